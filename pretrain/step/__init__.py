"""The pure training step and the loss.

Knows functions of (params, batch) that it is given; must not know configs, files or which model it trains.
"""
