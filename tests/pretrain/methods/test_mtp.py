"""Multi-token prediction: what each depth predicts, from what, and that the rest of the model is as without it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from models.build import KernelsConfig, build
from models.flops import flops_per_position
from models.specs import initialize
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.cli.main import main
from pretrain.config import bindings
from pretrain.errors import ConfigError
from pretrain.experiment.phases import phases_of
from pretrain.experiment.program import build_program
from pretrain.growth.depth import deepened
from pretrain.records.metrics import read_metrics
from pretrain.step.loss import LossConfig, make_eval_step, make_loss
from pretrain.testing import assert_resumes_exactly, losses
from pretrain.tools.weights import initial_params
from tests.models import plain, small
from tests.pretrain import tiny

DEPTH, WEIGHT = 3, 11.0  # one segment of the batch has three tokens: none of them has another one three beyond the next
CFG = dataclasses.replace(small.LLAMA, mtp_depth=DEPTH)


def batch():
  """Two segments in each row; every third target has no loss, like that of a turn of a user."""
  own = small.batch()
  text, positions, segments = (own[f'decoder_{kind}'] for kind in ('input_tokens', 'positions', 'segment_ids'))
  inputs = np.where(positions > 0, np.roll(text, 1, 1), 0)
  weights = ((segments > 0) & (np.arange(text.size).reshape(text.shape) % 3 > 0)).astype(np.float32)
  return own | {'decoder_input_tokens': inputs, 'decoder_target_tokens': text, 'decoder_loss_weights': weights}


@functools.cache
def parameters(cfg=CFG):
  return small.shaken(initialize(build(cfg).specs, jax.random.key(0)))


def trunk(params):
  return {name: branch for name, branch in params.items() if not name.startswith('mtp_')}


def by_hand(inputs):
  """float64 logits of one document: those of the next token, then of each depth, for the positions that it has.

  Equations 21 to 23 of arXiv:2412.19437, one document at a time.
  """
  params = jax.tree.map(np.float64, parameters())
  norm, head = functools.partial(plain.norm, CFG), params['head']['kernel']

  def block(p, x):
    x = x + plain.attention(CFG, p['self_attention'], norm(p['self_norm'], x))
    return x + plain.mlp(CFG, p['mlp'], norm(p['mlp_norm'], x))

  vectors = params['embedding']['table'][inputs]
  x = vectors
  for layer in range(CFG.layers):
    x = block(plain.take(params['decoder']['blocks'], layer), x)
  x = norm(params['decoder']['norm'], x)
  found = [x @ head]
  for k in range(1, DEPTH + 1):
    entry, own, there = params[f'mtp_{k}_entry'], params[f'mtp_{k}'], max(len(inputs) - k, 0)
    both = [norm(entry['hidden_norm'], x[:there]), norm(entry['token_norm'], vectors[k:])]
    x = np.concatenate(both, -1) @ entry['kernel']
    x = norm(own['norm'], block(plain.take(own['blocks'], 0), x)) if there else x
    found.append(x @ head)
  return found


def losses_by_hand():
  """[the main loss, that of each depth]: sums over the documents of a batch, divided by WEIGHT."""
  own, totals = batch(), np.zeros(1 + DEPTH)
  for row, segments in enumerate(own['decoder_segment_ids']):
    for segment in range(1, segments.max() + 1):
      here = segments == segment
      inputs, targets, weights = (
        own[f'decoder_{kind}'][row][here] for kind in ('input_tokens', 'target_tokens', 'loss_weights')
      )
      for k, logits in enumerate(by_hand(inputs)):
        right = np.take_along_axis(logits, targets[k:, None], 1)[:, 0]
        totals[k] += (weights[k:] * (np.log(np.exp(logits).sum(1)) - right)).sum()
  return totals / WEIGHT


@functools.cache
def compiled(cfg, loss, head='reference'):
  """params, batch -> ((value, metrics), gradients)."""
  kernels = KernelsConfig(linear_cross_entropy=head)
  own = make_loss(loss, build(cfg, kernels), kernels)

  def value(params, batch):
    total, (metrics, _) = own(params, batch, None, jnp.float32(WEIGHT))
    return total, metrics

  return jax.jit(jax.value_and_grad(value, has_aux=True))


def of_depths(metrics):
  return np.array([metrics['loss'], *(metrics[f'mtp_loss/{k}'] for k in range(1, DEPTH + 1))])


@pytest.mark.parametrize(
  ('loss', 'weight', 'head'),
  [(LossConfig(), 0.3, 'reference'), (LossConfig(mtp=0.1), 0.1, 'chunked')],
  ids=['default', 'chunked'],
)
def test_depth_k_predicts_the_token_k_beyond_the_next_of_its_own_document(loss, weight, head):
  """The oracle has one document at a time, so a leak from another one shows too."""
  (total, metrics), _ = compiled(CFG, loss, head)(parameters(), batch())
  expected = losses_by_hand()
  np.testing.assert_allclose(of_depths(metrics), expected, rtol=2e-5)
  np.testing.assert_allclose(total, expected[0] + weight * expected[1:].mean(), rtol=2e-5)


def padded(part, like):
  """A batch of one row in the shapes of another, with padding behind and below it."""
  return {
    name: np.pad(x, [(0, n - m) for n, m in zip(like[name].shape, x.shape, strict=True)]) for name, x in part.items()
  }


def test_segments_give_together_what_each_gives_alone():
  own = batch()
  parts = [padded(small.alone(own, row, segment), own) for row in (0, 1) for segment in (1, 2)]
  step = compiled(CFG, LossConfig())
  (total, metrics), gradients = step(parameters(), own)
  found = [step(parameters(), part) for part in parts]
  added = jax.tree.map(lambda *x: sum(x), *(gradients for _, gradients in found))
  np.testing.assert_allclose(total, sum(float(part[0][0]) for part in found), rtol=1e-5)
  np.testing.assert_allclose(of_depths(metrics), sum(of_depths(part[0][1]) for part in found), rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max())), gradients, added)


def test_the_tokens_of_one_segment_do_not_enter_the_losses_of_another():
  own = batch()
  first = own['decoder_segment_ids'] == 1
  own['decoder_loss_weights'] = own['decoder_loss_weights'] * first
  other = own | {'decoder_input_tokens': np.where(first, own['decoder_input_tokens'], 7)}
  other |= {'decoder_target_tokens': np.where(first, own['decoder_target_tokens'], 9)}
  step = compiled(CFG, LossConfig())
  for a, b in zip(*(jax.tree.leaves(step(parameters(), each)[0]) for each in (own, other)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_with_weight_0_loss_and_gradients_are_those_without_it_bit_for_bit():
  (total, metrics), gradients = compiled(CFG, LossConfig(mtp=0.0))(parameters(), batch())
  (expected, _), without = compiled(small.LLAMA, LossConfig())(trunk(parameters()), batch())
  assert float(total) == float(metrics['loss']) == float(expected)
  jax.tree.map(np.testing.assert_array_equal, trunk(gradients), without)
  assert not any(np.any(x) for name in gradients.keys() - without.keys() for x in jax.tree.leaves(gradients[name]))


def test_a_model_with_depths_begins_as_the_one_without():
  with_depths, without = (initialize(build(cfg).specs, jax.random.key(5)) for cfg in (CFG, small.LLAMA))
  jax.tree.map(np.testing.assert_array_equal, trunk(with_depths), without)


def test_evaluation_does_not_compute_them():
  """The compiled program of the model with depths has as many FLOPs, and its results are equal bit for bit."""
  found = []
  for cfg, params in ((CFG, parameters()), (small.LLAMA, trunk(parameters()))):
    step = jax.jit(make_eval_step(build(cfg), KernelsConfig(), 60)).lower(params, batch()).compile()
    found.append((step.cost_analysis()['flops'], jax.tree.map(float, step(params, batch()))))
  assert found[0] == found[1]


def test_flops_by_hand():
  """For each depth the entry, a block and the head; scores and mixing over the row in one layer more."""
  embed, width, kv, hidden, length = 32, 4 * 8, 2 * 8, 48, 10
  more = 2 * embed * embed + 2 * embed * width + 2 * embed * kv + 3 * embed * hidden + embed * small.VOCAB
  each = lambda cfg: flops_per_position(cfg, inputs_length=0, targets_length=length)['decoder']
  assert each(CFG) - each(small.LLAMA) == DEPTH * 3 * 2 * (more + 2 * width * length)


def test_growth_in_depth_copies_them():
  specs = flatten_dict(dict(build(CFG).specs))
  own = flatten_dict(parameters())
  grown = deepened(own, specs, {'layers': [0, 1, 0, 1]})
  for path, x in own.items():
    expected = np.concatenate([x, x]) if path[:2] == ('decoder', 'blocks') else x
    np.testing.assert_array_equal(grown[path], expected, '/'.join(path))


def test_an_export_is_that_of_the_model_without_them(tmp_path):
  own = bindings.override(tiny.decoder(), {'model.mtp_depth': 2}, 'test')
  params = initialize(build(own.model).specs, jax.random.key(0))
  for name, cfg, tree in (('with', own, params), ('without', tiny.decoder(), trunk(params))):
    checkpoints = Checkpoints(tmp_path / name, CheckpointConfig())
    checkpoints.save_params(0, tree, {'data': {'tokenizer': 'f' * 64}}, '')
    checkpoints.close()
    (tmp_path / name / 'config.gin').write_text(bindings.render(cfg))
    assert main(['export', f'--workdir={tmp_path}/{name}', f'--out={tmp_path}/{name}.hf']) == 0
  files = [
    {path.name: path.read_bytes() for path in (tmp_path / f'{name}.hf').iterdir()} for name in ('with', 'without')
  ]
  assert files[0] == files[1]
  assert 'config.json' in files[0]


@pytest.mark.parametrize(('before', 'after'), [(0, 1), (2, 1), (1, 0)])
def test_a_run_may_start_from_weights_with_more_or_fewer_depths(tmp_path, before, after):
  """What both have is read; a depth that is new is drawn; one that is no longer there is left out."""
  old, new = (tiny.decoder(f'model.mtp_depth={depth}') for depth in (before, after))
  drawn = initialize(build(old.model).specs, jax.random.key(7))
  checkpoints = Checkpoints(tmp_path, CheckpointConfig())
  checkpoints.save_params(0, drawn, {'data': {'tokenizer': 'f' * 64}}, '')
  checkpoints.close()
  (tmp_path / 'config.gin').write_text(bindings.render(old))
  program = build_program(new)
  found = program.start(initial_params(f'{tmp_path}/0', program, None)).params
  assert found.keys() == build(new.model).specs.keys()
  first = initialize(build(new.model).specs, jax.random.key(new.seed))
  for name, branch in found.items():
    if name in drawn:
      jax.tree.map(np.testing.assert_array_equal, branch, drawn[name])
    else:  # drawn inside of a compiled program
      jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), branch, first[name])


@pytest.mark.slow
def test_a_run_logs_them_resumes_exactly_and_changes_their_weight_in_a_phase(tmp_path):
  keys = ('model.mtp_depth=2', 'loss.mtp=0.3', 'checkpoint.every=1', 'train.accumulate=2')
  cfg = tiny.decoder(*keys, "phases=[{'start_step': 2, 'set': {'loss.mtp': 0.1}}]")
  assert [phase.cfg.loss.mtp for phase in phases_of(cfg)] == [0.3, 0.1]
  assert_resumes_exactly(cfg, tmp_path, steps=4, stop_at=1)
  rows = [{key: row[key] for key in ('mtp_loss/1', 'mtp_loss/2')} for row in read_metrics(tmp_path / 'whole')]
  assert len(rows) == 4
  assert rows == [{key: row[key] for key in rows[0]} for row in read_metrics(tmp_path / 'resumed')]
  assert all(4 < value < 8 for row in rows for value in row.values()), 'near ln(512) = 6.24'


LAYOUTS = {
  'fsdp': ('mesh.fsdp=2',),
  'tensor': ('mesh.tensor=2',),
  'accumulate': ('train.accumulate=2',),
  'remat': ("model.remat='full'",),
  'together': ('mesh.fsdp=2', 'mesh.tensor=2', 'mesh.replica=2', 'train.accumulate=2', "model.remat='minimal'"),
}


@pytest.mark.slow
@pytest.mark.parametrize('keys', LAYOUTS.values(), ids=LAYOUTS)
def test_no_layout_changes_the_losses(keys):
  one = ('model.mtp_depth=2', 'model.dropout=0.1', 'model.kv_heads=2', 'loss.mtp=1.0', 'mesh.data=1')
  for metric in ('loss', 'mtp_loss/2'):
    expected, found = (losses(tiny.decoder(*one, *more), 3, metric) for more in ((), keys))
    np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=metric)


MISTAKES = {
  'no depth': (('loss.mtp=0.1',), 'loss.mtp=0.1 without model.mtp_depth, whose losses it weighs; set model.mtp_depth'),
  'rows': (
    ('model.mtp_depth=32',),
    'model.mtp_depth=32 with data.targets_length=32: no token of such a row has another one 32 tokens beyond the next; '
    'use model.mtp_depth < 32, or longer rows.',
  ),
  'prefixes': (
    ('model.mtp_depth=1', "objective.name='prefix_lm'"),
    "model.mtp_depth=1 with objective.name='prefix_lm', some of whose rows have a prefix: a position would see the "
    "tokens that it predicts; use objective.name='causal_lm', or model.mtp_depth=0.",
  ),
  'prefixes in a phase': (
    ('model.mtp_depth=1', "phases=[{'start_step': 2, 'set': {'objective.name': 'prefix_lm'}}]"),
    "phases[0]: model.mtp_depth=1 with objective.name='prefix_lm'",
  ),
  'stages': (
    ('model.mtp_depth=1', 'mesh.stage=2'),
    'model.mtp_depth=1 with mesh.stage=2: a depth is one layer, which stages cannot divide; use mesh.stage=1',
  ),
  'sequence': (
    ('model.mtp_depth=1', 'mesh.sequence=2'),
    'model.mtp_depth=1 with mesh.sequence=2: the tokens ahead are on other devices; use mesh.sequence=1',
  ),
  'adapters': (
    ('model.mtp_depth=1', 'lora.rank=2', "checkpoint.initial='x/1'"),
    'model.mtp_depth=1 with lora.rank=2, which would leave the depths frozen; use lora.rank=0',
  ),
  'edges': (
    ('model.mtp_depth=1', "precision.recipe='int8'", 'precision.last_layers=1'),
    'model.mtp_depth=1 with precision.first_layers=0 and precision.last_layers=1: a depth has one layer, which is '
    'neither; use 0 of both',
  ),
  'own biases': (
    ('model.mtp_depth=1', "model.positions='relative'", "model.relative_layers='each'"),
    "model.mtp_depth=1 with model.relative_layers='each': the blocks behind the last layer have no biases of their own",
  ),
  'none': (('model.mtp_depth=-1',), 'model.mtp_depth'),
}


@pytest.mark.parametrize(('keys', 'message'), MISTAKES.values(), ids=MISTAKES)
def test_what_it_does_not_support_is_refused_before_anything_is_allocated(keys, message):
  with pytest.raises(ConfigError) as error:
    tiny.decoder(*keys)
  assert message in str(error.value)


def test_other_models_do_not_have_the_key():
  keys = (*tiny.SMALL_ENCODER, "data.name='synthetic'")
  with pytest.raises(ConfigError, match=r'model\.mtp_depth'):
    tiny.experiment(tiny.ENCODER, *keys, 'model.mtp_depth=1')
  with pytest.raises(ConfigError, match=r'loss\.mtp=0\.3 without model\.mtp_depth'):
    tiny.experiment(tiny.ENCODER, *keys, 'loss.mtp=0.3')


def test_a_mesh_that_fills_up_with_stages_is_refused_too():
  """An axis of -1 is known when devices are counted."""
  for axis in ('stage', 'sequence'):
    with pytest.raises(ConfigError, match=rf'model\.mtp_depth=1 with mesh\.{axis}=2'):
      build_program(tiny.decoder('model.mtp_depth=1', f'mesh.{axis}=-1'), jax.devices()[:2])


def test_instructions_and_middles_are_causal_and_a_depth_that_is_0_is_not_saved():
  tiny.decoder('model.mtp_depth=1', "objective.name='fim'", "data.name='builtin'", 'data.sentinels=64')
  assert 'mtp' not in bindings.render(tiny.decoder())
  assert 'model.mtp_depth = 1' in bindings.render(tiny.decoder('model.mtp_depth=1'))
