"""An encoder-decoder from an encoder and a decoder: which arrays are copies, and what the stacks compute."""

import jax
import numpy as np
import pytest

from models.build import build
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.cli.main import main
from pretrain.config import bindings
from pretrain.experiment.program import build_program
from pretrain.run.train import train
from pretrain.testing import logged_losses
from tests.models import small
from tests.pretrain import tiny

PARTS = ("model.positions='rotary'", "model.norm.name='rmsnorm'", "model.mlp.activation='silu'", 'model.mlp.gated=True')


def write(folder, cfg):
  """A run with one step, 0."""
  params = build_program(cfg).init().params
  checkpoints = Checkpoints(folder, CheckpointConfig())
  checkpoints.save_params(0, params, {'data': {'tokenizer': None}}, '')
  checkpoints.close()
  (folder / 'config.gin').write_text(bindings.render(cfg))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Runs `encoder` and `decoder`, and the config `new.gin` of an encoder-decoder of the same parts."""
  folder = tmp_path_factory.mktemp('warm')
  store = ("data.name='synthetic'", 'evaluation.every=0')
  encoder = (*tiny.SMALL_ENCODER, *PARTS, 'model.embedding_norm=False', 'seed=3')
  write(folder / 'encoder', tiny.experiment(tiny.ENCODER, *encoder, *FIXED, *store))
  write(folder / 'decoder', tiny.decoder(*PARTS, *FIXED, 'seed=4'))
  new = tiny.experiment(tiny.UL2, *tiny.SMALL_UL2, *PARTS, *FIXED, *store)
  (folder / 'new.gin').write_text(bindings.render(new))
  return folder


FIXED = ("model.norm_placement='pre'", 'model.norm.eps=1e-6', "model.head='untied'", "model.dtype='float32'")


def values(run) -> dict[str, np.ndarray]:
  checkpoints = Checkpoints(run, CheckpointConfig(), read_only=True)
  found = {
    key.removeprefix('params/'): np.asarray(x) for key, x in checkpoints.arrays(0, checkpoints.shapes(0)).items()
  }
  checkpoints.close()
  return found


def warm(folder, to, *flags: str) -> int:
  own = ['checkpoints', 'warm-start', f'--gin_file={folder}/new.gin', f'--to={to}']
  return main([*own, f'--encoder={folder}/encoder', f'--decoder={folder}/decoder', *flags])


def test_stacks_are_copies_and_the_rest_is_listed(folder, tmp_path, capsys):
  assert warm(folder, tmp_path / 'new') == 0
  new, encoder, decoder = (values(path) for path in (tmp_path / 'new', folder / 'encoder', folder / 'decoder'))
  listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]}
  assert listed == {key for key in new if '/cross_' in key}
  for key, x in new.items():
    if key not in listed:
      theirs = (encoder if key.startswith('encoder') else decoder)[key]
      factor = 8**-0.5 if key.endswith('query') else 1  # an encoder-decoder has the scale in its weights
      np.testing.assert_allclose(x, theirs * np.float32(factor), rtol=1e-6)


@pytest.mark.slow
def test_the_encoder_computes_what_it_computed(folder, tmp_path):
  assert warm(folder, tmp_path / 'new') == 0
  cfgs = [
    bindings.load(type(tiny.decoder()), [str(path / 'config.gin')]).model
    for path in (tmp_path / 'new', folder / 'encoder')
  ]
  trees = [nested(values(path)) for path in (tmp_path / 'new', folder / 'encoder')]
  trees[0]['embedding'] = trees[1]['embedding']  # the decoder's, in the new model
  batch = {k: v for k, v in small.batch().items() if k.startswith(('encoder', 'example'))}
  ours = build(cfgs[0]).bind(trees[0]).encode(batch, None)[0]
  theirs = build(cfgs[1]).apply(trees[1], batch)[0]
  real = batch['encoder_segment_ids'] > 0
  np.testing.assert_allclose(np.asarray(ours)[real], np.asarray(theirs)[real], atol=1e-5)


def nested(flat: dict[str, np.ndarray]) -> dict:
  tree = {}
  for key, x in flat.items():
    *parents, leaf = key.split('/')
    node = tree
    for name in parents:
      node = node.setdefault(name, {})
    node[leaf] = jax.numpy.asarray(x)
  return tree


def test_cross_attention_can_be_that_of_its_layer(folder, tmp_path, capsys):
  assert warm(folder, tmp_path / 'new', '--cross=self') == 0
  assert capsys.readouterr().out == f'{tmp_path}/new\n'
  new = values(tmp_path / 'new')
  for name in ('query', 'key', 'value', 'out'):
    np.testing.assert_array_equal(
      new[f'decoder/blocks/cross_attention/{name}'], new[f'decoder/blocks/self_attention/{name}']
    )


@pytest.mark.parametrize(
  ('flags', 'code', 'message'),
  [
    (['--gin.model.mlp.hidden=32'], 66, 'model.mlp.hidden is 64 in'),
    (['--gin.model.decoder_layers=3'], 66, 'decoder/blocks/'),
    (["--gin.model.positions='alibi'"], 66, "model.positions is 'rotary' in"),
  ],
)
def test_parts_that_do_not_fit_are_refused(folder, tmp_path, capsys, flags, code, message):
  assert warm(folder, tmp_path / 'new', *flags) == code
  err = capsys.readouterr().err
  assert message in err
  assert 'othing was written' in err
  assert err.count('\n') == 1
  assert not (tmp_path / 'new').exists()


def test_no_part_is_an_error(folder, tmp_path, capsys):
  flags = ['checkpoints', 'warm-start', f'--gin_file={folder}/new.gin', f'--to={tmp_path}/new']
  assert main(flags) == 64
  assert 'give --encoder=RUN' in capsys.readouterr().err


@pytest.mark.slow
def test_a_causal_decoder_continues_with_a_prefix(tmp_path):
  train(tiny.decoder('train.steps=1'), tmp_path / 'causal')
  start = ("objective.name='prefix_lm'", f"checkpoint.initial='{tmp_path}/causal/1'", 'train.steps=2')
  assert train(tiny.decoder(*start), tmp_path / 'prefix') == 0
  assert np.isfinite([loss for _, loss in logged_losses(tmp_path / 'prefix')]).all()
