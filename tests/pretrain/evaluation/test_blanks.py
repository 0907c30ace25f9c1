"""Held-out sentences with hidden words: readable, the same for everyone, and filled by the run's own probabilities."""

import math

import pytest

from data.stores.store import Store, open_store
from pretrain.errors import ConfigError
from pretrain.evaluation import blanks as module
from pretrain.evaluation.blanks import choose, hide_words, sentences, show_blanks
from pretrain.evaluation.generate import generate
from pretrain.evaluation.unigram import count, read_documents
from pretrain.run.train import train
from tests.pretrain import tiny

PLAIN = [
  'The object must be a mapping from names to values.',
  'A package may provide any set of files, including those that are not listed here.',
  'It does not alter the encoding of any text provided in later operations.',
]


@pytest.mark.parametrize(
  'other',
  [
    'Too short to read here.',
    'The words of this sentence go on ' + 'and on ' * 20 + 'until it is longer than a line.',
    'See Also Parameters None Transpose each matrix in a stack.',
    'The `axis` argument of this function is the one to sum over here.',
    'The value x[3] is returned in case that nothing else was ever found.',
    'without a capital it is the end of a sentence that was cut somewhere.',
    'Is this a question that somebody asks about the state of the object?',
  ],
)
def test_only_plain_sentences_are_taken(other):
  assert list(sentences(other)) == []
  assert list(sentences(f'{PLAIN[0]} {other} {PLAIN[1]}\n\n  {PLAIN[2]}')) == PLAIN


def test_hidden_words_are_one_to_three_whole_words_inside():
  sizes = set()
  for k in range(200):
    sentence = f'This is sentence {"x" * (k % 7 + 1)} of {"y" * (k // 7 + 1)} words, and it goes on like that.'
    blank = hide_words(sentence)
    assert blank.filled(blank.truth) == sentence
    assert f' {blank.truth}' in sentence
    assert sentence[blank.end] in ' ,'
    assert blank.start > 0
    assert blank.end <= sentence.rindex(' ')
    assert ',' not in blank.truth
    sizes.add(len(blank.truth.split()))
  assert sizes == {1, 2, 3}
  assert hide_words('Nothing inside.') is None


def test_the_choice_is_by_hash_whatever_the_order_and_leaves_out_training_text():
  chosen = choose(PLAIN, 2)
  assert len(chosen) == 2
  assert choose(PLAIN[::-1], 2) == chosen
  left = choose(PLAIN, 3, seen=f'before {chosen[0].sentence} behind')
  assert chosen[0].sentence not in [blank.sentence for blank in left]
  assert len(left) == 2
  assert len(choose([' '.join(PLAIN)], 3)) == 1, 'one of each document'


def test_a_unigram_is_a_distribution_over_fillings_of_the_given_mean_length(text_store):
  store = open_store(text_store)
  unigram = count([read_documents(store)], [[5, 6], [7, 8, 9], [4]])
  assert unigram.end == 1 / 2  # three fillings, six tokens
  ids = store.read([(0, store.num_tokens)])[0]
  text = ids[(ids > 2) & (ids < store.manifest['pieces'])]
  token = int(text[0])
  expected = ((text == token).sum() + 1) / (len(text) + store.manifest['pieces'])
  assert unigram.shares[token] == pytest.approx(expected, rel=1e-12)
  assert math.exp(unigram.log_prob([token, token])) == pytest.approx(expected * 0.5 * expected * 0.5, rel=1e-12)
  one = sum(math.exp(unigram.log_prob([k])) for k in range(len(unigram.shares)))
  assert one == pytest.approx(0.5), 'fillings of one token have half the probability'


def test_the_last_line_compares_over_many_sentences():
  line = module._compared(
    [(math.log(0.2), math.log(0.1)), (math.log(0.8), math.log(0.1)), (math.log(0.1), math.log(0.2))]
  )
  assert line == (
    'The true words of 3 such sentences: 2 times as likely to this run as to token counts (geometric mean), '
    'more likely in 2 of them.'
  )


@pytest.mark.slow
def test_a_run_shows_its_fillings_beside_those_of_a_unigram(text_store, tmp_path, monkeypatch):
  cfg = tiny.ul2(text_store, 'train.steps=1', 'checkpoint.every=1')
  train(cfg, tmp_path)
  monkeypatch.setattr(module, 'choose', lambda texts, number, seen: [hide_words(PLAIN[0])][:number])
  read, tokens = Store.read, []
  monkeypatch.setattr(Store, 'read', lambda store, ranges: tokens.extend(n for _, n in ranges) or read(store, ranges))
  lines = list(show_blanks(tmp_path, number=1))
  assert sum(tokens) == open_store(text_store).num_tokens, 'training text is read once; `choose` above reads none'
  blank = hide_words(PLAIN[0])
  (result,) = generate(tmp_path, [blank.filled('<extra_id_0>')], module.MOST_TOKENS + 1, top=module.SEARCHED)
  words = [c for c in result.top['<extra_id_0>'] if c.text.isalpha()]
  assert lines[2] == f'  {blank.filled("______")}'
  assert lines[3].startswith(f'  true words: {blank.truth} (this run ')
  ids = open_store(text_store).tokenizer(0).encode(blank.truth)
  by_count = math.exp(count([read_documents(open_store(text_store))], [ids]).log_prob(ids))
  assert lines[3].endswith(f', token counts {by_count:.2g})')
  assert lines[4].split() == ['best', 'words', 'of', 'this', 'run', 'most', 'frequent', 'words']
  assert lines[5].split()[-1] == 'the'
  assert lines.pop().startswith('The true words of 1 such sentences: ')
  assert lines.pop() == ''
  assert len({line.rindex('%') for line in lines[5:]}) == 1, 'aligned'
  shown = [tuple(line.split()[:2]) for line in lines[5:]]
  expected = [(f'{c.probability:.2%}', c.text) for c in words]
  assert set(shown) <= set(expected)
  assert shown == sorted(shown, key=expected.index)


@pytest.mark.slow
def test_a_run_without_heldout_text_is_refused(pair_store, tmp_path):
  train(tiny.ul2(pair_store, "objective.name='supervised'", 'train.steps=1', 'checkpoint.every=1'), tmp_path)
  with pytest.raises(ConfigError, match=r'has no held-out text to hide words in; set data\.heldout'):
    list(show_blanks(tmp_path))
