"""Series of numbers from the rows of metrics.jsonl, for plots."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

Rows = Sequence[Mapping[str, float]]
Curve = tuple[np.ndarray, np.ndarray]
EQUAL = 'tokens, in equal shares'  # the unit of `loads_of`


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
  """The mean of each value and its neighbours up to `window` away (fewer at the ends).

  >>> running_mean(np.array([1.0, 3.0, 5.0]), 1).tolist()
  [2.0, 3.0, 4.0]
  """
  sums = np.cumsum(np.concatenate([[0.0], values]))
  place = np.arange(len(values))
  start, stop = np.maximum(place - window, 0), np.minimum(place + window + 1, len(values))
  return (sums[stop] - sums[start]) / (stop - start)


def curve(rows: Rows, key: str) -> Curve:
  """(steps, values) of the rows that have a finite `key`."""
  found = [(row['step'], row[key]) for row in rows if key in row and math.isfinite(row[key])]
  steps, values = zip(*found, strict=True) if found else ((), ())
  return np.array(steps), np.array(values, np.float64)


def scaled(points: Curve, factor: float) -> Curve:
  return points[0], points[1] * factor


def layers_of(rows: Rows, name: str) -> dict[str, list[str]]:
  """The keys NAME/STACK/LAYER, or NAME/STACK/LAYER/EXPERT, of each stack, in their order."""
  keys = {key for row in rows for key in row if key.startswith(f'{name}/')}
  order = sorted(keys, key=lambda key: [int(part) for part in key.split('/')[2:]])
  return {stack: [key for key in order if f'/{stack}/' in key] for stack in {key.split('/')[1] for key in keys}}


def loads_of(rows: Rows) -> dict[str, list[Curve]]:
  """For each layer of each stack (steps, loads[step, expert]), where 1 is an equal share of the tokens.

  >>> rows = [{'step': 5, 'expert_load/decoder/0/0': 0.75, 'expert_load/decoder/0/1': 0.25}]
  >>> [(steps.tolist(), loads.tolist()) for steps, loads in loads_of(rows)['decoder']]
  [([5], [[1.5, 0.5]])]
  """
  found = {}
  for stack, keys in layers_of(rows, 'expert_load').items():
    layers = [list(own) for _, own in itertools.groupby(keys, key=lambda key: key.rpartition('/')[0])]
    curves = [[curve(rows, key) for key in own] for own in layers]
    found[stack] = [(own[0][0], len(own) * np.stack([values for _, values in own], 1)) for own in curves]
  return found
