"""How long the text of held-out rows is, which bits per byte divide by."""

import numpy as np

from data.batches.rows import StoreRows
from data.stores.vocabulary import Tokenizer


def text_bytes(rows: StoreRows, count: int, tokenizer: Tokenizer) -> int | None:
  """The UTF-8 bytes of the text that the targets of the first `count` rows spell: of whole documents, those of
  their decoded text. None where targets are not the text, all of it, as it stands in the store."""
  scored = rows.scored_text(count)
  if scored is None:
    return None
  tokens, places = scored
  first = tokens[np.isin(places, rows.store.offsets[:-1])]
  return int(tokenizer.byte_lengths[tokens].sum() - sum(map(tokenizer.spaces_before, first.tolist())))
