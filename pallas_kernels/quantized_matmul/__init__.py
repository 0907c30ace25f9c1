"""Products of quantized matrices, forward and in both gradients: the definition and XLA's own low-precision dot.

Knows arrays; must not know models.
"""
