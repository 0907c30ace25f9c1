"""From files of text to a token store.

Knows file formats and tokenizers; must not know objectives or rows.
"""
