"""What a finished model scores: text of any domain, tasks in JSONL, hidden words, needles in long contexts.

Knows models that write or fill masks, and their prompts; must not know the training loop, published layouts or the
command line.
"""
