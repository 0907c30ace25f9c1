"""Families of published models, one file for each way of naming tensors.

Each knows a config.json, a config of ours and names; must not read files or know a run.
"""
