"""Gin text to frozen dataclasses and back.

Knows gin's notation and the rules for dataclass fields; must not know any particular key (other_stacks.py
has other programs' keys, for messages only).
"""
