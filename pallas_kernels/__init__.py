"""Fast implementations of operations. Each operation is a folder; its reference.py is the specification.

Must not import any other package of this repository.
"""
