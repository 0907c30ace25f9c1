"""Scores of an encoder: tokens are hidden, and predicted from all others of the text.

Source: Salazar et al. 2020, arXiv:1910.14659, §2: the pseudo-log-likelihood of a text is the sum over its tokens of
log P(token | all others), each hidden alone; its pseudo-perplexity is exp(-sum / tokens).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from data.objectives.features import encoder_features
from data.packing.best_fit import fill
from data.ragged import join
from pretrain.benchmarks.scoring import Scored, check_batch
from pretrain.devices.mesh import replicated, to_global
from pretrain.errors import ConfigError
from pretrain.evaluation.outputs import padded
from pretrain.evaluation.writer import Writer
from pretrain.step.loss import make_token_step


class Hidden(NamedTuple):
  """The ids of a text, or of a part of it; those at `places` are read as the mask token, and asked for."""

  ids: np.ndarray
  places: Sequence[int]


class MaskedScorer:
  """Scores hidden tokens with the loss of training, without dropout; the softmax is over the whole vocabulary.

  Texts are read as in training: the tokenizer's `cls` before a text, if it has one, and the end behind it. `context` is
  the most tokens of a segment, with these (default: the length of a training row); segments are packed into rows.
  Raises ConfigError for a number out of range, and for a model or a tokenizer that hides no tokens.
  """

  def __init__(self, writer: Writer, batch: int = 8, context: int | None = None):
    check_batch(batch, writer.model.mesh)
    check_hides(writer)
    ids = writer.data.vocabulary.ids
    self._before, self._behind = [ids.cls] if ids.cls is not None else [], [ids.end]
    self.writer, self.batch = writer, batch
    self.context = _checked_context(writer, context, least=len(self._before) + len(self._behind) + 1)
    step = make_token_step(writer.model, writer.cfg.kernels)
    self._step = jax.jit(step, out_shardings=replicated(writer.model.mesh))

  @property
  def room(self) -> int:
    """The most tokens of text in a segment."""
    return self.context - len(self._before) - len(self._behind)

  def alone(self, ids: Sequence[int], first: int = 0) -> list[Hidden]:
    """Each token from number `first` on, hidden alone, with all others; of a longer text, with those around it."""
    text, found = np.asarray(ids, np.int32), []
    for i in range(first, len(text)):
      begin = min(max(i - self.room // 2, 0), max(len(text) - self.room, 0))
      found.append(Hidden(text[begin : begin + self.room], (i - begin,)))
    return found

  def __call__(self, wanted: Sequence[Hidden], said: Callable[[int], None] = lambda done: None) -> list[Scored]:
    """The scores of the hidden tokens of each; `said` hears how many are done."""
    found: list[Scored | None] = [None] * len(wanted)
    lengths = np.array([len(own.ids) for own in wanted], np.int64) + self.context - self.room
    length = padded(int(lengths.max(initial=0)))
    rows = fill(lengths, (np.arange(length + 1), length)) if wanted else lengths
    order = np.argsort(rows, kind='stable')
    done = 0
    for first in range(0, int(rows.max(initial=-1)) + 1, self.batch):
      numbers = order[slice(*np.searchsorted(rows[order], (first, first + self.batch)))]
      for number, scored in self._run(wanted, numbers, rows[numbers] - first, length):
        found[number] = scored
      done += len(numbers)
      said(done)
    return found

  def _run(self, wanted, numbers: np.ndarray, rows: np.ndarray, length: int) -> Iterator[tuple[int, Scored]]:
    """(number, scores) of the texts `numbers`, which are segments of the rows `rows` (ascending) of one batch."""
    own = [wanted[number] for number in numbers]
    texts = [[*self._before, *hidden.ids, *self._behind] for hidden in own]
    targets = join(texts)
    begins = np.cumsum(targets.lengths) - targets.lengths
    places = [begin + len(self._before) + np.asarray(h.places, int) for begin, h in zip(begins, own, strict=True)]
    asked = np.zeros(len(targets.values), bool)
    asked[np.concatenate(places)] = True
    read = np.where(asked, np.int32(self.writer.data.vocabulary.mask), targets.values)
    batch = encoder_features(targets._replace(values=read), targets.values, asked, rows, self.batch, length)
    batch |= {'example_index': np.zeros(self.batch, np.int32)}
    nats, hits = map(np.asarray, self._step(self.writer.params, to_global(batch, self.writer.model.mesh)))
    used = batch['encoder_segment_ids'] > 0  # segments in the order of `own`, row by row
    nats, hits = nats[used].astype(np.float64), hits[used] > 0
    for number, at in zip(numbers.tolist(), places, strict=True):
      yield number, Scored(nats[at], hits[at])


def check_hides(writer: Writer) -> None:
  """Raises ConfigError for an encoder that predicts no hidden tokens: a discriminator, a tokenizer without a mask."""
  cfg = writer.cfg
  if cfg.model.head == 'binary':
    raise ConfigError(
      "model.head='binary' (ELECTRA's discriminator) only knows whether a token was replaced, and has no probabilities "
      'of tokens; measure its generator.'
    )
  if cfg.data.name == 'synthetic' and writer.data.vocabulary.ids.mask is None:
    raise ConfigError(
      'the tokenizer of these weights has no mask token, so no token can be hidden; name it as mask_token in '
      'tokenizer_config.json.'
    )


def _checked_context(writer: Writer, context: int | None, least: int) -> int:
  most = getattr(writer.cfg.model, 'max_positions', None)
  context = writer.cfg.data.targets_length if context is None else context
  if context < least:
    raise ConfigError(f'--context={context}; it must be at least {least} tokens: one, and those around a text.')
  if most is not None and context > most:
    raise ConfigError(f'--context={context} is beyond model.max_positions={most}; use at most that.')
  return context
