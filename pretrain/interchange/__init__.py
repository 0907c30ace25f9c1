"""Weights and configs in the layout of Hugging Face `transformers`: read into a run, written from a run.

Knows the whole Experiment and finished checkpoints; must not know the training loop.
"""
