"""Outputs against those of `transformers` for imported weights (scripts/make_generation_goldens.py)."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from models.build import build
from models.decode.beam import beam_search
from models.decode.sampling import Sampling
from models.decode.writing import greedy
from tests.pretrain.interchange import goldens

FOLDER = goldens.GOLDENS.parent / 'generation'
OWN = {'plain_llama': 'llama', 'plain_t5': 't5'}  # models that only these tests have
BEAM = ('gpt2', *OWN)
ENCODERS = ('bert', 'roberta', 'electra', 'deberta')
GENERATIVE = [name for name in goldens.FAMILIES if name != 'gemma2' and name.split('_')[0] not in ENCODERS]
# Their caches are those of the other models: `make test-all` tests them.
ALIKE = ('t5_v1_0', 't5_v1_1', 'ul2', 'mt5', 'llama', 'yi', 'qwen2', 'olmo2', 'falcon_40b')
GEMMA = {'plain_gemma2': 'gemma2'} if 'gemma2' in goldens.FAMILIES else {}


@functools.cache
def model_of(name: str):
  source, params = goldens.load(FOLDER / (OWN | GEMMA)[name] if name.startswith('plain_') else goldens.GOLDENS / name)
  return build(source.model), params


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
  with np.load(FOLDER / f'{name}.npz') as found:
    return dict(found)


def batch_of(name: str, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The prompts as `models.decode` takes them: a decoder's stand at the end of their rows."""
  if model_of(name)[0].cfg.name == 'decoder':
    return {'decoder_input_tokens': found['prompts'], 'decoder_segment_ids': found['mask']}
  positions = np.tile(np.arange(found['mask'].shape[1], dtype=np.int32), (len(found['mask']), 1))
  return {
    'encoder_input_tokens': found['prompts'], 'encoder_segment_ids': found['mask'], 'encoder_positions': positions,
  }  # fmt: skip


def ids_of(found: dict[str, np.ndarray], eos: str = 'eos') -> dict:
  return {'eos': tuple(found[eos].tolist()), 'pad': 0, 'decoder_start': 0}


@pytest.mark.parametrize(
  'name', [*(goldens.slow(name) if name in ALIKE else name for name in GENERATIVE), *OWN, *GEMMA]
)
def test_greedy_tokens_are_those_of_transformers(name):
  """32 tokens for prompts of unequal lengths, some of which end early."""
  found, (model, params) = golden(name), model_of(name)
  ends = [np.flatnonzero(row == found['eos'][0]) for row in found['greedy']]
  assert any(len(at) and at[0] < 31 for at in ends), 'no early end'
  assert any(len(at) == 0 for at in ends)
  written = np.asarray(greedy(model, params, batch_of(name, found), 32, **ids_of(found)))
  np.testing.assert_array_equal(written, found['greedy'])


@pytest.mark.parametrize('name', BEAM)
def test_beams_are_those_of_transformers(name):
  found, (model, params) = golden(name), model_of(name)
  ids = ids_of(found, 'beam_eos')
  tokens, scores = beam_search(model, params, batch_of(name, found), 16, None, 4, **ids)
  wanted, best = found['beam'].reshape(-1, 3, 16), found['scores'].reshape(-1, 3)
  np.testing.assert_array_equal(np.asarray(tokens)[:, :3], wanted)
  np.testing.assert_allclose(np.asarray(scores)[:, :3], best, atol=2e-5)
  assert (np.asarray(tokens)[:, 0] != found['greedy'][:, :16]).any(), 'a beam that is greedy shows nothing'


def test_a_prompt_has_no_more_tokens_than_its_room():
  """Searched in one batch, each prompt has the output of a search of its own length."""
  found, (model, params) = golden('gpt2'), model_of('gpt2')
  batch, rooms, ids = batch_of('gpt2', found), np.int32([3, 16, 7, 16]), ids_of(found, 'beam_eos')
  together = np.asarray(beam_search(model, params, batch, 16, None, 4, rooms=jnp.asarray(rooms), **ids)[0])
  assert (together[[0, 2]] > 0).sum(-1).max() <= 7
  alone = {room: np.asarray(beam_search(model, params, batch, room, None, 4, **ids)[0]) for room in (3, 7)}
  np.testing.assert_array_equal(together[0, :, :3], alone[3][0])
  np.testing.assert_array_equal(together[2, :, :7], alone[7][2])
  np.testing.assert_array_equal(together[1::2, :3], found['beam'].reshape(-1, 3, 16)[1::2])


FILTERS = {
  'penalty': Sampling(repetition_penalty=1.7),
  'temperature': Sampling(temperature=0.6),
  'top_k': Sampling(temperature=1.0, top_k=7),
  'top_p': Sampling(temperature=1.0, top_p=0.7),
  'all': Sampling(temperature=0.8, top_k=12, top_p=0.8, repetition_penalty=1.3),
}


@pytest.mark.parametrize('name', FILTERS)
def test_filters_are_the_logits_processors_of_transformers(name):
  found, sampling = golden('filters'), FILTERS[name]
  seen = np.zeros(found['logits'].shape, bool)
  np.put_along_axis(seen, found['ids'], True, axis=1)
  penalized = sampling.repetition_penalty != 1.0
  logits = sampling.penalized(jnp.asarray(found['logits']), jnp.asarray(seen) if penalized else None)
  logits = logits if sampling.temperature is None else sampling.filtered(logits)
  np.testing.assert_array_equal(np.isinf(logits), np.isinf(found[name]))
  np.testing.assert_allclose(logits, found[name], rtol=1e-6)
