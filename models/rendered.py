"""How a field of a config appears in the saved one; pretrain/config/bindings.py reads it. data/, which imports nothing
of models/, writes the same where it needs it."""

IF_SET = {'rendered': 'if set'}  # metadata of a field: configs that were saved before it existed stay as they were
