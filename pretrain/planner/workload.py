"""What a training step works on, read off the parameter descriptions: stacks of layers, arrays of the state, rows."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp

from models.build import build
from models.families.encoder import EncoderConfig
from models.families.encoder_decoder import EncoderDecoderConfig
from models.partition import PARAMETER_RULES
from models.specs import ParamSpec, Tree, is_spec
from pretrain.experiment.experiment import Experiment
from pretrain.optim.averaging import Ema
from pretrain.optim.offload import moves, moves_parameter
from pretrain.optim.optimizer import make_optimizer
from pretrain.optim.state import own_path

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Held:
  """An array of the state; `axes` None: whole on every device. `kind`: parameters, optimizer or average. `away`: in the
  memory of the host; arrays of one path come to the device together."""

  kind: str
  shape: tuple[int, ...]
  axes: tuple[str | None, ...] | None
  itemsize: int
  away: Path | None = None

  def bytes(self, sizes: Mapping[str, int]) -> int:
    """On one device of a mesh with these axes."""
    return self.itemsize * stored(self.shape, self.axes, sizes)


@dataclasses.dataclass(frozen=True, eq=False)
class Layers:
  """A stack of equal layers over rows of `length`. `specs` are those of all layers, by the layer's own path."""

  name: str
  number: int
  length: int
  memory: int  # the length of the encoder's rows that it reads; 0 without
  keys: tuple[float, ...]  # scores of a query in one layer, for each attention of a layer, masked tiles left out
  specs: Mapping[Path, ParamSpec]


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: what depends on a mesh alone is computed once
class Workload:
  """A step of one config, whatever its mesh."""

  cfg: Experiment
  every: Mapping[Path, ParamSpec]  # all parameters, also adapters
  stacks: tuple[Layers, ...]
  ends: Mapping[Path, ParamSpec]  # what is outside the stacks: embeddings, head, norms
  state: tuple[Held, ...]
  trained: frozenset[Path]
  itemsize: int  # bytes of an activation

  @property
  def rows(self) -> int:
    return self.cfg.data.batch_size

  @property
  def tokens(self) -> int:
    """Positions of one row, on all sides."""
    return self.cfg.data.inputs_length + self.cfg.data.targets_length


LANES = 128


def divided(shape: Iterable[int], axes: Iterable[str | None] | None, sizes: Mapping[str, int]) -> int:
  """How many values of an array one device holds."""
  return math.prod(shard(shape, axes, sizes))


def shard(shape: Iterable[int], axes: Iterable[str | None] | None, sizes: Mapping[str, int]) -> list[int]:
  """The part of an array on one device; a dim that its mesh axis does not divide is whole."""
  if axes is None:
    return list(shape)
  parts = lambda axis: sizes.get(rule, 1) if axis and isinstance(rule := PARAMETER_RULES[axis], str) else 1
  return [dim // parts(axis) if dim % parts(axis) == 0 else dim for dim, axis in zip(shape, axes, strict=True)]


def stored(shape: Iterable[int], axes: Sequence[str | None] | None, sizes: Mapping[str, int]) -> int:
  """`divided`, with the padding of tiles: one dim lies along the lanes, the one that the compiler pads least."""
  own = shard(shape, axes, sizes)
  choices = [n for n, axis in zip(own, axes or [None] * len(own), strict=True) if axis != 'layers']
  if len(choices) < 2:
    return math.prod(own)
  return round(math.prod(own) * min(lanes(n) / n for n in choices))


def lanes(n: int) -> int:
  """A dim along the lanes of a tile, padded."""
  return -(-n // LANES) * LANES


def paths(tree: Tree) -> dict[Path, ParamSpec]:
  found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)[0]
  return {tuple(str(part.key) for part in path): spec for path, spec in found}


def describe(cfg: Experiment) -> Workload:
  """The workload of a config. Traces the optimizer's init, allocates nothing."""
  model = build(cfg.model, cfg.kernels, None, cfg.lora)
  every = paths(model.specs)
  trained = paths(model.split(model.specs)[0])
  stacks = tuple(_stacks(cfg, every))
  inside = {path for path in every if 'blocks' in path}
  ends = {path: spec for path, spec in every.items() if path not in inside}
  state = (*_parameters(cfg, every), *_optimizer(cfg, model.split(model.specs)[0], trained), *_average(cfg, trained))
  return Workload(cfg, every, stacks, ends, state, frozenset(trained), jnp.dtype(cfg.model.dtype).itemsize)


def _parameters(cfg: Experiment, every: Mapping[Path, ParamSpec]) -> list[Held]:
  home = lambda path, spec: path if moves_parameter(cfg.optimizer.offload, spec) else None
  return [Held('parameters', s.shape, s.axes, jnp.dtype(s.dtype).itemsize, home(path, s)) for path, s in every.items()]


def _average(cfg: Experiment, trained: Mapping[Path, ParamSpec]) -> list[Held]:
  return [Held('average', s.shape, s.axes, 4) for s in trained.values()] if isinstance(cfg.averaging, Ema) else []


def _optimizer(cfg: Experiment, tree: Tree, trained: Mapping[Path, ParamSpec]) -> list[Held]:
  """A parameter's statistics lie where it lies; a dim that is not the parameter's is whole (`optim.state`)."""
  tx = make_optimizer(cfg.optimizer, lambda step: step * 0.0, tree, None, spikes=cfg.spikes)
  shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), tree, is_leaf=is_spec)
  found = []
  for path, leaf in jax.tree_util.tree_flatten_with_path(jax.eval_shape(tx.init, shapes))[0]:
    spec = trained.get(own_path(path))
    axes = spec.axes if spec is not None and len(spec.axes) == leaf.ndim else None
    away = spec is not None and moves(cfg.optimizer.offload, spec, leaf.shape)
    found.append(Held('optimizer', leaf.shape, axes, leaf.dtype.itemsize, own_path(path) if away else None))
  return found


def _stacks(cfg: Experiment, every: Mapping[Path, ParamSpec]) -> Iterable[Layers]:
  model, inputs, targets = cfg.model, cfg.data.inputs_length, cfg.data.targets_length
  if isinstance(model, EncoderDecoderConfig):
    yield _stack('encoder', model.encoder_layers, inputs, 0, (_scores(cfg, inputs, causal=False),), every)
    keys = (_scores(cfg, targets, causal=True), float(inputs))
    yield _stack('decoder', model.decoder_layers, targets, inputs, keys, every)
    return
  encoder = isinstance(model, EncoderConfig)
  keys = (_scores(cfg, targets, causal=not encoder),)
  yield _stack('encoder' if encoder else 'decoder', model.layers, targets, 0, keys, every)
  for k in range(getattr(model, 'mtp_depth', 0)):
    yield _stack(f'mtp_{k + 1}', 1, targets, 0, keys, every)


def _scores(cfg: Experiment, length: int, *, causal: bool) -> float:
  """The mean number of keys that a query scores: half of a causal row, and no more than a window."""
  windows = cfg.model.windows or (None,)
  one = lambda w: min(length / 2 if causal else length, cfg.model.sinks + w * (1 if causal else 2) if w else length)
  return sum(map(one, windows)) / len(windows)


def _stack(name: str, number: int, length: int, memory: int, keys: tuple[float, ...], every) -> Layers:
  own = {path[2:]: spec for path, spec in every.items() if path[:2] == (name, 'blocks')}
  return Layers(name, number, length, memory, keys, own)
