"""What the steps of one phase work with."""

import functools

import jax

from data.batches.source import open_data
from data.objectives.objectives import Supervised
from models.flops import flops_per_step
from pretrain.devices.compilation_cache import cache_dir, plans_url
from pretrain.devices.mesh import host_rows
from pretrain.devices.usage import peak_flops
from pretrain.evaluation.exact_match import make_exact_match
from pretrain.experiment.phases import Phase
from pretrain.experiment.program import build_program
from pretrain.records.timeline import Activity
from pretrain.step.loss import make_eval_step


class PhaseProgram:
  """What one phase works with: its data, compiled functions, and the rows of its batches that this host reads."""

  def __init__(self, phase: Phase):
    self.index, self.cfg, self.holds = phase.index, phase.cfg, phase.holds
    vocab_size = self.cfg.model.vocab_size
    self.data = open_data(
      self.cfg.data, self.cfg.objective, seed=self.cfg.seed, vocab_size=vocab_size, cache_dir=cache_dir(),
      plans_url=plans_url(),
    )  # fmt: skip
    self.program = build_program(self.cfg, schedule_start=phase.schedule_start, start=phase.start)
    self.rows, self._compiled = host_rows(self.program.mesh, self.cfg.data.batch_size), set()
    self.peak_flops = peak_flops(self.program.mesh.devices.flat)
    self._flops: dict[tuple[int, int], float] = {}
    self.eval_step = jax.jit(
      make_eval_step(
        self.program.model, self.cfg.kernels, self.data.vocabulary.pieces, self.data.vocabulary.ids.not_text
      )
    )
    decodes = self.cfg.evaluation.generate and isinstance(self.cfg.objective, Supervised)
    self.exact_match = make_exact_match(self.cfg, self.program, self.data) if decodes else None

  @functools.cached_property
  def heldout_bytes(self) -> dict[str, int]:
    """The bytes of the evaluation sets whose targets are a text; counted when the phase is first evaluated."""
    return self.data.heldout_bytes(self.cfg.evaluation.batches)

  def flops_of(self, batch) -> float:
    """FLOPs of the model for a global batch of these shapes (models/flops.py), on all devices."""
    targets = batch['decoder_target_tokens'].shape[1]
    two_stacks = {'encoder_input_tokens', 'decoder_input_tokens'} <= set(batch)
    inputs = batch['encoder_input_tokens'].shape[1] if two_stacks else 0
    if (inputs, targets) not in self._flops:
      row = flops_per_step(self.cfg.model, inputs_length=inputs, targets_length=targets, lora=self.cfg.lora)
      self._flops[inputs, targets] = row * self.cfg.data.batch_size
    return self._flops[inputs, targets]

  def activity_of(self, batch) -> Activity:
    """'compile' for the first batch of its shapes, 'step' for the others."""
    shapes = tuple(values.shape for values in batch.values())
    known = shapes in self._compiled
    self._compiled.add(shapes)
    return 'step' if known else 'compile'
