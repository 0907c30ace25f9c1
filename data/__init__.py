"""Bytes to batches, in numpy: no JAX. Its folders are layers: each imports only those below it (setup.cfg)."""
