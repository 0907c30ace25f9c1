"""Scores against logits in numpy: nats of targets, windows, bits per byte, choices."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.batches.source import open_data
from data.errors import DataError
from data.objectives.features import decoder_features, encoder_decoder_features
from data.ragged import join
from data.stores.store import open_store
from data.stores.vocabulary import EOS
from models.specs import initialize
from pretrain.benchmarks import tasks
from pretrain.benchmarks.domains import Windows, documents, pieces_of, score_domain, windows_of
from pretrain.benchmarks.scoring import Piece, Scorer
from pretrain.devices.compilation_cache import cache_dir
from pretrain.errors import ConfigError
from pretrain.evaluation.writer import Writer
from pretrain.experiment.program import build_program
from tests.pretrain.evaluation.test_generate import config_of

TEXTS = ['The Licensor grants a License.', 'You may reproduce and distribute copies of the Work — ½ of it, naïvely.']


def writer_on(store, objective: str, *overrides: str) -> Writer:
  cfg = config_of(store, objective, 'mesh.data=1', *overrides)
  data = open_data(cfg.data, cfg.objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  program = build_program(cfg, jax.devices()[:1])
  params = initialize(program.model.specs, jax.random.key(1))
  return Writer(cfg, data, program.model, params | {'head': jax.tree.map(lambda x: 4 * x, params['head'])})


@pytest.fixture(scope='module')
def causal(text_store):
  return writer_on(text_store, 'causal_lm')


@pytest.fixture(scope='module')
def scorer(causal):
  return Scorer(causal, batch=2)


def log_probs(writer: Writer, ids: list[int]) -> np.ndarray:
  """float64[tokens, vocab] by the full forward pass over one row, which begins with the decoder's start."""
  row = decoder_features(None, join([np.int32(ids)]), np.zeros(1, int), 1, 64)
  return of_row(writer, row)[: len(ids)]


@functools.cache
def forward(model):
  return jax.jit(lambda params, row: model.logits(params, model.apply(params, row)[0]))


def of_row(writer: Writer, row) -> np.ndarray:
  logits = forward(writer.model)(writer.params, row | {'example_index': np.zeros(1, np.int32)})
  logits = np.float64(logits)[0]
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_packed_pieces_have_the_nats_of_each_alone(causal, scorer):
  """Of unequal lengths, in any order; some of their tokens are inputs."""
  rng = np.random.default_rng(0)
  sizes = [(0, 9), (3, 5), (0, 1), (7, 2), (0, 23), (1, 1), (4, 11)]
  pieces = [Piece(rng.integers(3, 448, a).tolist(), rng.integers(3, 448, b).tolist()) for a, b in sizes]
  found, backwards = scorer(pieces), scorer(pieces[::-1])[::-1]
  for piece, scored, again in zip(pieces, found, backwards, strict=True):
    expected = log_probs(causal, piece.inputs + piece.targets)[len(piece.inputs) :]
    own = -expected[np.arange(len(piece.targets)), piece.targets]
    np.testing.assert_allclose(scored.nats, own, atol=2e-4)
    np.testing.assert_allclose(again.nats, own, atol=2e-4)
    np.testing.assert_array_equal(scored.correct, expected.argmax(-1) == piece.targets)
  best = log_probs(causal, [5, 6, 7]).argmax(-1)
  assert scorer([Piece([], [int(best[0])])])[0].correct.all()


@pytest.mark.parametrize('objective', ['prefix_lm', 'ul2+encoder'])
def test_inputs_of_other_models_are_a_visible_prefix(text_store, objective):
  writer = writer_on(text_store, objective)
  pieces = [Piece([9, 8, 7, EOS], [6, 5, 4]), Piece([30, 31, EOS], [32, 33]), Piece([EOS], [40, 41, 42, 43, 44])]
  for piece, scored in zip(pieces, Scorer(writer, batch=2)(pieces), strict=True):
    sides, zero = [join([np.int32(ids)]) for ids in (piece.inputs, piece.targets)], np.zeros(1, int)
    sizes = [len(piece.inputs), len(piece.targets)]
    if writer.cfg.data.inputs_length:
      expected = of_row(writer, encoder_decoder_features(*sides, zero, 1, 32, 32))
    else:
      expected = of_row(writer, decoder_features(*sides, zero, 1, 32))[sizes[0] :]
    np.testing.assert_allclose(scored.nats, -expected[np.arange(sizes[1]), piece.targets], atol=2e-4)


@pytest.mark.parametrize(('length', 'stride'), [(64, 32), (16, 16), (16, 5), (10, 1)])
def test_each_token_is_scored_once_in_its_window(causal, scorer, length, stride):
  """Token i of a long document is in the first window that holds it: window k begins at k x stride."""
  found = score_domain(scorer, TEXTS, Windows(length, stride))
  nats = tokens = 0
  for text in TEXTS:
    ids = [*causal.data.tokenizer.encode(text), EOS]
    for i in range(len(ids)):
      begin = 0 if i < length else math.ceil((i + 1 - length) / stride) * stride
      row = log_probs(causal, ids[begin : begin + length])
      nats, tokens = nats - row[i - begin, ids[i]], tokens + 1
  size = sum(len(text.encode('utf-8')) for text in TEXTS)
  assert found['tokens'] == tokens
  assert found['bytes'] == size > sum(map(len, TEXTS))
  assert found['nats'] == pytest.approx(nats, abs=2e-3)
  assert found['bits_per_byte'] == pytest.approx(nats / (math.log(2) * size), rel=1e-4)
  assert found['perplexity'] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_a_uniform_model_has_log2_of_the_vocabulary_bits_for_each_token(causal):
  flat = Writer(causal.cfg, causal.data, causal.model, jax.tree.map(jnp.zeros_like, causal.params))
  found = score_domain(Scorer(flat, batch=1), TEXTS, Windows(32, 16))
  vocab = causal.cfg.model.vocab_size
  assert found['bits_per_byte'] == pytest.approx(math.log2(vocab) * found['tokens'] / found['bytes'], rel=1e-6)
  assert found['perplexity'] == pytest.approx(vocab, rel=1e-5)


def test_windows_of_a_visible_prefix_have_each_token_once(text_store):
  """Tokens before the scored ones are inputs, with EOS behind them as in training."""
  writer, ids = writer_on(text_store, 'prefix_lm'), list(range(3, 40))
  pieces = [piece for piece, skip in pieces_of(ids, Windows(16, 6), writer) if not skip]
  assert [token for piece in pieces for token in piece.targets] == ids
  assert all(piece.inputs[-1] == EOS for piece in pieces)
  at = 0
  for piece in pieces:
    context = piece.inputs[:-1]
    assert context == ids[max(at + len(piece.targets) - 16, 0) : at]
    at += len(piece.targets)
  assert max(len(piece.inputs) + len(piece.targets) for piece in pieces) == 17


@pytest.mark.parametrize(
  ('objective', 'numbers', 'message'),
  [
    ('span_corruption', (), "--text: a run with objective.name='span_corruption' does not continue text"),
    ('causal_lm', (1, None), '--context=1; it must be at least 2 tokens.'),
    ('causal_lm', (8, 0), '--stride=0; it must be from 1 to --context=8.'),
    ('causal_lm', (8, 9), '--stride=9; it must be from 1 to --context=8.'),
  ],
)
def test_windows_that_cannot_be_are_refused(text_store, causal, objective, numbers, message):
  writer = causal if objective == 'causal_lm' else writer_on(text_store, objective)
  with pytest.raises(ConfigError) as error:
    windows_of(writer, *numbers)
  assert message in str(error.value)
  assert windows_of(causal) == Windows(64, 32)


def test_documents_of_files_and_stores(text_store, tmp_path):
  (tmp_path / 'a.txt').write_text('One.\n\nTwo — 2.\n')
  (tmp_path / 'b.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in ('x y', '', 'z')))
  assert documents(tmp_path / 'a.txt') == ['One.\n\nTwo — 2.\n']
  assert documents(tmp_path / 'b.jsonl') == ['x y', 'z']
  stored = documents(text_store)
  assert len(stored) == len(open_store(text_store).offsets) - 1
  assert stored[1].startswith('TERMS AND CONDITIONS FOR USE')


def write_jsonl(path, records) -> None:
  path.write_text(''.join(json.dumps(each) + '\n' for each in records))


def test_the_choice_with_the_highest_probability_is_taken(causal, scorer, tmp_path):
  questions = [('The License ', ['of the Work', 'and', 'You may']), ('Any', [' a', ' contribution to the Work'])]
  best, best_per_byte, encode = [], [], causal.data.tokenizer.encode
  for context, choices in questions:
    totals = []
    for choice in choices:
      before, whole = encode(context.rstrip()), encode(context + choice)
      row = log_probs(causal, whole)
      totals.append(sum(row[i, whole[i]] for i in range(len(before), len(whole))))
    best.append(int(np.argmax(totals)))
    best_per_byte.append(int(np.argmax([t / len(c) for t, c in zip(totals, choices, strict=True)])))
  assert best != best_per_byte
  path = tmp_path / 'rank.jsonl'
  records = [{'context': c, 'choices': o, 'answer': a} for (c, o), a in zip(questions, best, strict=True)]
  write_jsonl(path, records)
  assert tasks.rank(scorer, path)['accuracy'] == 1.0
  write_jsonl(path, [r | {'answer': r['choices'][a]} for r, a in zip(records, best_per_byte, strict=True)])
  assert tasks.rank(scorer, path)['accuracy_per_byte'] == 1.0
  write_jsonl(path, [records[0], records[1] | {'answer': 1 - best[1]}])
  assert tasks.rank(scorer, path)['accuracy'] == 0.5


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    ({'choices': ['a', 'b'], 'answer': 0}, ":1: field 'context' is missing; the fields are choices, answer."),
    ({'context': 'c', 'choices': ['a'], 'answer': 0}, ':1: field "choices" is no list of two or more texts'),
    ({'context': 'c', 'choices': ['a', 'b'], 'answer': 2}, ':1: field "answer" is 2; it must be one of the choices'),
    ({'context': 'c', 'choices': ['a', 'b'], 'answer': 'x'}, ':1: field "answer" is \'x\'; it must be one of the ch'),
    ({'context': 'c', 'choices': ['a', 'b'], 'answer': True}, ':1: field "answer" is True'),
  ],
)
def test_a_line_that_is_no_question_is_named(scorer, tmp_path, record, message):
  write_jsonl(tmp_path / 'r.jsonl', [record])
  with pytest.raises(DataError) as error:
    tasks.rank(scorer, tmp_path / 'r.jsonl')
  assert f'r.jsonl{message}' in str(error.value)


def test_exact_match_is_the_share_of_outputs_with_the_text_of_the_targets(causal, tmp_path, monkeypatch):
  """Outputs are given. Other tokens of the same text, and spaces at its ends, count; more text does not."""
  encode, path = causal.data.tokenizer.encode, tmp_path / 'e.jsonl'
  letters = [token for letter in 'Work' for token in encode(letter)]
  outputs = [encode('of the Work'), encode('and more'), encode('Work'), [*encode('the'), *encode('the')]]
  write_jsonl(path, [{'inputs': 'any', 'targets': text} for text in ('of the Work ', 'and', 'Work', 'the the')])
  monkeypatch.setattr(tasks, 'outputs_of', lambda *_: outputs)
  assert tasks.exact(causal, path, 2) == {'examples': 4, 'exact_match': 0.75}
  monkeypatch.setattr(tasks, 'outputs_of', lambda *_: [letters, *outputs[1:]])
  assert tasks.exact(causal, path, 2)['exact_match'] == 0.5


def test_a_text_without_words_is_refused(scorer):
  with pytest.raises(DataError, match='there is no text to score'):
    score_domain(scorer, [], Windows(8, 4))
