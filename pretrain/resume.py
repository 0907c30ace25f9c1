"""Which config differences a resumed run may have; anything else refuses and shows both values."""

import pathlib

from pretrain import config
from pretrain.errors import ConfigError
from pretrain.experiment import MAY_CHANGE, Experiment


def may_change(key: str) -> bool:
  return any(key == allowed or (allowed.endswith('.') and key.startswith(allowed)) for allowed in MAY_CHANGE)


def differences(old: Experiment, new: Experiment) -> list[tuple[str, object, object]]:
  """(key, old value, new value) of every key that differs and may not."""
  before, after = config.flatten(old), config.flatten(new)
  keys = [key for key in dict.fromkeys([*before, *after]) if not may_change(key)]
  return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def check_same_run(saved: pathlib.Path, cfg: Experiment) -> None:
  """Raises ConfigError where `cfg` is not the run whose resolved config is `saved`; reads only."""
  changed = differences(config.load(Experiment, [str(saved)], []), cfg)
  if changed:
    key, old, new = changed[0]
    more = f' (first of {len(changed)})' if len(changed) > 1 else ''
    raise ConfigError(
      f'{key} is {old!r} in {saved}, {new!r} in this command{more}. A resumed run keeps its model, data and schedule; '
      'nothing was changed. Set it back, or use another --workdir.'
    )
