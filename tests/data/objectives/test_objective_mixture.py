"""Objectives mixed in one run: each row is that of its own objective, and no model is asked what it cannot do."""

import numpy as np
import pytest

from data.batches.show import show_row
from data.errors import DataError
from data.examples.make import RowMaker, RowSpec
from data.objectives.objectives import (
  Bart,
  CausalLm,
  FillInTheMiddle,
  IidDenoising,
  MaskedLm,
  ObjectiveMixture,
  Part,
  PrefixLm,
  SpanCorruption,
  Ul2,
  Ul2r,
  tasks_of,
)
from data.objectives.tasks import Budget
from data.packing.plan import Pieces
from data.ragged import Ragged, join
from data.stores.vocabulary import EOS, Vocabulary
from tests.data.batches.test_source import MIXTURE, opened

VOCABULARY = Vocabulary(100, 64)


def maker(objective, inputs: int = 0, targets: int = 128) -> RowMaker:
  options = {'vocabulary': VOCABULARY, 'tokenizer': None, 'attend_across_documents': False}
  return RowMaker(RowSpec(objective=objective, budget=Budget(inputs, targets), **options))


def pieces(number: int, seed: int = 0) -> tuple[Ragged, np.ndarray]:
  """Pieces of 5 to 40 tokens, every other one the end of its document; bits."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(5, 40, number)
  tokens = join([rng.integers(3, 100, n) for n in lengths])
  tokens.values[np.cumsum(lengths)[::2] - 1] = EOS
  return tokens, rng.integers(0, 2**64, lengths.sum() + number, np.uint64)


def rows_of(tokens: Ragged, rows: np.ndarray) -> Pieces:
  """A piece of document 0, from its beginning, in each row."""
  return Pieces(rows, np.zeros_like(rows), np.zeros_like(rows), tokens.lengths)


def without_eos(tokens: Ragged, bits: np.ndarray) -> tuple[Ragged, np.ndarray]:
  """As the rows of an objective alone get them: no EOS, and no bits for one."""
  own = np.split(bits, np.cumsum(tokens.lengths + 1)[:-1])
  kept = [(text[:-1], b[:-1]) if text[-1] == EOS else (text, b) for text, b in zip(tokens.split(), own, strict=True)]
  return join([text for text, _ in kept]), np.concatenate([b for _, b in kept])


@pytest.mark.parametrize(
  ('parts', 'inputs'),
  [
    ((CausalLm(), FillInTheMiddle(), PrefixLm(), PrefixLm(loss_on_prefix=True), Bart(), Ul2r()), 0),
    ((SpanCorruption(), IidDenoising(), Bart(), PrefixLm(), Ul2()), 128),
    ((MaskedLm(), MaskedLm(rate=0.4, mask=0.5, random=0.4)), 0),
    ((CausalLm(), FillInTheMiddle(rate=1.0)), 0),
  ],
)
def test_each_row_of_a_mixture_equals_the_row_of_its_objective_alone(parts, inputs):
  """One piece in each row, tasks in turn. A causal row beside others also says that its prefix is empty."""
  whole = ObjectiveMixture(parts=tuple(Part(objective=part) for part in parts))
  owner = np.concatenate([np.full(len(tasks_of(part)), i) for i, part in enumerate(parts)])
  first = np.searchsorted(owner, np.arange(len(parts)))
  number = 4 * len(owner)
  (tokens, bits), rows = pieces(number), np.arange(number)
  tasks = rows % len(owner)
  got = maker(whole, inputs).make(tokens, rows_of(tokens, rows), tasks, lambda: bits)
  see_ends = any(isinstance(part, CausalLm | FillInTheMiddle) for part in parts)
  for i, part in enumerate(parts):
    own = owner[tasks] == i
    text, drawn = (
      (tokens, bits) if isinstance(part, CausalLm | FillInTheMiddle) or not see_ends else without_eos(tokens, bits)
    )
    alone = maker(part, inputs).make(
      text, rows_of(text, rows), np.where(own, tasks - first[i], 0), lambda drawn=drawn: drawn
    )
    for name, values in alone.items():
      np.testing.assert_array_equal(got[name][own], values[own], err_msg=f'{part.name} {name}')
    for name in got.keys() - alone.keys():
      assert name == 'decoder_prefix_end'
      assert not got[name][own].any()


def test_batches_have_the_same_fields_whatever_rows_are_in_them(text_store):
  source = opened(text_store, MIXTURE, 0, 96)
  assert len({tuple(sorted(source.global_rows(i, 1))) for i in range(20)}) == 1


def test_a_mixture_gives_each_part_its_share_of_the_rows(text_store):
  source = opened(text_store, MIXTURE, 0, 96)
  labels = [source.describe_row(i).task for i in range(32)]
  assert labels.count('causal') == 16
  assert labels.count('fim(r=0.5, spm=0.5)') == 8
  assert labels.count('S') == 4


def test_rows_of_new_objectives_read_well(text_store):
  source = opened(text_store, MIXTURE, 0, 96)
  shown = [show_row(source, step, row) for step in range(4) for row in range(8)]
  fim = next(text for text in shown if 'task fim' in text and '<extra_id_31>' in text)
  assert '<extra_id_30>' in fim
  assert '<extra_id_29>' in fim
  assert 'prefix' not in next(text for text in shown if 'task causal' in text)
  bart = show_row(opened(text_store, Bart(), 64, 64), 0, 0)
  assert 'inputs' in bart.split('<extra_id_0>')[0]
  assert 'task bart(mu=3, r=0.3)' in bart


def test_a_row_too_short_for_cuts_inside_tokens_is_refused(text_store):
  """3 marks and what two cuts may add leave less than two tokens of 12."""
  with pytest.raises(DataError, match='leave no room for two tokens of text with denoiser fim'):
    opened(text_store, FillInTheMiddle(), 0, 12)
