"""`pretrain generate`: fills blanks or continues text, greedily, from the newest checkpoint of a run."""

import dataclasses
import pathlib
import reprlib
from collections.abc import Sequence

import jax
import numpy as np

from data.batches.batches import DataSource
from data.batches.source import open_data
from data.objectives.features import Batch, decoder_features, encoder_decoder_features
from data.objectives.fim import fim_ids
from data.objectives.objectives import Instruction, OfUnits, Supervised, pair_lengths, tasks_of
from data.objectives.tasks import LEFT_TO_RIGHT
from data.prepare.messages import marker
from data.ragged import interleave, join
from data.stores.vocabulary import EOS, Vocabulary
from models.build import Model
from models.decode import greedy
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.config import bindings
from pretrain.devices.compilation_cache import cache_dir
from pretrain.devices.mesh import MeshConfig
from pretrain.errors import CheckpointError, ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.phases import phase_at
from pretrain.experiment.program import build_program


@dataclasses.dataclass(frozen=True)
class Generated:
  """`output` is what the decoder wrote; `text` is the prompt with its blanks filled, or continued, or its answer.

  `text` is spelt as the tokenizer spells the prompt: T5's makes one space of several.
  """

  prompt: str
  output: str
  text: str


def generate(workdir: pathlib.Path, prompts: Sequence[str], max_tokens: int = 64) -> list[Generated]:
  """Greedy outputs for each prompt: at most `max_tokens` tokens, and no more than rows of training held.

  Prompts are read as the run's objective reads its inputs (`prompt_inputs`). Raises ConfigError for a run without text
  or of an encoder, a prompt longer than the rows of training or one the objective cannot answer; DataError for a
  sentinel that does not exist; CheckpointError where `workdir` holds no checkpoint. All of them before a parameter is
  read.
  """
  if max_tokens < 1:
    raise ConfigError(f'--max_tokens={max_tokens}; it must be at least 1.')
  whole = _config_of(workdir)
  checkpoints = Checkpoints(workdir, whole.checkpoint, read_only=True)
  step = checkpoints.latest()
  if step is None:
    raise CheckpointError(
      'CKPT-NONE', f'no finished checkpoint in {workdir}/checkpoints; let the run reach checkpoint.every.'
    )
  cfg = phase_at(whole, max(step - 1, 0)).cfg  # prompts are read as the phase did that saved the step
  data = open_data(cfg.data, cfg.objective, seed=cfg.seed, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  inputs = [prompt_inputs(prompt, cfg, data) for prompt in prompts]
  rooms = [min(max_tokens, _room(prompt, own, cfg)) for prompt, own in zip(prompts, inputs, strict=True)]
  program = build_program(cfg, jax.devices()[:1])
  params = checkpoints.restore_params(program.abstract.params, step)
  outputs = [_decode(program.model, params, own, room, cfg, data) for own, room in zip(inputs, rooms, strict=True)]
  return [_result(*each, cfg, data) for each in zip(prompts, inputs, outputs, strict=True)]


def _config_of(workdir: pathlib.Path) -> Experiment:
  """The config of a run on text whose model writes, for one device."""
  saved = workdir / 'config.gin'
  if not saved.exists():
    raise CheckpointError(
      'CKPT-NONE',
      f'no run in {workdir} (config.gin is missing); train first: pretrain train --workdir={workdir}.',
    )
  cfg = dataclasses.replace(bindings.load(Experiment, [str(saved)], []), mesh=MeshConfig())
  if cfg.model.name == 'encoder':
    raise ConfigError(
      f"{saved}: model.name='encoder' writes no text; generate from a run with model.name='encoder_decoder' or "
      "'decoder' (this one is judged by the eval/ lines of its metrics.jsonl)."
    )
  if cfg.data.name == 'synthetic':
    raise ConfigError(
      f"{saved}: data.name='synthetic' is random tokens, without a tokenizer to read a prompt; generate from a run "
      "trained with data.name='builtin' or 'store'."
    )
  return cfg


def prompt_inputs(prompt: str, cfg: Experiment, data: DataSource) -> list[int]:
  """The ids that training has for `prompt` as inputs: [mode] text EOS; the text alone for a causal objective, of a run
  with fill-in-the-middle (PSM) what stands around the one blank.

  Inputs of pairs are plain text, in which nothing is special; so is what a user says, which the assistant answers.
  The mode token, where the objective has them and the prompt begins with none, is that of the task that the prompt
  asks for: [NLU] (of the R denoiser, [NLG] where there are only X) for a prompt with blanks, [S2S] for one without.
  Raises ConfigError where the objective trains no such task; DataError for a sentinel that does not exist.
  """
  if isinstance(cfg.objective, Supervised):
    return [*data.tokenizer.encode(prompt), EOS]
  if isinstance(cfg.objective, Instruction):
    encode = data.tokenizer.encode
    return [*encode(marker('user')), *encode(prompt), EOS, *encode(marker('assistant'))]
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
      f"--text={reprlib.repr(prompt)}: a run with objective.name='{objective.name}' is not trained {trained}; {fix}."
    )
  if tasks[0].kind in LEFT_TO_RIGHT:
    return ids
  if tasks[0].mode is not None and (not ids or ids[0] not in vocabulary.mode_ids):
    ids = [vocabulary.mode_ids[min(task.mode for task in tasks if task.mode is not None)], *ids]
  return [*ids, EOS]


def _room(prompt: str, inputs: list[int], cfg: Experiment) -> int:
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
      f'--text={reprlib.repr(prompt)} is {len(inputs)} tokens, at most {most} fit the rows this run was trained on '
      f'({key}={length}); shorten the prompt.'
    )
  return room


def prompt_batch(prompts: Sequence[list[int]], cfg: Experiment, length: int) -> Batch:
  """A row of each of `prompts` as training makes it, up to its first target: fields as in `data.features`.

  They have `length` places, and one more in a decoder, where each prompt stands at the end of its row. Inputs that are
  read from left to right have no EOS behind (`prompt_inputs`); all prompts are of one kind.
  """
  inputs, number = join([np.asarray(ids, np.int32) for ids in prompts]), len(prompts)
  target, rows = join([np.zeros(1, np.int32)] * number), np.arange(number)
  if cfg.data.inputs_length:
    return encoder_decoder_features(inputs, target, rows, number, length, 1)
  match cfg.objective:
    case Instruction(prefix_attention=prefix):
      causal = not prefix
    case objective:
      causal = not isinstance(objective, Supervised) and prompts[0][-1:] != [EOS]
  if causal:
    fields = decoder_features(None, interleave(inputs, target)[0], rows, number, length + 1)
  else:
    fields = decoder_features(inputs, target, rows, number, length + 1)
  places = (np.arange(length + 1) + inputs.lengths[:, None] + 1) % (length + 1)
  return {name: np.take_along_axis(values, places, 1) for name, values in fields.items()}


def fill(inputs: list[int], output: list[int], vocabulary: Vocabulary) -> list[int]:
  """Ids of the text of `inputs`: each sentinel replaced by what follows it in `output`; without sentinels, both.

  Inputs of fill-in-the-middle get `output` in their middle. A sentinel that `output` does not hold stays. Joined as
  ids, the parts have spaces where the text had them.

  >>> vocabulary = Vocabulary(100, 4)  # <extra_id_0> is 103, [NLU] 104
  >>> fill([104, 10, 103, 12, 102, 1], [103, 20, 21, 102, 22], vocabulary)
  [10, 20, 21, 12, 22]
  >>> fill([10, 11], [12], vocabulary)
  [10, 11, 12]
  """
  pre, suf, mid = fim_ids(vocabulary)
  if inputs[:1] == [pre] and inputs[-1:] == [mid]:
    cut = inputs.index(suf)
    return inputs[1:cut] + output + inputs[cut + 1 : -1]
  text = [token for token in inputs if token != EOS and token not in vocabulary.mode_ids]
  if not any(map(vocabulary.is_sentinel, text)):
    return text + output
  marks = [i for i, token in enumerate(output) if vocabulary.is_sentinel(token)]
  ends = [*marks[1:], len(output)]
  # The first answer to a blank counts: models repeat themselves.
  found = {output[i]: output[i + 1 : end] for i, end in reversed(list(zip(marks, ends, strict=True)))}
  return [token for hidden in text for token in found.get(hidden, [hidden])]


def _decode(model: Model, params, inputs: list[int], max_tokens: int, cfg: Experiment, data: DataSource) -> list[int]:
  """What the model writes after `inputs`, up to its EOS; ids that the tokenizer lacks are never chosen."""
  batch = prompt_batch([inputs], cfg, len(inputs))
  return until_eos(np.asarray(greedy(model, params, batch, max_tokens, data.vocabulary.size))[0].tolist())


def until_eos(output: list[int]) -> list[int]:
  return output[: output.index(EOS)] if EOS in output else output


def _result(prompt: str, inputs: list[int], output: list[int], cfg: Experiment, data: DataSource) -> Generated:
  # Targets of pairs, turns of a conversation, and full targets of noise, are an answer of their own.
  answers = isinstance(cfg.objective, OfUnits) or all(task.full for task in tasks_of(cfg.objective))
  render = data.tokenizer.render
  return Generated(prompt, render(output), render(output if answers else fill(inputs, output, data.vocabulary)))
