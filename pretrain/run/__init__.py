"""The training run: where it starts from, its loop, what a step's numbers mean, saving and ending.

Knows the whole Experiment and every folder below; must not know the command line.
"""
