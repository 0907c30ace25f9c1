"""`pretrain generate`: fills blanks or continues text, greedily, from the newest checkpoint of a run."""

import dataclasses
import pathlib
import re

import jax
import numpy as np

from data.source import open_data
from models.decode import greedy
from pretrain import config
from pretrain.checkpoint import Checkpoints
from pretrain.errors import CheckpointError
from pretrain.experiment import Experiment
from pretrain.mesh import MeshConfig
from pretrain.runtime import build_program, cache_dir

SENTINEL = re.compile(r'<extra_id_(\d+)>')
EOS = 1


@dataclasses.dataclass(frozen=True)
class Generated:
  """`output` is what the decoder wrote; `text` is the prompt with its blanks filled, or continued."""

  prompt: str
  output: str
  text: str


def generate(workdir: pathlib.Path, prompts: list[str], max_tokens: int = 64) -> list[Generated]:
  """Greedy outputs for each prompt. Raises CheckpointError where `workdir` holds no checkpoint."""
  saved = workdir / 'config.gin'
  if not saved.exists():
    raise CheckpointError(
      'CKPT-NONE',
      f'no run in {workdir} (config.gin is missing); train first: pretrain train --workdir={workdir}.',
    )
  cfg = dataclasses.replace(config.load(Experiment, [str(saved)], []), mesh=MeshConfig())
  program = build_program(cfg, jax.devices()[:1])
  checkpoints = Checkpoints(workdir, cfg.checkpoint, read_only=True)
  step = checkpoints.latest()
  if step is None:
    raise CheckpointError(
      'CKPT-NONE', f'no finished checkpoint in {workdir}/checkpoints; let the run reach checkpoint.every.'
    )
  params = checkpoints.restore_params(program.abstract.params, step)
  data = open_data(cfg.data, cfg.objective, seed=cfg.seed, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  return [_complete(program.model, params, data, prompt, max_tokens) for prompt in prompts]


def _complete(model, params, data, prompt: str, max_tokens: int) -> Generated:
  ids = np.asarray(data.tokenizer.encode_prompt(prompt), np.int32)
  denoises = model.cfg.name == 'encoder_decoder'
  output = np.asarray(greedy(model, params, _prompt_batch(ids, denoises), max_tokens))[0]
  end = np.flatnonzero(output == EOS)
  text = data.tokenizer.render(output[: end[0]] if len(end) else output)
  return Generated(prompt, text, fill(prompt, text) if SENTINEL.search(prompt) else prompt + text)


def _prompt_batch(ids: np.ndarray, denoises: bool) -> dict[str, np.ndarray]:
  """One row. An encoder reads the prompt and EOS; a decoder reads it shifted right by one."""
  ids = np.append(ids, EOS).astype(np.int32) if denoises else ids
  side = 'encoder' if denoises else 'decoder'
  tokens = ids if denoises else np.concatenate([[0], ids])
  return {
    f'{side}_input_tokens': tokens[None].astype(np.int32),
    f'{side}_segment_ids': np.ones((1, len(tokens)), np.int32),
    f'{side}_positions': np.arange(len(tokens), dtype=np.int32)[None],
  }


def fill(prompt: str, output: str) -> str:
  """`prompt` with each sentinel replaced by what follows it in `output`.

  >>> fill('Thank you <extra_id_0> me to your party <extra_id_1> week.', '<extra_id_0> for inviting <extra_id_1> last')
  'Thank you for inviting me to your party last week.'
  """
  parts = SENTINEL.split(output)
  found = {int(k): text.strip() for k, text in zip(parts[1::2], parts[2::2], strict=True)}
  return SENTINEL.sub(lambda m: found.get(int(m[1]), m[0]), prompt)
