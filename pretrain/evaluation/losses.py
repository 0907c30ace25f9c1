"""Losses on held-out data, for each evaluation set."""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import jax
import numpy as np

from pretrain.devices.mesh import to_global
from pretrain.errors import ConfigError

KINDS = (
  'loss',
  'text_loss',
  'perplexity',
  'bits_per_byte',
  'accuracy',
  'exact_match',
)  # metrics for `checkpoint.best_of`


def bits_per_byte(nats: float, size: int) -> float:
  """Of a text of `size` bytes in UTF-8 whose tokens, the ends of documents included, cost so many `nats` together."""
  return nats / (math.log(2) * size)


def evaluate(
  eval_step, params, batches: Iterable[Mapping[str, np.ndarray]], mesh, size: int | None = None
) -> dict[str, float]:
  """Mean nats per target (`loss`), per target that is text (`text_loss`), `perplexity` and `accuracy`; and where the
  targets are a text of `size` bytes, `bits_per_byte`."""
  parts = [eval_step(params, to_global(batch, mesh)) for batch in batches]
  sums = {k: float(np.sum([np.float64(part[k]) for part in jax.device_get(parts)])) for k in parts[0]}
  loss = sums['loss'] / max(sums['weight'], 1.0)
  return {
    'loss': loss,
    'perplexity': math.exp(min(loss, 700.0)),
    'accuracy': sums['accuracy'] / max(sums['weight'], 1.0),
    'text_loss': sums['text_loss'] / max(sums['text_weight'], 1.0),
    'targets': sums['weight'],
  } | ({} if size is None else {'bits_per_byte': bits_per_byte(sums['loss'], size)})


def evaluate_sets(
  eval_step,
  params,
  sets: Mapping[str, Iterable],
  mesh,
  average: str = '',
  sizes: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, float]:
  """`evaluate` on each held-out set: eval/<set>/loss, …; eval/<set>/<average>/loss, … for averaged parameters.

  `sizes` has the bytes of the sets whose targets are a text.
  """
  values = {}
  for name, batches in sets.items():
    found = evaluate(eval_step, params, batches, mesh, sizes.get(name))
    values |= {f'{series(name, average)}/{k}': v for k, v in found.items()}
  return values


def check_best_of(key: str | None, sets: Iterable[str]) -> None:
  """Raises ConfigError where no evaluation of these held-out sets has `checkpoint.best_of`."""
  names = list(sets)
  prefixes = [series(name, average) for name in names for average in ('', 'ema', 'lawa')]
  if key is not None and key not in [f'{prefix}/{kind}' for prefix in prefixes for kind in KINDS]:
    raise ConfigError(
      f"checkpoint.best_of='{key}' is not a metric of the held-out sets; it is eval/<set>/<kind> with a set of "
      f'{", ".join(names)} and a kind of {", ".join(KINDS)}, e.g. {prefixes[0]}/loss.'
    )


def series(name: str, average: str) -> str:
  """The prefix of the names of a set's metrics.

  >>> series('builtin', ''), series('builtin', 'ema')
  ('eval/builtin', 'eval/builtin/ema')
  """
  return '/'.join(filter(None, ('eval', name, average)))
