"""Fast versions of definitions. Each operation is a folder, and its reference is the specification.

Imports nothing of ours.
"""
