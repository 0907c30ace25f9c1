"""How long a step takes at the rates of a chip's maker: matrix products, HBM, links; no overlap of the three networks.

Five numbers are not the maker's. PRODUCTS is the share of the peak that products reach, from the cycles that libtpu
0.0.42 estimates for UL2 20B on v5p:4x4x8. ATTENTION is that of attention kernels, from their schedules at head_dim 128.
WINDOWED: where parameters have no copies along data or replica, and fsdp is at most FEW, libtpu splits products into
loops over the shards, at 2 (Llama 7B on v5e:4x4) to 11 times (T5 base there) their cycles, 3 for Llama 7B on v5p:4x4x4
with fsdp=16 and tensor=4, 5 for Llama 1B on v5e:4x8; with data=4 and fsdp=16 it does not. FILL: what a step keeps in
HBM between passes moves at a tenth (v5p) to a quarter (tpu7x) of the maker's bandwidth, by the cycles that libtpu gives
to a broadcast of 32 MiB. UL2 20B shows it: 'dots' keeps 30 GB more than 'full', makes 0.30 s of products less, and has
0.33 s more of zeros, writes and reads. None of the five comes from a published run;
scripts/bench/planner/published.py prints the predictions beside those.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping

from models.flops import flops_per_step
from models.partition import PARAMETER_RULES, spec_for
from pretrain.devices.chips import Slice
from pretrain.devices.compiler import options_for
from pretrain.planner import memory, torus
from pretrain.planner.layouts import Layout, abstract
from pretrain.planner.stages import gathers, schedule, turns
from pretrain.planner.torus import Group, Time
from pretrain.planner.workload import Layers, Workload, divided
from pretrain.step.across_replicas import parts_of

PRODUCTS = 0.9
WINDOWED, FEW = 3.0, 32
THRESHOLD = 'xla_jf_spmd_threshold_for_windowed_einsum_mib'  # an option that ends that, the default of some chips
ATTENTION = {'v5e': 0.85, 'v5p': 0.85, 'v6e': 0.36, 'tpu7x': 0.31}
# Bytes/s of one device, in bfloat16. Zeros in f32 take half the cycles for a byte (362 to 160 bytes/cycle on v5p, 180
# to 91 on v5e); the update of an f32 array reaches 0.7 of the maker's bandwidth, and counts at all of it.
FILL = {'v5e': 1.36e11, 'v5p': 2.79e11, 'v6e': 1.71e11, 'tpu7x': 8.87e11}
# A loop over layers fills the array of what it keeps with zeros, writes each layer's part, and reads it backwards.
OF_KEPT = 3
# Of what a policy names only the zeros cost: Llama 7B, 8,192 tokens a device, in 1e9 cycles beside 'full', by libtpu
# 0.0.42: v5e:16x16 (4.581) save_context +0.015, save_out_proj -0.017, save_qkv_proj -0.179, save_dot_except_mlp -0.272;
# v5p:4x4x4 (2.347) minimal -0.305, minimal_with_context -0.295.
OF_NAMED = 1
DTYPES = {'float32': 4, 'bfloat16': 2}  # bytes of train.replica_dtype
# Arrays of one layer that pass between a device and its HBM in a forward pass outside of products, by their width:
# residual and norms, the parts of the MLP's activation, layouts and rotations around the attention kernel.
PASSES = {'embed': 8, 'hidden': 3, 'heads': 8}


@dataclasses.dataclass(frozen=True)
class Step:
  """Seconds of one step: `products` and `kernels` of the matrix units, `hbm` beside, links, links between slices."""

  products: float
  kernels: float
  hbm: float
  ici: float
  dcn: float

  @property
  def compute(self) -> float:
    return self.products + self.kernels + self.hbm

  @property
  def total(self) -> float:
    """Without any overlap of links and computation."""
    return self.compute + self.ici + self.dcn

  @property
  def overlapped(self) -> float:
    """With all links overlapped."""
    return max(self.compute, self.ici, self.dcn)

  @property
  def binds(self) -> str:
    parts = {'compute': self.products + self.kernels, 'HBM': self.hbm, 'ICI': self.ici, 'DCN': self.dcn}
    return max(parts, key=lambda name: parts[name])


def mfu(work: Workload, of: Slice, seconds: float) -> float:
  """Model FLOPs (attention over all pairs, nothing recomputed) over those that all devices could do."""
  return model_flops(work) / (of.devices * of.flops * seconds)


def model_flops(work: Workload) -> float:
  data = work.cfg.data
  return work.rows * flops_per_step(
    work.cfg.model, inputs_length=data.inputs_length, targets_length=data.targets_length
  )


def tokens_per_chip(work: Workload, of: Slice, seconds: float) -> float:
  return work.rows * work.tokens / seconds / (of.chips * of.slices)


def estimate(work: Workload, layout: Layout, of: Slice, over: Mapping[tuple[str, ...], Group]) -> Step:
  """The step of a layout; `over` are the groups of its mesh (`torus.groups`)."""
  stacks = [_stack(work, layout, of, stack) for stack in work.stacks]
  products = sum(s[0] for s in stacks) + _head(work, layout)
  rate = of.flops * PRODUCTS / (WINDOWED if windowed(work, layout, of) else 1)
  links = collectives(work, layout, of, over)
  each = layout.accumulate
  return Step(
    products=each * products / rate,
    kernels=each * sum(s[1] for s in stacks) / (of.flops * ATTENTION[of.chip.name]),
    hbm=(each * sum(s[2] for s in stacks) + _update(work, layout)) / of.hbm_rate
    + each * _filled(work, layout) / FILL[of.chip.name],
    ici=links.ici,
    dcn=links.dcn,
  )


def windowed(work: Workload, layout: Layout, of: Slice) -> bool:
  """Whether libtpu splits products with gathered parameters into loops over their shards."""
  if THRESHOLD in options_for(work.cfg.compiler, of.chip.kinds[0]):
    return False
  copies = layout.sizes['data'] * layout.sizes['replica']
  return copies == 1 and 1 < layout.sizes['fsdp'] <= FEW


def _stack(work: Workload, layout: Layout, of: Slice, stack: Layers) -> tuple[float, float, float]:
  """(FLOPs of products, FLOPs of kernels, bytes of HBM outside of both) of a microbatch on one device.

  A gradient costs two products more. What is not kept is made again, but for products that no gradient reads
  (`memory.unread`). The attention kernel runs again unless its output is kept, and so do the rotations and layouts
  around it unless queries are kept behind them.
  """
  found, own = memory.products(work, layout, stack), memory.tokens(work, layout, stack.length)
  rows, rerun, names = layout.rows(work.rows), int(layout.remat != 'none'), memory.kept(work, layout)
  behind = 'query' in names and layout.remat != 'dots'
  forward = lambda p: 2 * rows * p.tokens * p.values / p.experts
  products = sum(forward(p) * (2 + p.masked) for p in found)
  again = sum(forward(p) for p in found if p.name not in (*names, *memory.unread(work)))
  heads = work.cfg.model.heads * work.cfg.model.head_dim / layout.sizes['tensor']
  scores = 4 * own * heads * sum(stack.keys)
  around = work.itemsize * own * PASSES['heads'] * heads * len(stack.keys)
  passes = own * PASSES['embed'] * work.cfg.model.embed + PASSES['hidden'] * memory.results(work, layout, stack, 'up')
  moved = work.itemsize * (passes + 2 * sum(p.values for p in found))
  number = turns(work, layout, stack)
  return (
    number * (products + rerun * again),
    number * scores * (1 + (rerun if 'context' not in names else 0) + 2.5),
    number * (moved * (1 + rerun + 2) + around * (1 + (rerun if not behind else 0) + 2)),
  )


def _head(work: Workload, layout: Layout) -> float:
  """FLOPs of the head, forward and backward, once for each depth that predicts more tokens too."""
  own = memory.of_head(work, layout) * (1 + getattr(work.cfg.model, 'mtp_depth', 0))
  return 6 * own * work.cfg.model.embed * work.cfg.model.vocab_size / layout.sizes['tensor']


def _update(work: Workload, layout: Layout) -> float:
  """Bytes of the optimizer: the state is read and written, also what lies on the host; gradients are read twice."""
  mesh = memory.of_mesh(work, layout)
  return 2 * (mesh.state + mesh.moments + mesh.layers) + 2 * mesh.parameters


def _filled(work: Workload, layout: Layout) -> float:
  """Bytes of a microbatch that move at FILL: what is kept, and half of the zeros of f32 gradients. What goes to the
  host counts as if it were kept: its way there is not estimated.
  """
  layout = dataclasses.replace(layout, offload=())
  if layout.remat in ('none', 'dots'):
    kept = OF_KEPT * sum(memory.kept_by(work, layout, stack) for stack in work.stacks)
  else:
    kept = sum(OF_KEPT * memory.inputs_by(work, layout, stack) for stack in work.stacks)
    kept += sum(OF_NAMED * memory.named_by(work, layout, stack) for stack in work.stacks)
  return kept + memory.F32 * memory.of_mesh(work, layout).trained / 2


def collectives(work: Workload, layout: Layout, of: Slice, over: Mapping[tuple[str, ...], Group]) -> Time:
  """Links of a step: parameters gathered over fsdp in both passes of each microbatch; gradients summed, in the
  activations' dtype, whole over fsdp, then a device's part over the other axes of tokens, and over replicas once a step
  (`_replicas`); activations summed over tensor; keys and values sent around a ring over sequence; tokens on their way
  to experts and back; activations handed from stage to stage.
  """
  sizes, size = layout.sizes, work.itemsize
  named = lambda axes: over.get(tuple(a for a in axes if sizes[a] > 1))
  time = Time()
  whole = memory.of_mesh(work, layout).whole * gathers(work, layout)
  if group := named(('fsdp',)):
    time += torus.seconds('all-gather', size * whole, of, group).times(2)
    time += torus.seconds('all-reduce', size * whole, of, group)
  if group := named(('data', 'sequence')):
    time += torus.seconds('all-reduce', size * whole / sizes['fsdp'], of, group)
  if group := named(('expert',)):
    time += torus.seconds('all-reduce', size * memory.of_mesh(work, layout).dense / sizes['fsdp'], of, group)
    time += _routed(work, layout, of, group)
  if group := named(('tensor',)):
    for stack in work.stacks:
      sums = len(stack.keys) + 1
      again = layout.remat != 'none' and 'out' not in (*memory.kept(work, layout), *memory.unread(work))
      number = turns(work, layout, stack) * (2 * sums + (sums - 1 if again else 0))
      own = memory.tokens(work, layout, stack.length) * work.cfg.model.embed * size
      time += torus.seconds('all-reduce', own, of, group).times(number)
  if group := named(('sequence',)):
    for stack in work.stacks:
      time += _ring(work, layout, of, group, stack)
  if group := named(('stage',)):
    time += _handed_on(work, layout, of, group)
  return time.times(layout.accumulate) + _replicas(work, layout, of, over)


def _replicas(work: Workload, layout: Layout, of: Slice, over: Mapping[tuple[str, ...], Group]) -> Time:
  """Links of the sum over replicas, of the part of the gradients that a device has alone in its slice. Parts that the
  axes along which a parameter has copies have divided so far are gathered again, in the gradients' dtype.
  """
  if (group := over.get(('replica',))) is None:
    return Time()
  sent, gathered = _parts(work, tuple(layout.sizes.items()))
  time = torus.seconds('all-reduce', DTYPES[work.cfg.train.replica_dtype] * sent, of, group)
  for axes, values in gathered.items():
    time += torus.seconds('all-gather', memory.F32 * values, of, over[axes])
  return time


@functools.lru_cache(maxsize=4096)
def _parts(work: Workload, items: tuple[tuple[str, int], ...]) -> tuple[float, Mapping[tuple[str, ...], float]]:
  """(values of gradients that a device sends to other slices, {mesh axes: values of the gradients that are gathered
  over them afterwards, as a device holds them}). A matrix outside of the experts has copies along `expert`, one outside
  of the layers along `stage`.
  """
  sizes, sent, gathered = dict(items), 0.0, collections.Counter[tuple[str, ...]]()
  mesh = abstract(sizes)
  names = lambda spec: {axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())}
  for spec in (spec for path, spec in work.every.items() if path in work.trained):
    held, own = divided(spec.shape, spec.axes, sizes), spec_for(spec.axes, PARAMETER_RULES)
    more = names(parts_of(spec.shape, own, mesh)) - names(own)
    axes = tuple(axis for axis in sizes if axis in more)
    sent += held / math.prod(sizes[axis] for axis in axes)
    gathered[axes] += held
  del gathered[()]
  return sent, gathered


def _handed_on(work: Workload, layout: Layout, of: Slice, over: Group) -> Time:
  """Links between stages: activations in each tick, forward and backward."""
  own, time = schedule(work, layout), Time()
  for stack in work.stacks:
    size = memory.tokens(work, layout, stack.length) / own.microbatches * work.cfg.model.embed * work.itemsize
    time += torus.seconds('collective-permute', size, of, over).times(2 * own.ticks)
  return time


def _routed(work: Workload, layout: Layout, of: Slice, group: Group) -> Time:
  """Links of the tokens of a microbatch: two collectives in each layer, forward and backward, and the first of them
  again where the layer is computed again. With a capacity they exchange the rows of experts, else whole groups of
  tokens are gathered and their sums scattered.
  """
  model, parts, again = work.cfg.model, layout.sizes['expert'], int(layout.remat != 'none')
  if model.experts is None:
    return Time()
  kind, rows = ('all-gather', parts) if model.expert_capacity is None else ('all-to-all', memory.choices(work, parts))
  time = Time()
  for stack in work.stacks:
    size = memory.tokens(work, layout, stack.length) * rows * model.embed * work.itemsize
    time += torus.seconds(kind, size, of, group).times(turns(work, layout, stack) * (4 + again))
  return time


def _ring(work: Workload, layout: Layout, of: Slice, over: torus.Group, stack: Layers) -> Time:
  """Keys and values go around in each pass, in the backward one with their gradients, which are in f32 until home."""
  hops, names = layout.sizes['sequence'], memory.kept(work, layout)
  sent = lambda size: torus.seconds('collective-permute', size, of, over)
  keys = memory.results(work, layout, stack, 'key', 'value')
  passes = 2 + int(layout.remat != 'none' and 'context' not in names)
  around = sent(work.itemsize * keys).times(hops * passes) + sent(memory.F32 * keys).times(hops)
  return (around + sent(work.itemsize * keys)).times(turns(work, layout, stack))
