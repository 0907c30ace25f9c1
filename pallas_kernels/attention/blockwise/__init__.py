"""Attention in plain JAX, one tile of the scores after the other. Must not know models."""
