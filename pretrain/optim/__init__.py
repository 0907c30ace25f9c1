"""Updates of parameters: optimizers, schedules, averages of weights, guards against loss spikes.

Knows parameter descriptions (shapes, axes) and the mesh; must not know models or any other section of the config.
"""
