"""Which layout of a training step suits a TPU slice: estimated from parameter descriptions, then compiled.

Knows configs, models' descriptions and libtpu's compiler; holds no arrays, and nothing of a run.
"""
