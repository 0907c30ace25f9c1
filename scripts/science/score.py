"""Scores any run on held-out text in three ways: causal, prefix and infilling loss."""

import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from data.batches.source import open_data
from data.objectives.objectives import CausalLm, Denoiser, Objective, PrefixLm, SpanCorruption, Ul2
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.devices.compilation_cache import cache_dir
from pretrain.evaluation.losses import evaluate
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.program import build_program
from pretrain.records.metrics import read_metrics
from pretrain.step.loss import make_eval_step

BATCHES = 16


def questions(cfg: Experiment) -> dict[str, Objective]:
  """The tasks. A model that was trained with mode tokens gets the mode token of the task."""
  if not getattr(cfg.objective, 'mode_tokens', False):
    return {'causal': CausalLm(), 'prefix': PrefixLm(), 'infill': SpanCorruption()}
  infill = Denoiser(kind='R', mean_noise_span_length=3.0, noise_density=0.15)
  return {'causal': CausalLm(), 'prefix': Ul2(denoisers=(Denoiser(kind='S'),)), 'infill': Ul2(denoisers=(infill,))}


def score(cfg: Experiment, workdir: pathlib.Path, asked: Mapping[str, Objective] | None = None) -> dict[str, float]:
  """Nats per token of held-out text (without sentinels, modes and EOS), for each task of `asked` (None: `questions`).

  If the run evaluated averages of its weights, also the last of these numbers: `ema`, `lawa`, and `raw`.
  """
  program = build_program(cfg)
  checkpoints = Checkpoints(workdir, cfg.checkpoint, read_only=True)
  params = checkpoints.restore_params(program.abstract.params, checkpoints.latest())
  scores = {name: _loss(cfg, name, objective, program, params) for name, objective in (asked or questions(cfg)).items()}
  return scores | averages(workdir)


def averages(workdir: pathlib.Path) -> dict[str, float]:
  """The last losses on held-out text from the training loop: {'raw', 'ema', 'lawa'}, if they exist."""
  last = next((row for row in reversed(read_metrics(workdir)) if 'eval/builtin/text_loss' in row), {})
  keys = {'raw': 'eval/builtin/text_loss', 'ema': 'eval/builtin/ema/text_loss', 'lawa': 'eval/builtin/lawa/text_loss'}
  return {name: last[key] for name, key in keys.items() if key in last}


def _loss(cfg: Experiment, name: str, objective: Objective, program, params) -> float:
  alone = name == 'causal' and cfg.data.inputs_length > 0
  rows = dataclasses.replace(cfg.data, inputs_length=0) if alone else cfg.data
  data = open_data(rows, objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  eval_step = jax.jit(make_eval_step(program.model, cfg.kernels, data.vocabulary.pieces, data.vocabulary.ids.not_text))
  (batches,) = data.heldout(BATCHES, slice(0, cfg.data.batch_size)).values()
  if alone:
    modes = [data.vocabulary.mode_ids[2]] if getattr(cfg.objective, 'mode_tokens', False) else []
    batches = [with_empty_inputs(batch, [*modes, data.vocabulary.ids.end], cfg.data.inputs_length) for batch in batches]
  return evaluate(eval_step, params, batches, program.mesh)['text_loss']


def with_empty_inputs(batch, inputs: list[int], length: int):
  """Adds encoder fields with only `inputs` for each segment of the decoder: a prefix without text."""
  rows, count = len(batch['decoder_segment_ids']), len(inputs)
  places = np.arange(length)
  segments = places // count + 1
  used = segments <= batch['decoder_segment_ids'].max(1, keepdims=True)
  tile = lambda values: np.where(used, np.broadcast_to(values, (rows, length)), 0).astype(np.int32)
  tokens = np.asarray(inputs)[places % count]
  return batch | {
    'encoder_input_tokens': tile(tokens), 'encoder_segment_ids': tile(segments),
    'encoder_positions': tile(places % count),
  }  # fmt: skip
