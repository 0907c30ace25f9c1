"""What `sparsity` needs of `train`, `lora`, `checkpoint`, `averaging`, `evaluation` and phases."""

import itertools
from collections.abc import Iterator

from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.phases import phases_of
from pretrain.optim.averaging import Ema
from pretrain.optim.sparsity import FixedSparsity, NoSparsity, Pruning


def check_sparsity(cfg: Experiment) -> None:
  """Raises ConfigError for a schedule of pruning that does not end in training, and for what does not go with it."""
  own = cfg.sparsity
  if isinstance(own, NoSparsity):
    return
  if isinstance(own, Pruning):
    _check_schedule(own, cfg.train.steps)
  for wrong, why in _limits(cfg):
    if wrong:
      raise ConfigError(f"sparsity.name='{own.name}' with {why}, or sparsity.name='none'.")


def _limits(cfg: Experiment) -> Iterator[tuple[bool, str]]:
  yield cfg.lora.rank > 0, f'lora.rank={cfg.lora.rank}, whose weights are frozen; use lora.rank=0'
  if isinstance(cfg.sparsity, FixedSparsity):
    yield (
      cfg.sparsity.rate > 0 and cfg.checkpoint.initial is not None,
      f"sparsity.rate={cfg.sparsity.rate} and checkpoint.initial='{cfg.checkpoint.initial}', of whose weights it would "
      'set such a share to 0; use sparsity.rate=0.0, which trains all of them',
    )
  if isinstance(cfg.sparsity, Pruning):
    why = 'averages of a weight before and after it is pruned, which are not 0'
    yield isinstance(cfg.averaging, Ema), f"averaging.name='ema': {why}; use averaging.name='none'"
    models = cfg.evaluation.lawa_checkpoints
    yield models > 0, f'evaluation.lawa_checkpoints={models}: {why}; use evaluation.lawa_checkpoints=0'


def _check_schedule(own: Pruning, steps: int) -> None:
  where = f'sparsity.start_step={own.start_step} and sparsity.end_step={own.end_step}'
  if own.end_step > steps:
    raise ConfigError(
      f'{where} with train.steps={steps}: pruning would not end; use sparsity.end_step <= {steps}, e.g. '
      f'{steps // 4} and {steps * 3 // 4}, or more steps.'
    )
  if own.start_step >= own.end_step:
    raise ConfigError(f'{where}: pruning ends before it has begun; use sparsity.start_step < {own.end_step}.')
  if left := (own.end_step - own.start_step) % own.every:
    raise ConfigError(
      f'{where} with sparsity.every={own.every}: update {own.end_step} would prune nothing; use '
      f'sparsity.end_step={own.end_step - left}, or a sparsity.every that divides {own.end_step - own.start_step}.'
    )


def check_rates(cfg: Experiment) -> None:
  """Raises ConfigError for a phase that would set weights to 0: a random mask only shrinks, one of pruning has a
  schedule.
  """
  for before, after in itertools.pairwise(phases_of(cfg)):
    old, new = before.cfg.sparsity, after.cfg.sparsity
    if old == new:
      continue
    where = f'phases[{after.index - 1}]: sparsity.rate={new.rate}'
    if not isinstance(new, FixedSparsity):
      raise ConfigError(f"{where} with sparsity.name='{new.name}', whose rate follows its schedule; remove it.")
    if new.rate > old.rate:
      raise ConfigError(f'{where}, {old.rate} before it: a phase frees weights only; use sparsity.rate <= {old.rate}.')
