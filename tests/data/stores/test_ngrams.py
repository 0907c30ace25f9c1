"""The Kneser-Ney models, computed with arrays, equal the definition computed with dictionaries."""

import collections
import math

import numpy as np
import pytest

from data.stores import ngrams
from data.stores.ngrams import ngram_loss
from data.stores.store import StoreWriter, open_store
from data.stores.vocabulary import Tokenizer

BASE = 448


@pytest.fixture(scope='module')
def stores(tokenizer_model, tmp_path_factory):
  folder, rng = tmp_path_factory.mktemp('ngrams'), np.random.default_rng(0)
  documents = [(rng.zipf(1.5, rng.integers(1, 60)) % 40 + 3).tolist() for _ in range(80)]
  for name, part in (('train', documents[:60]), ('heldout', documents[60:])):
    with StoreWriter(folder / name, Tokenizer(tokenizer_model, 8)) as writer:
      writer.add(part)
      writer.finish()
  return open_store(folder / 'train'), open_store(folder / 'heldout'), documents


def histories(documents):
  return [(a, b, c) for d in documents for a, b, c in zip([0, 0, *d], [0, *d], d, strict=False)]


def discount(counts) -> float:
  values = list(counts.values())
  once, twice = values.count(1), values.count(2)
  return once / (once + 2 * twice) if once else 0.5


def interpolated(counts, lower):
  """Chen and Goodman's equation for one order: `counts` has n-gram counts, `lower` probabilities of shorter n-grams."""
  cut, totals, kinds = discount(counts), collections.Counter(), collections.Counter()
  for gram, number in counts.items():
    totals[gram[:-1]] += number
    kinds[gram[:-1]] += 1

  def chance(gram):
    context = gram[:-1]
    if context not in totals:
      return lower(gram[1:])
    return (max(counts.get(gram, 0) - cut, 0) + cut * kinds[context] * lower(gram[1:])) / totals[context]

  return chance


def expected_losses(train, heldout):
  text = histories(train)
  trigrams = collections.Counter(text)
  bigrams = collections.Counter((b, c) for _, b, c in text)
  words = collections.Counter(c for _, _, c in text)
  followers = collections.Counter(c for _, c in bigrams)
  middle_counts = collections.Counter((b, c) for _, b, c in trigrams)
  cut, total = discount(followers), sum(followers.values())
  spread = cut * len(followers) / total / BASE
  lowest = lambda gram: max(followers[gram[0]] - cut, 0) / total + spread
  unigram = lambda gram: (words[gram[0]] + 1) / (len(text) + BASE)
  trigram = interpolated(trigrams, interpolated(middle_counts, lowest))
  bigram = interpolated(bigrams, lowest)
  orders = [(unigram, 1), (bigram, 2), (trigram, 3)]
  return [np.mean([-math.log(chance(h[-n:])) for h in histories(heldout)]) for chance, n in orders]


def test_losses_equal_the_definition(stores):
  train, heldout, documents = stores
  got = ngram_loss(train, heldout)
  assert [got.unigram, got.bigram, got.trigram] == pytest.approx(expected_losses(documents[:60], documents[60:]))
  assert got.num_tokens == sum(map(len, documents[60:]))


def test_probabilities_sum_to_one(stores):
  train, _, documents = stores
  models = ngrams._count(ngrams._histories(train), BASE)
  for a, b in ((0, 0), (documents[0][0], documents[0][1]), (444, 445), (444, documents[0][0])):
    context = np.stack([np.full(BASE, a), np.full(BASE, b), np.arange(BASE)])
    for chances in ngrams._probabilities(models, context, BASE):
      assert chances.sum() == pytest.approx(1.0)
      assert chances.min() > 0


def test_context_starts_anew_at_each_document_and_eos_is_not_predicted(stores):
  train, _, documents = stores
  got = ngrams._histories(train)
  assert got.T.tolist() == [list(h) for h in histories(documents[:60])]
