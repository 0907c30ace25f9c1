"""Whole models: config keys all share, and how each family puts the layers together.

Knows layers; must not know losses, optimizers or meshes.
"""
