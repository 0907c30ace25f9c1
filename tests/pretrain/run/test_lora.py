"""A run that trains adapters of another run's weights: what moves, what is saved, what is refused."""

import shutil

import jax
import numpy as np
import pytest

from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.cli.main import main
from pretrain.config import bindings
from pretrain.errors import CheckpointError, ConfigError
from pretrain.experiment.program import build_program
from pretrain.experiment.trunk import plain, read_weights
from pretrain.run.train import train
from pretrain.testing import logged_losses
from tests.pretrain import tiny

EVERY = ('checkpoint.every=2', 'checkpoint.keep=9', 'model.dropout=0.1', 'mesh.data=1')
LORA = ('lora.rank=4', 'lora.alpha=8.0', "lora.modules=['attention', 'down']", 'schedule.peak=0.05')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Runs: `trunk`, and `tuned` of 4 steps with adapters of its step 2."""
  folder = tmp_path_factory.mktemp('lora')
  assert train(tiny.decoder(*EVERY, 'train.steps=2'), folder / 'trunk') == 0
  assert train(tuning(folder / 'trunk', 'train.steps=4'), folder / 'tuned') == 0
  return folder


def tuning(trunk, *keys: str):
  return tiny.decoder(*EVERY, *LORA, f"checkpoint.initial='{trunk}/2'", *keys)


def arrays(workdir, step: int, prefix: str) -> dict[str, np.ndarray]:
  checkpoints = Checkpoints(workdir, CheckpointConfig(), read_only=True)
  keys = [key for key in checkpoints.shapes(step) if key.startswith(prefix)]
  found = {key: np.asarray(x) for key, x in checkpoints.arrays(step, keys).items()}
  checkpoints.close()
  return found


def test_checkpoints_hold_adapters_and_their_moments_alone(folder):
  shapes = Checkpoints(folder / 'tuned', CheckpointConfig(), read_only=True).shapes(4)
  params = {key: x.size for key, x in shapes.items() if key.startswith('params/')}
  assert all(key.startswith('params/lora/decoder/blocks/') for key in params)
  attention, down = 4 * 4 * (32 + 32), 4 * (64 + 32)
  assert sum(params.values()) == 2 * (attention + down), 'two layers'
  moments = sum(x.size for key, x in shapes.items() if key.startswith('opt_state/') and x.size > 1)
  assert moments == 2 * sum(params.values()), 'no state of frozen weights'


def test_a_step_moves_adapters_and_nothing_else(folder):
  program = build_program(tuning(folder / 'trunk'))
  weights = read_weights(folder / 'trunk', 2, program.weights)
  before = jax.tree.map(np.asarray, weights)
  state = program.start(weights)
  assert all(not x.any() for key, x in flat(state.params).items() if key.endswith('/b'))
  assert all(x.any() for key, x in flat(state.params).items() if key.endswith('/a'))
  rows = np.ones((8, 32), np.int32)
  batch = {f'decoder_{name}': rows for name in ('input_tokens', 'target_tokens', 'segment_ids', 'positions')}
  batch |= {'decoder_loss_weights': rows.astype(np.float32), 'example_index': np.arange(8, dtype=np.int32)}
  first = jax.tree.map(np.asarray, state.params)
  state, _ = program.train_step(state, batch)
  state, _ = program.train_step(state, batch)  # A has no gradient before B has moved
  moved = [(x != y).any() for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(state.params), strict=True)]
  assert all(moved)
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state.frozen), before)


def flat(tree) -> dict[str, np.ndarray]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {'/'.join(part.key for part in path): np.asarray(x) for path, x in leaves}


def test_the_first_loss_is_that_of_the_weights(folder):
  trunk = tiny.decoder(*EVERY, f"checkpoint.initial='{folder}/trunk/2'", 'train.steps=1')
  train(trunk, folder / 'whole')
  assert logged_losses(folder / 'whole')[0] == logged_losses(folder / 'tuned')[0]


def test_a_resumed_run_is_the_same_to_the_bit(folder):
  for steps in (2, 4):
    train(tuning(folder / 'trunk', f'train.steps={steps}'), folder / 'resumed')
  assert logged_losses(folder / 'resumed') == logged_losses(folder / 'tuned')
  ours, theirs = arrays(folder / 'resumed', 4, ''), arrays(folder / 'tuned', 4, '')
  assert {k: x.tobytes() for k, x in ours.items()} == {k: x.tobytes() for k, x in theirs.items()}


@pytest.mark.slow
def test_a_mesh_and_microbatches_compute_the_same_losses(folder):
  keys = ('train.steps=3', 'mesh.fsdp=2', 'mesh.tensor=2', 'model.dropout=0.0')
  cfg = tuning(folder / 'trunk', 'train.steps=3', 'model.dropout=0.0')
  train(cfg, folder / 'one')
  train(tuning(folder / 'trunk', *keys, 'train.accumulate=2'), folder / 'mesh')
  ours, theirs = logged_losses(folder / 'mesh'), logged_losses(folder / 'one')
  np.testing.assert_allclose([x for _, x in ours], [x for _, x in theirs], rtol=1e-5)
  assert theirs[2][1] != theirs[0][1]


def test_readers_add_the_adapters(folder):
  program = build_program(plain(tuning(folder / 'trunk')))
  own, base = (
    flat(read_weights(folder / run, step, program.abstract.params)) for run, step in (('tuned', 4), ('trunk', 2))
  )
  found = arrays(folder / 'tuned', 4, 'params/lora')
  at = 'decoder/blocks/self_attention/query'
  a, b = (found[f'params/lora/{at}/{name}'].astype(np.float64) for name in 'ab')
  np.testing.assert_allclose(own[at], base[at] + 8 / 4 * np.einsum('ler,lrhd->lehd', a, b), rtol=1e-5, atol=1e-6)
  assert (own[at] != base[at]).any()
  assert (own['decoder/blocks/mlp/up'] == base['decoder/blocks/mlp/up']).all()


def test_merged_weights_are_an_ordinary_run(folder):
  out = folder / 'merged'
  assert main(['checkpoints', 'average', f'--workdir={folder}/tuned', '--steps=4', f'--output={out}']) == 0
  cfg = bindings.load(type(tuning(folder / 'trunk')), [str(out / 'config.gin')])
  assert cfg.lora.rank == 0
  assert not [key for key in arrays(out, 0, 'params/') if 'lora' in key]


@pytest.mark.slow
def test_other_weights_at_the_same_place_are_refused(folder, tmp_path):
  for run in ('trunk', 'tuned'):
    shutil.copytree(folder / run, tmp_path / run)
  text = (tmp_path / 'tuned/config.gin').read_text().replace(str(folder), str(tmp_path))
  (tmp_path / 'tuned/config.gin').write_text(text)
  saved = tmp_path / 'tuned/stores.json'
  saved.write_text(saved.read_text().replace(str(folder), str(tmp_path)))
  train(tuning(tmp_path / 'trunk', 'train.steps=4'), tmp_path / 'tuned')  # a copy of the weights is the same weights
  shutil.rmtree(tmp_path / 'trunk')
  train(tiny.decoder(*EVERY, 'train.steps=2', 'seed=1'), tmp_path / 'trunk')
  with pytest.raises(CheckpointError, match='were trained on other weights than those in'):
    train(tuning(tmp_path / 'trunk', 'train.steps=5'), tmp_path / 'tuned')
  program = build_program(plain(tuning(tmp_path / 'trunk')))
  with pytest.raises(CheckpointError, match='were trained on other weights than those in'):
    read_weights(tmp_path / 'tuned', 4, program.abstract.params)
  shutil.rmtree(tmp_path / 'trunk')
  with pytest.raises(CheckpointError, match='which does not exist'):
    read_weights(tmp_path / 'tuned', 4, program.abstract.params)


@pytest.mark.parametrize(
  ('keys', 'message'),
  [
    (('lora.alpha=2.0',), r'lora\.\* is set with lora\.rank=0'),
    (('lora.rank=2',), r'lora\.rank=2 trains adapters.*set checkpoint\.initial='),
    (
      (
        'lora.rank=2',
        "model.rope_scaling.name='clex'",
        'model.rope_scaling.original_max_positions=9',
        'model.rope_scaling.max_factor=2',
      ),
      r"lora\.rank=2 with model\.rope_scaling\.name='clex', whose frequencies would stay as drawn",
    ),
    (
      ("checkpoint.initial='x/2'", 'lora.rank=2', "lora.modules=['q']"),
      r"has 'q', which is not a product.*choose from all, attention",
    ),
    (("checkpoint.initial='x/2'", 'lora.rank=-1'), r'lora\.rank'),
  ],
)
def test_a_mistake_is_named(keys, message):
  with pytest.raises(ConfigError, match=message):
    tiny.decoder(*keys)


def test_a_restored_optimizer_may_change(folder, tmp_path):
  flags = [f'--input={folder}/tuned/4', f'--output={tmp_path}/new', "--gin.optimizer.name='lion'"]
  assert main(['checkpoints', 'restore-as', *flags]) == 0
  same = lambda workdir: {key: x.tobytes() for key, x in arrays(workdir, 4, 'params/').items()}
  assert same(tmp_path / 'new') == same(folder / 'tuned')
