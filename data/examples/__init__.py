"""From documents of a store to the fields of rows: text, tagged text, pairs, conversations.

Knows objectives and plans; must not know sources, mixtures or training steps.
"""
