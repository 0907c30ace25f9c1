"""Whole models: the config keys that all share, and how each family combines the layers.

Imports layers; must not import losses, optimizers or meshes.
"""
