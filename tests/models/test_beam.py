"""The beam search against every sequence there is, each with its probability from a full forward pass."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decode.fillings import beam
from tests.models.small import LLAMA, T5, model_and_params, shaken, side

VOCAB, TEXT, ENDS, MOST = 9, (3, 4, 5), (1, 6, 7), 3  # ids 0, 2 and 8 are neither text nor an end
ALL = [ids for n in range(MOST + 1) for ids in itertools.product(TEXT, repeat=n)]
CASES = {
  'encoder_decoder': (T5, False, 0, ()),
  'encoder_decoder, padded': (T5, False, 3, (7, 4)),
  'decoder': (LLAMA, False, 0, ()),
  'decoder, prefix and padded': (LLAMA, True, 3, (7, 4)),
}


@functools.cache
def small(cfg):
  model, params = model_and_params(dataclasses.replace(cfg, vocab_size=VOCAB))
  sharpen = lambda x: 3 * x  # untrained logits are all alike; ties would test nothing
  params = shaken(params)
  return model, params | {'head': jax.tree.map(sharpen, params['head'])}


def prompt_of(cfg, prefix: bool, padding: int):
  """One prompt of five tokens, as `beam` takes it: at the end of a decoder's row, at the beginning of an encoder's."""
  name = 'encoder' if cfg is T5 else 'decoder'
  data = {key: np.minimum(values, VOCAB - 1) for key, values in side(name, [[5]], 5 + padding, seed=4).items()}
  if cfg is LLAMA:
    data['decoder_input_tokens'][:, 0] = 0
    if prefix:
      data['decoder_prefix_end'] = np.where(data['decoder_segment_ids'], 5, 0).astype(np.int32)
    data = {key: np.roll(values, padding, 1) for key, values in data.items()}
  return data


@functools.cache
def full_pass(cfg, prefix: bool, forced: tuple[int, ...]):
  """sequence -> (log-prob of its tokens, of its tokens and an end), from `Model.apply` on unpadded rows."""
  model, params = small(cfg)
  data = {name: np.repeat(values, len(ALL), 0) for name, values in prompt_of(cfg, prefix, 0).items()}
  begun = data.get('decoder_input_tokens', np.zeros((len(ALL), 1), np.int32))
  written = np.array([(*forced, *ids, *[0] * (MOST - len(ids))) for ids in ALL], np.int32)
  tokens = np.concatenate([begun, written], 1)
  positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(ALL), 1))
  data |= {
    'decoder_input_tokens': tokens, 'decoder_positions': positions, 'decoder_segment_ids': np.ones_like(tokens),
    'example_index': np.zeros(len(ALL), np.int32),
  }  # fmt: skip
  if prefix:
    data['decoder_prefix_end'] = np.full_like(tokens, 5)
  logits = np.float64(model.logits(params, jax.jit(model.apply)(params, data)[0]))
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  first, found = begun.shape[1] + len(forced) - 1, {}
  for row, ids in enumerate(ALL):
    own = sum(log_probs[row, first + i, token] for i, token in enumerate(ids))
    found[ids] = own, own + np.log(np.exp(log_probs[row, first + len(ids), list(ENDS)]).sum())
  return found


def searched(cfg, prefix: bool, padding: int, forced: tuple[int, ...], width: int):
  """([(ids, log-prob)] of the ended, of the open sequences)."""
  model, params = small(cfg)
  masks = (np.isin(np.arange(VOCAB), ids) for ids in (TEXT, ENDS))
  both = beam(
    model, params, prompt_of(cfg, prefix, padding), jnp.asarray(forced, jnp.int32), *masks, MOST, width, decoder_start=0
  )
  listed = lambda s: [
    (tuple(t[:n]), lp) for lp, t, n in zip(*(np.asarray(x).tolist() for x in s), strict=True) if lp > -np.inf
  ]
  return tuple(map(listed, both))


@pytest.mark.parametrize(
  'case', [case if 'padded' in case else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_wide_beam_finds_every_sequence_with_its_probability(case):
  cfg, prefix, padding, forced = CASES[case]
  expected = full_pass(cfg, prefix, forced)
  ended, unfinished = searched(cfg, prefix, padding, forced, width=len(ALL))
  best = sorted(ALL, key=lambda ids: -expected[ids][1])
  assert [ids for ids, _ in ended] == best
  np.testing.assert_allclose([lp for _, lp in ended], [expected[ids][1] for ids in best], atol=1e-4)
  longest = sorted((ids for ids in ALL if len(ids) == MOST), key=lambda ids: -expected[ids][0])
  assert [ids for ids, _ in unfinished] == longest
  np.testing.assert_allclose([lp for _, lp in unfinished], [expected[ids][0] for ids in longest], atol=1e-4)
  assert len({round(lp, 3) for _, lp in ended}) > len(ALL) * 0.9, 'no order among ties'


@pytest.mark.parametrize('case', ['encoder_decoder, padded', 'decoder, prefix and padded'])
def test_a_narrow_beam_gives_right_probabilities_and_repeats_itself(case):
  cfg, prefix, padding, forced = CASES[case]
  expected = full_pass(cfg, prefix, forced)
  ended, _ = searched(cfg, prefix, padding, forced, width=8)
  assert [lp for _, lp in ended] == sorted((lp for _, lp in ended), reverse=True)
  np.testing.assert_allclose([lp for _, lp in ended], [expected[ids][1] for ids, _ in ended], atol=1e-4)
  assert [ids for ids, _ in ended[:3]] == sorted(ALL, key=lambda ids: -expected[ids][1])[:3]
  assert searched(cfg, prefix, padding, forced, width=8)[0] == ended
  assert sum(np.exp(lp) for _, lp in ended) < 1
