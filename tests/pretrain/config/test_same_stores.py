"""A run finds its data again by what the stores hold: however their paths are spelled, and from any folder."""

import json
import shutil

import numpy as np
import pytest

from data.stores.store import StoreWriter, open_store
from data.stores.vocabulary import Tokenizer
from pretrain.cli import main
from pretrain.config import bindings
from pretrain.errors import CheckpointError, ConfigError
from pretrain.experiment.resume import check_same_run, identity
from pretrain.experiment.same_stores import FILE, as_begun, record
from pretrain.records.metrics import read_metrics
from pretrain.run.train import train
from tests.pretrain import tiny

pytestmark = pytest.mark.usefixtures('shared_programs')


def write_store(path, tokenizer_model, seed: int) -> None:
  rng = np.random.default_rng(seed)
  with StoreWriter(path, Tokenizer(tokenizer_model, 32)) as writer:
    writer.add([rng.integers(3, 400, rng.integers(20, 90)) for _ in range(200)])
    writer.finish()


@pytest.fixture
def folder(tokenizer_model, tmp_path, monkeypatch):
  for seed, name in enumerate('abh'):
    write_store(tmp_path / 'stores' / name, tokenizer_model, seed)
  (tmp_path / 'elsewhere').mkdir()
  (tmp_path / 'current').symlink_to('stores/a')
  monkeypatch.chdir(tmp_path)
  return tmp_path


def listed(*paths) -> str:
  return '[' + ', '.join(f"{{'path': {str(path)!r}, 'weight': {i + 1}.0}}" for i, path in enumerate(paths)) + ']'


def configured(sources, heldout=(), *options: str):
  heldout = [f'data.heldout={listed(*heldout)}'] if heldout else []
  return tiny.decoder(
    "data.name='store'", f'data.sources={listed(*sources)}', 'data.sentinels=32', 'checkpoint.every=2',
    'evaluation.batches=1', *heldout, *options,
  )  # fmt: skip


def begun(folder, cfg):
  """The files by which a run knows its config and its stores."""
  run = folder / 'run'
  run.mkdir(exist_ok=True)
  (run / 'config.gin').write_text(bindings.render(cfg))
  (run / FILE).write_text(record(cfg))
  return run


SPELLINGS = {
  'absolute': ('.', '{}/stores/a'), 'a slash at its end': ('.', 'stores/a/'), 'slashes': ('.', './/stores///a'),
  'a symbolic link': ('.', 'current'), 'an absolute link': ('elsewhere', '{}/current'),
  'from elsewhere': ('elsewhere', '../stores/a'), 'a URL': ('elsewhere', 'file://{}/stores/a'),
  'through a link and back': ('elsewhere', '../current/../a'), 'a copy': ('elsewhere', '{}/moved'),
}  # fmt: skip


@pytest.mark.parametrize('how', SPELLINGS)
def test_spellings_of_a_path_are_the_same_data(folder, monkeypatch, how):
  where, spelled = SPELLINGS[how]
  phase = lambda path: f"phases=[{{'start_step': 3, 'set': {{'data.sources': {listed(path, folder / 'stores/b')}}}}}]"
  run = begun(folder, configured(['stores/a', 'stores/b'], ['stores/a'], phase('stores/a')))
  if how == 'a copy':
    shutil.move(folder / 'stores/a', folder / 'moved')
  monkeypatch.chdir(folder / where)
  path = spelled.format(folder)
  now = configured([path, folder / 'stores/b'], [path], phase(path))
  assert check_same_run(run / 'config.gin', now) == []
  named = as_begun(run, now)
  names = lambda sources: [source.name or source.path.rstrip('/').split('/')[-1] for source in sources]
  assert names(named.data.sources) == ['a', 'b']
  assert names(named.data.heldout) == ['a']
  in_phase = named.phases[0].set['data.sources'][0]
  assert in_phase.get('name', in_phase['path'].rstrip('/').split('/')[-1]) == 'a'


@pytest.mark.parametrize('key', ['sources', 'heldout', 'phases'])
def test_other_data_under_any_spelling_is_refused(folder, monkeypatch, key):
  """One path, read from two folders, is two stores."""
  (folder / 'elsewhere/stores').mkdir()
  shutil.copytree(folder / 'stores/b', folder / 'elsewhere/stores/a')
  phase = lambda path: f"phases=[{{'start_step': 3, 'set': {{'data.sources': {listed(path)}}}}}]"
  run = begun(folder, configured([folder / 'stores/a'], [folder / 'stores/a'], phase(folder / 'stores/a')))
  monkeypatch.chdir(folder / 'elsewhere')
  same, other = folder / 'stores/a', 'stores/a'
  now = configured(
    [other if key == 'sources' else same], [other if key == 'heldout' else same],
    phase(other if key == 'phases' else same),
  )  # fmt: skip
  with pytest.raises(ConfigError, match=r'^CONFIG: (data.)?' + key):
    check_same_run(run / 'config.gin', now)


@pytest.mark.parametrize('other', [['stores/b', 'stores/a'], ['stores/a'], ['stores/a', 'stores/h']])
def test_another_list_of_stores_is_refused(folder, other):
  run = begun(folder, configured(['stores/a', 'stores/b']))
  with pytest.raises(ConfigError, match=r'data.sources is .* in this command'):
    check_same_run(run / 'config.gin', configured(other))


def test_initial_weights_are_compared_by_their_place(folder, monkeypatch):
  initial = lambda path: configured(['stores/a'], [], f'checkpoint.initial={str(path)!r}')
  run = begun(folder, initial('elsewhere/2'))
  assert check_same_run(run / 'config.gin', initial(folder / 'elsewhere/2')) == []
  with pytest.raises(ConfigError, match=r'checkpoint.initial is .elsewhere/2.'):
    check_same_run(run / 'config.gin', initial(folder / 'other/2'))


def test_the_identity_of_memory_is_that_of_contents(folder):
  found = {identity(configured([path]), [])['config'] for path in ('stores/a', 'stores/a/', folder / 'current')}
  assert len(found) == 1
  assert identity(configured(['stores/b']), [])['config'] not in found


@pytest.mark.slow
def test_a_run_resumes_from_another_folder_with_its_names_and_rows(folder, monkeypatch):
  whole, cut = folder / 'whole', folder / 'cut'
  train(configured(['stores/a', 'stores/b'], ['stores/h'], 'train.steps=4'), whole)
  train(configured(['stores/a', 'stores/b'], ['stores/h'], 'train.steps=2'), cut)
  monkeypatch.chdir(folder / 'elsewhere')
  train(configured([folder / 'current', '../stores/b/'], ['../stores/h'], 'train.steps=4'), cut)
  rows = [read_metrics(run) for run in (whole, cut)]
  assert [row['batch_checksum'] for row in rows[0]] == [row['batch_checksum'] for row in rows[1]]
  assert [row['loss'] for row in rows[0]] == [row['loss'] for row in rows[1]]
  assert rows[0][-1].keys() == rows[1][-1].keys()
  assert any('/a' in key for key in rows[1][-1])
  train(configured([folder / 'stores/a', folder / 'stores/b'], [folder / 'stores/h'], 'train.steps=5'), cut)
  explain = ['data', 'explain', f'--workdir={cut}', '--step=4']
  assert main.main(explain) == 0
  assert (
    json.loads((cut / FILE).read_text())['stores'][str(folder / 'stores/a')] == open_store('../current').fingerprint
  )


def test_a_store_that_was_replaced_is_refused_at_its_old_path(folder, tokenizer_model):
  train(configured(['stores/a'], [], 'train.steps=2'), folder / 'run')
  shutil.rmtree(folder / 'stores/a')
  write_store(folder / 'stores/a', tokenizer_model, 9)
  with pytest.raises(CheckpointError, match=r'was trained on other data'):
    train(configured(['stores/a'], [], 'train.steps=3'), folder / 'run')


def test_a_path_that_is_not_found_names_the_folder_it_was_looked_for_in(folder, monkeypatch, capsys):
  monkeypatch.chdir(folder / 'elsewhere')
  with pytest.raises(ValueError, match=f'no token store at stores/a .looked for in {folder}/elsewhere.; make one with'):
    train(configured(['stores/a'], [], 'train.steps=2'), folder / 'run')
  assert main.main(['data', 'verify', 'stores/a']) == 65
  assert f'stores/a (looked for in {folder}/elsewhere)' in capsys.readouterr().err
  assert main.main(['data', 'prepare', 'none.txt', '--out=x']) == 65
  assert f'none.txt (looked for in {folder}/elsewhere) is not a file' in capsys.readouterr().err


def test_a_config_without_names_is_rendered_as_ever(folder):
  text = bindings.render(configured(['stores/a']))
  assert "data.sources = [{'path': 'stores/a', 'weight': 1.0}]\n" in text
  named = configured(['stores/a']).data.sources[0].__class__(path='x', name='y')
  assert bindings.plain((named,)) == [{'path': 'x', 'weight': 1.0, 'name': 'y'}]


@pytest.mark.parametrize('names', [('x', 'x'), ('', 'x')])
def test_names_that_are_empty_or_given_twice_are_refused(folder, names):
  sources = ', '.join(f"{{'path': 'stores/{p}', 'name': {n!r}}}" for p, n in zip('ab', names, strict=True))
  for key in ('sources', 'heldout'):
    lists = {'sources': listed('stores/a'), key: f'[{sources}]'}
    with pytest.raises(ConfigError, match=r'two stores in one list have the name|a name is empty'):
      tiny.decoder("data.name='store'", *(f'data.{name}={value}' for name, value in lists.items()), 'data.sentinels=32')
