"""The parts of a block: attention, feed-forward, norms, embeddings, positions, dropout, the one matrix product.

Knows parameter descriptions and logical axes; must not know which family uses a part.
"""
