"""Pathways: the experts that each token goes through, compared between two steps of a run on its held-out text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pretrain.devices.mesh import batch_shards, host_rows, replicated, to_global
from pretrain.errors import ConfigError
from pretrain.evaluation.writer import Writer


def check_pathways(writer: Writer) -> None:
  """Raises ConfigError for a model without experts, and for a run without held-out text."""
  if writer.cfg.model.experts is None:
    raise ConfigError('--pathways compares the experts of tokens, and this run has no model.experts; leave it out.')
  rows, shards = writer.cfg.data.batch_size, batch_shards(writer.model.mesh)
  if rows % shards:
    raise ConfigError(
      f'--pathways reads batches of the run, data.batch_size={rows}, which mesh.* does not divide into {shards}; use a '
      'mesh that does.'
    )
  if not _heldout(writer):
    raise ConfigError('--pathways reads held-out text, and this run has none (data.heldout); leave it out.')


def compare_pathways(
  writer: Writer, steps: Sequence[int], params_of: Callable[[int], Any]
) -> dict[str, dict[str, float]]:
  """Results by 'SET, step STEP' for each held-out set and each of `steps`, whose parameters are `params_of(step)`.

  `agreement` is the share of the choices of a token that are among its choices in `writer` too: 1 for the same step,
  per_token / experts by chance. Source: Muennighoff et al. 2024 (OLMoE), arXiv:2409.02060, §5.1, router saturation.
  `same` is the share of tokens for which all choices are. Both are means over tokens and layers; STACK/LAYER is the
  agreement in a layer.
  """
  run = jax.jit(lambda *args: matches(writer.model.choices, *args), out_shardings=replicated(writer.model.mesh))
  found = {}
  for step in steps:
    other = params_of(step)
    for name, batches in _heldout(writer).items():
      sums = [run(writer.params, other, to_global(batch, writer.model.mesh)) for batch in batches]
      found[f'{name}, step {step}'] = _means(jax.device_get(sums))
    del other  # before the next one is read
  return found


def _heldout(writer: Writer) -> Mapping[str, Any]:
  cfg = writer.cfg
  return writer.data.heldout(cfg.evaluation.batches, host_rows(writer.model.mesh, cfg.data.batch_size))


def matches(choices: Callable, params: Any, other: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
  """For each stack f32[layers, 2], sums over the tokens of a batch: the share of its choices that both have, and
  whether it is all; and the number of tokens."""
  found, others = {}, choices(other, batch)
  for stack, chosen in choices(params, batch).items():
    token = (batch[f'{stack}_segment_ids'] != 0).astype(jnp.float32)
    share = (chosen[..., :, None] == others[stack][..., None, :]).any(-1).mean(-1, dtype=jnp.float32)
    pair = jnp.stack([share, (share == 1).astype(jnp.float32)], -1)
    found[stack] = jnp.einsum('nblp,bl->np', pair, token)
    found[f'{stack}_tokens'] = token.sum()
  return found


def _means(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
  sums = {key: np.sum([np.float64(part[key]) for part in parts], 0) for key in parts[0]}
  tokens = {key.removesuffix('_tokens'): float(sums[key]) for key in sums if key.endswith('_tokens')}
  layers = {f'{stack}/{i}': row / n for stack, n in tokens.items() for i, row in enumerate(sums[stack])}
  agreement, same = np.mean(list(layers.values()), 0)
  found = {'agreement': float(agreement), 'same': float(same), 'tokens': sum(tokens.values())}
  return found | {name: float(row[0]) for name, row in layers.items()}
