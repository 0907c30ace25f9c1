"""Gin text to frozen dataclasses and back.

Knows gin's notation and dataclass fields; must not know any particular key (other_stacks.py has names for
messages alone).
"""
