"""The guarantees of the data engine, named g1 to g9. The tenth, speed, is measured by scripts/bench/data.py."""

import functools
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from data.batches.loader import loader
from data.batches.source import MixtureStage, Source
from data.errors import DataError
from data.examples.tags import Tags
from data.objectives.fitting import check_objective, num_sentinels
from data.objectives.noise import (
  noise_counts,
  noise_masks,
  noise_span_to_unique_sentinel,
  nonnoise_span_to_unique_sentinel,
)
from data.objectives.objectives import CausalLm, Instruction, MaskedLm, PrefixLm, SpanCorruption, Ul2, tasks_of
from data.objectives.tasks import Budget
from data.packing.best_fit import BestFitPlanner
from data.packing.buckets import LengthBuckets
from data.packing.full_rows import FullRows
from data.packing.packing import BestFit, ConcatSplit, NextFit
from data.packing.plan import Stream
from data.stores.store import StoreWriter, open_store
from data.stores.vocabulary import EOS, Tokenizer
from tests.data.batches.test_source import SENTINELS, digest, opened

STEPS, BATCH = 60, 8
GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / 'golden/t5_seqio.json').read_text())
STREAM = """
import sys
from tests.data.batches.test_guarantees import mixed, digest, loader
if __name__ == '__main__':
  start, workers = int(sys.argv[2]), int(sys.argv[3])
  for position, batch in loader(mixed(sys.argv[1], workers=workers), {'examples': start}, slice(0, 8)):
    print(position['examples'], digest(batch), flush=True)
"""


@pytest.fixture(scope='module')
def sharded(tokenizer_model, tmp_path_factory):
  """A folder of three stores with two to four shards each."""
  folder, rng = tmp_path_factory.mktemp('sharded'), np.random.default_rng(0)
  for name, number in (('a', 60), ('b', 90), ('c', 150)):
    with StoreWriter(folder / name, Tokenizer(tokenizer_model, SENTINELS), shard_tokens=5000) as writer:
      writer.add([rng.integers(3, 400, rng.integers(1, 300)) for _ in range(number)])
      writer.finish()
  assert [len(open_store(folder / name).shards) for name in 'abc'] == [2, 3, 4]
  return folder


def mixed(folder, **options):
  """UL2 over the three stores in two stages: everything that a real run uses, together."""
  stages = (MixtureStage(start_step=0, weights=(5.0, 3.0, 2.0)), MixtureStage(start_step=25, weights=(0.0, 1.0, 3.0)))
  sources = tuple(Source(path=f'{folder}/{name}') for name in 'abc')
  return opened(None, Ul2(), 64, 64, sources=sources, stages=stages, **options)


@pytest.fixture(scope='module')
def hashes(sharded) -> list[str]:
  """The batch hash of every step, each batch made on its own."""
  source = mixed(sharded)
  return [digest(source.batch(step, slice(0, BATCH))) for step in range(STEPS)]


def test_g1_a_killed_run_resumes_bit_exactly(sharded, hashes):
  seen: list[str] = []
  for workers, lines in ((0, 7), (2, 22), (1, STEPS - 29)):
    command = [sys.executable, '-c', STREAM, str(sharded), str(len(seen) * BATCH), str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
      assert run.stdout is not None
      for line in itertools.islice(run.stdout, lines):
        examples, found = line.split()
        seen.append(found)
        assert int(examples) == BATCH * len(seen)
      os.kill(run.pid, signal.SIGKILL)
  assert seen == hashes
  assert len(set(seen)) == STEPS


def steps_of(open_with, hosts: int, workers: int, first: int, last: int) -> list[str]:
  """Batch hashes of steps first … last - 1, with batches assembled from the rows of each host's loader."""
  own = BATCH // hosts
  sources = [open_with(workers=workers) for _ in range(hosts)]
  loaders = [loader(s, {'examples': first * BATCH}, slice(h * own, (h + 1) * own)) for h, s in enumerate(sources)]
  found = []
  for parts in itertools.islice(zip(*loaders, strict=True), last - first):
    batches = [batch for _, batch in parts]
    found.append(digest({name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}))
  return found


@pytest.mark.parametrize('hosts', [1, 2, pytest.param(8, marks=pytest.mark.slow)])
def test_g2_any_number_of_hosts_gives_the_same_batches(sharded, hashes, hosts):
  assert steps_of(functools.partial(mixed, sharded), hosts, 0, 0, STEPS) == hashes


def test_g2_hosts_and_workers_may_change_during_a_run(sharded, hashes):
  legs = [(2, 0, 0, 20), (8, 0, 20, 35), (1, 2, 35, 50), (1, 0, 50, STEPS)]
  assert [found for leg in legs for found in steps_of(functools.partial(mixed, sharded), *leg)] == hashes


@pytest.mark.parametrize(
  'kind', ['conversations', *(pytest.param(x, marks=pytest.mark.slow) for x in ('tags', 'full rows'))]
)
def test_g1_g2_g4_hold_for_conversations_tags_and_full_rows(chat_store, tag_store, sharded, kind):
  """Over several epochs: each step on its own, backwards; then in parts with different hosts and workers."""
  if kind == 'full rows':
    own = functools.partial(opened, sharded / 'a', Ul2(), 64, 48, packing=FullRows())
  elif kind == 'tags':
    own = functools.partial(opened, tag_store, CausalLm(), 0, 64, tags=Tags(drop_rate=0.4), packing=BestFit())
  else:
    own = functools.partial(opened, chat_store, Instruction(prefix_attention=True), 0, 64)
  backwards = own()
  wanted = [digest(backwards.batch(step, slice(0, BATCH))) for step in range(29, -1, -1)][::-1]
  assert backwards.describe_row(BATCH * 30 - 1).epoch > 1
  assert len(set(wanted)) == 30
  legs = [(2, 0, 0, 9), (8, 0, 9, 17), (1, 1, 17, 24), (1, 0, 24, 30)]
  assert [found for leg in legs for found in steps_of(own, *leg)] == wanted


def test_g2_a_different_batch_size_continues_with_the_next_row(sharded):
  of_eight, of_three = mixed(sharded), mixed(sharded, batch_size=3)
  position, batch = next(loader(of_three, {'examples': 16}, slice(0, 3)))
  assert position['examples'] == 19
  whole = of_eight.batch(2, slice(0, BATCH))
  assert all((batch[name] == whole[name][:3]).all() for name in batch if not name.startswith('source'))


EPOCHS = [
  pytest.param(Ul2(), 64, 64, ConcatSplit(), id='ul2'),
  pytest.param(SpanCorruption(), 64, 32, ConcatSplit(), id='spans'),
  pytest.param(CausalLm(), 0, 64, ConcatSplit(), id='causal'),
  pytest.param(CausalLm(), 0, 64, BestFit(), id='best-fit'),
  pytest.param(SpanCorruption(), 64, 32, BestFit(), id='spans-best-fit'),
  pytest.param(PrefixLm(), 0, 64, NextFit(), id='next-fit'),
  pytest.param(MaskedLm(), 0, 64, BestFit(), id='mlm-best-fit'),
  pytest.param(CausalLm(), 0, 64, LengthBuckets(min_length=16), id='buckets'),
  pytest.param(Ul2(), 64, 48, FullRows(), id='full-rows'),
]


def rows_until(source, epoch: int):
  """Yields the descriptions of all rows of the run before `epoch`."""
  start = 0
  while True:
    for row in range(source.batch_rows(start)):
      origin, _ = source.row(start, row)
      if origin.epoch == epoch:
        return
      yield origin
    start += source.cfg.batch_size


@pytest.mark.parametrize(('objective', 'inputs', 'targets', 'packing'), EPOCHS)
def test_g3_every_token_is_seen_once_in_an_epoch(sharded, objective, inputs, targets, packing):
  store = open_store(sharded / 'a')
  source = opened(sharded / 'a', objective, inputs, targets, packing=packing, batch_size=1)
  used = np.zeros((2, store.num_tokens), int)
  for origin in rows_until(source, 2):
    for _, start, length in origin.pieces:
      used[origin.epoch, start : start + length] += 1
  text = store.read([(0, store.num_tokens)])[0] != EOS
  wanted = np.ones_like(text) if isinstance(objective, CausalLm) else text
  assert used[0].tolist() == wanted.astype(int).tolist()
  assert used[1].tolist() == wanted.astype(int).tolist()


def test_g4_a_batch_depends_only_on_its_position(sharded, hashes):
  """The same batches are made on their own, backwards, and in a stream with other threads and prefetching."""
  backwards = mixed(sharded)
  assert [digest(backwards.batch(step, slice(0, BATCH))) for step in range(STEPS - 1, -1, -7)] == hashes[::-1][::7]
  for prefetch in (0, 5):
    stream = loader(mixed(sharded, prefetch=prefetch), {'examples': 0}, slice(0, BATCH))
    assert [digest(batch) for _, batch in itertools.islice(stream, 12)] == hashes[:12]


def test_g4_the_millionth_step_is_made_without_the_earlier_ones(sharded):
  far = mixed(sharded)
  planned: list[tuple[int, int]] = []
  for rows in far.sources:
    plan = rows._planner.plan
    rows._planner.plan = lambda *which, plan=plan: (planned.append(which), plan(*which))[1]
  first = digest(far.batch(1_000_000, slice(0, BATCH)))
  assert first == digest(mixed(sharded).batch(1_000_000, slice(0, BATCH)))
  assert len(planned) <= 9 * 8 + 16, 'each shard in each of its eight variants, and those of one window again'


def test_g5_given_a_mask_inputs_and_targets_equal_the_references():
  for case in GOLDEN['cases']:
    mask = np.array([c == '1' for c in case['mask']])
    tokens = np.arange(100, 100 + case['length'], dtype=np.int32)
    inputs = noise_span_to_unique_sentinel(tokens, mask, 32099)
    targets = nonnoise_span_to_unique_sentinel(tokens, mask, 32099)
    assert (inputs.tolist(), targets.tolist()) == (case['inputs'], case['targets'])


def test_g6_masks_have_their_distribution_and_denoisers_their_rates(sharded):
  number, (noise, spans) = 40_000, noise_counts(20, 0.3, 2.0)
  bits = np.random.default_rng(0).integers(0, 2**64, 20 * number, np.uint64)
  masks = noise_masks(np.full(number, 20), np.full(number, noise), np.full(number, spans), bits).reshape(number, 20)
  counts = np.unique(masks, axis=0, return_counts=True)[1]
  assert len(counts) == 780, 'every mask that the reference can draw'
  chi_square = np.square(counts - counts.mean()).sum() / counts.mean()
  assert 0.9 < chi_square / 779 < 1.1
  source = opened(sharded / 'c', Ul2(), 64, 64, batch_size=7)
  labels = [source.describe_row(position).task for position in range(70)]
  assert all(len(set(labels[i : i + 7])) == 7 for i in range(0, 70, 7))


def test_g7_sentinel_ids_never_collide_with_text_pieces(sharded):
  source = opened(sharded / 'c', Ul2(), 64, 64)
  vocabulary = source.vocabulary
  for step in range(20):
    batch = source.batch(step, slice(0, BATCH))
    for tokens, segments in (
      (batch['encoder_input_tokens'], batch['encoder_segment_ids']),
      (batch['decoder_target_tokens'], batch['decoder_segment_ids']),
    ):
      for row, own in zip(tokens, segments, strict=True):
        for segment in range(1, own.max() + 1):
          marks = [t for t in row[own == segment].tolist() if vocabulary.is_sentinel(t)]
          assert marks == [vocabulary.sentinel(k) for k in range(len(marks))], 'descending from the first'
  assert vocabulary.sentinel(vocabulary.sentinels - 1) == vocabulary.pieces, 'the last is the id after the pieces'
  needed = max(num_sentinels(task, Budget(64, 64)) for task in tasks_of(Ul2()))
  check_objective(Ul2(), 64, 64, needed)
  with pytest.raises(ValueError, match=f'set data.sentinels >= {needed}'):
    check_objective(Ul2(), 64, 64, needed - 1)


def test_g8_packed_rows_are_full_and_their_segments_are_the_pieces(sharded):
  source = opened(sharded / 'c', CausalLm(), 0, 64, packing=BestFit())
  for position in range(40):
    origin = source.describe_row(position)
    row = {name: values[0] for name, values in source.global_rows(position, 1).items()}
    lengths = [length for _, _, length in origin.pieces]
    used = sum(lengths)
    assert row['decoder_segment_ids'].tolist() == np.repeat(np.arange(len(lengths)) + 1, lengths).tolist() + [0] * (
      64 - used
    )
    assert row['decoder_positions'][:used].tolist() == [i for n in lengths for i in range(n)]
    assert row['decoder_loss_weights'].tolist() == [1.0] * used + [0.0] * (64 - used)
    text = np.concatenate(source.sources[0].store.read([(start, n) for _, start, n in origin.pieces]))
    assert row['decoder_target_tokens'][:used].tolist() == text.tolist()
    first = row['decoder_positions'][:used] == 0
    assert row['decoder_input_tokens'][:used].tolist() == np.where(first, 0, np.roll(text, 1)).tolist()
  rng = np.random.default_rng(0)
  lengths = np.clip(rng.lognormal(6, 1.1, 20_000), 20, 60_000).astype(np.int64)
  text = Stream(np.cumsum(lengths) - lengths, lengths)
  plan = BestFitPlanner(lambda shard: text, tasks_of(CausalLm())[0], Budget(0, 2048)).plan(0, 0)
  assert lengths.sum() / (2048 * len(plan.tasks)) > 0.999


@pytest.mark.parametrize('file', ['tokens/c/0', 'document_offsets/c/0', 'tokenizer.model', 'manifest.json'])
def test_g9_a_damaged_store_is_refused(sharded, tmp_path, file):
  shutil.copytree(sharded / 'a', tmp_path / 'a')
  read_all = lambda: [opened(tmp_path / 'a', Ul2(), 64, 64).batch(step, slice(0, BATCH)) for step in range(20)]
  read_all()
  raw = bytearray((tmp_path / 'a' / file).read_bytes())
  raw[len(raw) // 3] ^= 1
  (tmp_path / 'a' / file).write_bytes(raw)
  with pytest.raises(DataError, match='DATA'):
    read_all()
