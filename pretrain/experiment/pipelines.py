"""Which models and rows the stages of a mesh can share: rules between `mesh.stage`, `model` and `data`."""

from collections.abc import Iterator

from models.layers.pipeline.schedule import Pipeline, Schedule
from models.precision import RECIPES, named_by
from pallas_kernels.quantized_matmul.api import KERNELS
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment

DEPTHS = ('layers', 'encoder_layers', 'decoder_layers')


def check_pipeline(cfg: Experiment, stages: int, shards: int) -> None:
  """Raises ConfigError where `stages` devices cannot have equal parts of each stack, or a device's rows, of which there
  are `shards` parts, do not divide into the microbatches of the pipeline.
  """
  if stages <= 1:
    return
  for key, layers in _depths(cfg):
    _check_layers(cfg, key, layers, stages)
  _check_rows(cfg, stages, shards)
  if any(cfg.precision.edges):
    edges = 'precision.first_layers={} and precision.last_layers={}'.format(*cfg.precision.edges)
    raise ConfigError(
      f'{edges} with mesh.stage={stages}: all stages run one program, so their layers have one recipe; use 0 of both, '
      'or mesh.stage=1.'
    )
  _check_products(cfg, stages)
  if cfg.model.pipeline_repeats > 1 and cfg.model.remat == 'none':
    raise ConfigError(
      f"model.pipeline_repeats={cfg.model.pipeline_repeats} with model.remat='none', which would keep the parameters "
      "of a stage once for each microbatch; use model.remat='minimal_with_context' or 'full', or "
      'model.pipeline_repeats=1.'
    )


def _check_products(cfg: Experiment, stages: int) -> None:
  """A product of all stages is one, which XLA divides and the kernel of one device cannot."""
  own = cfg.kernels.quantized_matmul
  quantized = [name for name in named_by(cfg.precision) if RECIPES[name] is not None]
  if own in KERNELS and quantized:
    raise ConfigError(
      f"kernels.quantized_matmul='{own}' with mesh.stage={stages} and precision recipe '{quantized[0]}': the kernel "
      "cannot divide a product over stages; use kernels.quantized_matmul='auto' or 'xla', whose products the "
      'partitioner divides, or mesh.stage=1.'
    )


def schedule_of(cfg: Experiment, stages: int, shards: int) -> Schedule:
  """The schedule of a (micro)batch of a training step on a mesh of so many stages, with rows in `shards` parts."""
  rows = max(_rows(cfg, shards), 1)
  return Pipeline(cfg.model.pipeline_microbatches, cfg.model.pipeline_repeats).of(rows, stages)


def _rows(cfg: Experiment, shards: int) -> int:
  """Rows per device of one of the microbatches of `train.accumulate`."""
  return cfg.data.batch_size // (shards * cfg.train.accumulate)


def _depths(cfg: Experiment) -> Iterator[tuple[str, int]]:
  for key in DEPTHS:
    if hasattr(cfg.model, key):
      yield key, getattr(cfg.model, key)


def _check_layers(cfg: Experiment, key: str, layers: int, stages: int) -> None:
  repeats, windows = cfg.model.pipeline_repeats, len(cfg.model.windows or (None,))
  multiple = stages * repeats * windows
  if layers % multiple == 0:
    return
  near = [n for n in range(1, layers + 1) if layers % (n * repeats * windows) == 0]
  fits = f', or mesh.stage={min(near, key=lambda n: (abs(n - stages), n))}' if near else ''
  pattern = f', each with whole patterns of {windows} model.windows' if windows > 1 else ''
  raise ConfigError(
    f'model.{key}={layers} does not divide into mesh.stage={stages} x model.pipeline_repeats={repeats} equal '
    f'groups{pattern}; use {max(round(layers / multiple), 1) * multiple} layers{fits}.'
  )


def _check_rows(cfg: Experiment, stages: int, shards: int) -> None:
  rows, wanted = _rows(cfg, shards), cfg.model.pipeline_microbatches
  if wanted is not None and rows and rows % wanted:
    near = min((n for n in range(1, rows + 1) if rows % n == 0), key=lambda n: (abs(n - wanted), n))
    raise ConfigError(
      f'model.pipeline_microbatches={wanted} does not divide the {rows} rows per device of '
      f'data.batch_size={cfg.data.batch_size} on {shards} shards with train.accumulate={cfg.train.accumulate}; use '
      f'model.pipeline_microbatches={near}, or remove it.'
    )
