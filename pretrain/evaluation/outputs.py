"""Outputs for many prompts: batches of prompts of nearly equal lengths, decoded on the mesh of the model."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from models.decode.beam import beam_search
from models.decode.cached import PLACES
from models.decode.sampling import Sampling
from models.decode.writing import write
from pretrain.devices.mesh import BATCH_AXES, batch_shards, to_global
from pretrain.errors import ConfigError
from pretrain.evaluation.prompts import packed_batch, prompt_batch, special_ids
from pretrain.evaluation.texts import until_end
from pretrain.evaluation.writer import Writer

PADDED = 32  # prompts are padded to a multiple of it: one compilation serves many lengths
MOST_BEAMS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
  """How outputs are found: by `beams`, or token by token by `sampling`; `batch` prompts at once.

  `seed` and the number of a prompt decide what is drawn for it, whatever the batch. `packed`: prompts of a batch are
  read in fewer rows where that saves some.
  """

  sampling: Sampling = Sampling()
  beams: int | None = None
  seed: int = 0
  batch: int = 1
  packed: bool = True


GREEDY = Decoding()


def check_decoding(how: Decoding) -> None:
  """Raises ConfigError, naming the flag, for a value out of range and for flags that exclude each other."""
  s = how.sampling
  ranges = (
    ('temperature', s.temperature, s.temperature is None or 0 < s.temperature < float('inf'), 'more than 0'),
    ('top_k', s.top_k, s.top_k is None or s.top_k >= 1, 'at least 1'),
    ('top_p', s.top_p, s.top_p is None or 0 < s.top_p <= 1, 'more than 0 and at most 1'),
    ('repetition_penalty', s.repetition_penalty, 0 < s.repetition_penalty < float('inf'), 'more than 0'),
    ('beams', how.beams, how.beams is None or 1 <= how.beams <= MOST_BEAMS, f'from 1 to {MOST_BEAMS}'),
    ('seed', how.seed, 0 <= how.seed < 2**32, 'from 0 to 4294967295'),
    ('batch', how.batch, how.batch >= 1, 'at least 1'),
  )
  for flag, value, fits, wanted in ranges:
    if not fits:
      raise ConfigError(f'--{flag}={value}; it must be {wanted}.')
  drawn = {'top_k': s.top_k, 'top_p': s.top_p, 'seed': how.seed or None}
  if s.temperature is None and (useless := [flag for flag, value in drawn.items() if value is not None]):
    raise ConfigError(f'--{useless[0]} changes nothing without --temperature: outputs are greedy; add --temperature=1.')
  if how.beams is not None and s != GREEDY.sampling:
    raise ConfigError('--beams searches for the most likely output; leave out --temperature and --repetition_penalty.')


def outputs(
  writer: Writer,
  inputs: Sequence[list[int]],
  rooms: Sequence[int],
  how: Decoding = GREEDY,
  drawn: Sequence[int] | None = None,
  starts: bool = True,
) -> Iterator[tuple[int, list[int]]]:
  """(number of a prompt, the ids of its output up to its end) as batches are finished; `rooms` are the most tokens.

  `drawn` are the numbers that the keys of sampling fold in, by default those of the prompts. Without `starts`, the
  prompts of a decoder are read without the token that rows of training begin with.
  A batch of one has exactly its prompt, and prompts come in their order. Larger batches hold prompts of one kind,
  sorted by length, the longest first, padded to a multiple of PADDED. Raises ConfigError where the mesh does not divide
  the batch.
  """
  shards = 1 if writer.model.mesh is None else batch_shards(writer.model.mesh)
  if how.batch % shards:
    raise ConfigError(
      f'--batch={how.batch} does not divide over mesh.{"*".join(BATCH_AXES)}={shards}; use a multiple of it.'
    )
  most, eos = max(rooms, default=0), special_ids(writer.data).eos
  drawn = range(len(inputs)) if drawn is None else drawn
  for numbers in grouped(inputs, how.batch, eos):
    alone = how.batch == 1
    length = len(inputs[numbers[0]]) if alone else padded(len(inputs[numbers[0]]))
    filled = (numbers + numbers[:1] * how.batch)[: how.batch]  # rows that are left over repeat a prompt
    rows = _rows(writer, [inputs[number] for number in numbers], length, how, shards, starts)
    limits, keys = [rooms[number] for number in filled], [drawn[number] for number in filled]
    found = _decode(writer, rows, limits[0] if alone else most, limits, keys, how)
    for number, row in zip(numbers, found.tolist(), strict=False):
      yield number, until_end(row[: rooms[number]], eos)


def grouped(inputs: Sequence[list[int]], batch: int, eos: tuple[int, ...]) -> list[list[int]]:
  """The numbers of the prompts in each batch. Prompts that end with EOS, which see themselves, are kept apart."""
  if batch == 1:
    return [[number] for number in range(len(inputs))]
  kinds: dict[bool, list[int]] = {}
  for number in sorted(range(len(inputs)), key=lambda number: -len(inputs[number])):
    kinds.setdefault(inputs[number][-1:] in [[token] for token in eos], []).append(number)
  return [own[i : i + batch] for own in kinds.values() for i in range(0, len(own), batch)]


def _rows(
  writer: Writer, prompts: list[list[int]], length: int, how: Decoding, shards: int, starts: bool
) -> dict[str, np.ndarray]:
  """`how.batch` rows of prompts, or fewer packed ones; those left over repeat the first prompt."""
  ids = writer.data.vocabulary.ids
  if how.packed and how.batch > 1:
    packed = packed_batch(prompts, writer.cfg, length, ids, shards, starts)
    if packed is not None:
      again = np.repeat(packed[PLACES][:1], how.batch - len(prompts), 0)
      return packed | {PLACES: np.concatenate([packed[PLACES], again])}
  rows = prompt_batch((prompts + prompts[:1] * how.batch)[: how.batch], writer.cfg, length, ids)
  if not starts:  # as padding, it is not read
    rows['decoder_segment_ids'] = rows['decoder_segment_ids'] * (rows['decoder_positions'] > 0)
  return rows


def _decode(writer: Writer, rows, most: int, rooms: list[int], numbers: list[int], how: Decoding) -> np.ndarray:
  """int32[batch, most]; ids that the tokenizer lacks are never chosen."""
  ids, vocab_size = special_ids(writer.data)._asdict(), writer.data.vocabulary.size
  mesh = writer.model.mesh
  rows = rows if mesh is None or mesh.size == 1 else to_global(rows, mesh)
  limits = None if len(numbers) == 1 else jnp.asarray(rooms, jnp.int32)
  if how.beams is not None:
    found = beam_search(writer.model, writer.params, rows, most, vocab_size, how.beams, rooms=limits, **ids)
    return np.asarray(found[0])[:, 0]
  draws = {}
  if how.sampling.temperature is not None:
    draws = {'seed': jnp.uint32(how.seed), 'numbers': jnp.asarray(numbers, jnp.uint32)}
  return np.asarray(
    write(writer.model, writer.params, rows, most, vocab_size, how.sampling, rooms=limits, **draws, **ids)
  )


def padded(length: int) -> int:
  return -(-max(length, 1) // PADDED) * PADDED
