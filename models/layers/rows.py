"""What all blocks of a stack read of the rows of a batch, beside their activations."""

import dataclasses
from typing import Any

from jax import Array

from models.layers.attention import VECTORS, Visibility
from models.layers.positions.rotary import Angles

OF_ROWS = (*sorted(VECTORS), 'kv_places')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cross:
  """What cross-attention reads: the encoder's output (or each layer's keys and values of it), and the visibility."""

  see: Visibility
  memory: Array | None = None
  keys_values: tuple[Array, Array] | None = None


@dataclasses.dataclass(frozen=True)
class Beside:
  """Positions, visibility, what cross-attention reads, and one key for each row."""

  positions: Array | Angles
  see: Visibility
  cross: Cross | None
  keys: Array | None

  def by_row(self) -> dict[str, Any]:
    """What belongs to single rows, arrays [batch, …]; angles may be those of all rows together."""
    cross = self.cross
    return {
      'positions': None if self._shared else self.positions,
      'see': _vectors(self.see),
      'cross': None if cross is None else _vectors(cross.see) | {'memory': cross.memory},
      'keys': self.keys,
    }

  def of_rows(self, rows: dict[str, Any]) -> 'Beside':
    """The same of other rows, in the form of `by_row`."""
    cross = self.cross
    if cross is not None:
      vectors = {name: x for name, x in rows['cross'].items() if name != 'memory'}
      see = dataclasses.replace(cross.see, **vectors)
      cross = dataclasses.replace(cross, see=see, memory=rows['cross']['memory'])
    return Beside(
      self.positions if self._shared else rows['positions'], dataclasses.replace(self.see, **rows['see']), cross,
      rows['keys'],
    )  # fmt: skip

  @property
  def _shared(self) -> bool:
    return isinstance(self.positions, Angles) and self.positions.radians.shape[0] == 1


def _vectors(see: Visibility) -> dict[str, Array | None]:
  return {name: getattr(see, name) for name in OF_ROWS}
