"""BART's noise: the reference, loop by loop, given the same choices; and the laws of the choices."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data.objectives.corrupt import example
from data.objectives.infilling import Infilling, hide, insert, permute_sentences, poisson
from data.objectives.lexicon import Lexicon
from data.objectives.objectives import Bart, tasks_of
from data.ragged import Ragged, join
from data.stores.store import open_store
from data.stores.vocabulary import EOS, Vocabulary

VOCABULARY = Vocabulary(100, 4)
MASK, STOP = VOCABULARY.first_sentinel, 50


def random_bits(count: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)


def infilling(**keys) -> Infilling:
  return Infilling(tasks_of(Bart(**keys)), 400, VOCABULARY, Lexicon(VOCABULARY, None))


def reference_hide(source: list[int], is_word: list[bool], begins: list[int], lengths: list[int]) -> list[int]:
  """add_whole_word_mask with replace_length=1, from `begins` (which words) on; </s> is a word that ends all spans."""
  source, starts = [*source, EOS], [*map(int, is_word), 255]
  words = [i for i, start in enumerate(is_word) if start]
  keep, spans = [True] * len(source), [(words[k], n - 1) for k, n in zip(begins, lengths, strict=True)]
  for i, _ in spans:
    source[i] = MASK
  while spans:
    spans = [(i + 1, n - starts[i + 1]) for i, n in spans if n - starts[i + 1] >= 0]
    for i, _ in spans:
      keep[i] = False
  return [token for token, kept in zip(source[:-1], keep[:-1], strict=True) if kept]


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
  pieces=st.lists(st.lists(st.booleans(), min_size=1, max_size=30), min_size=1, max_size=5),
  density=st.floats(0.05, 1.0),
  seed=st.integers(0, 2**32),
)
def test_the_same_spans_hide_what_they_hide_in_the_reference(pieces, density, seed):
  """Spans may overlap, touch and reach beyond the end; a piece may have no word, or begin in the middle of one."""
  rng, wanted, begins, lengths = np.random.default_rng(seed), [], [], []
  tokens = join([np.arange(3, 3 + len(piece)) for piece in pieces])
  for piece, text in zip(pieces, tokens.split(), strict=True):
    chosen = rng.permutation(sum(piece))[: math.ceil(sum(piece) * density)].tolist()
    begins.append(chosen)
    lengths.append(rng.integers(1, 6, len(chosen)).tolist())
    wanted.append(reference_hide(text.tolist(), piece, chosen, lengths[-1]))
  words = np.array([sum(piece) for piece in pieces])
  spans = join([np.array(own, int) for own in lengths], np.int64)
  flat = np.array(list(itertools.chain(*begins)), int)
  got = hide(tokens, np.array(list(itertools.chain(*pieces))), words, flat, spans, MASK)
  assert [own.tolist() for own in got.split()] == wanted


def reference_sentences(text: list[int]) -> tuple[list[list[int]], list[int]]:
  """(sentences, what is left behind the last) by permute_sentences: a full stop whose predecessor is none ends one."""
  stops = [token == STOP for token in text]
  stops[-1] = True
  ends = [i + 1 for i in range(len(text)) if stops[i] and not (i and stops[i - 1])]
  return [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)], text[ends[-1] :]


@pytest.mark.parametrize(
  'text', [[5, STOP, 6, 7, STOP, 8], [5, STOP, 6, STOP, STOP], [STOP, 5, STOP, 6], [5, 6], [STOP]]
)
def test_every_order_of_the_references_sentences_is_equally_likely(text):
  number, ends = 6000, np.arange(100) == STOP
  tokens = join([np.int32(text)] * number)
  places = permute_sentences(tokens, ends, np.ones(number, bool), random_bits(len(tokens.values)))
  sentences, rest = reference_sentences(text)
  wanted = [[*itertools.chain(*order), *rest] for order in itertools.permutations(sentences)]
  found = [own.tolist() for own in Ragged(tokens.values[places], tokens.lengths).split()]
  counts = [found.count(order) for order in wanted]
  assert sum(counts) == number
  assert len(counts) == 1 or 0.001 < stats.chisquare(counts).pvalue < 0.999


def test_sentences_stay_where_the_config_says_so():
  tokens = join([np.int32([5, STOP, 6, STOP, 7])] * 50)
  places = permute_sentences(tokens, np.arange(100) == STOP, np.zeros(50, bool), random_bits(250))
  assert places.tolist() == list(range(250))


def test_spans_have_the_references_lengths_up_to_its_budget():
  """Of the first span of each piece, the law is that of Poisson(3) that fairseq makes, 0 included by its masks."""
  number, budget = 20_000, 40
  spans, empty = infilling()._spans(np.full(number, budget), np.zeros(number, int), random_bits(number))
  assert (np.add.reduceat(spans.values, np.cumsum(spans.lengths) - spans.lengths) == budget).all()
  firsts = np.bincount(np.array([own[0] for own in spans.split()]), minlength=10)[1:8]
  chances = np.diff(poisson(3.0), prepend=0)[1:8]
  assert 0.001 < stats.chisquare(firsts, chances / chances.sum() * firsts.sum()).pvalue < 0.999
  # Draws are spans and empty ones; the last draw is never empty, each one before is with chance e**-3 among those seen.
  share = empty.sum() / (empty.sum() + spans.lengths.sum())
  assert abs(share - math.exp(-3)) < 0.003


def test_lengths_are_poissons():
  np.testing.assert_allclose(poisson(3.0), stats.poisson.cdf(np.arange(len(poisson(3.0))), 3.0), atol=1e-6)


@pytest.mark.parametrize('words', [0, 1, 9, 10, 11, 100])
def test_the_budget_is_the_references_share_of_the_words(words):
  """ceil(0.3 * words) in float32 (of 100 words 31), in spans that together have so many; other tokens do not count."""
  (task,) = tasks_of(Bart(permute_sentences=False))
  lexicon = Lexicon(VOCABULARY, None)
  lexicon.begins_word[10:] = False
  text = [5, 11, 12] * words or [11, 12]
  seen, budget = set(), math.ceil(np.float32(0.3) * np.float32(words))
  for seed in range(20):
    ids = example(text, task, VOCABULARY, np.random.default_rng(seed), lexicon)['inputs'].tolist()
    assert ids.pop() == EOS
    assert words or ids == text
    covered = words - ids.count(5)
    assert covered <= budget
    assert ids.count(11) == len(text) // 3 - covered or not words
    seen.add(covered)
  assert max(seen) == budget


def test_every_word_begins_a_span_equally_often():
  number, text = 3000, np.arange(10, 30)
  inputs, _ = infilling(noise_density=0.05).apply(
    join([text] * number), np.zeros(number, int), random_bits(21 * number)
  )
  shown = np.stack([np.isin(text, own) for own in inputs.split()])
  assert (shown.sum(1) == 19).all()
  assert 0.001 < stats.chisquare((~shown).sum(0)).pvalue < 0.999


def test_masks_are_inserted_everywhere_equally_often():
  """Two masks among three tokens: C(5, 2) = 10 places, none of them lost."""
  number = 5000
  got = insert(join([np.int32([5, 6, 7])] * number), np.full(number, 2), random_bits(number), MASK)
  found = [tuple(own) for own in (np.array(got.split()) == MASK).tolist()]
  counts = [found.count(kind) for kind in sorted(set(found))]
  assert len(counts) == 10
  assert 0.001 < stats.chisquare(counts).pvalue < 0.999
  assert got.values[got.values != MASK].tolist() == [5, 6, 7] * number


def test_whole_words_of_real_text_are_hidden(text_store):
  store = open_store(text_store)
  tokenizer = store.tokenizer(32)
  lexicon = Lexicon(tokenizer.vocabulary, tokenizer)
  (task,) = tasks_of(Bart(permute_sentences=False))
  (ids,) = store.read([(0, int(store.offsets[20]))])
  ids = ids[ids != EOS]
  got = example(ids, task, tokenizer.vocabulary, np.random.default_rng(0), lexicon)
  assert tokenizer.decode(got['targets']) == tokenizer.decode(ids)
  masks = got['inputs'] == tokenizer.vocabulary.first_sentinel
  shown = tokenizer.decode(got['inputs'][~masks]).split()
  assert len(shown) > 50
  assert set(shown) <= set(tokenizer.decode(ids).split())
  assert masks.sum() > 5
