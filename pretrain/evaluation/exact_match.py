"""Exact match: the share of held-out pairs for which a run writes the whole targets."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from data.batches.batches import DataSource, ranges
from data.objectives.objectives import Supervised, pair_lengths
from models.decode.writing import greedy
from pretrain.devices.mesh import host_rows, replicated, to_global
from pretrain.evaluation.losses import series
from pretrain.evaluation.prompts import prompt_batch, special_ids
from pretrain.evaluation.texts import until_end
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.program import Program

Pairs = Sequence[tuple[list[int], list[int]]]
ExactMatch = Callable[[Any, Pairs], float]


def matches(exact_match: ExactMatch, params, sets: Mapping[str, Pairs], average: str = '') -> dict[str, float]:
  """eval/<set>/exact_match, or eval/<set>/<average>/exact_match for averaged parameters."""
  return {f'{series(name, average)}/exact_match': exact_match(params, pairs) for name, pairs in sets.items()}


def make_exact_match(cfg: Experiment, program: Program, data: DataSource) -> ExactMatch:
  """`exact_match(params, pairs)`: the share of greedy outputs whose text equals the text of the targets.

  `pairs` come from `DataSource.heldout_pairs`. Targets that do not fit a row count as misses. Every process decodes its
  own rows and sees all outputs.
  """
  assert isinstance(cfg.objective, Supervised)
  longest, room = pair_lengths(cfg.objective, cfg.data.budget)
  mesh, size = program.mesh, cfg.data.batch_size
  rows, render, ids = host_rows(mesh, size), data.tokenizer.render, special_ids(data)

  def decode(params, batch) -> Array:
    return greedy(program.model, params, batch, room, data.vocabulary.size, **ids._asdict())

  decode = jax.jit(decode, out_shardings=replicated(mesh))

  def hits(params, pairs: Pairs) -> int:
    """The number of matches in at most a batch of pairs; unused rows repeat the first pair."""
    prompts = [inputs for inputs, _ in pairs] + [pairs[0][0]] * (size - len(pairs))
    own = [prompt for part in ranges(rows) for prompt in prompts[part]]
    batch = prompt_batch(own, cfg, longest, data.vocabulary.ids)
    outputs = np.asarray(decode(params, to_global(batch, mesh))).tolist()
    answered = zip(outputs[: len(pairs)], pairs, strict=True)
    return sum(render(until_end(output, ids.eos)) == render(targets) for output, (_, targets) in answered)

  return lambda params, pairs: sum(hits(params, pairs[i : i + size]) for i in range(0, len(pairs), size)) / len(pairs)
