"""What 'parameters' in `optimizer.offload` need of other sections."""

from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment


def check_offload(cfg: Experiment, *, stages: int) -> None:
  """Raises ConfigError where whole parameters would come to the device, on a mesh of so many `stages`."""
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
    (cfg.sparsity.name != 'none', f"sparsity.name='{cfg.sparsity.name}', which reads all parameters too; use "
     "sparsity.name='none'"),
  )  # fmt: skip
  for wrong, why in limits:
    if wrong:
      raise ConfigError(f"optimizer.offload={list(cfg.optimizer.offload)} with {why}, or leave 'parameters' out.")
