"""Tasks in JSONL: the best of several choices, and outputs that equal their targets."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data.errors import DataError
from pretrain.benchmarks.scoring import Piece, Scorer
from pretrain.evaluation.outputs import Decoding, outputs
from pretrain.evaluation.prompt_files import read_records, text_field
from pretrain.evaluation.prompts import prompt_inputs, room_for, special_ids
from pretrain.evaluation.writer import Writer


def rank_pieces(writer: Writer, context: str, choices: list[str]) -> list[Piece]:
  """A piece for each choice after `context`.

  Read from left to right, context and choice are one text, and spaces at the end of the context belong to the choice
  (as in lm-evaluation-harness, api/model.py _encode_pair). Otherwise the context is the inputs, and the choice
  with EOS behind it the targets.
  """
  encode, inputs = writer.data.tokenizer.encode, prompt_inputs(context, writer.cfg, writer.data)
  ids = special_ids(writer.data)
  if writer.cfg.data.inputs_length or inputs[-1:] == [ids.eos[0]]:
    return [Piece(inputs, [*encode(choice), ids.eos[0]]) for choice in choices]
  return [Piece(*encode_pair(writer, context, choice)) for choice in choices]


def encode_pair(writer: Writer, context: str, continuation: str) -> tuple[list[int], list[int]]:
  """(ids of the context, ids of the continuation) of one text; spaces between them belong to the continuation."""
  encode = writer.data.tokenizer.encode
  cut = len(context.rstrip())
  context, continuation = context[:cut], context[cut:] + continuation
  before, whole = encode(context), encode(context + continuation)
  return whole[: len(before)], whole[len(before) :]


def rank(scorer: Scorer, path: pathlib.Path, said=lambda done: None) -> dict[str, float]:
  """The share of lines {context, choices, answer} whose answer has the highest probability, as a sum of
  log-probabilities (`accuracy`) and divided by the bytes of the choice (`accuracy_per_byte`).

  `answer` is the number of a choice, from 0, or its text. Raises DataError, with the line, for anything else.
  """
  groups = ranked(path)
  pieces = [rank_pieces(scorer.writer, context, choices) for _, context, choices, _ in groups]
  scored = iter(scorer([piece for own in pieces for piece in own], said))
  accuracy, per_byte = shares_of(groups, [[-next(scored).nats.sum() for _ in own] for own in pieces])
  return {'examples': len(groups), 'accuracy': accuracy, 'accuracy_per_byte': per_byte}


class Question(NamedTuple):
  """A line of a file of choices: where it stands, what comes before, the choices and the number of the right one."""

  place: str
  context: str
  choices: list[str]
  answer: int


def ranked(path: pathlib.Path) -> list[Question]:
  """The lines of a file. Raises DataError for a line that is not a question, and for a file without lines."""
  groups = [_ranked(place, record) for place, record in read_records(path)]
  if not groups:
    raise DataError(f'{path} has no lines; each has context, choices and answer.')
  return groups


def shares_of(groups: Sequence[Question], totals: Sequence[Sequence[float]]) -> tuple[float, float]:
  """The share of lines whose answer has the highest of `totals`, and of totals divided by the bytes of the choice."""
  hits = np.zeros(2)
  for group, own in zip(groups, totals, strict=True):
    sizes = np.array([max(len(choice.encode()), 1) for choice in group.choices])
    hits += [np.argmax(own) == group.answer, (np.array(own) / sizes).argmax() == group.answer]
  return float(hits[0] / len(groups)), float(hits[1] / len(groups))


def _ranked(place: str, record: dict[str, Any]) -> Question:
  context, choices, answer = text_field(place, record, 'context'), record.get('choices'), record.get('answer')
  if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
    raise DataError(f'{place}: field "choices" is no list of two or more texts; correct the line.')
  if isinstance(answer, str) and choices.count(answer) == 1:
    return Question(place, context, choices, choices.index(answer))
  if type(answer) is int and 0 <= answer < len(choices):
    return Question(place, context, choices, answer)
  raise DataError(
    f'{place}: field "answer" is {answer!r:.40}; it must be one of the choices, or its number, 0 to {len(choices) - 1}.'
  )


def exact(writer: Writer, path: pathlib.Path, batch: int, said=lambda done: None) -> dict[str, float]:
  """The share of lines {inputs, targets} whose greedy output has the text of the targets, spaces at its ends aside.

  Raises DataError, with the line, for a line without these fields, ConfigError for inputs that no row holds.
  """
  found = [
    (place, *(text_field(place, record, key) for key in ('inputs', 'targets'))) for place, record in read_records(path)
  ]
  if not found:
    raise DataError(f'{path} has no lines; each has inputs and targets.')
  prompts = [prompt_inputs(inputs, writer.cfg, writer.data, f'{place}: ') for place, inputs, _ in found]
  rooms = [room_for(text, own, writer.cfg, f'{place}: ') for (place, text, _), own in zip(found, prompts, strict=True)]
  written = outputs_of(writer, prompts, rooms, batch, said)
  tokenizer = writer.data.tokenizer
  rendered = lambda ids: tokenizer.render(ids).strip()
  hits = [
    rendered(own) == rendered(tokenizer.encode(targets)) for own, (_, _, targets) in zip(written, found, strict=True)
  ]
  return {'examples': len(found), 'exact_match': sum(hits) / len(found)}


def outputs_of(writer: Writer, prompts: list[list[int]], rooms: list[int], batch: int, said) -> list[list[int]]:
  """Greedy outputs in the order of the prompts."""
  found: dict[int, list[int]] = {}
  for number, output in outputs(writer, prompts, rooms, Decoding(batch=batch)):
    found[number] = output
    said(len(found))
  return [found[number] for number in range(len(prompts))]
