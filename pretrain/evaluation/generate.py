"""`pretrain generate`: fills blanks or continues text from the newest checkpoint of a run, greedily or by a beam."""

import dataclasses
import math
import pathlib
import reprlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.arguments import is_text
from data.batches.batches import DataSource
from data.batches.source import open_data
from data.errors import DataError
from data.objectives.fim import fim_ids
from data.objectives.objectives import OfUnits, tasks_of
from data.stores.paths import looked_in
from data.stores.vocabulary import EOS, MODES, SPECIAL, UNKNOWN, Tokenizer
from models.build import Model
from models.decode import Sequences, beam, greedy, teacher_forced
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.config import bindings
from pretrain.devices.compilation_cache import cache_dir
from pretrain.devices.mesh import MeshConfig
from pretrain.errors import CheckpointError, ConfigError, UserError
from pretrain.evaluation.imported import tokenizer_of
from pretrain.evaluation.prompts import not_utf8, prompt_batch, prompt_inputs, room_for
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.phases import phase_at
from pretrain.experiment.program import build_program
from pretrain.redact import redact

MOST_TOP = 64
LEAST_WIDTH = 8
PADDED = 32  # prompts of a beam search are padded to a multiple of it: one compilation serves many lengths


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A filling or a continuation, and the probability that the model writes it: exp(sum of its tokens' log-probs).

  Where it has `ended`, the probability includes that of ending there (`models.decode.beam`).
  """

  text: str
  probability: float
  ended: bool


@dataclasses.dataclass(frozen=True)
class Generated:
  """`output` is what the decoder wrote; `text` is the prompt with its blanks filled, or continued, or its answer.

  A blank that `output` does not fill stays in `text`; spaces around a blank are those of the prompt. `top` holds the
  best candidates for each blank, by its name in the prompt; candidates for the whole output have the name ''.
  """

  prompt: str
  output: str
  text: str
  top: dict[str, tuple[Candidate, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Refused:
  """A prompt that cannot be answered, and why."""

  prompt: str
  error: UserError | DataError


@dataclasses.dataclass(frozen=True)
class Writer:
  """A trained model, its config and its data: all that reads a prompt and writes an answer."""

  cfg: Experiment
  data: DataSource
  model: Model
  params: Any


def show_generated(workdir: pathlib.Path, prompts: Sequence[str], max_tokens: int = 64, top: int | None = None) -> int:
  """Prints each answer as soon as it is written, and a line on stderr for each refused prompt.

  Returns 0, or the exit code of the first refused prompt. Characters that the encoding of stdout lacks are escaped.
  """
  code, encoding = 0, sys.stdout.encoding or 'utf-8'
  for result in answers(workdir, prompts, max_tokens, top):
    if isinstance(result, Refused):
      code = code or result.error.exit_code
      print(redact(str(result.error)), file=sys.stderr)
    else:
      print('\n'.join(_lines(result)).encode(encoding, 'backslashreplace').decode(encoding), end='\n\n', flush=True)
  return code


def _lines(result: Generated) -> Iterator[str]:
  yield from (f'prompt  {result.prompt}', f'output  {result.output}')
  for name, candidates in result.top.items():
    yield f'top     {name or "of the output"}'
    yield from (f'{c.probability:>14.2%}  {c.text or "(nothing)"}{"" if c.ended else " …"}' for c in candidates)
  yield f'text    {result.text}'


def generate(
  workdir: pathlib.Path, prompts: Sequence[str], max_tokens: int = 64, top: int | None = None
) -> list[Generated | Refused]:
  """All of `answers`."""
  return list(answers(workdir, prompts, max_tokens, top))


def answers(
  workdir: pathlib.Path, prompts: Sequence[str], max_tokens: int = 64, top: int | None = None
) -> Iterator[Generated | Refused]:
  """The answer to each prompt in turn: at most `max_tokens` tokens, and no more than rows of training held.

  Prompts are read as the run's objective reads its inputs (`prompt_inputs`). Outputs are greedy; with `top` they are
  the best of a beam search, and come with the `top` best candidates. Raises ConfigError for a run without text or of an
  encoder, CheckpointError where `workdir` holds no checkpoint. A prompt longer than the rows of training, one that the
  objective cannot answer, and one with a sentinel that does not exist are `Refused`; the others are answered. All of
  them are checked before a parameter is read.
  """
  _check_counts(max_tokens, top)
  if not any(map(is_text, prompts)):  # nothing can be answered, whatever the run is
    return iter([Refused(prompt, not_utf8(prompt)) for prompt in prompts])
  cfg, data, checkpoints, step = _open(workdir)
  inputs = [_read_prompt(prompt, cfg, data) for prompt in prompts]
  if all(isinstance(own, Refused) for own in inputs):
    return (own for own in inputs if isinstance(own, Refused))
  writer = _writer(cfg, data, checkpoints, step)
  return (_answer(writer, *each, max_tokens, top) for each in zip(prompts, inputs, strict=True))


def _check_counts(max_tokens: int, top: int | None) -> None:
  if max_tokens < 1:
    raise ConfigError(f'--max_tokens={max_tokens}; it must be at least 1.')
  if top is not None and not 1 <= top <= MOST_TOP:
    raise ConfigError(f'--top={top}; it must be from 1 to {MOST_TOP}.')


def open_writer(workdir: pathlib.Path) -> Writer:
  """The newest checkpoint of a run. Raises the errors of `answers` that concern the run."""
  return _writer(*_open(workdir))


def _open(workdir: pathlib.Path) -> tuple[Experiment, DataSource, Checkpoints, int]:
  """(config, data, checkpoints, newest step) of a run that writes text."""
  whole = _config_of(workdir)
  checkpoints = Checkpoints(workdir, whole.checkpoint, read_only=True)
  step = checkpoints.latest()
  if step is None:
    raise CheckpointError(
      'CKPT-NONE', f'no finished checkpoint in {workdir}/checkpoints; let the run reach checkpoint.every.'
    )
  cfg = phase_at(whole, max(step - 1, 0)).cfg  # prompts are read as in the phase that saved the step
  data = open_data(
    cfg.data, cfg.objective, seed=cfg.seed, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir(),
    model=tokenizer_of(workdir) if cfg.data.name == 'synthetic' else None,
  )  # fmt: skip
  return cfg, data, checkpoints, step


def _writer(cfg: Experiment, data: DataSource, checkpoints: Checkpoints, step: int) -> Writer:
  program = build_program(cfg, jax.devices()[:1])
  return Writer(cfg, data, program.model, checkpoints.restore_params(program.abstract.params, step))


def _read_prompt(prompt: str, cfg: Experiment, data: DataSource) -> list[int] | Refused:
  try:
    inputs = prompt_inputs(prompt, cfg, data)
    _check_ids(inputs, cfg.model.vocab_size)
    room_for(prompt, inputs, cfg)
  except DataError as error:
    return Refused(prompt, DataError(f'{error.message} (--text={reprlib.repr(prompt)})', error.code))
  except UserError as error:
    return Refused(prompt, error)
  return inputs


def _check_ids(inputs: list[int], vocab_size: int) -> None:
  """Raises DataError for a special token that the model has no row for: imported vocabularies may end at the pieces."""
  if beyond := [token for token in inputs if token >= vocab_size]:
    raise DataError(
      f'a special token of the prompt has id {beyond[0]}, and model.vocab_size={vocab_size}; leave it out.'
    )


def _answer(writer: Writer, prompt: str, inputs: list[int] | Refused, max_tokens: int, top: int | None):
  if isinstance(inputs, Refused):
    return inputs
  room = min(max_tokens, room_for(prompt, inputs, writer.cfg))
  if top is None:
    output = _decode(writer.model, writer.params, inputs, room, writer.cfg, writer.data)
    return _result(prompt, inputs, output, writer.cfg, writer.data)
  output, found = best_outputs(writer, prompt, inputs, room, top)
  return dataclasses.replace(_result(prompt, inputs, output, writer.cfg, writer.data), top=found)


def _config_of(workdir: pathlib.Path) -> Experiment:
  """The config of a run on text whose model writes, for one device."""
  saved = workdir / 'config.gin'
  if not saved.exists():
    raise CheckpointError(
      'CKPT-NONE',
      f'no run in {workdir}{looked_in(workdir)}: config.gin is missing; '
      f'train first: pretrain train --workdir={workdir}.',
    )
  cfg = dataclasses.replace(bindings.load(Experiment, [str(saved)], []), mesh=MeshConfig())
  if cfg.model.name == 'encoder':
    raise ConfigError(
      f"{saved}: model.name='encoder' writes no text; generate from a run with model.name='encoder_decoder' or "
      "'decoder' (this one is judged by the eval/ lines of its metrics.jsonl)."
    )
  if cfg.data.name == 'synthetic' and tokenizer_of(workdir) is None:
    raise ConfigError(
      f"{saved}: data.name='synthetic' is random tokens, without a tokenizer to read a prompt; generate from a run "
      "trained with data.name='builtin' or 'store'."
    )
  return cfg


def _answers_whole(cfg: Experiment) -> bool:
  """Whether outputs are texts of their own: targets of pairs, turns of a conversation, full targets of noise."""
  return isinstance(cfg.objective, OfUnits) or all(task.full for task in tasks_of(cfg.objective))


def fills_middle(inputs: list[int], tokenizer: Tokenizer) -> bool:
  """Whether `inputs` are those of fill-in-the-middle, whose output is the middle, without a sentinel before it."""
  pre, _, mid = fim_ids(tokenizer.vocabulary)
  return inputs[:1] == [pre] and inputs[-1:] == [mid]


def _result(prompt: str, inputs: list[int], output: list[int], cfg: Experiment, data: DataSource) -> Generated:
  written = data.tokenizer.render(output)
  text = written if _answers_whole(cfg) else filled(prompt, inputs, output, data.tokenizer)
  return Generated(prompt, written, text)


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
  words = {blank: _words(ids, tokenizer) for blank, ids in found.items()}
  return ''.join(words.get(part, part) if i % 2 else part for i, part in enumerate(parts))


def _words(ids: list[int], tokenizer: Tokenizer) -> str:
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


def _decode(model: Model, params, inputs: list[int], max_tokens: int, cfg: Experiment, data: DataSource) -> list[int]:
  """What the model writes after `inputs`, up to its EOS; ids that the tokenizer lacks are never chosen."""
  batch = prompt_batch([inputs], cfg, len(inputs))
  return until_eos(np.asarray(greedy(model, params, batch, max_tokens, data.vocabulary.size))[0].tolist())


def until_eos(output: list[int]) -> list[int]:
  return output[: output.index(EOS)] if EOS in output else output


def best_outputs(
  writer: Writer, prompt: str, inputs: list[int], room: int, top: int
) -> tuple[list[int], dict[str, tuple[Candidate, ...]]]:
  """(the best output, the `top` best candidates for each blank, or for the whole output under the name '').

  The decoder reads a blank's sentinel and writes text up to another sentinel or EOS. For later blanks it has also read
  the best filling of each earlier one, as in training, where fillings follow each other. A text that
  several tokenizations spell is listed once, with the probability of the most likely one.
  """
  tokenizer, vocabulary = writer.data.tokenizer, writer.data.vocabulary
  blanks = [part for part in SPECIAL.split(prompt)[1::2] if part not in MODES]
  if _answers_whole(writer.cfg) or fills_middle(inputs, tokenizer) or not blanks:
    name = blanks[0] if fills_middle(inputs, tokenizer) else ''
    found = search(writer, inputs, [], room, top, whole=not name)
    return found[0][0] if found else [], {name: _candidates(found, tokenizer, top)}
  output, fillings = [], {}
  for blank in dict.fromkeys(blanks):
    output = [*output, vocabulary.special_id(blank)]
    found = search(writer, inputs, output, room - len(output), top)
    fillings[blank] = _candidates(found, tokenizer, top)
    output = [*output, *(found[0][0] if found else [])]
  return output, fillings


def search(
  writer: Writer, inputs: list[int], forced: list[int], max_tokens: int, top: int, whole: bool = False
) -> list[tuple[list[int], float, bool]]:
  """(ids of text, log-probability, whether it ended) by `models.decode.beam` after `inputs` and `forced`, best first.

  A filling ends at EOS or at a sentinel, and behind a sentinel it has at least one token, as every span of training
  has. A `whole` output ends at EOS; those cut off at `max_tokens` are listed too.
  """
  if max_tokens < 1:
    return []
  ids, ends = np.arange(writer.cfg.model.vocab_size), _ends(writer, whole)
  allowed = (ids >= UNKNOWN) & (ids < writer.data.vocabulary.pieces)
  batch = prompt_batch([inputs], writer.cfg, _padded(len(inputs)))
  width = max(LEAST_WIDTH, 2 * top)
  ended, unfinished = beam(
    writer.model, writer.params, batch, jnp.asarray(forced, jnp.int32), allowed, ends, max_tokens, width
  )
  found = [(*each, True) for each in _listed(ended) if each[0] or not forced]
  found += [(*each, False) for each in _listed(unfinished) if whole]
  return sorted(found, key=lambda each: -each[1])


def log_prob(writer: Writer, inputs: list[int], forced: list[int], ids: list[int]) -> float:
  """The log-probability of the filling `ids` after `inputs` and `forced`, and of ending there, as in `search`."""
  batch = prompt_batch([inputs], writer.cfg, _padded(len(inputs)))
  begun = batch['decoder_input_tokens']
  written = [*forced, *ids]
  row = np.zeros((1, _padded(len(written))), np.int32)
  row[0, : len(written)] = written
  tokens = np.concatenate([begun, row], 1)
  logits = teacher_forced(writer.model, writer.params, batch, jnp.asarray(tokens), at_once=begun.shape[1])
  log_probs = np.asarray(jax.nn.log_softmax(logits[0, begun.shape[1] - 1 :]))[len(forced) :]
  end = np.logaddexp.reduce(log_probs[len(ids), _ends(writer)])
  return float(sum(log_probs[i, token] for i, token in enumerate(ids)) + end)


def _ends(writer: Writer, whole: bool = False) -> np.ndarray:
  """bool[vocab]: the tokens behind a filling, or behind a `whole` output."""
  vocabulary, ids = writer.data.vocabulary, np.arange(writer.cfg.model.vocab_size)
  return (ids == EOS) | ((ids >= vocabulary.pieces) & (ids <= vocabulary.first_sentinel) & (not whole))


def _padded(length: int) -> int:
  return -(-max(length, 1) // PADDED) * PADDED


def _listed(sequences: Sequences) -> Iterator[tuple[list[int], float]]:
  log_probs, tokens, lengths = (np.asarray(values) for values in sequences)
  for log_prob, row, length in zip(log_probs.tolist(), tokens.tolist(), lengths.tolist(), strict=True):
    if log_prob > -math.inf:
      yield row[:length], log_prob


def _candidates(found: list[tuple[list[int], float, bool]], tokenizer: Tokenizer, top: int) -> tuple[Candidate, ...]:
  texts: dict[str, Candidate] = {}
  for ids, log_prob, ended in found:
    text = _words(ids, tokenizer)
    texts.setdefault(text, Candidate(text, math.exp(log_prob), ended))
  return tuple(texts.values())[:top]
