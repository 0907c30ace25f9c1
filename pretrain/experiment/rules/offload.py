"""What 'parameters' in `optimizer.offload` need of other sections, and configs of programs that do not train."""

import dataclasses

from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment


def check_offload(cfg: Experiment, *, stages: int) -> None:
  """Raises ConfigError for what needs more than a layer of the parameters at a time, on a mesh of so many `stages`."""
  if 'parameters' not in cfg.optimizer.offload:
    return
  limits = (
    (cfg.model.remat == 'none', "model.remat='none', which keeps the parameters of every layer on the device for the "
     "backward pass; use model.remat='full' or another policy"),
    (stages > 1, f'mesh.stage={stages}, whose stages select among their layers; use mesh.stage=1'),
    (cfg.lora.rank, f'lora.rank={cfg.lora.rank}, which trains adapters alone, and the others need no update; use '
     'lora.rank=0'),
    (any(cfg.precision.edges), 'precision.first_layers={} and precision.last_layers={}, whose layers are taken out of '
     'the stack; use 0 of both'.format(*cfg.precision.edges)),
    (cfg.averaging.name == 'ema', "averaging.name='ema', which reads all parameters after each step; use "
     "averaging.name='none'"),
    (cfg.evaluation.lawa_checkpoints, f'evaluation.lawa_checkpoints={cfg.evaluation.lawa_checkpoints}, which adds up '
     'all parameters of several steps; use evaluation.lawa_checkpoints=0'),
    (len(cfg.model.windows or ()) in _layers(cfg), f'model.windows of {len(cfg.model.windows or ())} layers, which are '
     'all in one group; use fewer windows, which repeat'),
    (cfg.sparsity.name != 'none', f"sparsity.name='{cfg.sparsity.name}', which reads all parameters too; use "
     "sparsity.name='none'"),
  )  # fmt: skip
  for wrong, why in limits:
    if wrong:
      raise ConfigError(f"optimizer.offload={list(cfg.optimizer.offload)} with {why}, or leave 'parameters' out.")


def _layers(cfg: Experiment) -> tuple[int, ...]:
  """The number of layers of each stack."""
  model = cfg.model
  return (model.encoder_layers, model.decoder_layers) if model.name == 'encoder_decoder' else (model.layers,)


def without_offload(cfg: Experiment) -> Experiment:
  """`cfg` for a program that does not train: nothing of it lies in the memory of the host."""
  return dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, offload=()))
