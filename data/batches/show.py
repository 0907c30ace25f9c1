"""A training row in readable form: `pretrain data show`."""

import itertools
from collections.abc import Iterator, Sequence
from typing import SupportsIndex, assert_never

import numpy as np

from data.batches.batches import DataSource, RowDescription
from data.errors import DataError
from data.objectives.features import Batch

FIRST_IDS = 12
MOST_EXAMPLES = 2**53  # so that products with it fit in an int64
MASK = '[MASK]'  # the notation of papers; in a prompt it is <extra_id_0>


def show_row(source: DataSource, step: int, row: int, first_example: int | None = None) -> str:
  """The origin of row `row` of the global batch of `step`, and its segments with every special token written out.

  The batch begins at example `first_example` of the run (None: after `step` batches of the same size).
  Raises DataError if the batch has no such row.
  """
  origin, fields = source.row(_check_place(source, step, row, first_example), row)
  lines = [
    f'step {step}, row {row} (example {fields["example_index"]}): task {origin.task}, epoch {origin.epoch}',
    f'from {origin.path}',
  ]
  if origin.losses is not None:
    lines.append(str(origin.losses))
  for k, where in enumerate(_origins(origin), 1):
    task = '' if origin.tasks is None else f', task {origin.tasks[k - 1]}'
    lines += ['', f'segment {k}: {where} of the store{task}', *_segment(source, origin, fields, k)]
  return '\n'.join([*lines, '', *_summary(fields)])


def explain_row(source: DataSource, step: int, row: int, first_example: int | None = None) -> str:
  """A table of the pieces of a row; arguments and errors are those of `show_row`."""
  origin, fields = source.row(_check_place(source, step, row, first_example), row)
  lines = [
    f'step {step}, row {row} (example {fields["example_index"]}): task {origin.task}, epoch {origin.epoch}',
    f'source {origin.path}, shard {origin.shard}, {_planned(origin)}',
    f'{"segment":>7} {"document":>10} {"offset":>10} {"length":>7} {"token of the store":>20}',
  ]
  lines[-1] += f' {"with loss":>10}' * (origin.asked is not None) + '  role' * (origin.roles is not None)
  lines[-1] += '  task' * (origin.tasks is not None)
  for i, (document, start, length) in enumerate(origin.pieces):
    offset = start - source.document_start(origin, document)
    line = f'{origin.segments[i]:>7} {document:>10} {offset:>10} {length:>7} {start:>20}'
    line += '' if origin.asked is None else f' {origin.asked[i]:>10}'
    line += '' if origin.tasks is None else f'  {origin.tasks[i]}'
    lines.append(line if origin.roles is None else f'{line}  {origin.roles[i]}')
  return '\n'.join(lines)


def _planned(origin: RowDescription) -> str:
  return f'row {origin.row} of its plan' if origin.row >= 0 else 'padding: the batch has fewer rows'


def _origins(origin: RowDescription) -> Iterator[str]:
  """Yields the origin of each segment."""
  places = [f'tokens {start} to {start + length - 1}' for _, start, length in origin.pieces]
  for _, group in itertools.groupby(range(len(places)), key=lambda i: origin.segments[i]):
    first, *others = own = list(group)
    (document, begin, _), (last, start, length) = origin.pieces[first], origin.pieces[own[-1]]
    match origin.kind:
      case 'text':
        yield f'document {document}, {places[first]}'
      case 'pairs':
        yield f'pair {document // 2}, inputs {places[first]}, targets {places[others[0]]}'
      case 'conversations':
        yield f'turns {document} to {last}, tokens {begin} to {start + length - 1}'
      case _:
        assert_never(origin.kind)


def _check_place(source: DataSource, step: int, row: int, first_example: int | None) -> int:
  """The position at which the batch of `step` begins. Raises DataError if it has no such row."""
  start = step * source.cfg.batch_size if first_example is None else first_example
  if start > MOST_EXAMPLES:
    raise DataError(f'step {step} begins at example {start}; the largest example number is {MOST_EXAMPLES}.')
  size = source.batch_rows(start) if step >= 0 else source.cfg.batch_size
  if step < 0 or not 0 <= row < size:
    known = f' (data.batch_size={size})' if size == source.cfg.batch_size else ''
    raise DataError(f'step {step}, row {row}: steps begin at 0 and rows are 0 to {size - 1}{known}.')
  return start


def _segment(source: DataSource, origin: RowDescription, fields: Batch, k: int) -> list[str]:
  """The parts of segment `k`: inputs or prefix (read, no loss) and targets (with loss)."""
  if 'decoder_segment_ids' not in fields:
    return _masked_segment(source, fields, k)
  mine = fields['decoder_segment_ids'] == k
  targets, weights = fields['decoder_target_tokens'][mine], fields['decoder_loss_weights'][mine] > 0
  if origin.asked is not None and origin.kind != 'pairs':
    return _stretches(source, targets, weights)
  parts = {'targets': targets[weights]}
  if 'encoder_input_tokens' in fields:
    parts = {'inputs': fields['encoder_input_tokens'][fields['encoder_segment_ids'] == k]} | parts
  elif not weights.all():
    parts = {'prefix': targets[~weights]} | parts
  return [f'  {name} ({len(ids)}): {_render(source, ids)}' for name, ids in parts.items()]


def _stretches(source: DataSource, targets: np.ndarray, weights: np.ndarray) -> list[str]:
  """The parts with and without loss, in order."""
  borders = np.flatnonzero(np.diff(weights)) + 1
  parts = zip(np.split(targets, borders), np.split(weights, borders), strict=True)
  return [f'  {"with loss" if own[0] else "read"} ({len(ids)}): {_render(source, ids)}' for ids, own in parts]


def _masked_segment(source: DataSource, fields: Batch, k: int) -> list[str]:
  """The encoder's inputs in segment `k`, then the answer at each position with loss, and what the input has there."""
  names = ('encoder_input_tokens', 'decoder_target_tokens', 'decoder_loss_weights')
  inputs, targets, weights = (fields[name][fields['encoder_segment_ids'] == k] for name in names)
  mask, answers = source.vocabulary.mask, []
  for read, answer in zip(inputs[weights > 0], targets[weights > 0], strict=True):
    how = '' if read == mask else ' (kept)' if read == answer else f' (reads {_render(source, [read])})'
    answers.append(_render(source, [answer]) + how)
  text = _render(source, inputs).replace('<extra_id_0>', MASK)
  return [f'  inputs ({len(inputs)}): {text}', f'  answers ({len(answers)}): {" | ".join(answers)}']


def _render(source: DataSource, ids: Sequence[SupportsIndex] | np.ndarray) -> str:
  """Text, or the first ids if there is no tokenizer (synthetic data)."""
  if source.tokenizer is not None:
    return source.tokenizer.render(ids)
  named = [source.vocabulary.special(int(i)) or str(i) for i in ids[:FIRST_IDS]]
  return ' '.join(named) + ' …' * (len(ids) > FIRST_IDS)


def _summary(fields: Batch) -> list[str]:
  """How full the row is, and how many of its targets carry loss."""
  lines = []
  for side in ('encoder', 'decoder'):
    if f'{side}_segment_ids' in fields:
      segments = fields[f'{side}_segment_ids']
      used = np.count_nonzero(segments)
      lines.append(
        f'{side}: {used} of {len(segments)} positions used ({used / len(segments):.0%}), {segments.max()} segments'
      )
  weights = fields['decoder_loss_weights']
  return [*lines, f'loss on {np.count_nonzero(weights)} targets']
