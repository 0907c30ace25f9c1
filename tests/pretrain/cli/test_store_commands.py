"""Every command that takes --workdir takes a URL; mistakes with one are a line and an exit code."""

import json
import re

import pytest

from pretrain.checkpoints import step_folders
from pretrain.cli.main import main
from pretrain.records.metrics import read_metrics
from pretrain.workdirs.store_path import StorePath
from tests.pretrain import tiny

URL = 'gs://runs/some/run'
LLAMA = tiny.ROOT / 'tests/golden/interchange/llama'
OTHER = tiny.ROOT / 'tests/data/golden/store/tokenizer.model'


@pytest.fixture(scope='module')
def flags(text_store) -> list[str]:
  keys = (*tiny.over(text_store), *tiny.SMALL_UL2, 'train.steps=2', 'checkpoint.every=1', 'checkpoint.keep=2')
  return [f'--gin_file={tiny.UL2}', *(f'--gin.{key}' for key in keys)]


@pytest.fixture(scope='module')
def trained(fake_server, flags, tmp_path_factory):
  """The objects of a run with steps 1 and 2, written by `pretrain train`."""
  store = fake_server.RequestHandlerClass.store
  store.objects.clear()
  store.faults.clear()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('PRETRAIN_SPOOL', str(tmp_path_factory.mktemp('spools')))
    assert main(['train', *flags, f'--workdir={URL}']) == 0
  return dict(store.objects)


@pytest.fixture
def run(trained, gcs):
  gcs.objects.update(trained)
  return gcs


@pytest.mark.slow
def test_each_command_reads_a_run_in_a_store(run, flags, tmp_path, capsys):
  wanted = {
    ('report', URL): f'{URL}/report.html',
    ('checkpoints', 'list', f'--workdir={URL}'): 'step',
    ('checkpoints', 'verify', f'--workdir={URL}'): 'step 2  whole',
    ('checkpoints', 'diff', f'--inputs={URL}/1,{URL}/2'): 'arrays are equal to the bit',
    ('generate', f'--workdir={URL}', '--text=The <extra_id_0> sat.', '--max_tokens=4'): '',
    ('data', 'show', f'--workdir={URL}', '--step=1'): '',
    ('replay', f'--workdir={URL}', '--step=2'): 'step 2  equal',
    ('eval', f'--workdir={URL}', f'--text=license={tiny.ROOT / "LICENSE"}'): f'{URL}/eval.json',
  }
  for argv, said in wanted.items():
    assert main([*argv]) == 0, argv
    assert said in capsys.readouterr().out, argv
  assert json.loads(StorePath(f'{URL}/eval.json').read_text())['model'] == URL
  assert '<h1>run</h1>' in StorePath(f'{URL}/report.html').read_text()


@pytest.mark.slow
def test_each_command_writes_a_run_in_a_store(run, flags, capsys):
  new = 'gs://runs/new'
  assert main(['checkpoints', 'average', f'--workdir={URL}', '--steps=1,2', f'--output={new}']) == 0
  assert StorePath(f'{new}/config.gin').exists()
  assert not StorePath(f'{new}/OWNER').exists()
  initial = f"--gin.checkpoint.initial='{new}/0'"
  assert main(['train', *flags, '--workdir=gs://runs/next', initial]) == 0
  assert StorePath('gs://runs/next/checkpoints/2/MANIFEST.json').is_file()
  assert main(['checkpoints', 'average', f'--workdir={URL}', '--steps=1,2', f'--output={new}']) == 64
  assert f'--output={new} exists' in capsys.readouterr().err


@pytest.mark.slow
def test_each_way_to_make_weights_reads_and_writes_stores(run, flags, text_store, capsys):
  gin, name = [*flags, '--gin.data.batch_size=8'], text_store.name
  ways = {
    'soup': [*gin, f'--inputs={URL}/1,{URL}/2', f'--metric=eval/{name}/loss', '--output=gs://runs/soup'],
    'merge': [f'--base={URL}/1', f'--inputs={URL}/2', '--coefficients=1', '--output=gs://runs/merge'],
    'restore-as': [f'--input={URL}/2', '--output=gs://runs/restore-as', "--gin.averaging.name='ema'"],
    'extend-vocabulary': [f'--workdir={URL}/2', f'--tokenizer={OTHER}', '--to=gs://runs/extend-vocabulary'],
    'grow': [*gin, f'--input={URL}/2', '--method=stack', '--gin.model.decoder_layers=4', '--to=gs://runs/grow'],
    'warm-start': [*gin, f'--encoder={URL}', f'--decoder={URL}/1', '--to=gs://runs/warm-start'],
  }
  for way, argv in ways.items():
    assert main(['checkpoints', way, *argv]) == 0, (way, capsys.readouterr().err)
    new = StorePath(f'gs://runs/{way}')
    assert step_folders.finished(new / 'checkpoints'), way
    assert (new / 'config.gin').is_file(), way
    assert not (new / 'OWNER').exists(), way
  assert (
    main(['train', *flags, "--gin.averaging.name='ema'", '--gin.train.steps=3', '--workdir=gs://runs/restore-as']) == 0
  )
  assert [row['step'] for row in read_metrics(StorePath('gs://runs/restore-as'))] == [3]


@pytest.mark.slow
def test_published_weights_go_into_a_store_and_out_of_it(gcs, tmp_path, capsys):
  assert main(['import', f'--from={LLAMA}', '--workdir=gs://runs/llama']) == 0
  assert main(['export', '--workdir=gs://runs/llama', f'--out={tmp_path / "out"}']) == 0
  old, new = (safetensors_of(folder) for folder in (LLAMA, tmp_path / 'out'))
  assert old == new
  assert main(['import', f'--from={LLAMA}', '--workdir=gs://runs/llama']) == 64
  assert '--workdir=gs://runs/llama exists' in capsys.readouterr().err


def safetensors_of(folder) -> dict[str, bytes]:
  """The bytes of each tensor. The layout: eight bytes with the length of a JSON header, the header, the values."""
  data = (folder / 'model.safetensors').read_bytes()
  start = 8 + int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:start])
  header.pop('__metadata__', None)
  return {name: data[start + x['data_offsets'][0] : start + x['data_offsets'][1]] for name, x in header.items()}


@pytest.mark.slow
def test_a_supervised_run_keeps_its_log_and_incidents_in_the_store(gcs, flags):
  assert main(['run', '--hosts=1', '--', 'train', *flags, f'--workdir={URL}']) == 0
  names = gcs.names('runs')
  assert 'some/run/checkpoints/2/MANIFEST.json' in names
  assert 'some/run/OWNER' not in names


@pytest.mark.parametrize(
  ('argv', 'code', 'said'),
  [
    (
      ['train', '--workdir=gs://none-such/run'],
      64,
      r'CONFIG: --workdir=gs://none-such/run cannot be used: there',
    ),
    (['train', '--workdir=gs://KEY:SECRET@runs/x'], 64, r'CONFIG: --workdir=gs://\*\*\*@runs/x has credentials in it'),
    (
      ['train', '--workdir=hdfs://runs/x'],
      64,
      r'CONFIG: --workdir=hdfs://runs/x is not the URL of a folder',
    ),
    (['report', 'gs://runs/none'], 66, r'CKPT-NONE: no metrics of a run in gs://runs/none; nothing was written'),
    (
      ['checkpoints', 'list', '--workdir=gs://runs/none'],
      66,
      'CKPT-NONE: no finished checkpoint in gs://runs/none/check',
    ),
    (['generate', '--workdir=gs://runs/none', '--text=a'], 66, 'CKPT-NONE: no run in gs://runs/none: config.gin is'),
    (['replay', '--workdir=gs://runs/none', '--step=1'], 64, 'CONFIG: --workdir=gs://runs/none is not a run'),
  ],
)
def test_a_mistake_with_a_url_is_one_line(gcs, flags, capsys, argv, code, said):
  found = main([*argv, *(flags if argv[0] == 'train' else [])])
  error = capsys.readouterr().err
  assert (found, len(error.splitlines())) == (code, 1), error
  assert re.match(said, error), error
  assert 'SECRET' not in error
  assert gcs.objects == {}


def test_a_bucket_that_refuses_is_one_line_before_anything_is_compiled(gcs, flags, capsys, monkeypatch):
  monkeypatch.setattr('pretrain.run.train.start', lambda *args, **more: pytest.fail('the run has begun'))
  gcs.fault('POST', 403, times=99)
  assert main(['train', *flags, f'--workdir={URL}']) == 64
  error = capsys.readouterr().err
  assert len(error.splitlines()) == 1
  assert 'bucket runs' in error
  assert 'credentials from GOOGLE_AUTH_TOKEN' in error
  gcs.fault('GET', 403, times=99)
  assert main(['report', URL]) == 66
  assert re.match(
    r'STORE: gs://runs/some/run cannot be listed: these credentials may not do that', capsys.readouterr().err
  )
