"""What a resumed run may change: some config keys, none of its data. Anything else refuses and shows both values."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax

from data.packing.buckets import LengthBuckets
from pretrain.config import bindings
from pretrain.errors import CheckpointError, ConfigError
from pretrain.experiment.experiment import MAY_CHANGE, Experiment
from pretrain.experiment.same_stores import Recorded, by_contents
from pretrain.experiment.saved import load_saved
from pretrain.hosts.skipping import Ranges
from pretrain.workdirs.folder import Folder


def may_change(key: str) -> bool:
  return any(key == allowed or (allowed.endswith('.') and key.startswith(allowed)) for allowed in MAY_CHANGE)


def differences(old: Experiment, new: Experiment) -> list[tuple[str, object, object]]:
  """(key, old value, new value) of every key that differs and may not."""
  before, after = bindings.flatten(old), bindings.flatten(new)
  return [(key, before.get(key), after.get(key)) for key in _unequal(old, new)]


def _unequal(old: Experiment, new: Experiment) -> list[str]:
  before, after = bindings.flatten(old), bindings.flatten(new)
  keys = [key for key in dict.fromkeys([*before, *after]) if not may_change(key)]
  return [key for key in keys if before.get(key) != after.get(key)]


def identity(cfg: Experiment, skips: Ranges) -> dict[str, str]:
  """What must be equal for a process to resume from the state another process left in memory; excludes `skips`."""
  flat = bindings.flatten(by_contents(cfg))
  fixed = [f'{key}={value!r}' for key, value in flat.items() if not may_change(key)]
  return {
    'config': hashlib.sha256('\n'.join(fixed).encode()).hexdigest()[:16],
    'mesh': ' '.join(f'{axis}={size}' for axis, size in dataclasses.asdict(cfg.mesh).items()),
    'number of processes': f'{jax.process_count()} with {jax.device_count()} devices',
    'list of examples left out': str(skips),
  }


def check_same_run(saved: Folder, cfg: Experiment, *, allow_data_change: bool = False) -> list[str]:
  """Raises ConfigError where `cfg` is not the run whose resolved config is `saved`; reads only.

  With `allow_data_change` keys of `data` may differ, but for `_is_fixed`: a line for each is returned.
  """
  before = load_saved(saved)
  unequal = _unequal(by_contents(before, Recorded(saved.parent)), by_contents(cfg))
  changed = [item for item in differences(before, cfg) if item[0] in unequal]
  data_keys = [key for key, _, _ in changed if key.startswith('data.') and not _is_fixed(key, before, cfg)]
  allowed = [item for item in changed if allow_data_change and item[0] in data_keys]
  refused = [item for item in changed if item not in allowed]
  if refused:
    key, old, new = refused[0]
    more = f' (first of {len(refused)})' if len(refused) > 1 else ''
    data = ' If other data is what you want, add --allow_data_change.' if key in data_keys else ''
    raise ConfigError(
      f'{key} is {old!r} in {saved}, {new!r} in this command{more}. A resumed run keeps its model, data and schedule; '
      f'nothing was changed. Set it back, or use another --workdir.{data}'
    )
  return [f'{key} was {old!r}, is {new!r}' for key, old, new in allowed]


def _is_fixed(key: str, before: Experiment, after: Experiment) -> bool:
  """Whether a key of `data` means another run: other ids of sentinels, or other steps of rows of several lengths."""
  if any(isinstance(cfg.data.packing, LengthBuckets) for cfg in (before, after)):
    return key in ('data.sentinels', 'data.batch_size', 'data.targets_length') or key.startswith('data.packing.')
  return key == 'data.sentinels'


def has_checkpoint(workdir: Folder) -> bool:
  return any((workdir / 'checkpoints').glob('[0-9]*'))


def check_not_lost(latest: int | None, recorded, every: int, workdir: Folder) -> None:
  """Raises CheckpointError where the metrics tell of checkpoints that are not there: a save ends before the next."""
  if latest is None and every > 0 and recorded and recorded[-1]['step'] > 2 * every:
    raise CheckpointError(
      'CKPT-NONE',
      f'no checkpoint in {workdir}, though its metrics.jsonl reaches step {recorded[-1]["step"]}. Not starting from '
      'step 0; bring checkpoints/ back, or use another --workdir.',
    )


def check_same_data(
  saved: Mapping[str, Any],
  found: Mapping[str, Any],
  step: int,
  workdir: Folder,
  *,
  allow_data_change: bool = False,
) -> list[str]:
  """Raises CheckpointError where the data of `step` (`DataSource.fingerprint`, saved with it) is not that of now.

  With `allow_data_change` a line is returned for what differs; the tokenizer must be the same even so.
  """
  before, after = _flat(saved), _flat(found)
  keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
  lines = [f'{key} was {_short(before.get(key))}, is {_short(after.get(key))}' for key in keys]
  if keys and not (allow_data_change and 'tokenizer' not in keys):
    add = '' if 'tokenizer' in keys else ', or add --allow_data_change to continue with it from the same position'
    raise CheckpointError(
      'CKPT-DATA',
      f'step {step} in {workdir} was trained on other data: {", ".join(lines)}. '
      f'Nothing was changed; bring the data back, or use another --workdir{add}.',
    )
  return lines


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
