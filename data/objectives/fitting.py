"""Checks that an objective fits the row lengths and the number of sentinels; each refusal is one sentence."""

import dataclasses

import numpy as np

from data.objectives.objectives import (
  FillInTheMiddle,
  IidDenoising,
  Instruction,
  MaskedLm,
  Objective,
  ObjectiveMixture,
  PrefixLm,
  Supervised,
  Ul2,
  Ul2r,
  is_decoder_only,
  is_encoder_only,
  parts_of,
  tasks_of,
)
from data.objectives.tasks import FIM_SENTINELS, Budget, Task, block_of

# An encoder-decoder learns answers from pairs: its input is one text, not alternating turns.
PAIRS_INSTEAD = (
  ', or make pairs of what is asked and answered (pretrain data prepare --inputs_field=… --targets_field=…) for '
  "objective.name='supervised'"
)  # fmt: skip


def check_objective(objective: Objective, inputs_length: int, targets_length: int, sentinels: int) -> None:
  """Raises ValueError if `objective` cannot be trained: values out of range, rows too short, too few sentinels.

  There must be enough sentinels for the longest possible piece. That length is computed without a mode token, so that
  turning mode tokens on or off never changes the vocabulary.
  """
  _check_mixture(objective)
  _check_family(objective, inputs_length)
  if isinstance(objective, Supervised):
    _check_pairs(objective, inputs_length, targets_length)
    return
  if isinstance(objective, Instruction):
    _check_roles(objective)
    return
  for i, part in enumerate(parts_of(objective)):
    _check_part(
      part, f'objective.parts[{i}].objective' if isinstance(objective, ObjectiveMixture) else 'objective', sentinels
    )
  tasks, budget = tasks_of(objective), Budget(inputs_length, targets_length)
  block_of([task.rate for task in tasks], 'objective rates')
  for task in tasks:
    if task.kind == 'spans':
      _check_spans(task, budget)
  check_room(tasks, budget)
  _check_sentinels(tasks, budget, sentinels)


def check_room(tasks: tuple[Task, ...], budget: Budget) -> None:
  """Raises ValueError for a task whose shortest useful piece no row can hold."""
  for task in tasks:
    if budget.capacity(task) < 2:
      raise ValueError(
        f'data.inputs_length={budget.inputs_length} and data.targets_length={budget.targets_length} leave no room for '
        f'two tokens of text with denoiser {task.label}; use longer rows.'
      )


def _check_mixture(objective: Objective) -> None:
  if not isinstance(objective, ObjectiveMixture):
    return
  if not objective.parts:
    raise ValueError(
      "objective.parts is empty; name at least one, e.g. {'rate': 0.5, 'objective': {'name': 'prefix_lm'}}."
    )
  masked = [isinstance(part.objective, MaskedLm) for part in objective.parts]
  if any(masked) and not all(masked):
    own, other = masked.index(True), masked.index(False)
    raise ValueError(
      f"objective.parts[{own}] ('mlm') is for an encoder, objective.parts[{other}] "
      f"('{objective.parts[other].objective.name}') for a model that writes; no model learns both: remove one."
    )


def _check_family(objective: Objective, inputs_length: int) -> None:
  if inputs_length and (is_encoder_only(objective) or is_decoder_only(objective)):
    only = 'encoder-only' if is_encoder_only(objective) else 'decoder-only'
    what = '' if not isinstance(objective, ObjectiveMixture) else ' (by its parts)'
    fix = 'set 0' + PAIRS_INSTEAD * isinstance(objective, Instruction)
    raise ValueError(f"objective.name='{objective.name}'{what} is {only}, data.inputs_length={inputs_length}; {fix}.")
  if inputs_length and any(isinstance(part, PrefixLm) and part.loss_on_prefix for part in parts_of(objective)):
    raise ValueError('objective.loss_on_prefix=True needs a decoder-only model (data.inputs_length=0).')


def _check_part(part: Objective, key: str, sentinels: int) -> None:
  match part:
    case MaskedLm():
      _check_masks(part, key, sentinels)
    case Ul2() | Ul2r():
      _check_denoisers(part, key)
    case IidDenoising():
      _check_random(part, key)
    case _:
      pass


def _check_pairs(objective: Supervised, inputs_length: int, targets_length: int) -> None:
  own = objective.inputs_length
  if inputs_length and own is not None:
    raise ValueError(
      f'objective.inputs_length={own} is for a decoder; here data.inputs_length={inputs_length} is the length of '
      'inputs: remove it.'
    )
  if not inputs_length and own is None:
    raise ValueError(
      "objective.name='supervised' on a decoder needs objective.inputs_length: inputs are cut to it, targets to the "
      f'rest of data.targets_length={targets_length}; set it.'
    )
  if own is not None and own >= targets_length:
    raise ValueError(
      f'objective.inputs_length={own} leaves no place for targets in rows of data.targets_length={targets_length}; '
      'lower it, or use longer rows.'
    )


def _check_roles(objective: Instruction) -> None:
  if not objective.loss_on:
    raise ValueError("objective.loss_on is empty, nothing would be learnt; name a role, e.g. ('assistant',).")


def _check_masks(objective: MaskedLm, key: str, sentinels: int) -> None:
  if objective.mask + objective.random > 1 + 1e-9:  # 0.7 + 0.3 may be a little more than 1
    raise ValueError(
      f'{key}.mask={objective.mask} and {key}.random={objective.random} are shares of the chosen tokens, '
      f'together {objective.mask + objective.random:g}; lower one, so that they are at most 1.'
    )
  if not sentinels:
    raise ValueError(f"{key}.name='mlm' hides tokens behind <extra_id_0>, data.sentinels=0; set data.sentinels >= 1.")


def _check_random(objective: IidDenoising, key: str) -> None:
  if objective.random and (objective.hide, objective.targets) != ('mask', 'full'):
    raise ValueError(
      f"{key}.random={objective.random} with {key}.hide='{objective.hide}' and {key}.targets='{objective.targets}': "
      f"nothing would tell random pieces from text; set {key}.hide='mask' and {key}.targets='full', or random to 0."
    )


def _check_denoisers(objective: Ul2 | Ul2r, key: str) -> None:
  if not objective.denoisers:
    raise ValueError(f'{key}.denoisers is empty; name at least one.')
  for i, denoiser in enumerate(objective.denoisers):
    given = sum(x is not None for x in (denoiser.mean_noise_span_length, denoiser.noise_density))
    if given != (0 if denoiser.kind == 'S' else 2):
      need = 'takes no' if denoiser.kind == 'S' else 'needs both'
      raise ValueError(
        f"{key}.denoisers[{i}] of kind '{denoiser.kind}' {need} mean_noise_span_length and noise_density."
      )
  block_of([denoiser.rate for denoiser in objective.denoisers], 'objective rates')


def _check_spans(task: Task, budget: Budget) -> None:
  mu, r = task.mean_noise_span_length, task.noise_density
  if not 0 < r < 1 or not mu >= 1:
    raise ValueError(
      f'denoiser {task.label}: noise_density={r} must lie in (0, 1), mean_noise_span_length={mu} be at least 1.'
    )
  lengths = np.arange(2, budget.longest + 1)
  noise, spans = task.counts(lengths)
  bad = np.flatnonzero(spans > lengths - noise)
  if len(bad):
    at = bad[0]
    raise ValueError(
      f'denoiser {task.label} makes {spans[at]} noise spans among {(lengths - noise)[at]} other tokens in a piece of '
      f'{lengths[at]}; lower its noise_density or raise its mean_noise_span_length.'
    )


def num_sentinels(task: Task, budget: Budget) -> int:
  """The most sentinels that one piece in a row can take."""
  return task.sentinels(budget.capacity(dataclasses.replace(task, mode=None)))


def _check_sentinels(tasks: tuple[Task, ...], budget: Budget, sentinels: int) -> None:
  needs = [num_sentinels(task, budget) for task in tasks if task.kind != 'fim']
  own = FIM_SENTINELS if len(needs) < len(tasks) else 0
  if own > sentinels:
    raise ValueError(
      f"objective.name='{FillInTheMiddle().name}' marks its parts with the last {own} sentinels, "
      f'data.sentinels={sentinels}; set data.sentinels >= {own}.'
    )
  most = max(needs, default=0)
  if most + own <= sentinels:
    return
  task = [task for task in tasks if task.kind != 'fim'][needs.index(most)]
  where = f'{budget.inputs_length} inputs' if budget.inputs_length else f'{budget.targets_length} tokens'
  what = 'makes {} spans' if task.kind == 'spans' else 'hides text behind <extra_id_0>'
  what = 'makes up to {} spans' if (task.kind, task.hide) == ('iid', 'sentinel_per_run') else what
  beside = f' beside the {own} of fim' if own else ''
  raise ValueError(
    f'data.sentinels={sentinels} but denoiser {task.label} at {where} {what.format(most)}{beside}; '
    f'set data.sentinels >= {most + own}.'
  )
