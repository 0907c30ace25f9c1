"""A row as a person reads it."""

import numpy as np

from data.features import Row
from data.sources import DataSource
from data.vocabulary import Tokenizer


def show_row(source: DataSource, step: int, row: int) -> str:
  """The packed examples of row `row` of the batch at `step`: inputs and targets with sentinels, and what is padding.

  Raises IndexError where the batch has no such row, ValueError for random tokens (there is nothing to read).
  """
  size = source.batches.cfg.batch_size
  if not 0 <= row < size:
    raise IndexError(f'--row={row}: a batch has rows 0..{size - 1} (data.batch_size={size}).')
  if source.tokenizer is None:
    raise ValueError("data.name='synthetic' has random ids and no text; show a config with a store.")
  batch = source.batches.batch(step, slice(row, row + 1))
  fields = {name: value[0] for name, value in batch.items() if value.ndim == 2}
  head = f'step {step}, row {row} (example {int(batch["example_index"][0])}): {_usage(fields)}'
  segments = range(1, int(fields['decoder_segment_ids'].max()) + 1)
  return '\n'.join([head, *(_show_segment(source.tokenizer, fields, k) for k in segments)])


def _usage(fields: Row) -> str:
  sides = [name.removesuffix('_segment_ids') for name in fields if name.endswith('_segment_ids')]
  used = {side: int(np.count_nonzero(fields[f'{side}_segment_ids'])) for side in sides}
  parts = [f'{side} {n} of {len(fields[f"{side}_segment_ids"])} tokens' for side, n in used.items()]
  return ', '.join([*parts, f'loss on {int(np.count_nonzero(fields["decoder_loss_weights"]))} targets'])


def _show_segment(tokenizer: Tokenizer, fields: Row, segment: int) -> str:
  here = fields['decoder_segment_ids'] == segment
  targets = fields['decoder_target_tokens'][here]
  if 'encoder_input_tokens' in fields:
    inputs = fields['encoder_input_tokens'][fields['encoder_segment_ids'] == segment]
  else:
    given = fields['decoder_loss_weights'][here] == 0
    inputs, targets = targets[given], targets[~given]
  parts = [f'--- segment {segment}']
  parts += [f'inputs   {tokenizer.render(inputs)}'] if len(inputs) else []
  return '\n'.join([*parts, f'targets  {tokenizer.render(targets)}'])
