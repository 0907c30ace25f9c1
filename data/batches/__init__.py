"""The batch of any step as a pure function of (config, seed, position), and the loader that prefetches batches.

May import every other folder of `data`, and nothing in `data` imports it. Only loader.py imports Grain.
"""
