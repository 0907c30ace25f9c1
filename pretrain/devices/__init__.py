"""The mesh, the platform and the caches of one process.

Knows JAX's devices; must not know which programs run on them.
"""
