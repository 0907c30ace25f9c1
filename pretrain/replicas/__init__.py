"""Copies of one array on several devices, compared; digests of arrays.

Knows arrays and the mesh; must not know who made the arrays.
"""
