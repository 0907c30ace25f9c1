"""Averages of weights: those that a run keeps and evaluates, and those that `pretrain checkpoints` writes."""

import contextlib
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pretrain.run.train
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.cli.main import main
from pretrain.errors import CheckpointError, ConfigError
from pretrain.experiment.program import build_program
from pretrain.optim.averaging import Ema, ema_decay, greedy_soup, linear_combination
from pretrain.records.metrics import read_metrics
from pretrain.records.timeline import Timeline
from pretrain.run.starting import start
from pretrain.run.train import train
from pretrain.tools import weights
from tests.pretrain import tiny

STEPS = 6
KEYS = (
  'checkpoint.every=1', 'checkpoint.keep=99', 'evaluation.every=2', 'evaluation.batches=1',
  "averaging.name='ema'", 'averaging.decay=0.6', 'averaging.warmup=True', 'averaging.start_step=1',
  'evaluation.lawa_checkpoints=3', 'schedule.peak=0.03', 'mesh.fsdp=2',
)  # fmt: skip


def config_of(store, *overrides: str):
  """A decoder on text, so that it can be generated from, with every average on."""
  source = ("data.name='store'", f"data.sources=[{{'path': '{store}'}}]", f"data.heldout=[{{'path': '{store}'}}]")
  rows = ("objective.name='ul2r'", 'data.targets_length=64', 'data.sentinels=32')
  return tiny.decoder(*source, *rows, *KEYS, f'train.steps={STEPS}', *overrides)


@pytest.fixture(scope='module')
def run(text_store, tmp_path_factory):
  """A run with every step on disk, evaluated at 2, 4 and 6."""
  workdir = tmp_path_factory.mktemp('runs') / 'run'
  with without_report():
    train(config_of(text_store), workdir)
  return workdir


@contextlib.contextmanager
def without_report():
  """No report is drawn: it takes a third of the time and has its own tests."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pretrain.run.train, 'write_report', lambda _: None)
    yield


@pytest.fixture(scope='module')
def program(text_store):
  return build_program(dataclasses.replace(config_of(text_store), averaging=Ema()))


def params_of(workdir, step: int, program, ema: bool = False):
  return jax.device_get(weights.Step(workdir, step, ema).read(program.abstract.params))


def assert_trees_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def series(workdir, key: str) -> dict[int, float]:
  return {row['step']: row[key] for row in read_metrics(workdir) if key in row}


def test_ema_is_the_average_of_the_parameters_of_each_step(run, program):
  """Recomputed by hand in float64 from the parameters on disk: a copy up to step 1, then the decays of TF's warm-up."""
  expected = jax.tree.map(np.float64, params_of(run, 1, program))
  assert_trees_equal(params_of(run, 1, program, ema=True), params_of(run, 1, program))
  for step in range(2, STEPS + 1):
    decay = min(0.6, step / (9 + step))  # update t = step - 1 of the average: (1 + t) / (10 + t)
    expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, params_of(run, step, program))
    got = params_of(run, step, program, ema=True)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-7), got, expected)


def test_decay_grows_to_its_value_after_the_start():
  cfg = Ema(decay=0.5, warmup=True, start_step=10)
  np.testing.assert_allclose([ema_decay(cfg, jnp.int32(n)) for n in (1, 10, 11, 12, 99)], [0, 0, 2 / 11, 3 / 12, 0.5])
  assert ema_decay(Ema(decay=0.5), jnp.int32(1)) == 0.5


def test_ema_is_sharded_like_its_parameter(program):
  placed = jax.tree.map(lambda e, p: (e.sharding == p.sharding, e.dtype), program.abstract.extra['ema'],
                        program.abstract.params)  # fmt: skip
  assert set(jax.tree.leaves(placed, is_leaf=lambda x: isinstance(x, tuple))) == {(True, np.dtype(np.float32))}
  assert any('fsdp' in leaf.sharding.spec for leaf in jax.tree.leaves(program.abstract.extra))


@pytest.mark.slow
def test_a_resumed_run_has_the_averages_of_an_uninterrupted_run(text_store, tmp_path, program):
  """Bit for bit. The step that was saved because the run was stopped, 3, is not one that LAWA takes."""
  keys = ('checkpoint.every=2', 'evaluation.lawa_checkpoints=2')
  with without_report():
    train(config_of(text_store, *keys), tmp_path / 'whole')
    train(config_of(text_store, *keys, 'train.steps=3'), tmp_path / 'resumed')
    train(config_of(text_store, *keys), tmp_path / 'resumed')
  for ema in (False, True):
    assert_trees_equal(*(params_of(tmp_path / w, STEPS, program, ema) for w in ('whole', 'resumed')))
  for key, steps in {'loss': 6, 'eval/license/ema/loss': 3, 'eval/license/lawa/loss': 2}.items():
    whole, resumed = series(tmp_path / 'whole', key), series(tmp_path / 'resumed', key)
    resumed = {step: value for step, value in resumed.items() if step in whole}  # 3, where the first part ended, is not
    assert resumed == whole, key
    assert len(whole) == steps


def test_ema_is_restored_on_another_mesh(run, text_store, program):
  moved = build_program(config_of(text_store, 'mesh.fsdp=4', 'mesh.tensor=2'))
  with contextlib.closing(Checkpoints(run, config_of(text_store).checkpoint, read_only=True)) as checkpoints:
    state = checkpoints.restore(moved.abstract, STEPS).state
  assert_trees_equal(jax.device_get(state.extra['ema']), params_of(run, STEPS, program, ema=True))


def test_averages_are_evaluated_beside_the_weights(run):
  assert list(series(run, 'eval/license/ema/loss')) == [2, 4, 6]
  assert list(series(run, 'eval/license/lawa/loss')) == [4, 6], 'not before there are three checkpoints'
  last = read_metrics(run)[-1]
  assert len({last[f'eval/license/{average}loss'] for average in ('', 'ema/', 'lawa/')}) == 3


@pytest.mark.slow
def test_lawa_evaluates_the_averaged_checkpoints(run, text_store, tmp_path):
  """A run that starts from the average and learns nothing evaluates it."""
  assert main(['checkpoints', 'average', f'--workdir={run}', '--steps=2,3,4', f'--output={tmp_path / "mean"}']) == 0
  keys = (
    f"checkpoint.initial='{tmp_path}/mean/0'",
    'schedule.peak=0.0',
    'train.steps=1',
    'evaluation.lawa_checkpoints=0',
  )
  with without_report():
    train(config_of(text_store, *keys), tmp_path / 'run')
  assert series(tmp_path / 'run', 'eval/license/loss')[1] == series(run, 'eval/license/lawa/loss')[4]


@pytest.mark.parametrize(('weights_', 'expected'), [(None, (0.5, 0.5)), ('3,1', (0.75, 0.25))])
def test_an_average_is_the_weighted_mean(run, tmp_path, program, weights_, expected):
  flags = [] if weights_ is None else [f'--weights={weights_}']
  assert (
    main(['checkpoints', 'average', f'--workdir={run}', '--steps=2,6', *flags, f'--output={tmp_path / "out"}']) == 0
  )
  a, b = params_of(run, 2, program), params_of(run, 6, program)
  mean = jax.tree.map(lambda x, y: np.float64(x) * expected[0] + np.float64(y) * expected[1], a, b)
  got = params_of(tmp_path / 'out', 0, program)
  jax.tree.map(lambda g, m: np.testing.assert_allclose(g, m, rtol=1e-6, atol=1e-8), got, mean)


@pytest.mark.parametrize(('flag', 'ema'), [([], False), (['--ema'], True)])
def test_the_average_of_one_is_itself(run, tmp_path, program, flag, ema):
  assert main(['checkpoints', 'average', f'--workdir={run}', '--steps=5', *flag, f'--output={tmp_path / "out"}']) == 0
  assert_trees_equal(params_of(tmp_path / 'out', 0, program), params_of(run, 5, program, ema))


def test_a_merge_of_one_input_with_coefficient_one_is_that_input_and_task_vectors_add(run, tmp_path, program):
  merge = ['checkpoints', 'merge', f'--base={run}/1']
  assert main([*merge, f'--inputs={run}/4', '--coefficients=1', f'--output={tmp_path / "one"}']) == 0
  assert_trees_equal(params_of(tmp_path / 'one', 0, program), params_of(run, 4, program))
  assert main([*merge, f'--inputs={run}/4,{run}', '--coefficients=0.5,-2', f'--output={tmp_path / "two"}']) == 0
  base, a, b = (jax.tree.map(np.float64, params_of(run, step, program)) for step in (1, 4, STEPS))
  expected = jax.tree.map(lambda o, x, y: o + 0.5 * (x - o) - 2 * (y - o), base, a, b)
  got = params_of(tmp_path / 'two', 0, program)
  jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6), got, expected)


def test_averaged_weights_generate_are_listed_and_record_their_source(run, tmp_path, capsys):
  out = tmp_path / 'out'
  assert main(['checkpoints', 'average', f'--workdir={run}', '--steps=2,6', f'--output={out}']) == 0
  first = (out / 'config.gin').read_text().splitlines()[0]
  assert first == f'# Parameters made by: pretrain checkpoints average --workdir={run} --steps=2,6'
  assert main(['generate', f'--workdir={out}', '--text=the License', '--max_tokens=2']) == 0
  capsys.readouterr()
  assert main(['checkpoints', 'list', f'--workdir={out}']) == 0
  assert capsys.readouterr().out.split()[:3] == ['step', 'MiB', '0']


def test_a_list_has_the_losses_of_each_step(run, capsys):
  assert main(['checkpoints', 'list', f'--workdir={run}']) == 0
  header, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
  assert header[:3] == ['step', 'MiB', 'loss']
  assert [line[0] for line in lines] == [str(n) for n in range(1, STEPS + 1)]
  column = header.index('eval/license/ema/loss')
  assert lines[1][column] == f'{series(run, "eval/license/ema/loss")[2]:.4f}'
  assert lines[2][column] == '-'
  assert float(lines[0][1]) > 0


@pytest.fixture
def damaged(run, tmp_path, program):
  """The newest step of the run, with noise on its weights."""
  noise = lambda x: jnp.asarray(x + np.random.default_rng(0).normal(size=x.shape) * 3, jnp.float32)
  params = jax.tree.map(noise, params_of(run, STEPS, program))
  checkpoints = Checkpoints(tmp_path / 'damaged', CheckpointConfig())
  checkpoints.save_params(0, params, {'data': {'tokenizer': weights.Step(run, 1).tokenizer()}}, '')
  checkpoints.close()
  shutil.copy(run / 'config.gin', tmp_path / 'damaged')
  return tmp_path / 'damaged'


@pytest.mark.slow
def test_a_greedy_soup_leaves_out_damaged_weights(run, damaged, tmp_path, program, capsys):
  flags = [f'--gin_file={run}/config.gin', '--metric=eval/license/loss', f'--output={tmp_path / "out"}']
  assert main(['checkpoints', 'soup', f'--inputs={damaged},{run}/5,{run}/6', *flags]) == 0
  decisions = [line for line in capsys.readouterr().out.splitlines() if line.startswith('+')]
  assert [line.split()[1] for line in decisions] == [f'{run}/6', f'{run}/5', f'{damaged}/0'], 'the best first'
  assert 'left out' in decisions[-1]
  kept = [int(line.split()[1].rsplit('/', 1)[1]) for line in decisions if line.endswith('kept')]
  assert kept[0] == 6
  mean = linear_combination((1 / len(kept), params_of(run, step, program)) for step in kept)
  got = params_of(tmp_path / 'out', 0, program)
  jax.tree.map(lambda g, m: np.testing.assert_allclose(g, m, rtol=1e-5, atol=1e-7), got, mean)


def test_a_soup_keeps_inputs_that_do_not_raise_the_loss():
  """One number as weights, its distance to 1 as the score; NaN is never kept, and is tried last."""
  numbers, order = [4.0, 0.5, float('nan'), 1.5, 1.0], []
  read = lambda i: {'w': jnp.float32(numbers[i])}
  score = lambda tree: abs(float(tree['w']) - 1)
  soup = greedy_soup([score(read(i)) for i in range(5)], read, score, order.append)
  assert [tasted.index for tasted in order] == [4, 1, 3, 0, 2]
  assert [tasted.kept for tasted in order] == [True, False, False, False, False]
  assert float(soup['w']) == 1.0
  numbers[4] = 1.25
  soup = greedy_soup([score(read(i)) for i in range(5)], read, score, order.append)
  assert float(soup['w']) == pytest.approx((1.25 + 0.5 + 1.5) / 3)
  assert [tasted.kept for tasted in order[5:]] == [True, True, True, False, False]
  order.clear()
  greedy_soup([0.0, 0.0], lambda i: read(4), lambda tree: 0.0, order.append)
  assert [tasted.kept for tasted in order] == [True, True], 'equally good is kept'


def test_only_one_tree_is_read_at_a_time():
  """At each read only the sum is in memory: two copies in all."""
  size = 50_000
  held = lambda: sum(x.size for x in jax.live_arrays() if x.size == size) // size
  before, alive = held(), []

  def read(i):
    alive.append(held() - before)
    return {'w': jnp.full(size, float(i))}

  total = linear_combination((0.25, read(i)) for i in range(4))
  assert alive == [0, 1, 1, 1]
  assert float(total['w'][0]) == 1.5
  del total
  for left_out in (0.0, 1.0):
    alive.clear()
    greedy_soup([0.0] * 4, read, lambda tree, score=left_out: score, lambda tasted: None)
    assert alive == [0, 1, 1, 1]


@pytest.mark.parametrize(
  ('action', 'flags', 'code', 'message'),
  [
    ('average', '--workdir={run} --steps=2,40 --output={new}', 66,
     'CKPT-NONE: no step 40 in {run}/checkpoints; it has 1, 2, 3, 4, 5, 6. Choose one of them.'),
    ('average', '--workdir={run} --steps=2,3 --weights=1 --output={new}', 64,
     'CONFIG: --weights has 1 values, --steps 2; give one weight to each step.'),
    ('average', '--workdir={run} --steps=2,3 --weights=1,-1 --output={new}', 64,
     'CONFIG: --weights=1,-1; each must be a finite number > 0.'),
    ('average', '--workdir={run} --steps=2,3 --output={run}', 64,
     'CONFIG: --output={run} exists; nothing is overwritten. Choose another folder.'),
    ('average', '--workdir={run} --steps=2,x --output={new}', 64,
     "CONFIG: argument --steps: '2,x' is no list of whole numbers; write e.g. 1,2; see pretrain checkpoints "
     'average --help.'),
    ('average', '--workdir={new} --steps=2 --output={new}', 66,
     'CKPT-NONE: no finished checkpoint in {new}/checkpoints; check the path.'),
    ('list', '--workdir={new}', 66, 'CKPT-NONE: no finished checkpoint in {new}/checkpoints; check the path.'),
    ('merge', '--base={run}/1 --inputs={run}/2 --coefficients=1,2 --output={new}', 64,
     'CONFIG: --coefficients has 2 values, --inputs 1; give one coefficient to each input.'),
    ('merge', '--base={run}/1 --inputs={run}/2 --coefficients=nan --output={new}', 64,
     'CONFIG: --coefficients=nan; each must be finite.'),
    ('merge', '--base={run}/1 --inputs={other} --coefficients=1 --output={new}', 66,
     "CKPT-MISMATCH: model.mlp.activation is 'silu' in {run}/config.gin, 'relu' in {other}/config.gin (first of 1); "
     'only weights of one architecture can be mixed. Nothing was written.'),
    ('merge', '--base={run}/1 --inputs={foreign} --coefficients=1 --output={new}', 66,
     'CKPT-MISMATCH: {run}/1 and {foreign}/0 have different tokenizers: an id is not the same text in both.'),
    ('average', '--workdir={other} --steps=0 --ema --output={new}', 66,
     "CKPT-NONE: step 0 of {other}/checkpoints has no moving average: averaging.name was not 'ema' there."),
    ('soup', '--gin_file={run}/config.gin --inputs={run} --metric=eval/books/loss --output={new}', 64,
     "CONFIG: --metric='eval/books/loss' is not one of eval/license/loss, eval/license/text_loss, "
     'eval/license/accuracy.'),
    ('soup', '--gin_file={run}/config.gin --gin.data.heldout=[] --gin.evaluation.every=0 '
     '--gin.evaluation.lawa_checkpoints=0 --inputs={run} --metric=loss --output={new}', 64,
     'CONFIG: --gin_file has no held-out set to score a soup on; set data.heldout.'),
    ('soup', '--gin_file={run}/config.gin --gin.model.embed=64 --inputs={run} --metric=loss --output={new}', 66,
     'CKPT-MISMATCH: model.embed is 64 in --gin_file, 32 in {run}/config.gin (first of 1); '
     'only weights of one architecture can be mixed. Nothing was written.'),
  ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_written(run, others, tmp_path, capsys, action, flags, code, message):
  paths = others | {'run': run, 'new': tmp_path / 'new'}
  assert (main(['checkpoints', action, *flags.format(**paths).split()]), capsys.readouterr().err) == (
    code, message.format(**paths) + '\n',
  )  # fmt: skip
  assert not (tmp_path / 'new').exists()


@pytest.fixture(scope='module')
def others(run, program, tmp_path_factory):
  """Parameters with another activation and of another tokenizer: the same shapes, other functions."""
  folder = tmp_path_factory.mktemp('others')
  assert main(['checkpoints', 'average', f'--workdir={run}', '--steps=2', f'--output={folder / "other"}']) == 0
  for name in ('foreign', 'mean'):
    shutil.copytree(folder / 'other', folder / name)
  edit(folder / 'other/config.gin', "model.mlp.activation = 'silu'", "model.mlp.activation = 'relu'")
  shutil.rmtree(folder / 'foreign/checkpoints')
  with contextlib.closing(Checkpoints(folder / 'foreign', CheckpointConfig())) as checkpoints:
    params = weights.Step(run, 2).read(program.abstract.params)
    checkpoints.save_params(0, params, {'data': {'tokenizer': 'another'}}, '')
  return {name: folder / name for name in ('other', 'foreign', 'mean')}


def edit(path, old: str, new: str) -> None:
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new))


@pytest.mark.slow
def test_a_run_starts_from_parameters_alone(run, text_store, tmp_path, program):
  free = ('model.dropout=0.1', 'model.init_std=0.02', 'model.rope_theta=500000.0')
  cfg = config_of(text_store, f"checkpoint.initial='{run}/4'", 'train.steps=1', 'schedule.peak=0.0', *free)
  with without_report():
    train(cfg, tmp_path)
  assert_trees_equal(params_of(tmp_path, 1, program), params_of(run, 4, program))
  assert f"checkpoint.initial = '{run}/4'" in (tmp_path / 'config.gin').read_text()
  fresh = series(run, 'batch_checksum')[1]
  assert series(tmp_path, 'batch_checksum') == {1: fresh}, 'its data begin anew'


def test_the_initial_checkpoint_of_a_run_cannot_change(run, text_store, tmp_path):
  (tmp_path / 'run').mkdir()
  for name in ('config.gin', 'metrics.jsonl'):
    shutil.copy(run / name, tmp_path / 'run')
  with pytest.raises(ConfigError, match=r"checkpoint.initial is None in .*, '.*/4' in this command"):
    train(config_of(text_store, f"checkpoint.initial='{run}/4'"), tmp_path / 'run')
  with pytest.raises(ConfigError, match=r"averaging.name is 'ema' in .*, 'none' in this command"):
    train(dataclasses.replace(config_of(text_store), averaging=tiny.decoder().averaging), tmp_path / 'run')


def test_lawa_in_several_processes_is_refused(text_store, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(ConfigError, match=r'evaluation.lawa_checkpoints=3 with 2 processes: one process alone can read'):
    start(config_of(text_store), tmp_path / 'run', Timeline())
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('initial', 'keys', 'message'),
  [
    ('{run}/40', (), 'CKPT-NONE: no step 40 in {run}/checkpoints; it has 1, 2, 3, 4, 5, 6. Choose one of them.'),
    ('{run}x/4', (), 'CKPT-NONE: no finished checkpoint in {run}x/checkpoints; check the path.'),
    (
      '{run}/4',
      ('model.mlp.hidden=128',),
      'CKPT-MISMATCH: model.mlp.hidden is 64 in {run}/config.gin, 128 in this command',
    ),
    (
      '{other}/0',
      (),
      "CKPT-MISMATCH: model.mlp.activation is 'relu' in {other}/config.gin, 'silu' in this command (first of 1); its "
      'parameters would be those of another model. Nothing was changed; set it as it is there.',
    ),
    (
      '{foreign}/0',
      (),
      'CKPT-MISMATCH: {foreign}/0 was trained with another tokenizer (sha256 another.., that of data.* is ',
    ),
  ],
)
def test_parameters_that_do_not_fit_are_refused(run, others, text_store, tmp_path, initial, keys, message):
  paths = others | {'run': run}
  with pytest.raises(CheckpointError) as caught:
    train(config_of(text_store, f"checkpoint.initial='{initial.format(**paths)}'", *keys), tmp_path)
  assert str(caught.value).startswith(message.format(**paths))
  assert not (tmp_path / 'config.gin').exists()


def test_no_run_resumes_from_parameters_alone(run, others, text_store):
  with pytest.raises(CheckpointError, match=r'CKPT-PARAMS: step 0 of .* --gin.checkpoint.initial="\'.*/mean/0\'"'):
    train(config_of(text_store), others['mean'])
