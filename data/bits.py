"""Random bits that depend on their seed, purpose and counters, never on the order in which they are drawn."""

import zlib
from collections.abc import Sequence

import numpy as np

_GOLDEN, _SPREAD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)  # odd: multiplication is one-to-one
_MASK = 2**64 - 1
_SMALL = 4096


def philox(seed: int, purpose: str, *counter: int) -> np.random.Philox:
  """The bit generator of (seed, purpose) at `counter` (at most three integers, e.g. epoch and row).

  Counter-based: two streams never meet, so hosts, workers and resumed runs draw the same bits. Draw with
  `random_raw`: the raw stream is stable, NumPy's distributions may change between releases.
  Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
  """
  place = np.zeros(4, np.uint64)
  place[1 : 1 + len(counter)] = counter  # word 0 counts the draws
  return np.random.Philox(key=_philox_key(seed, purpose), counter=place)


def draws(seed: int, purpose: str, counters: Sequence[tuple[int, int, int]], counts: Sequence[int]) -> np.ndarray:
  """What `philox(seed, purpose, *counter).random_raw(count)` gives for each, end to end: uint64[sum(counts)].

  One generator is moved to each counter in turn: creating a generator takes longer than drawing some hundred numbers.
  """
  generator = np.random.Philox(key=_philox_key(seed, purpose))
  state = generator.state
  drawn = np.empty(sum(counts), np.uint64)
  end = 0
  for counter, count in zip(counters, counts, strict=True):
    state['state']['counter'][1:] = counter
    generator.state = state
    drawn[end : end + count] = generator.random_raw(count)
    end += count
  return drawn


def _philox_key(seed: int, purpose: str) -> np.ndarray:
  return np.array([seed % 2**64, zlib.crc32(purpose.encode())], np.uint64)


def permutation(seed: int, purpose: str, *counter: int, size: int) -> np.ndarray:
  """A uniformly random order of `range(size)`: int64[size]."""
  return np.argsort(philox(seed, purpose, *counter).random_raw(size), kind='stable')


def stream_key(seed: int, purpose: str, *counter) -> np.ndarray:
  """uint64[1]: the key of (seed, purpose, counter) for `permute`; of arrays as counters, an array of keys."""
  key = _mix_int(seed % 2**64 ^ _mix_int(zlib.crc32(purpose.encode()) + int(_GOLDEN)))
  for i, value in enumerate(counter):
    if isinstance(value, np.ndarray):
      return _keys(key, counter[i:])
    key = _mix_int(key ^ _mix_int(int(value) + int(_GOLDEN)))  # Python integers: ten times as fast as arrays
  return np.array([key], np.uint64)


def _keys(key: int, counter) -> np.ndarray:
  keys = np.array([key], np.uint64)
  for value in counter:
    keys = _mix(keys ^ _mix(np.atleast_1d(value).astype(np.uint64) + _GOLDEN))
  return keys


def orders(keys: np.ndarray, size: int) -> np.ndarray:
  """int64[keys, size]: a uniformly random order of `range(size)` for each key; `permute` serves large ranges."""
  places = _mix(np.arange(1, size + 1, dtype=np.uint64) * _GOLDEN)
  return np.argsort(_mix(keys[:, None] ^ places), axis=1, kind='stable')


def permute(index: np.ndarray, size: int | np.ndarray, key: np.ndarray) -> np.ndarray:
  """Where a random order of `range(size)` puts each `index`: int64, one-to-one for each key. No memory, any size.

  `key` is uint64, one for all or one for each index, and so is `size`. A Feistel network over pairs below
  a * b >= size, a and b near its root, walked until it lands inside: Black and Rogaway 2002, "Ciphers with arbitrary
  finite domains", §5. Raises ValueError for an index outside the range.

  >>> sorted(permute(np.arange(10), 10, stream_key(0, 'example')).tolist())
  [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
  """
  place = np.asarray(index, np.int64).astype(np.uint64)
  sizes, keys = (np.broadcast_to(values, place.shape) for values in (np.asarray(size).astype(np.uint64), key))
  if (place >= sizes).any():
    raise ValueError(f'indices {np.min(index)} .. {np.max(index)} are not all in range({np.min(size)}).')
  # Enough rounds to make all orders equally likely, in small ranges and in large ones.
  for outside, rounds in (np.flatnonzero(sizes < _SMALL), 16), (np.flatnonzero(sizes >= _SMALL), 8):
    while len(outside):
      place[outside] = _feistel(place[outside], sizes[outside], keys[outside], rounds)
      outside = outside[place[outside] >= sizes[outside]]
  return place.astype(np.int64)


def _feistel(place: np.ndarray, sizes: np.ndarray, keys: np.ndarray, rounds: int) -> np.ndarray:
  root = np.sqrt(sizes).astype(np.uint64)
  root = np.maximum(root + (root * root < sizes), 2)
  radix = root, np.maximum((sizes + root - 1) // root, 2)
  halves = [place % root, place // root]
  for number in range(rounds):
    this, other = number % 2, 1 - number % 2
    keys = keys + _GOLDEN
    halves[this] = (halves[this] + _mix(keys ^ (halves[other] * _SPREAD))) % radix[this]
  return halves[1] * root + halves[0]


def _mix(value: np.ndarray) -> np.ndarray:
  """A bijection of 64 bits in which every bit of the result depends on every bit of `value` (splitmix64's)."""
  value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return value ^ (value >> np.uint64(31))


def _mix_int(value: int) -> int:
  """`_mix` of a Python number."""
  value &= _MASK
  value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
  value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
  return value ^ value >> 31


def uniform(keys: np.ndarray) -> np.ndarray:
  """float64 in (0, 1) for each key."""
  return ((_mix(keys) >> np.uint64(12)) + 0.5) * 2.0**-52
