"""Fast implementations of operations. Each operation is a folder; its reference.py is the specification.

Imports no other package of this repository.
"""
