"""Fast implementations of operations. Each operation is a folder; its reference.py is the specification.

Imports nothing from the other packages of this repository.
"""
