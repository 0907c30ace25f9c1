"""The parts of a block: attention, feed-forward, norms, embeddings, positions, dropout, the one matrix product.

Imports parameter descriptions and logical axes; must not depend on the family that uses a part.
"""
