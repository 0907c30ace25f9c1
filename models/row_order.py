"""In which order the tokens of a row lie on the devices that share it."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array

PLACES = 'decoder_places'
OF_TOKENS = 'decoder_'


@dataclasses.dataclass(frozen=True)
class RowOrder:
  """Rows of the decoder in 2 * `devices` parts, of which device n has part n and part n from the end: each then sees as
  many keys as any other under causality. With one device rows stay as they are.

  Source: Llama Team 2024, arXiv:2407.21783, §3.3.2.
  """

  devices: int = 1

  def parts(self) -> np.ndarray:
    """The number of each part, as they lie on devices one after the other.

    >>> RowOrder(3).parts().tolist()
    [0, 5, 1, 4, 2, 3]
    """
    first = np.arange(self.devices)
    return np.stack([first, 2 * self.devices - 1 - first], 1).reshape(-1) if self.devices > 1 else np.zeros(1, int)

  def arrange(self, batch: Mapping[str, Array]) -> dict[str, Array]:
    """The batch with the fields of the decoder in this order and PLACES int32[batch, length], their indices in rows."""
    if self.devices == 1:
      return dict(batch)
    own = {name: x for name, x in batch.items() if name.startswith(OF_TOKENS)}
    rows, length = own[f'{OF_TOKENS}target_tokens'].shape
    own[PLACES] = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    return {**batch, **{name: self._taken(x, self.parts()) for name, x in own.items()}}

  def restore(self, x: Array) -> Array:
    """`x[batch, length, ...]` of an arranged batch in the order of its rows."""
    return self._taken(x, np.argsort(self.parts()))

  def _taken(self, x: Array, parts: np.ndarray) -> Array:
    if self.devices == 1:
      return x
    return x.reshape(x.shape[0], len(parts), -1, *x.shape[2:])[:, parts].reshape(x.shape)
