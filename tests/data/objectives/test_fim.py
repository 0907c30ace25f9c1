"""Fill in the middle: the reference's parts and their laws, and all of the text."""

import numpy as np
import pytest
from scipy import stats

from data.objectives.corrupt import Corruption, example
from data.objectives.fim import fim_ids
from data.objectives.lexicon import Lexicon
from data.objectives.objectives import FillInTheMiddle, tasks_of
from data.ragged import join
from data.stores.store import open_store
from data.stores.vocabulary import EOS, Vocabulary

VOCABULARY = Vocabulary(1000, 8)
PRE, SUF, MID = fim_ids(VOCABULARY)


def parts(ids: list[int], marks=(PRE, SUF, MID)) -> tuple[str, list[int], list[int], list[int]]:
  """(order, prefix, suffix, middle) of a piece without EOS, by the marks alone; of SPM prefix and middle as one."""
  pre, suf, mid = marks
  if pre not in ids:
    return 'whole', ids, [], []
  assert ids[0] == pre
  assert [ids.count(mark) for mark in marks] == [1, 1, 1]
  at, end = ids.index(suf), ids.index(mid)
  return ('SPM' if at == 1 else 'PSM'), ids[1:at], ids[at + 1 : end], ids[end + 1 :]


def permuted(text: list[int], boundaries: tuple[int, int], spm: bool) -> list[int]:
  """bigcode-project/Megatron-LM gpt_dataset.py permute, without its truncation, on characters that are tokens."""
  low, high = sorted(boundaries)
  prefix, middle, suffix = text[:low], text[low:high], text[high:]
  if spm:
    return [PRE, SUF, *suffix, MID, *prefix, *middle]
  return [PRE, *prefix, SUF, *suffix, MID, *middle]


def draws(length: int, number: int, **rates) -> list[list[int]]:
  """The targets of `number` pieces 10, 11, … of `length`."""
  (task,) = tasks_of(FillInTheMiddle(**rates))
  maker = Corruption([task], length, VOCABULARY, Lexicon(VOCABULARY, None), ends=True)
  tokens = join([np.arange(10, 10 + length)] * number)
  bits = np.random.default_rng(0).integers(0, 2**64, (length + 1) * number, np.uint64)
  inputs, targets = maker.apply(tokens, np.zeros(number, int), bits)
  assert not len(inputs.values)
  return [ids.tolist() for ids in targets.split()]


@pytest.mark.parametrize('spm', [False, True])
def test_all_boundaries_are_those_of_the_reference_equally_often(spm):
  """Two numbers from [0, 4], sorted: of 25 pairs, those of equals once, others twice. Any part may be empty."""
  found: dict[tuple, int] = {}
  for ids in draws(4, 20_000, rate=1.0, spm_rate=float(spm)):
    found[tuple(ids)] = found.get(tuple(ids), 0) + 1
  text, chances = [10, 11, 12, 13], {}
  for a in range(5):
    for b in range(5):
      wanted = tuple(permuted(text, (a, b), spm))
      chances[wanted] = chances.get(wanted, 0) + 20_000 / 25
  assert found.keys() == chances.keys()
  assert 0.001 < stats.chisquare([found[key] for key in chances], list(chances.values())).pvalue < 0.999


def test_the_rates_are_those_of_the_config():
  """Orders of prefix and suffix are told apart where the prefix is not empty."""
  orders = [parts(ids)[0] for ids in draws(200, 4000, rate=0.6, spm_rate=0.3)]
  counts = [orders.count(order) for order in ('whole', 'PSM', 'SPM')]
  assert 0.001 < stats.chisquare(counts, [4000 * 0.4, 4000 * 0.6 * 0.7, 4000 * 0.6 * 0.3]).pvalue < 0.999


def test_an_eos_stays_at_the_end_and_an_empty_document_is_three_marks():
  (task,) = tasks_of(FillInTheMiddle(rate=1.0))
  rng = np.random.default_rng(0)
  assert example([5, 6, 7, EOS], task, VOCABULARY, rng)['targets'][-1] == EOS
  assert sorted(example([EOS], task, VOCABULARY, rng)['targets'].tolist()) == sorted([PRE, SUF, MID, EOS])


def test_prefix_middle_and_suffix_of_real_text_are_the_text(text_store):
  store = open_store(text_store)
  tokenizer = store.tokenizer(32)
  v, lexicon = tokenizer.vocabulary, Lexicon(tokenizer.vocabulary, tokenizer)
  (task,) = tasks_of(FillInTheMiddle(rate=1.0, spm_rate=0.5))
  documents = store.read(list(zip(store.offsets[:-1].tolist(), np.diff(store.offsets).tolist(), strict=True))) * 4
  tokens = join(documents)
  bits = np.random.default_rng(1).integers(0, 2**64, len(tokens.values) + len(documents), np.uint64)
  maker = Corruption([task], 4000, v, lexicon, ends=True)
  _, targets = maker.apply(tokens, np.zeros(len(documents), int), bits)
  seen, inside = set(), 0
  for document, ids in zip(documents, targets.split(), strict=True):
    assert ids[-1] == EOS
    order, prefix, suffix, middle = parts(ids[:-1].tolist(), fim_ids(v))
    whole = prefix + middle + suffix  # of SPM the prefix is empty, and middle is both
    assert tokenizer.decode(whole) == tokenizer.decode(document)
    assert len(ids) <= len(document) + 3 + 2 * lexicon.halves.growth
    seen.add(order)
    inside += whole != document[:-1].tolist()
  assert seen == {'PSM', 'SPM'}
  assert inside > len(documents) / 2, 'most boundaries fall inside a piece'
