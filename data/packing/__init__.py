"""Plans: which pieces of which documents each row holds, and in which order rows come.

Knows lengths only; must not know tokens.
"""
