"""The mesh, the platform and the caches of one process.

Knows JAX's devices; must not know what runs on them.
"""
