"""What a model is asked to do with text: span corruption, prefixes, masks, infilling, as functions of arrays.

Knows tokens and random bits; must not know stores, rows of an epoch or files.
"""
