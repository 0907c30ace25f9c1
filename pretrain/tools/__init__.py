"""What works on a config or a finished run, outside the loop: generate, evaluate, report, plan, merge, verify.

Uses the whole Experiment; must not import the training loop.
"""
