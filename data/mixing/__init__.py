"""Which source each row comes from and in which order: weights of sources, online mixing, curricula.

Knows shares and scores; must not know tokens or stores.
"""
