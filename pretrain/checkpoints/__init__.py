"""Steps on disk: saved in the background, verified by hashes, restored onto any mesh.

Knows files and trees of arrays; must not know models, data or the loop. Orbax is imported in one file here.
"""
