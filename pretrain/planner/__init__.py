"""Which layout of a training step suits a TPU slice: estimated from parameter descriptions, then compiled.

Knows the whole Experiment, published numbers of chips and compiled programs; must not know the training loop or hold
arrays.
"""
