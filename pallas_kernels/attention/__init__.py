"""Attention: the definition in plain JAX, kernels for TPU and GPU, and the one function that chooses.

Knows arrays; must not know models.
"""
