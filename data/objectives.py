"""What a model is asked to do with text: the objectives of a config, and whether they fit its lengths."""

import dataclasses
from typing import Annotated, Literal, assert_never

import numpy as np

from data.tasks import Budget, Task, block_of

MODE_OF_KIND = {'R': 0, 'X': 1, 'S': 2}
SMode = Literal['uniform_prefix', 'last_quarter']


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLm:
  """Every token is predicted from those before it in its document. Decoder-only."""

  name: Literal['causal_lm'] = 'causal_lm'


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLm:
  """A piece is cut at a uniformly random place; the second part is predicted from the first.

  Source: Raffel et al. 2020, §3.2.3; t5/data/preprocessors.py prefix_lm. `loss_on_prefix` (decoder-only) is seqio's
  loss_on_targets_only=False.
  """

  name: Literal['prefix_lm'] = 'prefix_lm'
  loss_on_prefix: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption:
  """T5: spans of text are replaced by sentinels and predicted. Source: Raffel et al. 2020, §3.3.4."""

  name: Literal['span_corruption'] = 'span_corruption'
  noise_density: float = 0.15
  mean_noise_span_length: float = 3.0
  random_roll: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
  """R and X hide spans of this mean length and density, S the end of the text. `rate` is relative to the others."""

  kind: Literal['R', 'S', 'X']
  mean_noise_span_length: float | None = None
  noise_density: float | None = None
  rate: float = 1.0

  def __str__(self) -> str:
    if self.kind == 'S':
      return 'S'
    return f'{self.kind}(mu={self.mean_noise_span_length:g}, r={self.noise_density:g})'


def _denoiser(kind: str, mu: float | None = None, r: float | None = None, rate: float = 1.0) -> Denoiser:
  return Denoiser(kind=kind, mean_noise_span_length=mu, noise_density=r, rate=rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ul2:
  """The mixture of denoisers: short and long, sparse and dense spans, and prefixes.

  Source: Tay et al. 2022, arXiv:2205.05131, Table 1 and appendix 9.2 (S has no sentinel). `s_mode` settles where the
  paper's text and table differ: the prefix ends anywhere, or at three quarters. Mode tokens ([NLU] for R, [NLG] for X,
  [S2S] for S) stand before the inputs.
  """

  name: Literal['ul2'] = 'ul2'
  denoisers: tuple[Denoiser, ...] = (
    _denoiser('R', 3.0, 0.15),
    _denoiser('R', 8.0, 0.15),
    _denoiser('X', 3.0, 0.5),
    _denoiser('X', 8.0, 0.5),
    _denoiser('X', 64.0, 0.15),
    _denoiser('X', 64.0, 0.5),
    _denoiser('S'),
  )
  s_mode: SMode = 'uniform_prefix'
  mode_tokens: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ul2r:
  """UL2's mixture for going on with a decoder: half S, a quarter R, a quarter X. Decoder-only.

  Source: Tay et al. 2022, arXiv:2210.11399 (U-PaLM), §2.2-2.4.
  """

  name: Literal['ul2r'] = 'ul2r'
  denoisers: tuple[Denoiser, ...] = (
    _denoiser('S', rate=0.5),
    _denoiser('R', 3.0, 0.15, 0.25),
    _denoiser('X', 32.0, 0.15, 0.125),
    _denoiser('X', 3.0, 0.5, 0.125),
  )
  s_mode: SMode = 'uniform_prefix'
  mode_tokens: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLm:
  """BERT: the share `rate` of the tokens is predicted, each in its place. Encoder-only.

  Of these the share `mask` is read as the mask token (<extra_id_0>), the share `random` as a random piece, the rest as
  it is. Source: Devlin et al. 2019, arXiv:1810.04805, §3.1 and A.1.
  """

  name: Literal['mlm'] = 'mlm'
  rate: Annotated[float, '(0, 1)'] = 0.15
  mask: Annotated[float, '[0, 1]'] = 0.8
  random: Annotated[float, '[0, 1]'] = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised:
  """Targets are predicted from inputs, over stores of pairs: fine-tuning.

  An encoder-decoder reads inputs in its encoder. A decoder sees them whole, as a prefix without loss; it needs
  `inputs_length`: inputs are cut to it, targets to the rest of data.targets_length (task_feature_lengths in seqio).
  Source: seqio feature_converters.py (EncDecFeatureConverter, PrefixLMFeatureConverter); utils.py trim_dataset: what is
  too long loses its end, with EOS.
  """

  name: Literal['supervised'] = 'supervised'
  inputs_length: Annotated[int, '>= 1'] | None = None


Objective = CausalLm | PrefixLm | SpanCorruption | Ul2 | Ul2r | MaskedLm | Supervised


def tasks_of(objective: Objective) -> tuple[Task, ...]:
  """The tasks whose rows make up `objective`, in the order of its config."""
  match objective:
    case CausalLm():
      return (Task(label='causal', kind='causal'),)
    case PrefixLm():
      return (Task(label='prefix', kind='uniform_prefix'),)
    case SpanCorruption(noise_density=r, mean_noise_span_length=mu, random_roll=turned):
      label = f'spans(mu={mu:g}, r={r:g})'
      spans = Task(label=label, kind='spans', noise_density=r, mean_noise_span_length=mu, random_roll=turned)
      return (spans,)
    case MaskedLm(rate=rate, mask=mask, random=random):
      return (Task(label=f'mlm(r={rate:g})', kind='masked', noise_density=rate, mask=mask, random=random),)
    case Supervised():
      return (Task(label='supervised', kind='pairs'),)
    case Ul2() | Ul2r():
      return tuple(_task(d, objective.s_mode, objective.mode_tokens) for d in objective.denoisers)
    case _:
      assert_never(objective)


def has_marks(task: Task) -> bool:
  """Whether its rows hold sentinels or mode tokens."""
  return task.kind in ('spans', 'masked') or task.mode is not None


def _task(denoiser: Denoiser, s_mode: SMode, mode_tokens: bool) -> Task:
  mode = MODE_OF_KIND[denoiser.kind] if mode_tokens else None
  if denoiser.kind == 'S':
    return Task(label=str(denoiser), kind=s_mode, rate=denoiser.rate, mode=mode)
  mu, r = denoiser.mean_noise_span_length, denoiser.noise_density
  spans = {'noise_density': r, 'mean_noise_span_length': mu}
  return Task(label=str(denoiser), kind='spans', rate=denoiser.rate, mode=mode, **spans)


def check_objective(objective: Objective, inputs_length: int, targets_length: int, sentinels: int) -> None:
  """Raises ValueError where `objective` cannot be: values out of range, rows too short, too few sentinels.

  Sentinels must do for every piece that can occur. The place of a mode token is left out of the sum, so that turning
  mode tokens on or off never changes the vocabulary.
  """
  _check_family(objective, inputs_length)
  if isinstance(objective, Supervised):
    _check_pairs(objective, inputs_length, targets_length)
    return
  if isinstance(objective, MaskedLm):
    _check_masks(objective, sentinels)
  if isinstance(objective, Ul2 | Ul2r):
    _check_denoisers(objective)
  tasks, budget = tasks_of(objective), Budget(inputs_length, targets_length)
  block_of([task.rate for task in tasks], 'objective rates')
  for task in tasks:
    if task.kind == 'spans':
      _check_spans(task, budget)
    if budget.capacity(task) < 2:
      raise ValueError(
        f'data.inputs_length={inputs_length} and data.targets_length={targets_length} leave no room for two tokens of '
        f'text with denoiser {task.label}; use longer rows.'
      )
  _check_sentinels(tasks, budget, sentinels)


def _check_family(objective: Objective, inputs_length: int) -> None:
  if inputs_length and isinstance(objective, CausalLm | Ul2r | MaskedLm):
    only = 'encoder-only' if isinstance(objective, MaskedLm) else 'decoder-only'
    raise ValueError(f"objective.name='{objective.name}' is {only}, data.inputs_length={inputs_length}; set 0.")
  if inputs_length and isinstance(objective, PrefixLm) and objective.loss_on_prefix:
    raise ValueError('objective.loss_on_prefix=True needs a decoder-only model (data.inputs_length=0).')


def pair_lengths(objective: Supervised, budget: Budget) -> tuple[int, int]:
  """The most tokens that (inputs, targets) of a pair have in a row, EOS included.

  >>> pair_lengths(Supervised(), Budget(64, 32)), pair_lengths(Supervised(inputs_length=64), Budget(0, 96))
  ((64, 32), (64, 32))
  """
  prefix = objective.inputs_length or 0
  return (budget.inputs_length or prefix), budget.targets_length - prefix


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


def _check_masks(objective: MaskedLm, sentinels: int) -> None:
  if objective.mask + objective.random > 1 + 1e-9:  # 0.7 + 0.3 may be a little more than 1
    raise ValueError(
      f'objective.mask={objective.mask} and objective.random={objective.random} are shares of the chosen tokens, '
      f'together {objective.mask + objective.random:g}; lower one, so that they are at most 1.'
    )
  if not sentinels:
    raise ValueError(
      "objective.name='mlm' hides tokens behind <extra_id_0>, data.sentinels=0; set data.sentinels >= 1."
    )


def _check_denoisers(objective: Ul2 | Ul2r) -> None:
  if not objective.denoisers:
    raise ValueError('objective.denoisers is empty; name at least one.')
  for i, denoiser in enumerate(objective.denoisers):
    given = sum(x is not None for x in (denoiser.mean_noise_span_length, denoiser.noise_density))
    if given != (0 if denoiser.kind == 'S' else 2):
      need = 'takes no' if denoiser.kind == 'S' else 'needs both'
      raise ValueError(
        f"objective.denoisers[{i}] of kind '{denoiser.kind}' {need} mean_noise_span_length and noise_density."
      )


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
  if task.kind != 'spans':
    return 0
  longest = budget.capacity(dataclasses.replace(task, mode=None))
  return int(task.counts(np.array([longest]))[1][0]) + task.random_roll


def _check_sentinels(tasks, budget: Budget, sentinels: int) -> None:
  needs = [num_sentinels(task, budget) for task in tasks]
  if max(needs) > sentinels:
    task = tasks[int(np.argmax(needs))]
    where = f'{budget.inputs_length} inputs' if budget.inputs_length else f'{budget.targets_length} tokens'
    raise ValueError(
      f'data.sentinels={sentinels} but denoiser {task.label} at {where} makes {max(needs)} spans; '
      f'set data.sentinels >= {max(needs)}.'
    )
