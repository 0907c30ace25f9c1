"""Codes of 4 or 8 bits in words of 32, and the scales that give weights back: `pack-quantized` of compressed-tensors.

Code i of a row is bits i * b to (i + 1) * b of the row's little-endian words, plus 2 ** (b - 1); rows end with whole
words. A weight [outputs, inputs] is code * scale, with a scale for each row, or for each `group` inputs of a row.
Source: vllm-project/compressed-tensors 0.20, compressors/pack_quantized/{base,helpers}.py.
"""

import dataclasses
from typing import Any, Literal

import numpy as np

Kind = Literal['int8', 'int4']
BITS: dict[Kind, int] = {'int8': 8, 'int4': 4}
GROUP: dict[Kind, int] = {'int8': 0, 'int4': 128}  # inputs that share a scale, where none are given; 0: a whole row
WORD = 32  # bits


@dataclasses.dataclass(frozen=True)
class Scheme:
  """How a matrix is quantized: the bits of a code, and how many inputs share a scale; 0: all of a row."""

  bits: int
  group: int

  def groups(self, inputs: int) -> int:
    """Scales of a row."""
    return inputs // self.group if self.group else 1

  def words(self, inputs: int) -> int:
    """Words of a row."""
    return -(-inputs * self.bits // WORD)


def quantized(x: np.ndarray, scheme: Scheme, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
  """(int8 codes [rows, inputs], scales [rows, groups] in `dtype`) of float32 weights: the nearest, ties to even.

  The largest size of a group is the largest code (7, 127), as in pallas_kernels/quantized_matmul/reference.py; codes
  belong to the scale as it is stored. A group of zeros has the scale 1.
  """
  largest = 2 ** (scheme.bits - 1) - 1
  split = x.astype(np.float32).reshape(len(x), scheme.groups(x.shape[1]), -1)
  scales = (np.abs(split).max(-1) / np.float32(largest)).astype(dtype)
  scales = np.where(scales > 0, scales, scales.dtype.type(1))
  codes = np.clip(np.rint(split / scales[..., None].astype(np.float32)), -largest, largest)
  return codes.astype(np.int8).reshape(x.shape), scales


def dequantized(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """float32 [rows, inputs]."""
  split = codes.astype(np.float32).reshape(*scales.shape, -1)
  return (split * scales[..., None].astype(np.float32)).reshape(codes.shape)


def packed(codes: np.ndarray, scheme: Scheme) -> np.ndarray:
  """int32 [rows, words].

  >>> [hex(word) for word in packed(np.arange(-8, 0, dtype=np.int8)[None], Scheme(4, 0))[0]]
  ['0x76543210']
  """
  raw = np.zeros((len(codes), scheme.words(codes.shape[1]) * WORD // scheme.bits), np.uint8)
  raw[:, : codes.shape[1]] = codes.astype(np.int16) + 2 ** (scheme.bits - 1)
  if scheme.bits == 4:
    raw = raw[:, ::2] | raw[:, 1::2] << 4
  return np.ascontiguousarray(raw).view('<i4')


def unpacked(words: np.ndarray, scheme: Scheme, inputs: int) -> np.ndarray:
  """int8 [rows, inputs]: the codes in int32 [rows, words]."""
  raw = np.ascontiguousarray(words, '<i4').view(np.uint8)
  if scheme.bits == 4:
    raw = np.stack([raw & 15, raw >> 4], -1).reshape(len(raw), -1)
  return (raw[:, :inputs].astype(np.int16) - 2 ** (scheme.bits - 1)).astype(np.int8)
