"""What is done with a config or a finished run outside the loop: generate, evaluate, report, plan, merge, verify.

Knows the whole Experiment; must not know the training loop.
"""
