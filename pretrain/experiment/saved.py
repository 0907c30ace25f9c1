"""The config that a run has saved. A run begun with an earlier version of Pretrain keeps what that version did."""

import dataclasses
from collections.abc import Sequence

from pretrain.config import bindings
from pretrain.devices.chips import CHIPS, of_kind
from pretrain.devices.compiler import recorded
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.workdirs.folder import Folder

# Keys that earlier versions did not save -> the value that does what those versions did.
BEFORE = {'train.decay_delay': 1, 'compiler.chip_options': {chip: {} for chip in CHIPS}}


def load_saved(saved: Folder, overrides: Sequence[str] = ()) -> Experiment:
  """The config in RUN/config.gin. A key that the version which saved it did not have gets its value in BEFORE."""
  return bindings.load(Experiment, [str(saved)], overrides, absent=BEFORE)


def as_begun(cfg: Experiment, saved: Folder) -> Experiment:
  """`cfg` with the learning rates of the run whose resolved config is `saved`; as it is where there is no such run.

  A config that cannot be read is reported where the run is resumed (`check_same_run`).
  """
  try:
    delay = load_saved(saved).train.decay_delay if saved.exists() else cfg.train.decay_delay
  except ConfigError:
    return cfg
  return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, decay_delay=delay))


def with_chip_options(cfg: Experiment, saved: Folder, device_kind: str) -> Experiment:
  """`cfg` with the compiler's options for this chip as values: those of the run in `saved` if it has begun and `cfg`
  gives none, else the defaults of the chip.
  """
  chip = of_kind(device_kind)
  if chip is None or not cfg.compiler.chip_defaults:
    return cfg
  compiler = cfg.compiler
  try:
    begun = load_saved(saved).compiler.chip_options.get(chip.name) if saved.exists() else None
  except ConfigError:  # reported where the run is resumed
    begun = None
  if begun is not None and chip.name not in compiler.chip_options:
    compiler = dataclasses.replace(compiler, chip_options={**compiler.chip_options, chip.name: begun})
  return dataclasses.replace(cfg, compiler=recorded(compiler, device_kind))
