"""Parity of the blocks of a group of hosts: a lost block is rebuilt from the other hosts. RAID-5 in host RAM.

Every block is padded to the same length and cut into one chunk for each *other* host of its group. Host s keeps the
exclusive or of the chunks that the others have for it, and none of its own. So after the loss of one host, everything
needed to rebuild its block is on the remaining hosts. Parity takes 1 / (hosts - 1) of a block on each host (Patterson,
Gibson, Katz 1988, §11; in training: REFT, arXiv:2310.12670, §4.2).
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

Read = Callable[[int, int, int], np.ndarray]  # (host, first, end) -> those bytes of its block; zeros after its end


def groups(hosts: int, size: int) -> list[list[int]]:
  """Neighbouring hosts in groups of at least `size`, if there are that many; no groups for fewer than two hosts.

  >>> groups(7, 3), groups(2, 3), groups(3, 0), groups(1, 2)
  ([[0, 1, 2], [3, 4, 5, 6]], [[0, 1]], [], [])
  """
  if size < 2 or hosts < 2:
    return []
  count = max(hosts // size, 1)
  bounds = [hosts * i // count for i in range(count + 1)]
  return [list(range(a, b)) for a, b in itertools.pairwise(bounds)]


def group_of(host: int, found: Sequence[Sequence[int]]) -> Sequence[int]:
  """The group that `host` is in; empty without parity."""
  return next((group for group in found if host in group), ())


def chunk_size(sizes: Sequence[int]) -> int:
  """Bytes of a chunk for blocks of these lengths, a multiple of 8; the parity of each host has the same size.

  >>> chunk_size([96, 80, 100])
  56
  """
  return -(-max(sizes) // (8 * (len(sizes) - 1))) * 8


def chunk_for(group: Sequence[int], source: int, holder: int, size: int) -> tuple[int, int]:
  """(first, end) of the chunk of `source`'s block that goes into the parity of `holder`.

  >>> [chunk_for((4, 5, 6), 5, holder, 10) for holder in (4, 6)]
  [(0, 10), (10, 20)]
  """
  place = [host for host in group if host != source].index(holder)
  return place * size, (place + 1) * size


def parity(group: Sequence[int], holder: int, size: int, read: Read) -> np.ndarray:
  """The parity that `holder` keeps: uint8 [size], from the blocks of the others."""
  found = np.zeros(size, np.uint8)
  for source in group:
    if source != holder:
      add(found, read(source, *chunk_for(group, source, holder, size)))
  return found


def rebuild(group: Sequence[int], lost: int, size: int, read: Read, read_parity: Callable[[int], np.ndarray]):
  """The padded block of `lost`: uint8 [(hosts - 1) * size], from the parity and the blocks of the others."""
  block = np.empty((len(group) - 1) * size, np.uint8)
  for holder in group:
    if holder != lost:
      first, end = chunk_for(group, lost, holder, size)
      block[first:end] = read_parity(holder)
      for source in group:
        if source not in (lost, holder):
          add(block[first:end], read(source, *chunk_for(group, source, holder, size)))
  return block


def add(total: np.ndarray, more: np.ndarray) -> None:
  """`total` ^= `more`, by words of 64 bits."""
  words = total.view(np.uint64)
  np.bitwise_xor(words, more.view(np.uint64), out=words)
