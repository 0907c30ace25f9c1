"""What a model answers: losses on held-out text, generated text, filled blanks, exact matches.

Knows the whole Experiment and finished checkpoints; must not know the training loop.
"""
