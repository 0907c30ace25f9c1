"""What `model.mtp_depth` needs of `loss`, `objective`, `data`, `mesh`, `lora` and `precision`."""

from data.objectives.objectives import is_causal
from data.packing.buckets import LengthBuckets
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment


def check_multi_token(cfg: Experiment, *, stages: int, devices: int) -> None:
  """Raises ConfigError where no row has a token so far ahead, where tokens behind a position are seen, and for meshes
  of so many `stages`, or `devices` that share a row, and other sections that know nothing of the depths.
  """
  depth = getattr(cfg.model, 'mtp_depth', 0)
  if not depth:
    if cfg.loss.mtp is not None:
      raise ConfigError(
        f'loss.mtp={cfg.loss.mtp} without model.mtp_depth, whose losses it weighs; set model.mtp_depth (decoders have '
        'it), or remove loss.mtp.'
      )
    return
  _check_length(cfg, depth)
  limits = (
    (not is_causal(cfg.objective), f"objective.name='{cfg.objective.name}', some of whose rows have a prefix: a "
     "position would see the tokens that it predicts; use objective.name='causal_lm'"),
    (stages > 1, f'mesh.stage={stages}: a depth is one layer, which stages cannot divide; use mesh.stage=1'),
    (devices > 1, f'mesh.sequence={devices}: the tokens ahead are on other devices; use mesh.sequence=1'),
    (cfg.lora.rank, f'lora.rank={cfg.lora.rank}, which would leave the depths frozen; use lora.rank=0'),
    (any(cfg.precision.edges), 'precision.first_layers={} and precision.last_layers={}: a depth has one layer, which '
     'is neither; use 0 of both'.format(*cfg.precision.edges)),
  )  # fmt: skip
  for wrong, why in limits:
    if wrong:
      raise ConfigError(f'model.mtp_depth={depth} with {why}, or model.mtp_depth=0.')


def _check_length(cfg: Experiment, depth: int) -> None:
  key, length = 'targets_length', cfg.data.targets_length
  if isinstance(cfg.data.packing, LengthBuckets):
    key, length = 'packing.min_length', cfg.data.packing.min_length
  if depth >= length:
    raise ConfigError(
      f'model.mtp_depth={depth} with data.{key}={length}: no token of such a row has another one {depth} tokens beyond '
      f'the next; use model.mtp_depth < {length}, or longer rows.'
    )
