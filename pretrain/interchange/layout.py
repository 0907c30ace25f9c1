"""How a tensor of theirs holds a parameter of ours: views, so that one description reads and writes.

A layout names the axes of their tensor in order, as in `(heads head_dim) embed`; axes in parentheses are one dimension.
Ours are the axes of the parameter (models/specs.py), without `layers`: their files have a tensor for each layer.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from models.specs import ParamSpec

Sizes = Mapping[str, int]
Index = tuple[slice, ...]
Row = np.ndarray | None

RENAMED = {'one_head': 'kv_heads'}  # a single key head has an axis word of its own


class Block(NamedTuple):
  """Elements `begin` to `end` of a tensor, `rows` of its first axis, hold the part `into` of what is wanted.

  `cut` are their places in the parameter's axes, counted from the first of these rows.
  """

  begin: int
  end: int
  rows: int
  cut: Index
  into: Index


@dataclasses.dataclass(frozen=True)
class Entry:
  """`ours` is the path of a parameter; `theirs` the name of a tensor, with `{0}` for the layer where ours is stacked.

  An atom of `layout` is the name of an axis of ours, `axis@start/total` for an axis that lies in a longer one, or
  `@index/total` for one place of an axis that ours lacks. `split` writes an axis of ours as two, the outer one first.

  ours = theirs * `scale` + `shift`, plus the first row of the tensor `row`, where there is one: in float32.
  """

  ours: str
  theirs: str
  layout: str
  split: Mapping[str, tuple[tuple[str, int], ...]] = dataclasses.field(default_factory=dict)
  scale: float = 1.0
  shift: float = 0.0
  row: str | None = None

  @property
  def folds(self) -> bool:
    """Whether ours has other values than theirs."""
    return self.scale != 1.0 or self.shift != 0.0 or self.row is not None

  @property
  def inputs_first(self) -> bool:
    """Whether the tensor of a product is [inputs, outputs], as GPT-2's are."""
    first = self.layout.lstrip('(').split()[0]
    return first == {'out': 'heads', 'down': 'mlp'}.get(self.ours.rpartition('/')[2], 'embed')

  @property
  def stacked(self) -> int:
    """How many leading axes of ours are tensors of their own in their file."""
    return len(set(re.findall(r'\{\d\}', self.theirs)))

  def names(self, spec: ParamSpec) -> dict[tuple[int, ...], str]:
    """The tensors that hold the parameter, by their place on the stacked axes of ours."""
    return {place: self.theirs.format(*place) for place in np.ndindex(spec.shape[: self.stacked])}

  def shape(self, spec: ParamSpec) -> tuple[int, ...]:
    """The shape of each of these tensors."""
    sizes = self._sizes(spec)
    return tuple(math.prod(_total(atom, sizes) for atom in dim) for dim in _parse(self.layout))

  def view(self, tensor: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """The places of the parameter in one `tensor`: a view with the axes of ours, split axes still apart."""
    sizes, atoms = self._sizes(spec), self._atoms()
    whole = tensor.reshape([_total(atom, sizes) for atom in atoms])
    return self._arranged(whole[tuple(_index(atom, sizes) for atom in atoms)], spec)

  def read(self, tensor: np.ndarray, spec: ParamSpec, row: np.ndarray | None = None) -> np.ndarray:
    """The part of the parameter that `tensor` holds."""
    return self.fold(self.view(tensor, spec).reshape(spec.shape[self.stacked :]), row)

  def write(
    self, tensor: np.ndarray, spec: ParamSpec, block: Block, values: np.ndarray, before: np.ndarray | None, row: Row
  ) -> None:
    """Puts `values` into their places in the elements `tensor` of `block`, which are whole rows of the parameter.

    Where `before`, the same elements of the tensor that was imported, gives the same value, it stays: a fold rounds, so
    its inverse may not give the bits back.
    """
    view = self._places(tensor, spec, block)
    if not self.folds:
      view[...] = values.reshape(view.shape)
      return
    found = self.unfold(values, row).astype(tensor.dtype)
    if before is not None:
      old = self.of_block(before, spec, block)
      found = np.where(self.fold(old, row) == values, old.astype(tensor.dtype), found)
    view[...] = found.reshape(view.shape)

  def fold(self, theirs: np.ndarray, row: np.ndarray | None) -> np.ndarray:
    """Values of ours from values of theirs, whose last axis is that of `row`."""
    if not self.folds:
      return theirs
    ours = theirs.astype(np.float32) * np.float32(self.scale) + np.float32(self.shift)
    return ours if row is None else ours + row

  def unfold(self, ours: np.ndarray, row: np.ndarray | None) -> np.ndarray:
    """The inverse of `fold`, up to rounding."""
    return ((ours if row is None else ours - row) - np.float32(self.shift)) / np.float32(self.scale)

  def blocks(self, spec: ParamSpec, wanted: Sequence[range], largest: int) -> Iterator[Block]:
    """The parts of a tensor that hold the part `wanted` of a parameter, of about `largest` elements or fewer.

    A part has whole rows of the tensor's first axis, so it is contiguous in the file.
    """
    sizes, lead = self._sizes(spec), self._atoms()[0]
    axis, inner = self._axis_of(lead, spec)
    total, start = _total(lead, sizes), _start(lead)
    size = math.prod(self.shape(spec)) // total
    if axis is None:
      every = tuple(slice(own.start, own.stop) for own in wanted)
      yield Block(0, total * size, total, every, tuple(slice(0, len(own)) for own in wanted))
      return
    low, high = wanted[axis].start, wanted[axis].stop
    step = max(1, largest // size)
    for first in range(low // inner, -(-high // inner), step):
      rows = min(step, -(-high // inner) - first)
      begin, end = max(low, first * inner), min(high, (first + rows) * inner)
      cut = [slice(own.start, own.stop) for own in wanted]
      into = [slice(0, len(own)) for own in wanted]
      cut[axis], into[axis] = slice(begin - first * inner, end - first * inner), slice(begin - low, end - low)
      yield Block((start + first) * size, (start + first + rows) * size, rows, tuple(cut), tuple(into))

  def of_block(self, values: np.ndarray, spec: ParamSpec, block: Block) -> np.ndarray:
    """The part of the parameter that the elements of `block` hold, before `fold`."""
    arranged, shape, at = self._places(values, spec, block), [], 0
    for axis in self._own(spec):  # joins split axes
      parts = len(self._parts(axis))
      shape.append(math.prod(arranged.shape[at : at + parts]))
      at += parts
    return arranged.reshape(shape)[block.cut]

  def _places(self, values: np.ndarray, spec: ParamSpec, block: Block) -> np.ndarray:
    """The places of the parameter in the elements of `block`: a view with the axes of ours, split axes still apart."""
    sizes, (lead, *others) = self._sizes(spec), self._atoms()
    whole = values.reshape([block.rows, *(_total(atom, sizes) for atom in others)])
    first = slice(None) if self._axis_of(lead, spec)[0] is not None else _index(lead, sizes)
    return self._arranged(whole[(first, *(_index(atom, sizes) for atom in others))], spec)

  def boxes(
    self, spec: ParamSpec, wanted: Sequence[range], chunks: Sequence[int], read: Callable[[Index], np.ndarray]
  ) -> Iterator[tuple[Index, np.ndarray]]:
    """(places in the part `wanted` of the parameter, values) of each chunk of a tensor, which `read`s a box of itself.

    For layouts of whole axes. Boxes end where chunks do, or where the next whole row of inner axes does.
    """
    sizes, own, dims = self._sizes(spec), self._own(spec), _parse(self.layout)
    inner = [math.prod(sizes[name] for name in dim[1:]) for dim in dims]
    spans = [
      _spans(wanted[own.index(dim[0])], -(-chunk // size)) for dim, chunk, size in zip(dims, chunks, inner, strict=True)
    ]
    for at in itertools.product(*spans):
      box = tuple(slice(low * size, high * size) for (low, high), size in zip(at, inner, strict=True))
      shape = [n for (low, high), dim in zip(at, dims, strict=True) for n in (high - low, *map(sizes.get, dim[1:]))]
      lead = {dim[0]: span for dim, span in zip(dims, at, strict=True)}
      cut = [slice(None) if name in lead else slice(w.start, w.stop) for name, w in zip(own, wanted, strict=True)]
      into = [
        slice(lead[name][0] - w.start, lead[name][1] - w.start) if name in lead else slice(0, len(w))
        for name, w in zip(own, wanted, strict=True)
      ]
      yield tuple(into), self._arranged(read(box).reshape(shape), spec)[tuple(cut)]

  def _axis_of(self, lead: str, spec: ParamSpec) -> tuple[int | None, int]:
    """(the axis of ours whose outermost part is the atom `lead`, how many of it are in a row); None: there is none."""
    name = lead.partition('@')[0]
    for axis, own in enumerate(self._own(spec)):
      (outer, _), *rest = self._parts(own)
      if outer == name:
        return axis, math.prod(size for _, size in rest)
    return None, 1

  def _arranged(self, kept: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """Axes in the order of the layout -> in the order of ours, split axes still apart."""
    left = [atom.partition('@')[0] for atom in self._atoms() if not atom.startswith('@')]
    return kept.transpose([left.index(name) for own in self._own(spec) for name, _ in self._parts(own)])

  def _atoms(self) -> list[str]:
    return [atom for dim in _parse(self.layout) for atom in dim]

  def _own(self, spec: ParamSpec) -> list[str]:
    return [RENAMED.get(axis, axis) for axis in spec.axes[self.stacked :]]

  def _parts(self, axis: str) -> tuple[tuple[str, int], ...]:
    return self.split.get(axis, ((axis, 0),))

  def _sizes(self, spec: ParamSpec) -> dict[str, int]:
    sizes = dict(zip(self._own(spec), spec.shape[self.stacked :], strict=True))
    return sizes | {name: size for parts in self.split.values() for name, size in parts}


def _parse(layout: str) -> list[list[str]]:
  """
  >>> _parse('embed (@1/3 heads head_dim)')
  [['embed'], ['@1/3', 'heads', 'head_dim']]
  """
  return [dim.strip('()').split() for dim in re.findall(r'\([^)]*\)|[^\s()]+', layout)]


def _spans(wanted: range, step: int) -> list[tuple[int, int]]:
  """
  >>> _spans(range(3, 9), 4)
  [(3, 4), (4, 8), (8, 9)]
  """
  starts = range(wanted.start // step * step, wanted.stop, step)
  return [(max(start, wanted.start), min(start + step, wanted.stop)) for start in starts]


def _total(atom: str, sizes: Sizes) -> int:
  name, cut, place = atom.partition('@')
  return int(place.partition('/')[2]) if cut else sizes[name]


def _start(atom: str) -> int:
  """Where an axis begins in the axis that holds it."""
  name, cut, place = atom.partition('@')
  return int(place.partition('/')[0]) if cut and name else 0


def _index(atom: str, sizes: Sizes) -> slice | int:
  name, cut, place = atom.partition('@')
  start = int(place.partition('/')[0]) if cut else 0
  return slice(start, start + sizes[name]) if name else start
