"""Token stores: written once, hashed, read in any order; the vocabulary; statistics of a store.

Knows arrays on disks and object stores; must not know where the text came from or how it is used.
"""
