"""Number formats: which values a code of a few bits can have, how codes share a scale, and what a product quantizes to.

Sources: OCP 8-bit Floating Point Specification (OFP8) 1.0; OCP Microscaling Formats (MX) 1.0, §5; NVFP4: NVIDIA 2025,
arXiv:2509.25149, §2 and appendix B; fp8 for training: Micikevicius et al. 2022, arXiv:2209.05433.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import KernelError

Scale = Literal['tensor', 'channel', 'block', 'delayed']
Rounding = Literal['nearest', 'stochastic']
ScaleFormat = Literal['float32', 'e8m0', 'two_level']


@dataclasses.dataclass(frozen=True)
class Element:
  """The values of one code, symmetric around 0. `mantissa` None: integers; otherwise its number of stored bits.

  `dtype` holds one code in a product of hardware. `smallest_exponent` is that of normal numbers; below it values have
  the spacing of the smallest normal ones.
  """

  name: str
  bits: int
  largest: float
  dtype: Any
  mantissa: int | None = None
  smallest_exponent: int = 0

  @property
  def is_integer(self) -> bool:
    return self.mantissa is None


INT8 = Element('int8', 8, 127.0, jnp.int8)
INT4 = Element('int4', 4, 7.0, jnp.int4)
E4M3 = Element('e4m3', 8, 448.0, jnp.float8_e4m3fn, 3, -6)
E5M2 = Element('e5m2', 8, 57344.0, jnp.float8_e5m2, 2, -14)
E2M1 = Element('e2m1', 4, 6.0, jnp.float4_e2m1fn, 1, 0)


@dataclasses.dataclass(frozen=True)
class Format:
  """An element with its scales: `block` None where any of `Scale` may be chosen."""

  element: Element
  scales: ScaleFormat = 'float32'
  block: int | None = None


FORMATS = {
  'int8': Format(INT8),
  'int4': Format(INT4),
  'fp8_e4m3': Format(E4M3),
  'fp8_e5m2': Format(E5M2),
  'mxfp8': Format(E4M3, 'e8m0', 32),
  'mxfp8_e5m2': Format(E5M2, 'e8m0', 32),
  'mxfp4': Format(E2M1, 'e8m0', 32),
  'nvfp4': Format(E2M1, 'two_level', 16),
}


@dataclasses.dataclass(frozen=True)
class Operand:
  """How one matrix of a product is quantized.

  `scale` 'tensor': one for all; 'channel': one for each row or column that the product does not sum over; 'block': one
  for each `block` consecutive numbers that it does; 'delayed': one for all, from the sizes that the matrix had before.
  The formats mx… and nvfp4 have blocks of their own.

  Raises KernelError for a format, scale or rounding that does not exist, and for scales that the format does not have.
  """

  format: str
  scale: Scale = 'channel'
  block: int | None = None
  rounding: Rounding = 'nearest'

  def __post_init__(self):
    if self.format not in FORMATS:
      known = ', '.join(map(repr, FORMATS))
      raise KernelError(f'quantized_matmul has no format {self.format!r}; choose from {known}.')
    for field, choices in (('scale', get_args(Scale)), ('rounding', get_args(Rounding))):
      if (value := getattr(self, field)) not in choices:
        known = ', '.join(map(repr, choices))
        raise KernelError(f'quantized_matmul has no {field} {value!r}; choose from {known}.')
    if self.block is not None and self.block < 1:
      raise KernelError(f'quantized_matmul got blocks of {self.block} numbers; use at least 1.')
    own = FORMATS[self.format].block
    if own is not None and self.scale not in ('channel', 'block'):
      raise KernelError(
        f"quantized_matmul: {self.format} has scales of blocks, not scale='{self.scale}'; remove `scale`."
      )
    if own is not None:
      object.__setattr__(self, 'scale', 'block')
      object.__setattr__(self, 'block', self.block or own)
    if own is not None and self.block != own:
      raise KernelError(f'quantized_matmul: {self.format} has blocks of {own}, not {self.block}; remove `block`.')
    if (self.scale == 'block') != (self.block is not None):
      raise KernelError(
        f"quantized_matmul got scale='{self.scale}' with block={self.block}; a block size belongs to scale='block'."
      )

  @property
  def element(self) -> Element:
    return FORMATS[self.format].element

  @property
  def scales(self) -> ScaleFormat:
    return FORMATS[self.format].scales

  @property
  def is_random(self) -> bool:
    return self.rounding == 'stochastic'

  @property
  def carrier(self) -> Any:
    """The dtype in which a product takes the quantized numbers; blocks' own scales are multiplied into them.

    bfloat16 has 8 significant bits: it holds an element of 8 bits or less times a power of two exactly, and one of e2m1
    (2 significant bits) times one of e4m3 (4).
    """
    if self.scale != 'block':
      return self.element.dtype
    return jnp.float32 if self.scales == 'float32' else jnp.bfloat16

  @property
  def in_hardware(self) -> bool:
    """Whether the product multiplies codes, and not the numbers that they stand for."""
    return self.scale != 'block'


Pair = tuple[Operand, Operand]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """Operands of the three products of a matrix w, each independent of the others; None: not quantized.

  `forward`: (x, w); `dgrad`, the gradient of x: (g, w); `wgrad`, that of w: (x, g), where g is the gradient of x w.
  `weights` stands alone: w is rounded, and multiplied as any other matrix.
  """

  forward: Pair | None = None
  dgrad: Pair | None = None
  wgrad: Pair | None = None
  weights: Operand | None = None

  @property
  def pairs(self) -> dict[str, Pair]:
    found = {'forward': self.forward, 'dgrad': self.dgrad, 'wgrad': self.wgrad}
    return {name: pair for name, pair in found.items() if pair is not None}

  @property
  def is_random(self) -> bool:
    return any(operand.is_random for pair in self.pairs.values() for operand in pair)

  @property
  def is_delayed(self) -> bool:
    return any(operand.scale == 'delayed' for pair in self.pairs.values() for operand in pair)

  @property
  def formats(self) -> list[str]:
    return sorted({operand.format for pair in self.pairs.values() for operand in pair})

  def block(self, product: str) -> int:
    """The number that must divide the lengths over which `product` sums."""
    alone = (self.weights,) if product == 'forward' and self.weights is not None else ()
    blocks = [operand.block or 1 for operand in (*self.pairs.get(product, ()), *alone)]
    return int(np.lcm.reduce(blocks)) if blocks else 1


def values_of(element: Element) -> np.ndarray:
  """float64[2 ** bits]: the number of each code, sign bit first. Integers are in two's complement.

  >>> values_of(E2M1)[:8].tolist()
  [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
  """
  codes = np.arange(2**element.bits)
  if element.mantissa is None:
    half = 2 ** (element.bits - 1)
    return np.where(codes < half, codes, codes - 2 * half).astype(np.float64)
  steps, body = 2**element.mantissa, codes % 2 ** (element.bits - 1)
  exponent, fraction = body // steps, body % steps
  significand = np.where(exponent == 0, fraction, fraction + steps)
  power = element.smallest_exponent - element.mantissa + np.maximum(exponent - 1, 0)
  sign = np.where(codes == body, 1.0, -1.0)
  # Codes above the largest number: e5m2 has infinities (IEEE 754), e4m3 only NaN.
  beyond = np.where((fraction == 0) & (element == E5M2), np.inf, np.nan)
  size = significand * 2.0**power
  return np.copysign(np.where(size > element.largest, beyond, size), sign)
