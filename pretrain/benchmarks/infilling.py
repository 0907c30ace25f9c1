"""The share of hidden words of held-out sentences that a model fills in exactly."""

from collections.abc import Iterable

from data.errors import DataError
from pretrain.benchmarks.tasks import outputs_of
from pretrain.errors import ConfigError
from pretrain.evaluation.blanks import MOST_TOKENS, choose
from pretrain.evaluation.prompts import prompt_inputs, room_for
from pretrain.evaluation.texts import filled, fills_middle
from pretrain.evaluation.writer import Writer


def infill(writer: Writer, texts: Iterable[str], number: int, batch: int, said=lambda done: None) -> dict[str, float]:
  """Results for at most `number` sentences, picked and hidden as in `pretrain.evaluation.blanks`: no run chooses them.

  `exact_match` is the share of greedy outputs whose filling is the hidden words, spaces at its ends aside. Sentences
  that no row of training holds are left out, and counted. Raises DataError where no sentence can be hidden, ConfigError
  for a run that does not fill blanks.
  """
  blanks, prompts, rooms, long = [], [], [], 0
  for blank in choose(texts, number):
    text = blank.filled('<extra_id_0>')
    inputs = prompt_inputs(text, writer.cfg, writer.data, '--infill: ')
    try:
      room = room_for(text, inputs, writer.cfg)
    except ConfigError:
      long += 1
      continue
    blanks.append(blank)
    prompts.append(inputs)
    rooms.append(min(room, MOST_TOKENS + 2))
  if not blanks:
    raise DataError('--infill: the text has no sentence of plain English words in which words can be hidden.')
  written = outputs_of(writer, prompts, rooms, batch, said)
  hits = 0
  for blank, inputs, output in zip(blanks, prompts, written, strict=True):
    tokenizer = writer.data.tokenizer
    mark = [] if fills_middle(inputs, tokenizer) else [tokenizer.vocabulary.first_sentinel]
    if mark == output[: len(mark)]:  # an output that begins with something else fills nothing
      hits += filled(blank.filled('<extra_id_0>'), inputs, output, tokenizer) == blank.sentence
  return {'sentences': len(blanks), 'too_long': long, 'exact_match': hits / len(blanks)}
