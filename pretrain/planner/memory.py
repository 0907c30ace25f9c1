"""How much of a device's HBM a step needs, from the parameter descriptions alone: what is kept, what is in work.

The parts are those that stand in the programs that libtpu 0.0.42 compiles (`pretrain plan --explain` lists them).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

from models.partition import ACTIVATION_RULES
from models.specs import ParamSpec, is_matrix
from pretrain.planner.layouts import Layout
from pretrain.planner.workload import Layers, Workload, divided

F32 = 4
# Products whose results a layer keeps for its gradient, beside its input; the rest is made again.
KEPT = {'full': (), 'dots': ('query', 'key', 'value', 'out', 'gate', 'up'),
        'none': ('query', 'key', 'value', 'out', 'gate', 'up')}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device. `arguments`: the state and the batch; `kept`: activations for the backward pass; `gradients`
  with those of earlier microbatches; `weights`: copies of parameters in the activations' dtype; `layer`: the layer or
  the head in work, with its gathered weights.
  """

  arguments: float
  kept: float
  gradients: float
  weights: float
  layer: float

  @property
  def total(self) -> float:
    return self.arguments + self.kept + self.gradients + self.weights + self.layer


@dataclasses.dataclass(frozen=True)
class OfMesh:
  """What depends on a workload and its mesh alone: bytes of the state and of casts, values of trained parameters on a
  device, values of all parameters where only `tensor` divides them."""

  state: float
  parameters: float
  copies: float
  trained: float
  whole: float


def of_mesh(work: Workload, layout: Layout) -> OfMesh:
  return _of_mesh(work, tuple(layout.sizes.items()))


@functools.lru_cache(maxsize=4096)
def _of_mesh(work: Workload, items: tuple[tuple[str, int], ...]) -> OfMesh:
  sizes = dict(items)
  only = dict.fromkeys(sizes, 1) | {'tensor': sizes['tensor']}
  stacked = {(s.name, 'blocks', *path): spec for s in work.stacks for path, spec in s.specs.items()}
  every = {**work.ends, **stacked}
  values = lambda specs, over: sum(divided(spec.shape, spec.axes, over) for spec in specs)
  return OfMesh(
    state=sum(array.bytes(sizes) for array in work.state),
    parameters=sum(array.bytes(sizes) for array in work.state if array.kind == 'parameters'),
    copies=0 if work.itemsize == F32 else work.itemsize * values(stacked.values(), sizes),
    trained=values([spec for path, spec in every.items() if path in work.trained], sizes),
    whole=values(every.values(), only),
  )


def estimate(work: Workload, layout: Layout) -> Memory:
  """What a step needs where it needs most: at the head, or in the backward pass of a stack."""
  moments = [_at_head(work, layout), *(_in_backward(work, layout, stack) for stack in work.stacks)]
  return max(moments, key=lambda found: found.total)


def arguments(work: Workload, layout: Layout) -> float:
  """The state and the rows: ids, segments, positions and weights, four bytes each."""
  return of_mesh(work, layout).state + work.rows / layout.shards * work.tokens * 4 * 4


def _at_head(work: Workload, layout: Layout) -> Memory:
  kept = sum(kept_by(work, layout, stack) for stack in work.stacks)
  mesh = of_mesh(work, layout)
  return Memory(arguments(work, layout), kept, _accumulated(mesh, layout), mesh.copies, head(work, layout))


def _in_backward(work: Workload, layout: Layout, stack: Layers) -> Memory:
  """Stacks go backwards in turn: activations of those after `stack` are gone, gradients of all are there."""
  place, mesh = work.stacks.index(stack), of_mesh(work, layout)
  kept = sum(kept_by(work, layout, s) for s in work.stacks[: place + 1])
  grads = _accumulated(mesh, layout) + F32 * mesh.trained
  return Memory(arguments(work, layout), kept, grads, mesh.copies, in_layer(work, layout, stack))


def _accumulated(mesh: OfMesh, layout: Layout) -> float:
  return F32 * mesh.trained if layout.accumulate > 1 else 0.0


def parts(spec: ParamSpec, sizes: Mapping[str, int], experts: int | None = None) -> float:
  """Values of one layer's matrix, gathered over fsdp: `tensor` still divides it. With `experts`, of so many."""
  one = math.prod(d for d, a in zip(spec.shape, spec.axes, strict=True) if a != 'layers')
  if experts and 'experts' in spec.axes[:-1]:
    one = one // spec.shape[spec.axes.index('experts')] * experts
  return one / math.prod(sizes[rule] for a in spec.axes if (rule := ACTIVATION_RULES.get(a)) == 'tensor')


def width(spec: ParamSpec, sizes: Mapping[str, int]) -> float:
  """Values of one token's product with a matrix on one device: all its dims but the contracted ones."""
  names = [a for a in spec.axes if a not in ('layers', 'experts')]
  dims = dict(zip(spec.axes, spec.shape, strict=True))
  outs = names[1:] if names[0] == 'embed' else names[-1:]
  shared = math.prod(sizes[rule] for axis in outs if (rule := ACTIVATION_RULES.get(axis)) == 'tensor')
  return math.prod(dims[axis] for axis in outs) / shared


def tokens(work: Workload, layout: Layout, length: int) -> float:
  """Positions of a microbatch on one device."""
  return layout.rows(work.rows) * length / layout.sizes['sequence']


def products(work: Workload, layout: Layout, stack: Layers) -> list[tuple[str, ParamSpec, float]]:
  """(name, matrix, positions multiplied with it) of a layer; a token counts once for each of its experts."""
  return [
    (path[-1], spec, _multiplied(work, layout, stack, path)) for path, spec in stack.specs.items() if is_matrix(spec)
  ]


def _multiplied(work: Workload, layout: Layout, stack: Layers, path: tuple[str, ...]) -> float:
  across = path[0] == 'cross_attention' and path[-1] in ('key', 'value')
  positions = tokens(work, layout, stack.memory if across else stack.length)
  routed = work.cfg.model.experts is not None and path[0] == 'mlp' and path[-1] != 'router'
  return positions * (work.cfg.model.experts_per_token if routed else 1)


def kept_by(work: Workload, layout: Layout, stack: Layers) -> float:
  """Activations that all layers of a stack keep for the backward pass."""
  embed, own = work.cfg.model.embed, tokens(work, layout, stack.length)
  found = products(work, layout, stack)
  values = own * embed + sum(n * width(s, layout.sizes) for name, s, n in found if name in KEPT[layout.remat])
  if layout.remat == 'none':  # what attention mixes and the MLP's hidden layer too, and each norm's output
    again = [(n, s) for name, s, n in found if name in ('query', 'up')]
    values += own * 2 * embed + sum(n * width(s, layout.sizes) for n, s in again)
  return values * work.itemsize * stack.number


def in_layer(work: Workload, layout: Layout, stack: Layers) -> float:
  """The backward pass of one layer: gathered matrices, activations that are made again, and their gradients."""
  sizes, own = layout.sizes, tokens(work, layout, stack.length)
  found = products(work, layout, stack)
  attention = len(stack.keys)  # self- and cross-attention have equal matrices, and are in work in turn
  gathered = sum(parts(s, sizes) for name, s, _ in found if name in ('gate', 'up'))
  gathered += sum(parts(s, sizes) for name, s, _ in found if name in ('query', 'key', 'value', 'out')) / attention
  hidden = max((n * width(s, sizes) for name, s, n in found if name == 'up'), default=0.0)
  heads = sum(n * width(s, sizes) for name, s, n in found if name in ('query', 'key', 'value')) / attention
  return work.itemsize * (gathered + 4 * hidden + 2 * heads + 6 * own * work.cfg.model.embed)


def head(work: Workload, layout: Layout) -> float:
  """Logits in f32 and their gradient, with the table of the head and of the embedding gathered over fsdp."""
  own = tokens(work, layout, work.stacks[-1].length)
  vocab = work.cfg.model.vocab_size / layout.sizes['tensor']
  table = vocab * work.cfg.model.embed * work.itemsize
  return own * vocab * (F32 + work.itemsize) + 2 * table + 4 * own * work.cfg.model.embed * work.itemsize
