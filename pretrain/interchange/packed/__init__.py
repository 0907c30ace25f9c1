"""Weights of 4 or 8 bits with their scales, in the layout `pack-quantized` of compressed-tensors: read and written.

Knows files and how a run is exported; must not know arrays on devices.
"""
