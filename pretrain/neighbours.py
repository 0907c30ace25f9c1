"""Whether `data`, `models` and `pallas_kernels` are ours: names so common that another folder may have them too."""

import importlib.util
import pathlib

from pretrain.errors import ConfigError

NAMES = ('data', 'models', 'pallas_kernels')


def check_neighbours() -> None:
  """Raises ConfigError where another folder comes before ours on sys.path; imports none of the three."""
  root = pathlib.Path(__file__).resolve().parents[1]
  for name in NAMES:
    spec = importlib.util.find_spec(name)
    found = None if spec is None else spec.origin or next(iter(spec.submodule_search_locations or ()), None)
    if found is None or not pathlib.Path(found).resolve().is_relative_to(root / name):
      raise ConfigError(
        f'import {name} finds {found or "nothing"}, not {root / name}. Nothing was changed; start `pretrain` instead '
        'of python -m pretrain, or in another folder, and take the folder of the other one out of PYTHONPATH.'
      )
