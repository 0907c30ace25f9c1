"""What a resumed run may change: some config keys, none of its data. Anything else refuses and shows both values."""

import pathlib
from collections.abc import Mapping
from typing import Any

from pretrain import config
from pretrain.errors import CheckpointError, ConfigError
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


def check_same_data(saved: Mapping[str, Any], found: Mapping[str, Any], step: int, workdir: pathlib.Path) -> None:
  """Raises CheckpointError where the data of `step` (`DataSource.fingerprint`, saved with it) is not that of now."""
  before, after = _flat(saved), _flat(found)
  keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
  if keys:
    changed = ', '.join(f'{key} was {_short(before.get(key))}, is {_short(after.get(key))}' for key in keys)
    raise CheckpointError(
      'CKPT-DATA',
      f'step {step} in {workdir} was trained on other data: {changed}. '
      'Nothing was changed; bring the data back, or use another --workdir.',
    )


def _flat(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
  """Lists by their elements: stores[0], stores[1], …"""
  flat: dict[str, Any] = {}
  for key, value in fingerprint.items():
    flat |= {f'{key}[{i}]': v for i, v in enumerate(value)} if isinstance(value, list | tuple) else {key: value}
  return flat


def _short(value: Any) -> str:
  """A hash by its first eight digits."""
  text = 'absent' if value is None else str(value)
  return text if len(text) <= 32 else f'{text[:8]}..'
