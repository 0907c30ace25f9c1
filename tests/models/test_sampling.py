"""Drawn tokens have the probabilities of a softmax over what filters keep, and follow from seed, prompt and step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decode.sampling import Sampling, row_keys, step_keys
from models.decode.writing import greedy, write
from tests.models.small import IDS, LLAMA, T5, batch, model_and_params, shaken

LOGITS = np.float64([2.0, 1.5, 1.4, 0.9, 0.3, 0.0, -0.5, -1.0, -2.0, -4.0])
DRAWS = 20_000
# 0.9999 quantiles of chi-square with 1 to 9 degrees of freedom (NIST/SEMATECH e-Handbook, 1.3.6.7.4, has 0.999).
QUANTILES = [15.14, 18.42, 21.11, 23.51, 25.74, 27.86, 29.88, 31.83, 33.72]


def probabilities(sampling: Sampling, seen: list[int]) -> np.ndarray:
  """By the definitions, in float64: penalty, temperature, top-k, top-p, softmax."""
  x = LOGITS.copy()
  for i in seen:
    x[i] = x[i] * sampling.repetition_penalty if x[i] < 0 else x[i] / sampling.repetition_penalty
  x = x / sampling.temperature
  order = np.argsort(-x)
  kept = order[: sampling.top_k] if sampling.top_k else order
  p = np.zeros_like(x)
  p[kept] = np.exp(x[kept]) / np.exp(x[kept]).sum()
  if sampling.top_p:
    number = int((np.cumsum(p[order]) < sampling.top_p).sum()) + 1
    p[order[number:]] = 0
  return p / p.sum()


CASES = {
  'temperature': (Sampling(temperature=1.7), []),
  'cold': (Sampling(temperature=0.5), []),
  'top_k': (Sampling(temperature=1.0, top_k=3), []),
  'top_p': (Sampling(temperature=1.0, top_p=0.8), []),
  'penalty': (Sampling(temperature=1.0, repetition_penalty=1.5), [0, 3, 7]),
  'all': (Sampling(temperature=1.3, top_k=6, top_p=0.85, repetition_penalty=1.4), [0, 3]),
}


@pytest.mark.parametrize('case', CASES)
def test_draws_have_the_probabilities_of_the_filters(case):
  sampling, seen = CASES[case]
  expected = probabilities(sampling, seen) * DRAWS
  marked = jnp.isin(jnp.arange(len(LOGITS)), jnp.asarray(seen, jnp.int32))
  logits = jnp.tile(jnp.asarray(LOGITS, jnp.float32), (DRAWS, 1))
  rows = row_keys(jnp.uint32(3), jnp.arange(DRAWS, dtype=jnp.uint32))
  seen_rows = jnp.broadcast_to(marked, logits.shape) if seen else None
  drawn = sampling.choose(logits, seen_rows, step_keys(rows, jnp.int32(5)))
  counts = np.bincount(np.asarray(drawn), minlength=len(LOGITS))
  kept = expected > 0
  assert counts[~kept].sum() == 0
  assert chi_square(counts[kept], expected[kept]) < QUANTILES[kept.sum() - 2]
  again = sampling.choose(logits, seen_rows, step_keys(rows, jnp.int32(6)))
  assert (np.asarray(again) != np.asarray(drawn)).mean() > 0.1, 'another step draws other tokens'
  wrong = np.roll(expected[kept], 1)
  assert chi_square(counts[kept], wrong) > 10 * QUANTILES[kept.sum() - 2], 'the mutation'


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
  return float(((counts - expected) ** 2 / expected).sum())


def test_a_temperature_of_none_is_greedy():
  sampling = Sampling()
  assert sampling.choose(jnp.asarray([[0.0, 2.0, 1.0]]), None, None).tolist() == [1]


@functools.cache
def sharp(cfg):
  model, params = model_and_params(cfg)
  params = shaken(params)
  return model, params | {'head': jax.tree.map(lambda x: 3 * x, params['head'])}


@pytest.mark.parametrize('cfg', [LLAMA, pytest.param(T5, marks=pytest.mark.slow)], ids=['decoder', 'encoder_decoder'])
def test_a_prompt_has_the_same_text_in_any_batch(cfg):
  """Alone, in another row, and with another batch beside it; another seed, prompt number or step gives another text."""
  model, params = sharp(cfg)
  data = {name: values for name, values in batch(((6,), (6,), (6,)), 6).items() if not name.startswith('example')}
  keep = lambda name: name.startswith('encoder' if cfg is T5 else 'decoder_input')
  data = {name: values for name, values in data.items() if keep(name)}
  sampling = Sampling(temperature=1.2, top_p=0.95)

  def texts(rows, numbers, seed=7):
    own = {name: values[rows] for name, values in data.items()}
    draws = {'seed': jnp.uint32(seed), 'numbers': jnp.asarray(numbers, jnp.uint32)}
    return np.asarray(write(model, params, own, 12, None, sampling, **draws, **IDS))

  whole = texts([0, 1, 2], [0, 1, 2])
  for row in range(3):
    np.testing.assert_array_equal(texts([row], [row])[0], whole[row])
  np.testing.assert_array_equal(texts([2, 0, 1], [2, 0, 1]), whole[[2, 0, 1]])
  assert (texts([0, 1, 2], [0, 1, 2], seed=8) != whole).any(1).all()
  assert (texts([0, 1, 2], [3, 4, 5]) != whole).any(1).all()
  same = texts([0, 0], [0, 1])
  assert (same[0] != same[1]).any(), 'two prompts of one text'


def test_rooms_end_outputs_and_a_penalty_forbids_repetition():
  model, params = sharp(LLAMA)
  data = {'decoder_input_tokens': batch(((6,), (6,)), 6)['decoder_input_tokens']}
  plain = np.asarray(greedy(model, params, data, 10, **IDS | {'eos': (), 'pad': 63}))
  cut = np.asarray(write(model, params, data, 10, None, Sampling(), jnp.int32([4, 0]), **IDS | {'eos': (), 'pad': 63}))
  np.testing.assert_array_equal(cut[0], [*plain[0, :4], *[63] * 6])
  np.testing.assert_array_equal(cut[1], [63] * 10)
  strong = Sampling(repetition_penalty=1e6)
  once = np.asarray(write(model, params, data, 10, None, strong, **IDS | {'eos': ()}))
  for row, prompt in zip(once, data['decoder_input_tokens'], strict=True):
    assert len({*row.tolist(), *prompt.tolist()}) == len(row) + len(set(prompt.tolist()))
  assert any(len(set(row.tolist())) < 10 for row in plain) or (plain != once).any()


def test_any_end_token_ends_an_output():
  model, params = sharp(LLAMA)
  data = {'decoder_input_tokens': batch(((6,), (6,)), 6)['decoder_input_tokens']}
  plain = np.asarray(greedy(model, params, data, 8, **IDS | {'eos': ()}))
  ends = (int(plain[0, 2]), int(plain[1, 4]))
  ended = np.asarray(greedy(model, params, data, 8, **IDS | {'eos': ends}))
  for row, full in zip(ended, plain, strict=True):
    stop = next(i for i, token in enumerate(full.tolist()) if token in ends) + 1
    np.testing.assert_array_equal(row, [*full[:stop], *[0] * (8 - stop)])
