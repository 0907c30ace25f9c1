"""The one matrix product of the models: quantisation and low-rank adapters enter here and nowhere else."""

import jax
from flax import nnx
from jax import Array

from models.specs import cast


def linear(x: Array, w: nnx.Param, contract: int = 1) -> Array:
  """`x[..., *c]` times `w[*c, ...]`, contracting `contract` dims, in x's dtype."""
  own = tuple(range(x.ndim - contract, x.ndim))
  return jax.lax.dot_general(x, cast(w, x), ((own, tuple(range(contract))), ((), ())))
