"""Packed prefill: prompts that share rows are continued as prompts with a row each, and as each prompt alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decode.beam import beam_search
from models.decode.cached import PLACES, start, tokens_read
from models.decode.sampling import Sampling
from models.decode.writing import greedy, write
from tests.models.small import (
  ALIBI,
  CLEX,
  EXPERTS,
  FAR_SINKS,
  IDS,
  LEARNED,
  LLAMA,
  ROUTED_T5,
  SINKS,
  T5,
  T5_ALIBI,
  model_and_params,
  shaken,
  side,
)

LENGTHS = [[5, 8], [3]]  # of the prompts in each packed row of 14
PROMPTS = [(row, k + 1, n) for row, own in enumerate(LENGTHS) for k, n in enumerate(own)]
WIDTH, LONGEST = 14, 8
RELATIVE = dataclasses.replace(LLAMA, positions='relative', relative_buckets=8, relative_max_distance=6)
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


def packed(name: str, prefix: bool = False) -> dict[str, np.ndarray]:
  """The prompts in two rows, and their places."""
  fields = side(name, LENGTHS, WIDTH, seed=3)
  if prefix:  # of a segment's first tokens, as many as the segment has, but for two
    sizes = np.array([[0, *own, 0, 0][:3] for own in LENGTHS])
    fields['decoder_prefix_end'] = np.maximum(np.take_along_axis(sizes, fields['decoder_segment_ids'], 1) - 2, 0)
  places = np.full((len(PROMPTS), LONGEST), -1, np.int32)
  for i, (row, segment, n) in enumerate(PROMPTS):
    places[i, LONGEST - n :] = row * WIDTH + np.flatnonzero(fields[f'{name}_segment_ids'][row] == segment)
  return fields | {PLACES: places}


def padded(fields: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
  """Each prompt in a row of its own, a decoder's at the end of it."""
  rows: dict[str, list] = {key: [] for key in fields if key != PLACES}
  for row, segment, n in PROMPTS:
    own = fields[f'{name}_segment_ids'][row] == segment
    for key in rows:
      values = np.ones(n, np.int32) if key.endswith('segment_ids') else fields[key][row][own]
      rows[key].append(np.pad(values, (LONGEST - n, 0) if name == 'decoder' else (0, LONGEST - n)))
  return {key: np.stack(values) for key, values in rows.items()}


@functools.partial(jax.jit, static_argnums=0)
def _first_logits(model, params, batch):
  step, carry, token = start(model.bind(params), batch, 4, 0)
  hidden, _ = carry if token is None else step(token, carry[1])
  return model.logits(params, hidden[:, -1])


def first_logits(model, params, batch) -> np.ndarray:
  return np.asarray(_first_logits(model, params, batch))


def of(cfg, prefix=False):
  name = 'encoder' if cfg.name == 'encoder_decoder' else 'decoder'
  model, params = model_and_params(cfg)
  fields = packed(name, prefix)
  return model, shaken(params), fields, padded(fields, name)


CASES = {
  'rotary': (LLAMA, False), 'relative': (RELATIVE, False), 'alibi': (ALIBI, False), 'learned': (LEARNED, False),
  'windows and sinks': (SINKS, False), 'experts': (EXPERTS, False), 'prefix': (LLAMA, True),
  'relative prefix': (RELATIVE, True), 't5': (T5, False), 't5 alibi': (T5_ALIBI, False),
  'clex': (CLEX, False), 'far sinks': (FAR_SINKS, False),
  't5 capacity': (dataclasses.replace(ROUTED_T5, expert_capacity=0.5), False),
}  # fmt: skip
RARE = ('experts', 't5 capacity', 'relative prefix', 't5 alibi', 'clex', 'far sinks')


@pytest.mark.parametrize('case', [slow(case) if case in RARE else case for case in CASES])
def test_the_first_logits_are_those_of_padded_prompts(case):
  model, params, fields, rows = of(*CASES[case])
  found, expected = first_logits(model, params, fields), first_logits(model, params, rows)
  np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())
  wrong = fields | {PLACES: np.where(fields[PLACES] > 0, fields[PLACES] - 1, fields[PLACES])}
  assert np.abs(first_logits(model, params, wrong) - expected).max() > 1e-3, 'the mutation'


@pytest.mark.parametrize('case', ['rotary', *map(slow, [case for case in CASES if case not in ('rotary', 't5')]), 't5'])
def test_greedy_tokens_are_those_of_padded_prompts(case):
  """Twelve steps: further than the windows, so that later steps read the copied keys at their own positions."""
  model, params, fields, rows = of(*CASES[case])
  if case == 'learned':
    model, params = model_and_params(LEARNED, max_positions=24)
    params = shaken(params)
  ids = IDS | {'eos': ()}
  together = np.asarray(greedy(model, params, fields, 12, **ids))
  np.testing.assert_array_equal(together, np.asarray(greedy(model, params, rows, 12, **ids)))
  assert len({*map(tuple, together.tolist())}) == len(PROMPTS)


def test_a_penalty_counts_the_tokens_of_the_own_prompt():
  model, params, fields, rows = of(LLAMA)
  tokens, own = tokens_read(fields)
  np.testing.assert_array_equal(own, fields[PLACES] >= 0)
  assert tokens[own].tolist() == [t for row in fields['decoder_input_tokens'].tolist() for t in row if t]
  once = Sampling(repetition_penalty=1e6)
  run = lambda batch: np.asarray(write(model, params, batch, 6, None, once, **IDS | {'eos': ()}))
  found = run(fields)
  np.testing.assert_array_equal(found, run(rows))
  for (row, segment, _), output in zip(PROMPTS, found.tolist(), strict=True):
    own = fields['decoder_input_tokens'][row][fields['decoder_segment_ids'][row] == segment].tolist()
    assert len({*own, *output}) == len({*own}) + len(output)


@pytest.mark.parametrize('cfg', [LLAMA, slow(T5)], ids=['decoder', 'encoder_decoder'])
def test_beams_are_those_of_padded_prompts(cfg):
  model, params, fields, rows = of(cfg)
  run = lambda batch: beam_search(model, params, batch, 5, None, 3, **IDS)
  found, expected = run(fields), run(rows)
  np.testing.assert_array_equal(*map(np.asarray, (found[0], expected[0])))
  np.testing.assert_allclose(*map(np.asarray, (found[1], expected[1])), rtol=1e-5)


def test_keys_of_other_prompts_are_not_read():
  """What stands in the empty slots before a short prompt is masked, also where it is NaN."""
  model, params, fields, _ = of(LLAMA)
  whole = first_logits(model, params, fields)
  broken = {**params, 'embedding': {'table': params['embedding']['table'].at[63].set(jnp.nan)}}
  tokens = fields['decoder_input_tokens'].copy()
  tokens[0][fields['decoder_segment_ids'][0] == 1] = 63  # the first prompt; slots of the others may be copies of it
  found = first_logits(model, broken, fields | {'decoder_input_tokens': tokens})
  assert np.isnan(found[0]).all()
  np.testing.assert_allclose(found[2], whole[2], atol=3e-6 * np.abs(whole).max())
