"""Weights that are 0 in training: which, when, that they and their moments are exactly 0, and how many are left."""

import itertools
import math
import re
import zlib
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from models import partition
from models.build import build
from models.specs import count
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.config import bindings
from pretrain.devices.mesh import MeshConfig, make_mesh
from pretrain.errors import ConfigError
from pretrain.experiment.program import build_program
from pretrain.optim.offload import HOST, on_host, streamed
from pretrain.optim.optimizer import Adafactor, AdamW, Lion, Muon, make_optimizer
from pretrain.optim.sparsity import (
  DENSE,
  FixedSparsity,
  Pruning,
  begun,
  ranked,
  shares,
  sparse,
  sparsity_rule,
  sparsity_tracks,
  total,
)
from pretrain.optim.state import own_path, state_shardings
from pretrain.records.metrics import read_metrics
from pretrain.testing import assert_resumes_exactly, losses
from tests.pretrain import tiny
from tests.pretrain.optim import optimizing
from tests.pretrain.optim.optimizing import draw, spec

# Embeddings, heads, norms and routers are not in MATRICES.
SPECS = {
  'embedding': optimizing.SPECS['embedding'],
  'blocks': {name: optimizing.SPECS['blocks'][name] for name in ('up', 'out', 'norm')}
  | {'router': spec((3, 64, 4), ('layers', 'embed', 'experts'))},
}
MATRICES = [('blocks', 'out'), ('blocks', 'up')]
SIZE = 3 * (64 * 96 + 4 * 32 * 64)
SEED, RATE = 7, 0.75
FIXED, PRUNING = FixedSparsity(rate=RATE), Pruning(rate=RATE, start_step=2, end_step=4, every=1)


def hashed(seed, path, shape):
  """The numbers of a mask, by the formula of `optim.shared.noise`, in 64 bits."""
  x = np.arange(math.prod(shape), dtype=np.uint64) * 0x9E3779B1 + zlib.crc32(f'{seed}/{"/".join(path)}'.encode())
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x %= 2**32
    x = (x ^ (x >> np.uint64(shift))) * factor
  return (x % 2**32).reshape(shape)


def kept_by_hash(specs=None, rate=RATE, seed=SEED):
  """{path: whether a weight is trained} of a random mask."""
  own = flatten_dict(specs or SPECS)
  return {path: hashed(seed, path, own[path].shape) >= int(rate * 2**32) for path in MATRICES}


def kept_by_rank(params, number):
  """{path: whether a weight is among all but the `number` smallest of all matrices}, by sorting."""
  sizes = [np.abs(params[path]).ravel() for path in MATRICES]
  order = np.argsort(np.concatenate(sizes), kind='stable')
  kept = np.ones(len(order), bool)
  kept[order[:number]] = False
  parts = np.split(kept, np.cumsum([len(x) for x in sizes])[:-1])
  return {path: part.reshape(params[path].shape) for path, part in zip(MATRICES, parts, strict=True)}


def numbers(cfg, size=SIZE):
  """How many weights are 0 after each update that prunes, in exact fractions: Zhu and Gupta 2017, equation 1."""
  updates = range(cfg.start_step, cfg.end_step + 1, cfg.every)
  length, rate = cfg.end_step - cfg.start_step, Fraction(cfg.rate)
  return [math.floor((rate - rate * (1 - Fraction(t - cfg.start_step, length)) ** 3) * size) for t in updates]


def test_the_cubic_curve_is_the_formula_and_starts_at_0():
  cfg = Pruning(rate=0.8125, start_step=500, end_step=1500, every=100)
  exact = [float(Fraction(13, 16) * (1 - (1 - Fraction(i, 10)) ** 3)) for i in range(11)]
  np.testing.assert_allclose(shares(cfg), exact, rtol=1e-15)
  assert (shares(cfg)[0], shares(cfg)[-1]) == (0, 0.8125)


def test_on_the_geometric_curve_each_update_prunes_an_equal_part_of_what_remains():
  """300, 400, … 800: six updates, the first of which prunes too, as in the code of Jin et al."""
  left = 1 - shares(Pruning(rate=0.5, start_step=300, end_step=800, every=100, curve='geometric'))
  np.testing.assert_allclose(left, [0.5 ** (i / 6) for i in range(1, 7)], rtol=1e-15)


def test_a_random_mask_follows_from_seed_and_path_and_has_its_share_of_every_layer():
  masks, expected = sparsity_rule(FIXED, SPECS, SEED).now({}, 0), kept_by_hash()
  assert sorted(masks) == MATRICES
  for path, mask in masks.items():
    np.testing.assert_array_equal(mask, expected[path])
    deviation = 5 * math.sqrt(RATE * (1 - RATE) / mask[0].size)
    assert all(abs(np.mean(layer) - (1 - RATE)) < deviation for layer in mask)
  both = [np.asarray(mask).ravel()[:18_432] for mask in masks.values()]
  others = [*both, np.asarray(masks[MATRICES[0]])[1].ravel()[:8192], kept_by_hash(seed=8)[MATRICES[0]].ravel()]
  for a, b in itertools.combinations(others, 2):
    a, b = a[: len(b)], b[: len(a)]
    assert abs(np.mean(a & b) - (1 - RATE) ** 2) < 5 * 0.25 / math.sqrt(len(a)), 'masks are independent'
  fewer = sparsity_rule(FixedSparsity(rate=0.5), SPECS, SEED).now({}, 0)
  assert all(np.all(fewer[path] | ~masks[path]) for path in masks), 'a lower rate frees weights and takes none'


def updates(cfg, sparsity, *, streaming=False):
  """[(parameters, state)] before and after each of five updates of SPECS, the third of them of a gradient of NaN."""
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  rule = sparsity_rule(sparsity, SPECS, SEED)
  tx = sparse(make_optimizer(cfg, lambda step: 0.01, SPECS), rule)
  params = begun(rule, draw(SPECS, 0))
  if streaming:
    places = state_shardings(tx, params, partition.shardings(SPECS, mesh), mesh)
    tx = streamed(tx, on_host(('moments',), SPECS, jax.eval_shape(tx.init, params), places))

  @jax.jit
  def step(params, state, grads):
    changes, state = tx.update(grads, state, params)
    return optax.apply_updates(params, changes), state

  found = [(params, jax.jit(tx.init)(params))]
  for i, factor in enumerate((1, 1, np.nan, 1, 1)):
    found.append(step(*found[-1], jax.tree.map(lambda x, c=factor: x * c, draw(SPECS, i + 1))))
  return [(flatten_dict(jax.tree.map(np.asarray, params)), state) for params, state in found]


def moments_of(state, path):
  """The statistics of a parameter's own shape: 8-bit codes as signed numbers, whose 0 is 127 or 0."""
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  own = [(jax.tree_util.keystr(where), np.asarray(x)) for where, x in leaves if own_path(where) == path]
  signed = lambda name, x: x.astype(np.int32) - (127 if '.nu' not in name else 0) if x.dtype == np.uint8 else x
  shape = flatten_dict(SPECS)[path].shape
  return [signed(name, x) for name, x in own if x.shape == shape]


ADAFACTOR = Adafactor(min_dim_size_to_factor=16, momentum=0.9, weight_decay=0.1)
name_of = lambda x: f'{x.name}-{x.state_dtype}' if hasattr(x, 'state_dtype') else x.name


@pytest.mark.parametrize(
  ('cfg', 'sparsity'),
  [
    (AdamW(parameter_scale=True, weight_decay=0.1), PRUNING),
    (ADAFACTOR, PRUNING),
    (AdamW(state_dtype='int8'), FIXED),
    *(
      (cfg, PRUNING) for cfg in (AdamW(state_dtype='int8'), AdamW(state_dtype='bfloat16'), Lion(), Muon(), Adafactor())
    ),
    *((cfg, FIXED) for cfg in (AdamW(state_dtype='bfloat16'), Lion(), Muon(), ADAFACTOR)),
  ],
  ids=name_of,
)
def test_weights_under_the_mask_and_their_moments_are_exactly_0(cfg, sparsity):
  """Of pruning, those are the smallest before each update that prunes, also where the update itself is skipped."""
  found = updates(cfg, sparsity)
  kept = kept_by_hash() if sparsity is FIXED else {path: True for path in MATRICES}
  for number, ((before, _), (params, state)) in enumerate(itertools.pairwise(found), 1):
    if sparsity is PRUNING and 2 <= number <= 4:
      kept = kept_by_rank(before, numbers(PRUNING)[number - 2])
    for path, x in params.items():
      mask = kept.get(path, True) & np.ones(x.shape, bool)
      np.testing.assert_array_equal(x != 0, mask, f'{path} after update {number}')
      assert not np.any(np.signbit(x[~mask])), 'no -0.0'
      moved = np.mean((x != before[path])[mask])
      assert moved > 0.99 if number != 3 else moved == 0, 'the others are trained, but for the skipped update'
      for moment in moments_of(state, path) if path in MATRICES else ():
        assert not np.any(moment[~mask])
  moments = [np.mean(x != 0) for path in MATRICES for x in moments_of(found[-1][1], path)]
  assert len(moments) == (0 if cfg == Adafactor() else 4 if cfg.name == 'adamw' else 2)
  assert all(0.2 < share < 0.26 for share in moments)
  assert sum(np.sum(x == 0) for x in found[-1][0].values()) / SIZE == pytest.approx(RATE, abs=0.01)


def test_factored_means_count_masked_gradients_as_0():
  """After one update from 0, decay 1 - 1: the mean over rows of g² + epsilon."""
  mask, grad = kept_by_hash()['blocks', 'up'], np.float64(draw(SPECS, 1)['blocks']['up'])
  _, state = updates(ADAFACTOR, FIXED)[1]
  (rows, columns) = [
    np.asarray(x)
    for where, x in jax.tree_util.tree_flatten_with_path(state)[0]
    if own_path(where) == ('blocks', 'up') and x.shape != mask.shape
  ]
  np.testing.assert_allclose(rows, ((grad * mask) ** 2).mean(2, keepdims=True), rtol=1e-5)
  np.testing.assert_allclose(columns, ((grad * mask) ** 2).mean(1, keepdims=True), rtol=1e-5)


def test_a_dense_phase_frees_them_from_0_with_moments_of_0():
  """Adam in float64, whose gradients are masked for three updates and whole for two more."""
  cfg, mask = AdamW(weight_decay=0.0, clip_norm=0.0), kept_by_hash()['blocks', 'up']
  rule = sparsity_rule(FIXED, SPECS, SEED)
  dense = make_optimizer(cfg, lambda step: 0.01, SPECS)
  assert sparse(dense, sparsity_rule(FixedSparsity(rate=0.0), SPECS, SEED)) is dense
  params = begun(rule, draw(SPECS, 0))
  x, mu, nu = np.float64(params['blocks']['up']), 0, 0
  state = dense.init(params)
  for i in range(1, 6):
    grads = draw(SPECS, i)
    changes, state = jax.jit((sparse(dense, rule) if i <= 3 else dense).update)(grads, state, params)
    params = jax.tree.map(jnp.add, params, changes)
    g = np.float64(grads['blocks']['up']) * (mask if i <= 3 else 1)
    mu, nu = 0.9 * mu + 0.1 * g, 0.98 * nu + 0.02 * g**2
    x = x - 0.01 * (mu / (1 - 0.9**i)) / (np.sqrt(nu / (1 - 0.98**i)) + 1e-8)
    assert np.all(x[~mask] == 0) == (i <= 3)
    np.testing.assert_allclose(params['blocks']['up'], x, rtol=1e-5, atol=1e-7)


def test_a_rank_is_that_of_a_sorted_list_with_ties_too():
  """Values of few bits: each occurs several times, and so does 0."""
  own = {path: spec for path, spec in flatten_dict(SPECS).items() if path in MATRICES}
  rng = np.random.default_rng(0)
  sizes = {path: rng.integers(0, 3000, s.shape, dtype=np.uint32) << 11 for path, s in own.items()}
  found = jax.jit(lambda number: ranked(sizes, own, (number >> 16, number & 0xFFFF)))
  ordered = np.sort(np.concatenate([x.ravel() for x in sizes.values()]))
  for number in (0, 1, 17, SIZE // 2, SIZE - 2, SIZE - 1):
    assert found(jnp.uint32(number)) == ordered[number]


def test_more_than_2_to_the_32_weights_are_counted():
  class Huge:
    def sum(self, dims, dtype):
      return jnp.full(3, 2**32 - 1, dtype)

  own = {path: SPECS['blocks']['up'] for path in (('a',), ('b',))}
  high, low = total(own, dict.fromkeys(own, Huge()))
  assert int(high) * 2**16 + int(low) == 6 * (2**32 - 1)


@pytest.mark.parametrize('mesh', [MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=2, stage=2)], ids=['fsdp', 'mixed'])
@pytest.mark.parametrize('sparsity', [FIXED, PRUNING], ids=name_of)
def test_masks_are_those_of_one_device_bit_for_bit(sparsity, mesh):
  """Weights are rounded, so that several are as large as the threshold. Between devices go counts alone."""
  specs = jax.tree.map(lambda s: spec((4, *s.shape[1:]), s.axes), SPECS['blocks'])
  specs = {'blocks': specs}
  params = jax.tree.map(lambda x: jnp.round(x * 64) / 64, draw(specs, 0))
  own = partition.shardings(specs, make_mesh(mesh))
  masks = lambda params: sparsity_rule(sparsity, specs, SEED).next(params, 3)
  alone = jax.jit(masks)(params)
  places = flatten_dict(own)
  program = jax.jit(masks, in_shardings=(own,), out_shardings={path: places[path] for path in MATRICES})
  program = program.lower(params).compile()
  assert not re.search('all-gather|all-to-all|collective-permute', program.as_text())
  found = program(jax.device_put(params, own))
  assert not any(mask.sharding.is_fully_replicated for mask in found.values())
  jax.tree.map(np.testing.assert_array_equal, found, alone)
  if sparsity is PRUNING:
    number = numbers(PRUNING, count({path: flatten_dict(specs)[path] for path in MATRICES}))[1]
    ordered = np.sort(np.concatenate([np.abs(flatten_dict(params)[path]).ravel() for path in MATRICES]))
    for path, mask in alone.items():  # all as large as the one of that rank stay
      np.testing.assert_array_equal(mask, np.abs(flatten_dict(params)[path]) >= ordered[number])
  else:
    jax.tree.map(np.testing.assert_array_equal, alone, kept_by_hash(specs))


@pytest.mark.slow
@pytest.mark.parametrize('sparsity', [FIXED, PRUNING], ids=name_of)
def test_moments_on_the_host_change_no_bit(sparsity):
  wanted, found = (updates(AdamW(), sparsity, streaming=streaming)[-1] for streaming in (False, True))
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  assert HOST in {x.sharding.memory_kind for x in jax.tree.leaves(found[1])}


def test_the_mean_is_right_after_many_steps_of_many_parameters():
  """A float32 sum of 20,000 equal numbers, without what rounding takes from it, is 4e-4 off."""
  track = sparsity_tracks(FixedSparsity(rate=0.0), DENSE, {'w': spec((70_000, 100_001), ('embed', 'mlp'))})['sparsity']
  first = track.init({})
  entry, _ = jax.jit(lambda: jax.lax.scan(lambda e, _: (track.update(e, {}, {}, 1), None), first, length=20_000))()
  assert entry['updates'] == 20_000
  np.testing.assert_allclose(track.shown(entry)['active_parameters_mean'], 7_000_070_000, rtol=1e-7)


def test_weights_that_are_0_before_pruning_begins_are_trained():
  """Its first update is number 2, after which what is 0 stays 0."""
  rule = sparsity_rule(PRUNING, SPECS, SEED)
  track = sparsity_tracks(PRUNING, rule, SPECS)['sparsity']
  params = jax.tree.map(lambda x: jnp.where(x > 0, x, 0), draw(SPECS, 0))
  zeros = sum(int(jnp.sum(flatten_dict(params)[path] == 0)) for path in MATRICES)
  left = [track.update(track.init({}), {}, params, step)['active'] for step in (0, 1, 2, 3)]
  np.testing.assert_array_equal(left, [count(SPECS)] * 2 + [count(SPECS) - zeros] * 2)


PRUNED = (
  "sparsity.name='pruning'", 'sparsity.start_step=1', 'sparsity.end_step=3', 'sparsity.every=1', 'sparsity.rate=0.5',
)  # fmt: skip
SPDF = ("sparsity.name='fixed'", "phases=[{'start_step': 3, 'set': {'sparsity.rate': 0.0}}]")
TINY_MATRICES = 2 * (4 * 32 * 32 + 3 * 32 * 64)


def active(workdir):
  """[active parameters] and [their mean so far], of the rows of a run."""
  rows = read_metrics(workdir)
  return [[row[key] for row in rows] for key in ('active_parameters', 'active_parameters_mean')]


def test_a_run_prunes_logs_how_many_are_left_and_resumes_exactly(tmp_path):
  """Stopped after the second of three updates that prune: by 0, 7/16 and 1/2 of the matrices."""
  cfg = tiny.decoder(*PRUNED, 'checkpoint.every=1', 'train.accumulate=2')
  assert_resumes_exactly(cfg, tmp_path, steps=4, stop_at=2)
  every = count(build(cfg.model).specs)
  left = [every - pruned for pruned in (0, TINY_MATRICES * 7 // 16, TINY_MATRICES // 2, TINY_MATRICES // 2)]
  means = [sum(left[:n]) / n for n in range(1, 5)]
  for name in ('whole', 'resumed'):
    assert active(tmp_path / name)[0] == left
    np.testing.assert_allclose(active(tmp_path / name)[1], means, rtol=1e-7)


LAYOUTS = {
  'fsdp': ('mesh.fsdp=8',),
  'together': ('mesh.fsdp=2', 'mesh.tensor=2', 'mesh.replica=2', 'train.accumulate=2'),
}


@pytest.mark.slow
@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize('keys', [PRUNED, SPDF], ids=['pruning', 'spdf'])
def test_stopped_and_resumed_on_eight_devices_is_equal_bit_for_bit(tmp_path, keys, layout):
  """Losses, weights, moments and averages; SPDF is stopped before its dense phase begins."""
  batch = 'data.batch_size=16'
  cfg = tiny.decoder(*keys, *layout, batch, 'checkpoint.every=1', "averaging.name='ema'" * (keys is SPDF) or batch)
  assert_resumes_exactly(cfg, tmp_path, steps=5, stop_at=2)
  program = build_program(cfg)
  whole, resumed = (
    Checkpoints(tmp_path / name, cfg.checkpoint).restore(program.abstract, 5).state for name in ('whole', 'resumed')
  )
  jax.tree.map(np.testing.assert_array_equal, whole, resumed)
  zeros = sum(np.sum(np.asarray(x) == 0) for x in jax.tree.leaves(whole.params))
  assert zeros == (TINY_MATRICES // 2 if keys is PRUNED else 0)
  if keys is SPDF:
    left, means = active(tmp_path / 'whole')
    every = count(build(cfg.model).specs)
    assert left[2] < every - 0.74 * TINY_MATRICES
    assert left == [left[0]] * 3 + [every] * 2
    np.testing.assert_allclose(means[-1], (3 * left[0] + 2 * every) / 5, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize('layout', [*LAYOUTS.values(), ('mesh.stage=2', 'mesh.data=4')], ids=[*LAYOUTS, 'stages'])
@pytest.mark.parametrize('keys', [PRUNED, SPDF[:1]], ids=['pruning', 'fixed'])
def test_no_layout_changes_the_losses(keys, layout):
  """Weights are equal to rounding, so one of the rank at which pruning ends may be another: one in 20,480."""
  one = (*keys, 'data.batch_size=16', 'model.kv_heads=2')
  expected, found = (losses(tiny.decoder(*one, *more), 4) for more in (('mesh.data=1',), layout))
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize('name', ['encoder', 'encoder_decoder'])
def test_other_families_have_matrices_too(name):
  file, keys = {'encoder': (tiny.ENCODER, tiny.SMALL_ENCODER), 'encoder_decoder': (tiny.UL2, tiny.SMALL_UL2)}[name]
  cfg = tiny.experiment(file, *keys, "data.name='synthetic'", "sparsity.name='fixed'")
  specs = build(cfg.model).specs
  masked = sparsity_rule(cfg.sparsity, specs, 0).now({}, 0)
  ends = {'query', 'key', 'value', 'out', 'gate', 'up', 'down'}
  assert {path[-1] for path in masked} <= ends
  assert set(masked) == {path for path in flatten_dict(dict(specs)) if path[-1] in ends and 'blocks' in path}


def test_a_model_without_matrices_of_blocks_is_refused():
  with pytest.raises(ConfigError, match=r"sparsity\.name='fixed' and no parameter of the model is a matrix of a block"):
    sparsity_rule(FIXED, {'embedding': SPECS['embedding'], 'norm': SPECS['blocks']['norm']}, 0)


MISTAKES = {
  'rate of 1': (("sparsity.name='fixed'", 'sparsity.rate=1.0'), 'sparsity.rate'),
  'negative rate': ((*PRUNED, 'sparsity.rate=-0.5'), 'sparsity.rate'),
  'ends after training': (
    (*PRUNED, 'train.steps=100', 'sparsity.end_step=101'),
    'sparsity.start_step=1 and sparsity.end_step=101 with train.steps=100: pruning would not end; use '
    'sparsity.end_step <= 100, e.g. 25 and 75, or more steps.',
  ),
  'starts after it ends': (
    (*PRUNED, 'sparsity.start_step=3'),
    'sparsity.start_step=3 and sparsity.end_step=3: pruning ends before it has begun; use sparsity.start_step < 3.',
  ),
  'does not divide': (
    (*PRUNED, 'sparsity.end_step=10', 'sparsity.every=4'),
    'sparsity.start_step=1 and sparsity.end_step=10 with sparsity.every=4: update 10 would prune nothing; use '
    'sparsity.end_step=9, or a sparsity.every that divides 9.',
  ),
  'adapters': (
    ("sparsity.name='fixed'", 'lora.rank=2', "checkpoint.initial='x/1'"),
    "sparsity.name='fixed' with lora.rank=2, whose weights are frozen; use lora.rank=0, or sparsity.name='none'.",
  ),
  'trained weights': (
    ("sparsity.name='fixed'", "checkpoint.initial='x/1'"),
    "sparsity.name='fixed' with sparsity.rate=0.75 and checkpoint.initial='x/1', of whose weights it would set such a "
    "share to 0; use sparsity.rate=0.0, which trains all of them, or sparsity.name='none'.",
  ),
  'averages': (
    (*PRUNED, "averaging.name='ema'"),
    "sparsity.name='pruning' with averaging.name='ema': averages of a weight before and after it is pruned, which are "
    "not 0; use averaging.name='none'",
  ),
  'averages of checkpoints': (
    (*PRUNED, 'evaluation.lawa_checkpoints=2', 'evaluation.every=1', "data.name='builtin'", 'data.sentinels=64'),
    "sparsity.name='pruning' with evaluation.lawa_checkpoints=2: averages",
  ),
  'a phase that prunes': (
    (*SPDF[:1], "phases=[{'start_step': 2, 'set': {'sparsity.rate': 0.9}}]"),
    'phases[0]: sparsity.rate=0.9, 0.75 before it: a phase frees weights only; use sparsity.rate <= 0.75.',
  ),
  'a phase of pruning': (
    (*PRUNED, "phases=[{'start_step': 2, 'set': {'sparsity.rate': 0.1}}]"),
    "phases[0]: sparsity.rate=0.1 with sparsity.name='pruning', whose rate follows its schedule; remove it.",
  ),
  'a schedule in a phase': (
    (*PRUNED, "phases=[{'start_step': 2, 'set': {'sparsity.end_step': 4}}]"),
    'sparsity.end_step is the same in all phases of a run',
  ),
}


@pytest.mark.parametrize(('keys', 'message'), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_found_before_anything_is_allocated(keys, message):
  with pytest.raises(ConfigError) as error:
    tiny.decoder(*keys)
  assert message in str(error.value)


def test_a_config_without_it_is_saved_as_before():
  assert 'sparsity' not in bindings.render(tiny.decoder())
  assert 'sparsity.rate = 0.75' in bindings.render(tiny.decoder(*SPDF))
