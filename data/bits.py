"""Random bits that depend on what they are for, never on the order in which they are drawn."""

import math
import zlib

import numpy as np

_GOLDEN, _SPREAD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)  # odd: what they multiply stays apart


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


def stream_key(seed: int, purpose: str, *counter) -> np.ndarray:
  """uint64[1]: the key of (seed, purpose, counter) for `permute`; of arrays as counters, an array of keys."""
  key = _mix(np.array([seed % 2**64], np.uint64) ^ _mix(np.array([zlib.crc32(purpose.encode())], np.uint64) + _GOLDEN))
  for value in counter:
    key = _mix(key ^ _mix(np.atleast_1d(value).astype(np.uint64) + _GOLDEN))
  return key


def orders(keys: np.ndarray, size: int) -> np.ndarray:
  """int64[keys, size]: a uniformly random order of `range(size)` for each key. What `permute` is to large ranges."""
  places = _mix(np.arange(1, size + 1, dtype=np.uint64) * _GOLDEN)
  return np.argsort(_mix(keys[:, None] ^ places), axis=1, kind='stable')


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
  """Where a random order of `range(size)` puts each `index`: int64, one-to-one for each key. No memory, any size.

  `key` is uint64, one for all or one for each index. A Feistel network over pairs below a * b >= size, a and b near
  its root, walked until it lands inside: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", §5. Raises
  ValueError for an index outside the range.

  >>> sorted(permute(np.arange(10), 10, stream_key(0, 'example')).tolist())
  [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
  """
  place = np.asarray(index, np.int64).astype(np.uint64)
  if len(place) and place.max() >= size:
    raise ValueError(f'indices {np.min(index)} .. {np.max(index)} are not all in range({size}).')
  root = max(math.isqrt(size - 1) + 1, 2) if size else 2
  radix = np.uint64(root), np.uint64(max(-(-size // root), 2))
  rounds = 16 if size < 4096 else 8  # what it takes for all orders to be equally likely, in small ranges
  keys, outside = np.broadcast_to(key, place.shape), np.arange(len(place))
  while len(outside):
    place[outside] = _feistel(place[outside], radix, keys[outside], rounds)
    outside = outside[place[outside] >= size]
  return place.astype(np.int64)


def _feistel(place: np.ndarray, radix: tuple[np.uint64, np.uint64], keys: np.ndarray, rounds: int) -> np.ndarray:
  halves = [place % radix[0], place // radix[0]]
  for number in range(rounds):
    this, other = number % 2, 1 - number % 2
    keys = keys + _GOLDEN
    halves[this] = (halves[this] + _mix(keys ^ (halves[other] * _SPREAD))) % radix[this]
  return halves[1] * radix[0] + halves[0]


def _mix(value: np.ndarray) -> np.ndarray:
  """A bijection of 64 bits in which every bit of the result hangs on every bit of `value` (splitmix64's)."""
  value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return value ^ (value >> np.uint64(31))


def uniform(keys: np.ndarray) -> np.ndarray:
  """float64 in (0, 1) for each key."""
  return ((_mix(keys) >> np.uint64(12)) + 0.5) * 2.0**-52
