"""Losses on held-out text of a trained model whose products are quantized only now (post-training quantization)."""

import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from data.batches.source import open_data
from models.build import build
from models.precision import PrecisionConfig, RecipeName
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.devices.compilation_cache import cache_dir
from pretrain.evaluation.losses import evaluate
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.program import build_program
from pretrain.step.loss import make_eval_step

BATCHES = 16
# int4 rounds to nearest with a scale for each token and each column of a weight, as the paper's tables of weights and
# activations in four bits; theirs have asymmetric activations, and keys and values in four bits too.
RECIPES: tuple[RecipeName, ...] = ('bf16', 'int4', 'nvfp4')


def losses_in(cfg: Experiment, workdir: pathlib.Path) -> dict[str, float]:
  """Nats per token of held-out text of the final weights, with all blocks in each recipe."""
  program = build_program(cfg)
  checkpoints = Checkpoints(workdir, cfg.checkpoint, read_only=True)
  params = checkpoints.restore_params(program.abstract.params, checkpoints.latest())
  data = open_data(cfg.data, cfg.objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  (batches,) = data.heldout(BATCHES, slice(0, cfg.data.batch_size)).values()
  return losses_on(cfg, params, list(batches), program.mesh)


def losses_on(cfg: Experiment, params, batches: Sequence[Mapping[str, np.ndarray]], mesh: Mesh) -> dict[str, float]:
  """Nats per target of `batches`, in each recipe."""

  def loss(recipe: RecipeName) -> float:
    model = build(cfg.model, cfg.kernels, mesh, precision=PrecisionConfig(recipe=recipe))
    step = make_eval_step(model, cfg.kernels, cfg.model.vocab_size)
    return evaluate(jax.jit(step), params, batches, mesh)['loss']

  return {recipe: loss(recipe) for recipe in RECIPES}
