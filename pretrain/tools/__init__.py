"""What works on a config or a finished run, outside the loop: report, plan, average, verify, rewrite.

Uses the whole Experiment; must not import the training loop.
"""
