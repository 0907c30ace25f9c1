"""The loader gives the same batches from any position with any number of workers, and leaves no process behind."""

import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from data.batches.loader import loader
from data.errors import DataError
from data.objectives.objectives import MaskedLm, Supervised, Ul2
from data.packing.full_rows import FullRows
from tests.data.batches.test_source import assert_equal, digest, opened

ALL = slice(0, 8)


def take(source, position, count, rows=ALL):
  return list(itertools.islice(loader(source, position, rows), count))


@pytest.mark.parametrize(
  ('workers', 'prefetch'), [(0, 3), (2, 1), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((0, 0), (1, 2)))]
)
def test_batches_do_not_depend_on_workers(text_store, workers, prefetch):
  source = opened(text_store, workers=workers, prefetch=prefetch)
  for step, (position, batch) in enumerate(take(source, {'examples': 0}, 9)):
    assert position == {'version': 2, 'examples': 8 * (step + 1)}
    assert_equal(batch, source.batch(step, ALL))


@pytest.mark.parametrize(
  ('workers', 'objective'),
  [
    (0, (Ul2(), 64, 64)),
    (1, (Ul2(), 64, 64)),
    (0, (MaskedLm(), 0, 64)),
    (0, (Supervised(), 64, 32)),
    pytest.param(1, (Supervised(), 64, 32), marks=pytest.mark.slow),
  ],
)
def test_a_resumed_stream_equals_the_rest_of_the_original(text_store, pair_store, workers, objective):
  store = pair_store if isinstance(objective[0], Supervised) else text_store
  whole = take(opened(store, *objective), {'examples': 0}, 12)
  rest = take(opened(store, *objective, workers=workers), whole[4][0], 7)
  assert [(p, digest(b)) for p, b in rest] == [(p, digest(b)) for p, b in whole[5:]]


@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_continues_past_2_to_the_31_rows(text_store, workers):
  ((position, batch),) = take(opened(text_store, workers=workers), {'examples': 2**31 - 4}, 1)
  assert position['examples'] == 2**31 + 4
  assert batch['example_index'].tolist() == [*range(2**31 - 4, 2**31), 0, 1, 2, 3]


def test_a_different_batch_size_continues_at_the_same_row(text_store):
  source = opened(text_store, batch_size=3)
  ((position, batch),) = take(source, {'examples': 8}, 1, slice(0, 3))
  assert position['examples'] == 11
  assert batch['example_index'].tolist() == [8, 9, 10]


def test_hosts_load_their_rows(text_store):
  source = opened(text_store)
  for h in range(4):
    ((_, batch),) = take(source, {'examples': 16}, 1, slice(2 * h, 2 * h + 2))
    assert_equal(batch, source.batch(2, slice(2 * h, 2 * h + 2)))


def test_a_host_may_have_rows_that_lie_apart(text_store):
  source = opened(text_store)
  ((_, batch),) = take(source, {'examples': 16}, 1, (slice(0, 2), slice(5, 6), slice(7, 8)))
  whole = source.batch(2, slice(0, 8))
  assert_equal(batch, {name: values[[0, 1, 5, 7]] for name, values in whole.items()})


def test_positions_in_full_rows_have_a_version_of_their_own(text_store):
  source = opened(text_store, packing=FullRows())
  ((position, batch),) = take(source, {'version': 3, 'examples': 16}, 1)
  assert position == {'version': 3, 'examples': 24}
  assert_equal(batch, source.batch(2, slice(0, 8)))


def test_a_position_of_another_version_is_refused(text_store):
  with pytest.raises(DataError, match='position has data version 7, but this release reads 2 and 3'):
    loader(opened(text_store), {'version': 7, 'examples': 0}, ALL)


@pytest.mark.parametrize('workers', [0, 1])
def test_damage_reaches_the_training_loop_as_an_error_with_its_code(text_store, tmp_path, workers):
  import shutil

  store = tmp_path / 'store'
  shutil.copytree(text_store, store)
  source = opened(store, workers=workers)
  damaged = store / 'tokens/c/0'
  raw = bytearray(damaged.read_bytes())
  raw[100] ^= 1
  damaged.write_bytes(raw)
  with pytest.raises(DataError, match=r'DATA-CORRUPT: .*tokens/c/0'):
    take(source, {'examples': 0}, 1)


def test_workers_end_when_their_parent_is_killed(text_store):
  code = (
    'import sys, time; from tests.data.batches.test_source import opened; from data.batches.loader import loader\n'
    'if __name__ == "__main__":\n'
    '  batches = loader(opened(sys.argv[1], workers=2), {"examples": 0}, slice(0, 8)); next(batches)\n'
    '  print("ready", flush=True); time.sleep(100)'
  )
  run = subprocess.Popen([sys.executable, '-c', code, str(text_store)], stdout=subprocess.PIPE)
  with run, run.stdout:
    assert run.stdout.readline() == b'ready\n'
    workers = living(children(run.pid))
    assert len(workers) == 2
    run.kill()
    run.wait()
  until = time.time() + 10
  while time.time() < until and living(workers):
    time.sleep(0.05)
  left = living(workers)
  for pid in left:
    os.kill(pid, signal.SIGKILL)
  assert not left


def living(pids: list[int]) -> list[int]:
  """The pids that still are worker processes."""
  return [pid for pid in pids if 'spawn_main' in command_of(pid)]


def children(pid: int) -> list[int]:
  return [int(p) for f in pathlib.Path(f'/proc/{pid}/task').glob('*/children') for p in f.read_text().split()]


def command_of(pid: int) -> str:
  """The command line of a process; empty if it has ended or is a zombie."""
  try:
    return pathlib.Path(f'/proc/{pid}/cmdline').read_text()
  except OSError:
    return ''


@pytest.mark.slow
def test_a_script_that_ends_without_closing_the_loader_prints_nothing(text_store):
  code = (
    'import sys; from tests.data.batches.test_source import opened; from data.batches.loader import loader\n'
    'if __name__ == "__main__":\n'
    '  batches = loader(opened(sys.argv[1], workers=int(sys.argv[2])), {"examples": 0}, slice(0, 8)); next(batches)'
  )
  for workers in '01':
    command = [sys.executable, '-c', code, str(text_store), workers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert (done.stdout, done.stderr) == ('', '')
