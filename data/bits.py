"""Random bits that depend on what they are for, never on the order in which they are drawn."""

import zlib

import numpy as np


def philox(seed: int, purpose: str, *counter: int) -> np.random.Philox:
  """The bit generator of (seed, purpose) at `counter` (at most three integers, e.g. epoch and row).

  Counter-based: two streams never meet, so hosts, workers and resumed runs draw the same bits. Draw with
  `random_raw`: the raw stream is fixed for ever, NumPy's distributions may change between releases.
  Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
  """
  place = np.zeros(4, np.uint64)
  place[1 : 1 + len(counter)] = counter  # word 0 counts the draws
  key = np.array([seed % 2**64, zlib.crc32(purpose.encode())], np.uint64)
  return np.random.Philox(key=key, counter=place)


def permutation(seed: int, purpose: str, *counter: int, size: int) -> np.ndarray:
  """A uniformly random order of `range(size)`: int64[size]."""
  return np.argsort(philox(seed, purpose, *counter).random_raw(size), kind='stable')
