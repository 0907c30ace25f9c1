"""Gin text to frozen dataclasses and back.

Contains gin's notation and the rules for dataclass fields; must not contain any particular key, except those that
messages suggest (other_stacks.py).
"""
