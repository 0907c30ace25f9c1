"""The batch of any step as a pure function of (config, seed, position), and the loader that makes it ahead of time.

Knows every folder below; nothing in `data` imports it. Grain is imported in one file here.
"""
