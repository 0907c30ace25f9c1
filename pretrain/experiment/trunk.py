"""The weights of a step, and those under the adapters of a run with `lora`: the trunk, which other files hold.

A step of a run with `lora` holds adapters, and the fingerprint of the step that `checkpoint.initial` names. What reads
the run reads both, and refuses another trunk.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from models.build import build
from models.layers.low_rank import KEY as LORA
from models.layers.low_rank import LoraConfig, merged, pairs, update
from models.partition import shardings
from models.specs import is_spec
from pretrain.checkpoints import manifest
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.errors import CheckpointError
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.same_stores import Recorded
from pretrain.experiment.saved import load_saved
from pretrain.workdirs.folder import Folder, as_folder

KEY = 'trunk'  # of a saved position: the fingerprint of the trunk


def plain(cfg: Experiment) -> Experiment:
  """`cfg` without adapters: its model has the weights that `read_weights` gives."""
  return dataclasses.replace(cfg, lora=LoraConfig())


def fingerprint(workdir: Folder, step: int) -> str:
  """A hash of the parameters of a step and of the weights under its adapters; equal for copies of the run."""
  try:
    leaves = manifest.read(workdir / 'checkpoints' / str(step)).leaves
  except ValueError as error:
    raise CheckpointError(
      'CKPT-UNVERIFIED',
      f'step {step} of {workdir}/checkpoints has no hashes to recognise it by ({error}), so no adapters can be trained '
      f'on it. Nothing was changed; write it again: pretrain checkpoints average --workdir={workdir} --steps={step}.',
    ) from error
  lines = sorted(f'{key} {leaf.digest}' for key, leaf in leaves.items() if key.startswith('params/'))
  with opened(workdir) as checkpoints:
    lines.append(str(checkpoints.position(step).get(KEY)))
  return hashlib.sha256('\n'.join(lines).encode()).hexdigest()


def trunk_of(workdir: Folder, cfg: Experiment) -> tuple[Folder, int]:
  """(run, step) that `checkpoint.initial` of the run in `workdir` names, wherever this process was started."""
  path = as_folder(Recorded(workdir).resolved(cfg.checkpoint.initial))
  return path.parent, int(path.name)


def check_trunk(found: str, saved: str | None, workdir: Folder, initial: object) -> None:
  """Raises CheckpointError if the adapters in `workdir` were trained on other weights than those in `initial`."""
  if saved is not None and found != saved:
    raise CheckpointError(
      'CKPT-MISMATCH',
      f'the adapters in {workdir} were trained on other weights than those in {initial} (fingerprint {saved[:8]}.., '
      f'found {found[:8]}..). Nothing was changed; bring the weights back.',
    )


def checked_trunk(workdir: Folder, cfg: Experiment, step: int) -> tuple[Folder, int]:
  """(run, step) under the adapters of a step of the run in `workdir`, whose config is `cfg`.

  Raises CheckpointError if it is missing, or if its weights differ from the weights that the step was trained on.
  """
  run, number = trunk_of(workdir, cfg)
  if not (run / 'checkpoints' / str(number)).is_dir():
    raise CheckpointError(
      'CKPT-NONE',
      f'{workdir} holds adapters of {run}/{number}, which does not exist. Nothing was changed; bring that run back.',
    )
  with opened(workdir) as checkpoints:
    saved = checkpoints.position(step).get(KEY)
  check_trunk(fingerprint(run, number), saved, workdir, f'{run}/{number}')
  return run, number


def read_trunk(workdir: Folder, cfg: Experiment, step: int, abstract: Any) -> Any:
  """The weights under the adapters of a step, sharded as in `abstract`; {} where the run has no adapters.

  Raises the errors of `checked_trunk`.
  """
  return read_weights(*checked_trunk(workdir, cfg, step), abstract) if cfg.lora.rank else {}


def read_weights(workdir: Folder, step: int, abstract: Any, *, ema: bool = False) -> Any:
  """The weights of a step, sharded as in `abstract`; adapters are added to those of their trunk.

  Raises CheckpointError where shapes differ, or the trunk is missing or another one.
  """
  saved = workdir / 'config.gin'
  cfg = load_saved(saved) if saved.exists() else None
  own = abstract if cfg is None or not cfg.lora.rank else _adapters(cfg, abstract)
  with opened(workdir) as checkpoints:
    params = checkpoints.restore_params(own, step, ema=ema)
  if cfg is None or not cfg.lora.rank:
    return params
  return _merge(read_trunk(workdir, cfg, step, abstract), params, cfg.lora)


def _adapters(cfg: Experiment, abstract: Any) -> Any:
  """Shapes, dtypes and places of the adapters beside `abstract`, on its mesh."""
  specs, mesh = build(cfg.model, lora=cfg.lora).adapters, jax.tree.leaves(abstract)[0].sharding.mesh
  place = lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)
  return jax.tree.map(place, specs, shardings(specs, mesh), is_leaf=is_spec)


def _merge(weights: Any, adapters: Any, cfg: LoraConfig) -> Any:
  places = jax.tree.map(lambda x: x.sharding, weights)
  add = jax.jit(lambda own, adapters: merged({**own, **adapters}, cfg), out_shardings=places, donate_argnums=0)
  return add(weights, adapters)


def opened(workdir: Folder) -> contextlib.closing[Checkpoints]:
  return contextlib.closing(Checkpoints(workdir, CheckpointConfig(), read_only=True))


class Weight(Protocol):
  """A weight of a step: its shape, and the values at places on its leading axes, read one after the other."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  def parts(self, places: Iterable[tuple[int, ...]]) -> Iterator[np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Adapted:
  """A weight with its adapters added; only the adapters are held."""

  weight: Weight
  a: np.ndarray
  b: np.ndarray
  cfg: LoraConfig

  @property
  def shape(self) -> tuple[int, ...]:
    return self.weight.shape

  def parts(self, places: Iterable[tuple[int, ...]]) -> Iterator[np.ndarray]:
    listed = list(places)
    parts, ndim = self.weight.parts(listed), len(self.shape)
    for place in listed:
      a, b = jnp.asarray(self.a[place]), jnp.asarray(self.b[place])
      yield np.asarray(next(parts) + update(a, b, ndim - len(place), self.cfg))


@contextlib.contextmanager
def weights_reader(workdir: Folder, step: int, *, ema: bool = False) -> Iterator[Callable[[str], Weight | None]]:
  """Inside, `read(path)` is one weight of a step, None if the step lacks it; adapters are added. Nothing is read yet.

  Raises the errors of `read_weights`; values are not compared with the manifest.
  """
  cfg, prefix = load_saved(workdir / 'config.gin'), 'extra/ema' if ema else 'params'
  with opened(workdir) as checkpoints, contextlib.ExitStack() as stack:
    keys = [key for key in checkpoints.shapes(step) if key.startswith(f'{prefix}/')]
    weights = {key.removeprefix(f'{prefix}/'): own for key, own in checkpoints.stored(step, keys).items()}

    if not cfg.lora.rank:
      yield weights.get
      return
    under = stack.enter_context(weights_reader(*checked_trunk(workdir, cfg, step)))
    adapted = {'/'.join(path) for path in pairs(build(cfg.model, lora=cfg.lora).adapters)}

    def read(path: str) -> Weight | None:
      weight = under(path)
      if weight is None or path not in adapted:
        return weight
      a, b = (weights[f'{LORA}/{path}/{name}'].all() for name in 'ab')
      return Adapted(weight, a, b, cfg.lora)

    yield read
