"""Ids that a decoder wrote -> the text of a prompt with its blanks filled, continued, or answered."""

from data.objectives.fim import fim_ids
from data.objectives.objectives import OfUnits, tasks_of
from data.stores.vocabulary import MODES, SPECIAL, Tokenizer
from pretrain.experiment.experiment import Experiment


def answers_whole(cfg: Experiment) -> bool:
  """Whether outputs are texts of their own: targets of pairs, turns of a conversation, full targets of noise."""
  return isinstance(cfg.objective, OfUnits) or all(task.full for task in tasks_of(cfg.objective))


def fills_middle(inputs: list[int], tokenizer: Tokenizer) -> bool:
  """Whether `inputs` are those of fill-in-the-middle, whose output is the middle, without a sentinel before it."""
  pre, _, mid = fim_ids(tokenizer.vocabulary)
  return inputs[:1] == [pre] and inputs[-1:] == [mid]


def filled(prompt: str, inputs: list[int], output: list[int], tokenizer: Tokenizer) -> str:
  """`prompt` with each sentinel replaced by what follows it in `output`; without sentinels, both.

  `inputs` are the ids of the prompt. Every character of the prompt outside its sentinels stays; mode tokens go. The one
  blank of fill-in-the-middle is replaced by all of `output`. A sentinel that `output` does not hold stays.
  """
  parts = SPECIAL.split(prompt)
  blanks = [part for part in parts[1::2] if part not in MODES]
  for i, part in enumerate(parts):
    if part in MODES and i % 2:
      parts[i], parts[i + 1] = '', parts[i + 1].removeprefix(' ')
  if not blanks:
    return _continued(''.join(parts), inputs, output, tokenizer)
  found = {blanks[0]: output} if fills_middle(inputs, tokenizer) else _by_blank(blanks, output, tokenizer)
  words = {blank: words_of(ids, tokenizer) for blank, ids in found.items()}
  return ''.join(words.get(part, part) if i % 2 else part for i, part in enumerate(parts))


def words_of(ids: list[int], tokenizer: Tokenizer) -> str:
  """The text of a filling. Spaces around a blank are those of the prompt, so a filling has none at its ends."""
  return tokenizer.render(ids).strip(' ')


def _by_blank(blanks: list[str], output: list[int], tokenizer: Tokenizer) -> dict[str, list[int]]:
  """blank -> the ids behind its first sentinel in `output` (models repeat themselves); a missing one is left out."""
  vocabulary = tokenizer.vocabulary
  marks = [i for i, token in enumerate(output) if vocabulary.is_sentinel(token)]
  found: dict[int, list[int]] = {}
  for i, mark in enumerate(marks):
    found.setdefault(output[mark], output[mark + 1 : (*marks, len(output))[i + 1]])
  ids = {blank: vocabulary.special_id(blank) for blank in blanks}
  return {blank: found[token] for blank, token in ids.items() if token in found}


def _continued(text: str, inputs: list[int], output: list[int], tokenizer: Tokenizer) -> str:
  """`text`, whose ids are `inputs`, and the text of `output` behind it, with one space between two words."""
  special = tokenizer.vocabulary.special
  cut = next((i for i, token in enumerate(output) if special(token) is not None), len(output))
  more = tokenizer.decode_after([token for token in inputs if special(token) is None], output[:cut])
  rest = tokenizer.render(output[cut:])
  return text + (more.removeprefix(' ') if text.endswith(' ') else more) + (f' {rest}' if rest else '')


def until_end(output: list[int], eos: tuple[int, ...]) -> list[int]:
  """`output` up to the first token of `eos`, which is left out."""
  return next((output[:i] for i, token in enumerate(output) if token in eos), output)
