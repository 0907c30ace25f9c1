"""Token stores: written once, hashed, read at random; the vocabulary; counts over a store.

Knows arrays on disks and object stores; must not know where text came from or what is done with it.
"""
