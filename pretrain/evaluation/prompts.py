"""Prompts as a run reads them: the ids of its training inputs, the row they make, and the room they leave."""

import copy
import re
import reprlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.arguments import is_text
from data.batches.batches import DataSource
from data.errors import DataError
from data.objectives.features import Batch, decoder_features, encoder_decoder_features
from data.objectives.fim import fim_ids
from data.objectives.objectives import Instruction, Supervised, pair_lengths, tasks_of
from data.objectives.tasks import LEFT_TO_RIGHT
from data.packing.best_fit import fill
from data.prepare.messages import marker
from data.ragged import interleave, join
from data.stores.special_ids import SpecialIds
from models.decode.cached import PLACES
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment

CONTINUING = (*LEFT_TO_RIGHT, 'uniform_prefix', 'last_quarter')  # kinds of tasks that continue text

ALL = 'all'  # every special token of the tokenizer
LIKE_SPECIAL = re.compile(r'<\|[^|<>\s]+\|>')


class DecodingIds(NamedTuple):
  """The ids that end an output, fill the row after it, and start the decoder of an encoder-decoder."""

  eos: tuple[int, ...]
  pad: int
  decoder_start: int


def special_ids(data: DataSource) -> DecodingIds:
  """The arguments of `models.decode` that the tokenizer of a run decides."""
  ids = data.vocabulary.ids
  return DecodingIds(ids.eos, ids.filler, ids.first_input)


def prompt_inputs(prompt: str, cfg: Experiment, data: DataSource, place: str = '--text=') -> list[int]:
  """The ids that training has for `prompt` as inputs: [mode] text EOS; the text alone for a causal objective. For
  fill-in-the-middle with one blank: the text before and after it, between its marks (PSM).

  Inputs of pairs and messages of a user are plain text, in which no token is special. Where the objective has mode
  tokens and the prompt begins without one, it gets that of its task: [NLU] for a prompt with blanks (the R denoiser;
  [NLG] where there are only X denoisers), [S2S] for a prompt without.
  Raises ConfigError where the objective trains no such task, or for bytes that are not UTF-8; DataError for a sentinel
  that does not exist. `place` is where the prompt was given.
  """
  if not is_text(prompt):
    raise not_utf8(prompt)
  if isinstance(cfg.objective, Supervised):
    return [*data.tokenizer.encode(prompt), data.vocabulary.ids.end]
  if isinstance(cfg.objective, Instruction):
    encode = data.tokenizer.encode
    return [*encode(marker('user')), *encode(prompt), data.vocabulary.ids.end, *encode(marker('assistant'))]
  ids = data.tokenizer.encode_prompt(prompt)
  vocabulary, objective = data.vocabulary, cfg.objective
  blanks = [i for i, token in enumerate(ids) if vocabulary.is_sentinel(token)]
  tasks = [task for task in tasks_of(objective) if task.shows_blanks == bool(blanks)]
  if not tasks and len(blanks) == 1 and any(task.kind == 'fim' for task in tasks_of(objective)):
    (blank,), (pre, suf, mid) = blanks, fim_ids(vocabulary)
    return [pre, *ids[:blank], suf, *ids[blank + 1 :], mid]
  if not tasks:
    fix = 'leave out <extra_id_k>, the text is continued' if blanks else 'mark one, e.g. with <extra_id_0> at the end'
    trained = 'to fill blanks' if blanks else 'to do anything but fill blanks'
    raise ConfigError(
      f"{named(prompt, place)}: a run with objective.name='{objective.name}' is not trained {trained}; {fix}."
    )
  if tasks[0].kind in LEFT_TO_RIGHT:
    return ids
  if tasks[0].mode is not None and (not ids or ids[0] not in vocabulary.mode_ids):
    ids = [vocabulary.mode_ids[min(task.mode for task in tasks if task.mode is not None)], *ids]
  return [*ids, vocabulary.ids.end]


def reading_special(data: DataSource, names: Sequence[str]) -> DataSource:
  """`data` for prompts in which the special tokens `names` are tokens, or with ALL each that the tokenizer has.

  Raises ConfigError, with the names that exist, for another one.
  """
  if not names:
    return data
  there = copy.copy(data)
  try:
    there.tokenizer = data.tokenizer.reading(data.tokenizer.special if ALL in names else names)
  except DataError as error:
    raise ConfigError(f'--special: {error.message}') from error
  return there


def check_special(prompt: str, data: DataSource) -> None:
  """Where all special tokens are read: raises DataError, with their names, for text like <|name|> that is none."""
  tokenizer = data.tokenizer
  if tokenizer.read and tokenizer.read == frozenset(tokenizer.special) and is_text(prompt):
    tokenizer.check_special(LIKE_SPECIAL.findall(prompt))


def named(prompt: str, place: str) -> str:
  """Where a prompt was given, and how it begins and ends."""
  return f'{place}{reprlib.repr(prompt)}'


def not_utf8(prompt: str) -> ConfigError:
  return ConfigError(f'argument --text: {reprlib.repr(prompt)} has bytes that are not UTF-8; write the text in UTF-8.')


def room_for(prompt: str, inputs: list[int], cfg: Experiment, place: str = '--text=') -> int:
  """How many tokens of output a training row would hold after `inputs`. Raises ConfigError where there is none."""
  data, objective = cfg.data, cfg.objective
  if data.inputs_length:
    key, length, most, room = 'data.inputs_length', data.inputs_length, data.inputs_length, data.targets_length
  elif isinstance(objective, Supervised):
    most, room = pair_lengths(objective, data.budget)
    key, length = 'objective.inputs_length', most
  else:
    key, length, most = 'data.targets_length', data.targets_length, data.targets_length - 1
    room = length - len(inputs)
  if len(inputs) > most:
    raise ConfigError(
      f'{named(prompt, place)} is {len(inputs)} tokens, at most {most} fit the rows this run was trained on '
      f'({key}={length}); shorten the prompt.'
    )
  return room


def sees_itself(inputs: list[int], cfg: Experiment, end: int) -> bool:
  """Whether a decoder has `inputs` as a prefix that every token sees, and does not read them from left to right."""
  match cfg.objective:
    case Instruction(prefix_attention=prefix):
      return prefix
    case Supervised():
      return True
    case objective:  # a special token at the end of a prompt may be EOS
      return inputs[-1:] == [end] and any(task.kind not in LEFT_TO_RIGHT for task in tasks_of(objective))


def continues_text(cfg: Experiment) -> bool:
  """Whether the objective trains to continue running text."""
  objective = cfg.objective
  return not isinstance(objective, Supervised | Instruction) and any(t.kind in CONTINUING for t in tasks_of(objective))


def framed(context: list[int], cfg: Experiment, data: DataSource, blank: bool = False) -> list[int]:
  """The ids of training for inputs with the text `context`: as `prompt_inputs` of it, with a blank behind it or none.

  Raises ConfigError where the objective trains no such task.
  """
  end = data.vocabulary.ids.end
  if not blank and isinstance(cfg.objective, Supervised):
    return [*context, end]
  frame = prompt_inputs('<extra_id_0>' if blank else '', cfg, data)
  at = frame.index(data.vocabulary.first_sentinel) if blank else len(frame) - (frame[-1:] == [end])
  return [*frame[:at], *context, *frame[at:]]


def prompt_batch(prompts: Sequence[list[int]], cfg: Experiment, length: int, ids: SpecialIds) -> Batch:
  """One row for each of `prompts` as training makes it, up to its first target: fields as in `data.features`.

  Rows have `length` tokens; in a decoder one more, and each prompt stands at the end of its row. Prompts that are read
  from left to right do not end with EOS (`prompt_inputs`); all prompts must be of one kind. Weights that were imported
  and not trained here read `ids.decoder_start` first, and where it is None the text alone, as in `transformers`.
  """
  number, (first, prompts) = len(prompts), _begun(prompts, cfg, ids)
  fields = _rows_of(prompts, cfg, np.arange(number), number, length, first, ids.end)
  if cfg.data.inputs_length:
    return fields
  order = (np.arange(length + 1) + np.array(list(map(len, prompts)))[:, None] + 1) % (length + 1)
  return {name: np.take_along_axis(values, order, 1) for name, values in fields.items()}


def _begun(prompts: Sequence[list[int]], cfg: Experiment, ids: SpecialIds) -> tuple[np.ndarray, list[list[int]]]:
  """(what a decoder reads first, the tokens behind it) of each prompt."""
  if cfg.data.name == 'synthetic' and ids.decoder_start is None and not cfg.data.inputs_length:
    return np.array([own[0] if own else ids.first_input for own in prompts]), [own[1:] for own in prompts]
  return np.full(len(prompts), ids.first_input), list(prompts)


def _rows_of(
  prompts: Sequence[list[int]], cfg: Experiment, rows: np.ndarray, number: int, length: int, first: np.ndarray, end: int
) -> Batch:
  """Prompt i in row `rows[i]` (ascending) of `number` rows, with room for one target behind each."""
  inputs, target = join([np.asarray(own, np.int32) for own in prompts]), join([np.zeros(1, np.int32)] * len(prompts))
  if cfg.data.inputs_length:
    most = int(np.bincount(rows).max())
    return encoder_decoder_features(inputs, target, rows, number, length, most, first)
  if not sees_itself(prompts[0], cfg, end):
    return decoder_features(None, interleave(inputs, target)[0], rows, number, length + 1, first=first)
  return decoder_features(inputs, target, rows, number, length + 1, first=first)


class Packed(NamedTuple):
  """Packed rows: `rows` has the row of each prompt, out of `number`."""

  rows: np.ndarray
  number: int


def packing_of(lengths: Sequence[int], length: int, shards: int) -> Packed:
  """The rows, of `length` positions, of prompts that take `lengths` positions: best fit, the longest first.

  Their number is rounded up to an eighth of the prompts, and to a multiple of `shards`: few programs are compiled.
  """
  rows = fill(np.array(lengths), (np.arange(length + 1), length))
  unit = shards * -(-len(lengths) // (8 * shards))
  return Packed(rows, unit * -(-int(rows.max(initial=0) + 1) // unit))


def packed_batch(
  prompts: Sequence[list[int]], cfg: Experiment, length: int, ids: SpecialIds, shards: int = 1, starts: bool = True
) -> Batch | None:
  """As `prompt_batch`, with several prompts in a row, for packed prefill (`models.decode.cached.start`).

  None where more than three quarters of the rows would be left: too little is saved for another program. Without
  `starts`, a decoder does not read the token that rows of training begin with.
  """
  first, prompts = _begun(prompts, cfg, ids)
  decodes = not cfg.data.inputs_length
  taken = np.array([len(own) + decodes for own in prompts])
  packed = packing_of(taken.tolist(), length + decodes, shards)
  if 4 * packed.number > 3 * len(prompts):
    return None
  order = np.argsort(packed.rows, kind='stable')
  rows = packed.rows[order]
  fields = _rows_of([prompts[i] for i in order], cfg, rows, packed.number, length, first[order], ids.end)
  if not decodes:
    fields = {name: values for name, values in fields.items() if name.startswith('encoder')}
  if decodes and not starts:
    fields['decoder_segment_ids'] = fields['decoder_segment_ids'] * (fields['decoder_positions'] > 0)
    fields['decoder_positions'] = np.maximum(fields['decoder_positions'] - 1, 0)
  before = np.cumsum(taken[order]) - taken[order]
  begins = rows * (length + decodes) + before - before[np.searchsorted(rows, rows)]
  places = np.full((len(prompts), length + decodes), -1, np.int32)
  skipped = int(decodes and not starts)
  for prompt, begin in zip(order.tolist(), begins.tolist(), strict=True):
    own = np.arange(begin + skipped, begin + taken[prompt])
    places[prompt, places.shape[1] - len(own) :] = own
  return fields | {PLACES: places}
