"""Losses on held-out text of a trained model whose products are quantized only now (post-training quantization)."""

import functools
import pathlib
from collections.abc import Mapping

import jax

from data.batches.source import open_data
from models.build import Model, make_module
from models.layers.low_rank import products
from models.product import KEY, Quantization
from models.specs import as_function, param_specs
from pallas_kernels.quantized_matmul.api import Operand, Recipe
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.devices.compilation_cache import cache_dir
from pretrain.evaluation.losses import evaluate
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.program import build_program
from pretrain.step.loss import make_eval_step

BATCHES = 16
INT4, NVFP4 = Operand('int4'), Operand('nvfp4')
# int4 is round-to-nearest with a scale for each token and each column of a weight, as in the paper's tables (whose
# activations are asymmetric and whose keys and values are quantized too). Scales of nvfp4 are those of 16 numbers.
FORMATS: Mapping[str, Recipe | None] = {
  'none': None, 'int4': Recipe(forward=(INT4, INT4)), 'nvfp4': Recipe(forward=(NVFP4, NVFP4))
}  # fmt: skip


def losses_in(cfg: Experiment, workdir: pathlib.Path) -> dict[str, float]:
  """Nats per token of held-out text of the final weights, with weights and activations of all blocks in each format."""
  program = build_program(cfg)
  checkpoints = Checkpoints(workdir, cfg.checkpoint, read_only=True)
  params = checkpoints.restore_params(program.abstract.params, checkpoints.latest())
  data = open_data(cfg.data, cfg.objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  (batches,) = data.heldout(BATCHES, slice(0, cfg.data.batch_size)).values()
  batches = list(batches)

  def loss(recipe: Recipe | None) -> float:
    step = make_eval_step(quantized(cfg, recipe, program.mesh), cfg.kernels, data.vocabulary.pieces)
    return evaluate(jax.jit(step), params, batches, program.mesh)['loss']

  return {name: loss(recipe) for name, recipe in FORMATS.items()}


def quantized(cfg: Experiment, recipe: Recipe | None, mesh) -> Model:
  """The model of a run with all products of its blocks in `recipe`."""
  module = make_module(cfg.model, cfg.kernels)
  for path in products(param_specs(module)) if recipe else ():
    owner = functools.reduce(getattr, path[:-1], module)
    getattr(owner, path[-1]).set_metadata(**{KEY: Quantization(recipe, 0, cfg.kernels.quantized_matmul)})
  return Model(cfg.model, param_specs(module), as_function(module), mesh)
