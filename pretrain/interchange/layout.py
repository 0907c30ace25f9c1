"""How a tensor of theirs holds a parameter of ours: views, so that one description reads and writes.

A layout names the axes of their tensor in order, as in `(heads head_dim) embed`; axes in parentheses are one dimension.
Ours are the axes of the parameter (models/specs.py), without `layers`: their files have a tensor for each layer.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from models.specs import ParamSpec

Sizes = Mapping[str, int]


STACKED = ('layers', 'experts')  # the axes along which their files have a tensor each
RENAMED = {'one_head': 'kv_heads'}  # a single key head has an axis word of its own


@dataclasses.dataclass(frozen=True)
class Entry:
  """`ours` is the path of a parameter; `theirs` the name of a tensor, with `{0}` for the layer where ours is stacked.

  An atom of `layout` is the name of an axis of ours, `axis@start/total` for an axis that lies in a longer one, or
  `@index/total` for one place of an axis that ours lacks. `split` writes an axis of ours as two, the outer one first.
  """

  ours: str
  theirs: str
  layout: str
  split: Mapping[str, tuple[tuple[str, int], ...]] = dataclasses.field(default_factory=dict)

  @property
  def stacked(self) -> int:
    """How many leading axes of ours are tensors of their own in their file."""
    return self.theirs.count('{')

  def names(self, spec: ParamSpec) -> dict[tuple[int, ...], str]:
    """The tensors that hold the parameter, by their place on the stacked axes of ours."""
    return {place: self.theirs.format(*place) for place in np.ndindex(spec.shape[: self.stacked])}

  def shape(self, spec: ParamSpec) -> tuple[int, ...]:
    """The shape of each of these tensors."""
    sizes = self._sizes(spec)
    return tuple(math.prod(_total(atom, sizes) for atom in dim) for dim in _parse(self.layout))

  def view(self, tensor: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """The places of the parameter in one `tensor`: a view with the axes of ours, split axes still apart."""
    sizes, atoms = self._sizes(spec), [atom for dim in _parse(self.layout) for atom in dim]
    whole = tensor.reshape([_total(atom, sizes) for atom in atoms])
    kept = whole[tuple(_index(atom, sizes) for atom in atoms)]
    left = [atom.partition('@')[0] for atom in atoms if not atom.startswith('@')]
    return kept.transpose([left.index(name) for name in self._axes(spec)])

  def read(self, tensor: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """The part of the parameter that `tensor` holds; a view unless axes were split."""
    return self.view(tensor, spec).reshape(spec.shape[self.stacked :])

  def write(self, tensor: np.ndarray, spec: ParamSpec, values: np.ndarray) -> None:
    """Puts the part of the parameter that `tensor` holds into its places."""
    view = self.view(tensor, spec)
    view[...] = values.reshape(view.shape).astype(view.dtype)

  def _own(self, spec: ParamSpec) -> list[str]:
    return [RENAMED.get(axis, axis) for axis in spec.axes[self.stacked :]]

  def _axes(self, spec: ParamSpec) -> list[str]:
    return [name for axis in self._own(spec) for name, _ in self.split.get(axis, ((axis, 0),))]

  def _sizes(self, spec: ParamSpec) -> dict[str, int]:
    sizes = dict(zip(self._own(spec), spec.shape[self.stacked :], strict=True))
    return sizes | {name: size for parts in self.split.values() for name, size in parts}


def _parse(layout: str) -> list[list[str]]:
  """
  >>> _parse('embed (@1/3 heads head_dim)')
  [['embed'], ['@1/3', 'heads', 'head_dim']]
  """
  return [dim.strip('()').split() for dim in re.findall(r'\([^)]*\)|[^\s()]+', layout)]


def _total(atom: str, sizes: Sizes) -> int:
  name, cut, place = atom.partition('@')
  return int(place.partition('/')[2]) if cut else sizes[name]


def _index(atom: str, sizes: Sizes) -> slice | int:
  name, cut, place = atom.partition('@')
  start = int(place.partition('/')[0]) if cut else 0
  return slice(start, start + sizes[name]) if name else start


def reader(entry: Entry, spec: ParamSpec, tensors: Mapping[tuple[int, ...], Callable[[], np.ndarray]]) -> Callable:
  """`read(index)`: the part of the parameter at `index`, for `jax.make_array_from_callback`.

  Only that part is copied; a tensor is mapped while its part is.
  """

  def read(index: tuple[slice, ...]) -> np.ndarray:
    ranges = [range(*own.indices(size)) for own, size in zip(index, spec.shape, strict=True)]
    part, stacked = np.empty([len(own) for own in ranges], spec.dtype), entry.stacked
    for at in np.ndindex(part.shape[:stacked]):
      place = tuple(own[i] for own, i in zip(ranges, at, strict=False))
      part[at] = entry.read(tensors[place](), spec)[index[stacked:]]
    return part

  return read
