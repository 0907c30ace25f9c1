"""The smallest runs that still have every part: an encoder-decoder on UL2, a decoder, an encoder; as overrides."""

import pathlib

from pretrain.config import bindings
from pretrain.experiment.checks import check
from pretrain.experiment.experiment import Experiment

ROOT = pathlib.Path(__file__).parents[2]
UL2 = ROOT / 'configs/ul2/tiny.gin'
ENCODER = ROOT / 'configs/encoder/tiny.gin'
DECODER = ROOT / 'configs/decoder/bench.gin'

SMALL = (
  'model.embed=32',
  'model.heads=4',
  'model.head_dim=8',
  'model.mlp.hidden=64',
  'data.batch_size=8',
  'train.log_every=1',
  'evaluation.every=0',
)
SMALL_UL2 = (
  *SMALL,
  'model.vocab_size=512',
  'model.encoder_layers=2',
  'model.decoder_layers=2',
  'data.inputs_length=64',
  'data.targets_length=64',
  'data.sentinels=32',
  'mesh.data=1',
)
SMALL_ENCODER = (
  *SMALL,
  'model.vocab_size=512',
  'model.layers=2',
  'data.targets_length=64',
  'data.sentinels=32',
  'mesh.data=1',
)
SMALL_DECODER = (*SMALL, 'model.vocab_size=512', 'model.layers=2', 'data.targets_length=32')


def experiment(file: pathlib.Path, *overrides: str) -> Experiment:
  cfg = bindings.load(Experiment, [str(file)], overrides)
  check(cfg)
  return cfg


def decoder(*overrides: str) -> Experiment:
  """A two-layer decoder on synthetic tokens."""
  return experiment(DECODER, *SMALL_DECODER, *overrides)


def ul2(store: pathlib.Path, *overrides: str) -> Experiment:
  """A two-and-two-layer encoder-decoder on UL2 over `store`."""
  return experiment(UL2, *over(store), *SMALL_UL2, *overrides)


def encoder(store: pathlib.Path, *overrides: str) -> Experiment:
  """A two-layer encoder on masked language modelling over `store`."""
  return experiment(ENCODER, *over(store), *SMALL_ENCODER, *overrides)


def over(store: pathlib.Path) -> tuple[str, ...]:
  """Overrides: train and evaluate on `store`."""
  return ("data.name='store'", f"data.sources=[{{'path': '{store}'}}]", f"data.heldout=[{{'path': '{store}'}}]")
