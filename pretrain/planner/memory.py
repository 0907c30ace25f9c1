"""How much of a device's HBM a step needs, from the parameter descriptions alone: what is kept, what is in work.

The parts are those that stand in the programs that libtpu 0.0.42 compiles (`pretrain plan --explain` lists them).
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping

from models.layers import remat
from models.partition import ACTIVATION_RULES
from models.specs import ParamSpec, is_matrix
from pallas_kernels.linear_cross_entropy import chunked
from pretrain.planner.layouts import Layout
from pretrain.planner.stages import turns
from pretrain.planner.workload import Layers, Path, Workload, divided, lanes, shard, stored

F32 = 4
VMEM = 64 * 2**20  # bytes of an array that the compiler keeps in the vector memory between two operations
# Products whose results a layer keeps for its gradient, beside its input; the rest is made again.
PRODUCTS = ('query', 'key', 'value', 'out', 'gate', 'up')
KEPT = {'dots': PRODUCTS, 'none': PRODUCTS} | remat.KEPT
# With remat='none', arrays as wide as the MLP that its activation keeps beside its input and output; a norm keeps two
# f32 arrays as wide as the model, and two in the dtype of activations.
OF_ACTIVATION = {'gelu_tanh': 4, 'gelu_exact': 3, 'silu': 1, 'relu': 0}


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
  """What depends on a workload and its mesh alone. Bytes: `state` on the device, its `parameters`, in the host's memory
  `moments` and `layers`, the parameters there, the largest `chunk` of both, `copies` in the dtype of activations.
  Values: `trained`, gradients on a device, `of_stack`, those of each stack; `whole`, all parameters where only
  `tensor`, `expert` and `stage` divide them; `dense`, those of them that are no experts'.
  """

  state: float
  parameters: float
  moments: float
  layers: float
  chunk: float
  copies: float
  trained: float
  of_stack: tuple[float, ...]
  whole: float
  dense: float


def of_mesh(work: Workload, layout: Layout) -> OfMesh:
  return _of_mesh(work, tuple(layout.sizes.items()))


@functools.lru_cache(maxsize=4096)
def _of_mesh(work: Workload, items: tuple[tuple[str, int], ...]) -> OfMesh:
  sizes = dict(items)
  only = dict.fromkeys(sizes, 1) | {axis: sizes[axis] for axis in ('tensor', 'expert', 'stage')}
  stacked = [spec for stack in work.stacks for spec in stack.specs.values()]
  every = work.every
  values = lambda count, specs, over: sum(count(spec.shape, spec.axes, over) for spec in specs)
  chunks, kinds = collections.Counter[Path | None](), collections.Counter[str]()
  for array in work.state:
    if array.away is not None:
      chunks[array.away] += array.bytes(sizes)
      kinds[array.kind] += array.bytes(sizes)
  return OfMesh(
    state=sum(array.bytes(sizes) for array in work.state if array.away is None),
    parameters=sum(array.bytes(sizes) for array in work.state if array.kind == 'parameters'),
    moments=kinds['optimizer'],
    layers=kinds['parameters'],
    chunk=max(chunks.values(), default=0),
    copies=0 if work.itemsize == F32 else work.itemsize * values(stored, stacked, sizes),
    trained=sum(_padded(spec, sizes) for path, spec in every.items() if path in work.trained),
    of_stack=tuple(_gradients(work, stack, sizes) for stack in work.stacks),
    whole=values(divided, every.values(), only),
    dense=values(divided, (spec for spec in every.values() if 'experts' not in spec.axes[:-1]), only),
  )


def _gradients(work: Workload, stack: Layers, sizes: Mapping[str, int]) -> float:
  blocks = (stack.name, 'blocks')  # its adapters are at lora/NAME/blocks
  own = {path: spec for path, spec in work.every.items() if blocks in (path[:2], path[1:3])}
  return sum(_padded(spec, sizes) for path, spec in own.items() if path in work.trained)


def _padded(spec: ParamSpec, sizes: Mapping[str, int]) -> int:
  """Values of a gradient on one device. Those of experts keep their order of dims, and the last is padded to a tile;
  others are laid out so that a long dim is last."""
  if 'experts' not in spec.axes[:-1] or not is_matrix(spec):
    return stored(spec.shape, spec.axes, sizes)
  *others, last = shard(spec.shape, spec.axes, sizes)
  return math.prod(others) * lanes(last)


def estimate(work: Workload, layout: Layout) -> Memory:
  """What a step needs where it needs most: at the head, in the backward pass of a stack, at the embedding, or in the
  update."""
  moments = [_at_head(work, layout), _at_embedding(work, layout)]
  moments += [_in_backward(work, layout, stack) for stack in work.stacks]
  moments += [_at_update(work, layout)]
  return max(moments, key=lambda found: found.total)


def arguments(work: Workload, layout: Layout) -> float:
  """The state and the rows: ids, segments, positions and weights, four bytes each."""
  return of_mesh(work, layout).state + work.rows / layout.shards * work.tokens * 4 * 4


def _at_head(work: Workload, layout: Layout) -> Memory:
  kept = sum(kept_by(work, layout, stack) for stack in work.stacks)
  mesh = of_mesh(work, layout)
  return Memory(arguments(work, layout), kept, _accumulated(mesh, layout), mesh.copies, head(work, layout))


def _table(work: Workload, layout: Layout) -> float:
  """The embedding's table, gathered once for all microbatches."""
  if layout.accumulate == 1:
    return 0.0
  return work.itemsize * work.cfg.model.vocab_size / layout.sizes['tensor'] * work.cfg.model.embed


def _at_embedding(work: Workload, layout: Layout) -> Memory:
  """The gradient of a table is made whole, and summed whole."""
  mesh = of_mesh(work, layout)
  grads = _accumulated(mesh, layout) + F32 * mesh.trained
  tables = 3 * work.itemsize * work.cfg.model.vocab_size / layout.sizes['tensor'] * work.cfg.model.embed
  return Memory(arguments(work, layout), 0.0, grads, mesh.copies, tables)


def _in_backward(work: Workload, layout: Layout, stack: Layers) -> Memory:
  """Stacks go backwards in turn: activations of those after `stack` are gone, gradients of those before not made."""
  place, mesh = work.stacks.index(stack), of_mesh(work, layout)
  kept = sum(kept_by(work, layout, s) for s in work.stacks[: place + 1])
  grads = _accumulated(mesh, layout) + F32 * (mesh.trained - sum(mesh.of_stack[:place]))
  copies = mesh.copies + _table(work, layout)
  return Memory(arguments(work, layout), kept, grads, copies, in_layer(work, layout, stack))


def _at_update(work: Workload, layout: Layout) -> Memory:
  """Three chunks of the state on the host: one fetched, its updated copy on the way back, the next on the way in."""
  mesh = of_mesh(work, layout)
  return Memory(arguments(work, layout), 0.0, F32 * mesh.trained, 0.0, 3 * mesh.chunk)


def moved(work: Workload, layout: Layout) -> tuple[float, float]:
  """Bytes that a step moves to a device from its host, and back. Layers come for the forward and the backward pass of
  each microbatch, for the update and for the sum with it.
  """
  mesh = of_mesh(work, layout)
  return mesh.moments + (2 * layout.accumulate + 2) * mesh.layers, mesh.moments + mesh.layers


def _accumulated(mesh: OfMesh, layout: Layout) -> float:
  return F32 * mesh.trained if layout.accumulate > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class Product:
  """A matrix of a layer. `tokens`: positions of one row that are multiplied with it, once for each of their experts;
  `width`: values of a position's result on one device; `values`: those of the matrix, gathered over fsdp; `experts`:
  among how many experts they are divided; `masked`: how many products of all rows the gradient of the matrix takes."""

  name: str
  spec: ParamSpec
  tokens: float
  width: float
  values: float
  experts: int
  masked: int

  @property
  def routed(self) -> bool:
    return 'experts' in self.spec.axes[:-1]


def products(work: Workload, layout: Layout, stack: Layers) -> tuple[Product, ...]:
  return _products(work, stack, tuple(layout.sizes.items()))


@functools.lru_cache(maxsize=4096)
def _products(work: Workload, stack: Layers, items: tuple[tuple[str, int], ...]) -> tuple[Product, ...]:
  sizes = dict(items)

  def product(path: tuple[str, ...], spec: ParamSpec) -> Product:
    routed = 'experts' in spec.axes[:-1]
    experts = spec.shape[spec.axes.index('experts')] // sizes['expert'] if routed else 1
    # Without a capacity a product of all rows, masked, for each expert.
    masked = experts if work.cfg.model.expert_capacity is None else 1
    of = _tokens(work, stack, path, sizes), _width(spec, sizes), _values(spec, sizes)
    return Product(path[-1], spec, *of, experts, masked)

  return tuple(product(path, spec) for path, spec in stack.specs.items() if is_matrix(spec))


def _tokens(work: Workload, stack: Layers, path: tuple[str, ...], sizes: Mapping[str, int]) -> float:
  across = path[0] == 'cross_attention' and path[-1] in ('key', 'value')
  routed = work.cfg.model.experts is not None and path[0] == 'mlp' and path[-1] != 'router'
  length = (stack.memory if across else stack.length) / sizes['sequence']
  return length * (choices(work, sizes['expert']) if routed else 1)


def choices(work: Workload, parts: int) -> float:
  """For how many rows of experts there is room on a device for each token of it, with experts on `parts` devices: the
  tokens of `parts` devices may choose it, which without a capacity all can do."""
  model = work.cfg.model
  if model.expert_capacity is not None:
    return model.experts_per_token * model.expert_capacity
  return parts * min(model.experts_per_token, model.experts // parts)


def _values(spec: ParamSpec, sizes: Mapping[str, int]) -> float:
  one = math.prod(d for d, a in zip(spec.shape, spec.axes, strict=True) if a != 'layers')
  parts = [rule for a in spec.axes if (rule := ACTIVATION_RULES.get(a)) in ('tensor', 'expert')]
  return one / math.prod(sizes[rule] for rule in parts)


def _width(spec: ParamSpec, sizes: Mapping[str, int]) -> float:
  """All dims but the contracted ones."""
  names = [a for a in spec.axes if a not in ('layers', 'experts')]
  dims = dict(zip(spec.axes, spec.shape, strict=True))
  outs = names[1:] if names[0] == 'embed' else names[-1:]
  shared = math.prod(sizes[rule] for axis in outs if (rule := ACTIVATION_RULES.get(axis)) == 'tensor')
  return math.prod(dims[axis] for axis in outs) / shared


def tokens(work: Workload, layout: Layout, length: int) -> float:
  """Positions of a microbatch on one device."""
  return layout.rows(work.rows) * length / layout.sizes['sequence']


def of_head(work: Workload, layout: Layout) -> float:
  """Positions of a microbatch whose loss one device computes: stages divide them where they divide the rows."""
  stages = layout.sizes['stage']
  return tokens(work, layout, work.stacks[-1].length) / (1 if layout.rows(work.rows) % stages else stages)


def results(work: Workload, layout: Layout, stack: Layers, *names: str) -> float:
  """Values of a layer's products of these names for a microbatch, on one device."""
  each = sum(p.tokens * p.width for p in products(work, layout, stack) if p.name in names)
  return layout.rows(work.rows) * each


def kept(work: Workload, layout: Layout) -> tuple[str, ...]:
  """The named activations that a layer saves for its backward pass, on the device or the host.

  A name that no gradient reads is left out: the compiler does not save it.
  """
  names, without = layout.keep if layout.remat == 'custom' else KEPT[layout.remat], unread(work)
  return tuple(name for name in names if name not in without)


def unread(work: Workload) -> tuple[str, ...]:
  """The products that no gradient reads: a layer's last ones, which are added to the residual without a norm and, with
  experts, without a router's weight.
  """
  model = work.cfg.model
  if model.norm_placement != 'pre' or model.experts is not None:
    return ()
  return ('down',) if model.parallel == 'none' else ('out', 'down')


def kept_by(work: Workload, layout: Layout, stack: Layers) -> float:
  """Bytes of activations that all layers of a stack keep for the backward pass."""
  if layout.remat == 'none':
    return turns(work, layout, stack) * _everything(work, layout, stack)
  return inputs_by(work, layout, stack) + named_by(work, layout, stack)


def inputs_by(work: Workload, layout: Layout, stack: Layers) -> float:
  """Bytes of the inputs of a stack's layers, where they are not in host memory."""
  own = 0.0 if 'input' in layout.offload else tokens(work, layout, stack.length) * work.cfg.model.embed
  return turns(work, layout, stack) * work.itemsize * own


def named_by(work: Workload, layout: Layout, stack: Layers) -> float:
  """Bytes of the activations that a policy names, where they are not in host memory."""
  names = [name for name in kept(work, layout) if name not in layout.offload]
  mixed = results(work, layout, stack, 'query') if 'context' in names else 0.0
  return turns(work, layout, stack) * work.itemsize * (mixed + results(work, layout, stack, *names))


def _everything(work: Workload, layout: Layout, stack: Layers) -> float:
  """Bytes that a layer keeps with remat='none': inputs of norms, queries, keys, values, what attention mixes (in the
  kernel's order of dims and the layer's), every step of the MLP's activation."""
  model, own = work.cfg.model, tokens(work, layout, stack.length)
  of = lambda *names: results(work, layout, stack, *names)
  norms = sum(path[-1] == 'scale' and spec.axes[1:] == ('embed',) for path, spec in stack.specs.items())
  wide = norms * own * model.embed * 2 * (F32 + work.itemsize)
  inner = (OF_ACTIVATION[model.mlp.activation] + (2 if model.mlp.gated else 1)) * of('up') + of('up', 'gate')
  return wide + work.itemsize * (of('query', 'key', 'value') + 2 * of('query') + inner) + _scores(work, layout, stack)


def _scores(work: Workload, layout: Layout, stack: Layers) -> float:
  """Bytes of the scores of a layer of disentangled attention, which no kernel computes: in f32, as weights in the
  activations' dtype, and their mask."""
  model = work.cfg.model
  if model.positions != 'disentangled':
    return 0.0
  heads = model.heads / layout.sizes['tensor']
  return tokens(work, layout, stack.length) * stack.length * heads * (F32 + work.itemsize + 1)


def in_layer(work: Workload, layout: Layout, stack: Layers) -> float:
  """The backward pass of one layer: gathered matrices, activations that are made again, and their gradients."""
  found, own = products(work, layout, stack), tokens(work, layout, stack.length)
  attention = len(stack.keys)  # self- and cross-attention have equal matrices, and are in work in turn
  gathered = sum(p.values * _copies(p) for p in found)
  gathered += sum(p.values for p in found if p.name in ('query', 'key', 'value', 'out')) / attention
  heads = results(work, layout, stack, 'query', 'key', 'value') / attention
  live = 4 * results(work, layout, stack, 'up') + 2 * heads + 6 * own * work.cfg.model.embed
  return work.itemsize * (gathered + live) + _scores(work, layout, stack) + _ring(work, layout, stack)


def _ring(work: Workload, layout: Layout, stack: Layers) -> float:
  """What travels in the backward pass of ring attention, here and on its way: keys, values, and their gradients in f32;
  and the gradient of queries, which waits in f32.
  """
  if layout.sizes['sequence'] == 1:
    return 0.0
  keys, queries = (results(work, layout, stack, *names) for names in (('key', 'value'), ('query',)))
  return ((work.itemsize + 2 * F32) * keys + F32 * queries) / len(stack.keys)


def _copies(product: Product) -> int:
  """How many whole copies of a matrix of the MLP are there at once; those of experts do not wait for their turn, and
  their gradients are whole too."""
  if product.routed:
    return {'gate': 1, 'up': 1, 'down': 2}.get(product.name, 0)
  return int(product.name in ('gate', 'up'))


def head(work: Workload, layout: Layout) -> float:
  """Logits in f32 and the gathered table; then the table's whole gradient, in the dtype of activations. In chunks (the
  logits are those of one), or with capped logits: the gradient of the logits (of a part), or the table's in f32.
  """
  own = of_head(work, layout)
  vocab, embed = work.cfg.model.vocab_size / layout.sizes['tensor'], work.cfg.model.embed
  parts, chunks = 1, 1
  if in_chunks := work.cfg.kernels.linear_cross_entropy == 'chunked':
    parts, chunks = chunked.split(round(own), round(vocab))
  logits, gradient = own * vocab * F32 / parts / chunks, vocab * embed * work.itemsize
  if in_chunks or work.cfg.model.logit_softcap is not None:
    gradient = max(own * vocab * work.itemsize / parts, vocab * embed * F32)
  in_hbm = logits if logits > VMEM else 0.0
  return in_hbm + vocab * embed * work.itemsize + gradient + 4 * own * embed * work.itemsize
