"""Conditional training: tags in front of text (`prepare --tag_fields`), without loss; some documents drop them.

A model that reads `url: …` in front of a text learns what depends on the URL; from documents without tags it learns to
work without them. CTRL (Keskar et al. 2019, arXiv:1909.05858) puts control codes before text; Korbak et al. 2023
(arXiv:2302.08582) put tokens there that rate the text by a reward model; MeCo (Gao et al. 2025, arXiv:2501.01956) puts
metadata there, without loss, and ends training without any (here: a phase with drop_rate = 1).

Whether a document keeps its tags is drawn separately for each variant of a shard's plan (VARIANTS epochs, then the
variants repeat). The rows of an epoch are planned for the text of that epoch: dropped tags leave no empty positions,
and every token of text is still in exactly one row.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import numpy as np

from data.bits import stream_key, uniform
from data.objectives.objectives import CausalLm
from data.packing.concat_split import VARIANTS
from data.packing.plan import Plan, Planner, Stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tags:
  """Tags in front of text are read without loss; a share `drop_rate` of the documents comes without its tags."""

  drop_rate: Annotated[float, '[0, 1]'] = 0.1


def check_tags(cfg, objective) -> None:
  """Raises ValueError if the `tags` of a data config cannot be combined with its other keys or with the objective."""
  if cfg.tags is None:
    return
  if not isinstance(objective, CausalLm):
    raise ValueError(
      f"data.tags requires objective.name='causal_lm'; '{objective.name}' would corrupt or predict tags as text. "
      'Remove data.tags to treat tags as text.'
    )
  if cfg.attend_across_documents:
    raise ValueError('data.tags needs separate documents; data.attend_across_documents=True joins them; remove either.')
  if cfg.packing.name == 'length_buckets':
    raise ValueError(
      "data.tags changes the text of each epoch, but data.packing.name='length_buckets' cuts it once for all; set "
      "data.packing.name='best_fit', or remove data.tags."
    )
  if not hasattr(cfg, 'sources'):
    raise ValueError(
      f"data.tags with data.name='{cfg.name}', which has no tags; set data.name='store', with data.sources made by "
      'pretrain data prepare --tag_fields=….'
    )


class TaggedText:
  """The text of a store, with the tags of some documents dropped. Picklable."""

  def __init__(self, store, cfg: Tags, seed: int, purpose: str):
    self._store, self._cfg, self._seed, self._purpose = store, cfg, seed, purpose + ' tags'

  def stream(self, shard: int, variant: int) -> Stream:
    """The documents of a shard, EOS included; those drawn in this variant come without their tags."""
    offsets, documents = self._store.offsets_of(shard), self._store.shards[shard].documents
    skipped = np.where(self._dropped(np.array(documents), variant), self._store.tag_lengths(shard), 0)
    return Stream(offsets[:-1] + skipped, np.diff(offsets) - skipped, documents.start)

  def _dropped(self, documents: np.ndarray, variant: int) -> np.ndarray:
    return uniform(stream_key(self._seed, self._purpose, variant, documents)) < self._cfg.drop_rate

  def begins(self, shard: int) -> np.ndarray:
    """int64[1, documents]: the position in the store where each document's text begins, after its tags."""
    return (self._store.offsets_of(shard)[:-1] + self._store.tag_lengths(shard))[None]


@dataclasses.dataclass(frozen=True)
class TagPlanner:
  """A planner of text that differs in each variant. `make(stream)` gives a planner of the text of `stream(shard)`."""

  text: TaggedText
  make: Callable[[Callable[[int], Stream]], Planner]
  variants = VARIANTS

  def plan(self, shard: int, variant: int) -> Plan:
    return self.make(lambda own: self.text.stream(own, variant)).plan(shard, variant)
