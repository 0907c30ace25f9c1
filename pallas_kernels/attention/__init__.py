"""Attention: the definition in plain JAX, kernels for TPU and GPU, and the function that chooses one.

Knows arrays; must not know models.
"""
