"""Data that changes at a resume: refused with both values, or, with a flag, continued from the same row."""

import numpy as np
import pytest

from data.batches.source import open_data
from data.stores.store import StoreWriter
from data.stores.vocabulary import Tokenizer
from pretrain.cli import main
from pretrain.config import bindings
from pretrain.errors import CheckpointError, ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.records.metrics import read_metrics
from pretrain.run.train import train
from pretrain.step.train_step import checksum
from pretrain.tools.history import data_of_run
from tests.pretrain import tiny


def write_store(path, tokenizer_model, seed: int, documents: int = 200) -> None:
  rng = np.random.default_rng(seed)
  with StoreWriter(path, Tokenizer(tokenizer_model, 32)) as writer:
    writer.add([rng.integers(3, 400, rng.integers(20, 90)) for _ in range(documents)])
    writer.finish()


@pytest.fixture
def stores(tokenizer_model, tmp_path):
  for seed, name in enumerate('abc'):
    write_store(tmp_path / name, tokenizer_model, seed)
  return tmp_path


def configured(stores, names: str, weights, *options: str):
  listed = ', '.join(f"{{'path': '{stores}/{n}', 'weight': {w}}}" for n, w in zip(names, weights, strict=True))
  return tiny.decoder(
    "data.name='store'", f'data.sources=[{listed}]', 'data.sentinels=32', 'checkpoint.every=4', *options
  )


def checksums(workdir) -> list[int]:
  return [int(row['batch_checksum']) for row in read_metrics(workdir)]


@pytest.mark.slow
def test_other_weights_are_refused_or_continue_with_the_next_row_of_each_source(stores, tmp_path, capsys):
  run = tmp_path / 'run'
  before = configured(stores, 'ab', (3.0, 1.0), 'train.steps=4')
  train(before, run)
  after = configured(stores, 'abc', (1.0, 1.0, 2.0), 'train.steps=9')
  with pytest.raises(ConfigError, match=r'data.sources.* in this command.*add --allow_data_change'):
    train(after, run)
  train(after, run, allow_data_change=True)
  assert 'DATA-CHANGE: from step 4 on data.sources' in capsys.readouterr().err
  old, new = (open_data(c.data, c.objective, seed=0, vocab_size=512, cache_dir=tmp_path) for c in (before, after))
  size = before.data.batch_size
  changed = new.at({'mixture': {'start': 4 * size, 'used': old.used(4 * size)}})
  assert old.used(4 * size) == {'a': 3 * size, 'b': size}
  wanted = [int(checksum(old.batch(step, slice(0, size)))) for step in range(4)]
  wanted += [int(checksum(changed.batch(step, slice(0, size)))) for step in range(4, 9)]
  assert checksums(run) == wanted
  first = {name: None for name in 'abc'}
  for position in range(4 * size, 9 * size):
    origin = changed.describe_row(position)
    first[origin.path[-1]] = first[origin.path[-1]] or (origin.epoch, origin.row)
  fresh = open_data(after.data, after.objective, seed=0, vocab_size=512, cache_dir=tmp_path)
  for name, used in (('a', 3 * size), ('b', size), ('c', 0)):
    rows = fresh.sources[fresh.names.index(name)]
    ((epoch, places),) = rows.epochs(np.array([used]))
    assert first[name] == (epoch, int(rows.locate(epoch, places)[1][0])), 'the next row of the source'


@pytest.mark.slow
def test_a_run_whose_data_has_changed_resumes_without_the_flag_and_exactly_and_shows_its_rows(stores, tmp_path, capsys):
  for run in ('whole', 'cut'):
    train(configured(stores, 'ab', (3.0, 1.0), 'train.steps=4'), tmp_path / run)
    steps = 8 if run == 'cut' else 11
    train(configured(stores, 'bc', (1.0, 1.0), f'train.steps={steps}'), tmp_path / run, allow_data_change=True)
  train(configured(stores, 'bc', (1.0, 1.0), 'train.steps=11'), tmp_path / 'cut')
  assert checksums(tmp_path / 'cut') == checksums(tmp_path / 'whole')
  assert len(set(checksums(tmp_path / 'whole'))) == 11
  assert shown_checksums(tmp_path / 'cut', range(4, 11)) == checksums(tmp_path / 'cut')[4:]
  explain = ['data', 'explain', f'--workdir={tmp_path / "cut"}']
  assert main.main([*explain, '--step=4', '--row=1']) == 0
  assert main.main([*explain, '--step=3']) == 64
  assert 'step 11 of' in (message := capsys.readouterr().err)
  assert 'of the steps from 4 (--allow_data_change' in message
  assert main.main(['data', 'explain', '--step=3']) == 64
  assert 'give --gin_file=F, or --workdir=RUN' in capsys.readouterr().err


def shown_checksums(workdir, steps) -> list[int]:
  """The checksums of the batches from which `pretrain data show --workdir` takes its rows."""
  cfg = bindings.load(Experiment, [str(workdir / 'config.gin')], [])
  found = []
  for step in steps:
    data = open_data(cfg.data, cfg.objective, seed=0, vocab_size=512, cache_dir=workdir)
    own, example = data_of_run(workdir, cfg, data, step)
    found.append(int(checksum(own.global_rows(example, cfg.data.batch_size))))
  return found


@pytest.mark.slow
def test_a_store_that_grew_continues_from_the_same_row(stores, tokenizer_model, tmp_path):
  train(configured(stores, 'a', (1.0,), 'train.steps=4'), tmp_path / 'run')
  (stores / 'a').rename(stores / 'old')
  write_store(stores / 'a', tokenizer_model, 0, documents=260)
  longer = configured(stores, 'a', (1.0,), 'train.steps=5')
  with pytest.raises(CheckpointError, match=r'stores\[0\] was .*add --allow_data_change to continue with it'):
    train(longer, tmp_path / 'run')
  train(longer, tmp_path / 'run', allow_data_change=True)
  data = open_data(longer.data, longer.objective, seed=0, vocab_size=512, cache_dir=tmp_path)
  assert checksums(tmp_path / 'run')[4] == int(checksum(data.batch(4, slice(0, longer.data.batch_size))))


@pytest.mark.slow
def test_a_batch_of_another_size_continues_with_the_next_row(stores, tmp_path):
  train(configured(stores, 'a', (1.0,), 'train.steps=4'), tmp_path / 'run')
  larger = configured(stores, 'a', (1.0,), 'train.steps=6', 'data.batch_size=16')
  with pytest.raises(ConfigError, match=r'data.batch_size is 8 in .*, 16 in this command'):
    train(larger, tmp_path / 'run')
  train(larger, tmp_path / 'run', allow_data_change=True)
  data = open_data(larger.data, larger.objective, seed=0, vocab_size=512, cache_dir=tmp_path)
  wanted = [int(checksum(data.global_rows(start, 16))) for start in (32, 48)]
  assert checksums(tmp_path / 'run')[4:] == wanted == shown_checksums(tmp_path / 'run', (4, 5))
