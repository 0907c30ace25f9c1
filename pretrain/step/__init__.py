"""The pure training step and the loss.

Knows the functions of (params, batch) that it receives; must not know configs, files or the model that it trains.
"""
