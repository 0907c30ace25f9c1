"""Which rows a run has read: those of its config, corrected by what only its newest checkpoint records."""

from collections.abc import Mapping
from typing import Any

from data.batches.batches import DataSource
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.errors import CheckpointError, ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.phases import phase_at
from pretrain.experiment.resume import check_same_data
from pretrain.hosts.skipping import behind
from pretrain.workdirs.folder import Folder


def data_of_run(workdir: Folder, cfg: Experiment, data: DataSource, step: int) -> tuple[DataSource, int]:
  """(`data` as the run in `workdir` had it at `step`, the first example of that step).

  Sources may have been changed (--allow_data_change), weights set from losses (data.online). Raises CheckpointError
  where there is no checkpoint, or its data is not that of `cfg`; ConfigError for a step whose rows the checkpoint no
  longer records, or does not record yet.
  """
  checkpoints = Checkpoints(workdir, cfg.checkpoint, read_only=True)
  latest = checkpoints.latest()
  if latest is None:
    raise CheckpointError('CKPT-NONE', f'no checkpoint in {workdir}; leave out --workdir, and give --gin_file.')
  saved = checkpoints.position(latest)
  own, last = phase_at(cfg, step), phase_at(cfg, max(latest - 1, 0))
  if own.index == last.index:
    check_same_data(saved['data'], data.fingerprint(), latest, workdir)
  position = saved['loader']
  skipped = position.get('skipped', [])
  used = position['examples'] - sum(end - first for first, end in skipped)
  shift = used - last.example(latest)  # batches had another size before the data was changed
  example = behind(skipped, own.example(step) + shift)
  _check_known(workdir, cfg, position, step, example, latest)
  return data.at(position), example


def _check_known(
  workdir: Folder, cfg: Experiment, position: Mapping[str, Any], step: int, example: int, latest: int
) -> None:
  began = position.get('mixture')
  if not began:
    return
  size = cfg.data.batch_size
  first = latest - (position['examples'] - began['start']) // size
  end = first + cfg.data.online.every if cfg.data.online else None
  if example < began['start'] or (end is not None and step >= end):
    until = f' to {end - 1}' if end else ''
    raise ConfigError(
      f'--step={step}: step {latest} of {workdir} records the sources and weights of the steps from {first}{until} '
      '(--allow_data_change or data.online changed them); give one of these steps.'
    )
