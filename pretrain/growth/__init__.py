"""A larger model from the weights of a smaller one: deeper stacks, experts in place of MLPs.

Knows the whole Experiment and finished checkpoints; must not know the training loop. A growth is a function from one
checkpoint to another; the step that trains its result is that of any other run.
"""
