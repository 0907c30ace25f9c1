"""Rotary positions in a config.json: rope_parameters (transformers 5), or rope_theta and rope_scaling (4)."""

from collections.abc import Mapping
from typing import Any

from models.families.decoder import DecoderConfig
from models.layers.positions.rotary import Linear, Llama3, NoScaling, RopeScaling, Yarn
from pretrain.interchange.config_json import ConfigJson

SUPPORTED: dict[str, type] = {'default': NoScaling, 'linear': Linear, 'llama3': Llama3, 'yarn': Yarn}
TYPES = {kind: name for name, kind in SUPPORTED.items()}
# Their key -> ours. Of keys that are absent or null, ours have the defaults of transformers.
KEYS = {
  'factor': 'factor', 'original_max_position_embeddings': 'original_max_positions',
  'low_freq_factor': 'low_freq_factor', 'high_freq_factor': 'high_freq_factor', 'beta_fast': 'beta_fast',
  'beta_slow': 'beta_slow', 'attention_factor': 'attention_factor', 'truncate': 'truncate',
}  # fmt: skip
REQUIRED = {
  'linear': ('factor',), 'yarn': ('factor', 'original_max_position_embeddings'),
  'llama3': ('factor', 'original_max_position_embeddings', 'low_freq_factor', 'high_freq_factor'),
}  # fmt: skip
ALWAYS = ('rope_type', 'type', 'rope_theta', 'partial_rotary_factor')


def read_rope(config: ConfigJson, theta: float, fraction: float | None = None) -> dict[str, Any]:
  """The keys rope_theta, rotary_fraction and rope_scaling of a model; notes problems with all others.

  `fraction` is the default of a family that rotates a part of each head; None: of one that always rotates all of it.
  """
  config.ignore('rope_parameters', 'rope_scaling')
  found = config.values.get('rope_parameters') or config.values.get('rope_scaling') or {}
  if not isinstance(found, Mapping):
    config.problems.append(f'rope_scaling={found!r} is no object')
    found = {}
  base, inner = config.take('rope_theta', theta, float), ConfigJson(found, 'rope_parameters')
  own = {'rope_theta': inner.take('rope_theta', base, float), 'rope_scaling': _scaling(config, inner)}
  if fraction is None:
    inner.expect('partial_rotary_factor', 1.0)
  else:
    share = config.take('partial_rotary_factor', fraction, float)
    own['rotary_fraction'] = inner.take('partial_rotary_factor', share, float)
  config.problems += [f'rope_parameters.{problem}' for problem in inner.problems]
  return own


def _scaling(config: ConfigJson, inner: ConfigJson) -> RopeScaling:
  values = inner.values
  name = values.get('rope_type', values.get('type', 'default'))
  if name not in SUPPORTED:
    config.problems.append(f'rope_type={name!r} (supported: {" or ".join(map(repr, SUPPORTED))})')
    return NoScaling()
  kind, required = SUPPORTED[name], REQUIRED.get(name, ())
  fields = kind.__dataclass_fields__
  known = [theirs for theirs, ours in KEYS.items() if ours in fields]
  if extra := sorted(key for key, value in values.items() if value is not None and key not in (*known, *ALWAYS)):
    config.problems.append(f'rope_type={name!r} with {", ".join(extra)}, which change it')
  given = {}
  for key in known:
    if values.get(key) is not None or key in required:
      whole = key == 'original_max_position_embeddings'
      given[KEYS[key]] = inner.take(key, kind=bool if key == 'truncate' else int if whole else float)
  return kind(**given)


def write_rope(cfg: DecoderConfig) -> dict[str, Any]:
  """The keys of both forms, so that old and new releases of transformers read the same."""
  scaling = cfg.rope_scaling
  own = {'rope_type': TYPES.get(type(scaling), scaling.name)}  # one of ours alone is refused when it is read back
  for theirs, ours in KEYS.items():
    value = getattr(scaling, ours, None)
    if value is not None and (theirs, value) != ('truncate', True):  # an addition that older releases lack
      own[theirs] = value
  if cfg.rotary_fraction != 1.0:
    own['partial_rotary_factor'] = cfg.rotary_fraction
  old = {} if isinstance(scaling, NoScaling) else {'rope_scaling': own}
  return {'rope_theta': cfg.rope_theta, **old, 'rope_parameters': {**own, 'rope_theta': cfg.rope_theta}}
