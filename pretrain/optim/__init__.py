"""Updates of parameters: optimizers, schedules, averages of weights, guards against loss spikes.

Uses parameter descriptions (shapes, axes) and the mesh; must not import models or any other section of the config.
"""
