"""Which source or document a row comes from: weights of sources, online mixing, curricula.

Knows shares and scores; must not know tokens or stores.
"""
