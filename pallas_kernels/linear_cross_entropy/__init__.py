"""Cross-entropy of a linear head.

Knows arrays; must not know models.
"""
