"""Tokens that a model writes: greedy, drawn at random, or found by a beam search; keys and values are cached.

Knows models and what they are built of; must not know a tokenizer: the ids of end, padding and start are arguments.
"""
