"""From bytes to batches, in NumPy, without JAX. Folders are layers: each imports only those below it (setup.cfg)."""
