"""The global batch of a step is a pure function of config, seed and step."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import subprocess
import sys
import time

import numpy as np
import pytest

import data.batches.rows
from data.batches.batches import DataSource
from data.batches.source import Source, StoreData, Synthetic, open_data
from data.errors import DataError
from data.objectives.objectives import (
  Bart,
  CausalLm,
  FillInTheMiddle,
  Instruction,
  MaskedLm,
  Objective,
  ObjectiveMixture,
  Part,
  PrefixLm,
  SpanCorruption,
  Supervised,
  Ul2,
  Ul2r,
)
from data.stores.store import StoreWriter, open_store
from data.stores.vocabulary import EOS, Tokenizer

SENTINELS = 32
UL2 = Ul2()
MIXTURE = ObjectiveMixture(
  parts=(
    Part(rate=0.5, objective=CausalLm()),
    Part(rate=0.25, objective=Ul2r()),
    Part(rate=0.25, objective=FillInTheMiddle()),
  )
)
OBJECTIVES = [
  pytest.param(Ul2(), 64, 64, id='ul2'),
  pytest.param(SpanCorruption(random_roll=True), 64, 32, id='spans'),
  pytest.param(Ul2r(), 0, 96, id='ul2r'),
  pytest.param(PrefixLm(), 0, 64, id='prefix'),
  pytest.param(CausalLm(), 0, 64, id='causal'),
  pytest.param(MaskedLm(), 0, 64, id='mlm'),
  pytest.param(Bart(), 64, 64, id='bart'),
  pytest.param(MIXTURE, 0, 96, id='mixture'),
]
CONVERSATIONS = [
  pytest.param(Instruction(), 0, 96, id='instruction'),
  pytest.param(Instruction(loss_on=('user',), prefix_attention=True), 0, 64, id='instruction-prefix'),
]
PAIRS = [
  pytest.param(Supervised(), 64, 32, id='supervised'),
  pytest.param(Supervised(inputs_length=24), 0, 64, id='supervised-decoder'),
]


def opened(
  store, objective: Objective = UL2, inputs: int = 64, targets: int = 64, *, seed: int = 0, **options
) -> DataSource:
  options = {'batch_size': 8, 'sources': (Source(path=str(store)),)} | options
  cfg = StoreData(inputs_length=inputs, targets_length=targets, sentinels=SENTINELS, **options)
  return open_data(cfg, objective, seed=seed, vocab_size=600, cache_dir='unused')


@pytest.fixture
def store_for(text_store, pair_store, chat_store):
  """A function: objective -> the store that it learns from."""
  special = {'supervised': pair_store, 'instruction': chat_store}
  return lambda objective: special.get(objective.name, text_store)


def digest(batch) -> str:
  return hashlib.sha256(b''.join(name.encode() + batch[name].tobytes() for name in sorted(batch))).hexdigest()


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope='module')
def two_stores(tokenizer_model, tmp_path_factory):
  """A small store and one three times as large, with the same tokenizer."""
  folder, rng = tmp_path_factory.mktemp('two'), np.random.default_rng(0)
  for name, number in (('small', 20), ('large', 60)):
    with StoreWriter(folder / name, Tokenizer(tokenizer_model, SENTINELS)) as writer:
      writer.add([rng.integers(3, 400, rng.integers(20, 300)) for _ in range(number)])
      writer.finish()
  return folder / 'small', folder / 'large'


@pytest.mark.parametrize(('objective', 'inputs', 'targets'), OBJECTIVES + PAIRS + CONVERSATIONS)
@pytest.mark.parametrize('hosts', [2, 8])
def test_the_rows_of_all_hosts_equal_the_batch_of_a_single_host(store_for, objective, inputs, targets, hosts):
  own, store = 8 // hosts, store_for(objective)
  for step in (0, 3, 11):  # for some objectives the last one crosses an epoch
    whole = opened(store, objective, inputs, targets).batch(step, slice(0, 8))
    parts = [opened(store, objective, inputs, targets).batch(step, slice(h * own, (h + 1) * own)) for h in range(hosts)]
    assert_equal(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


@pytest.mark.parametrize(('objective', 'inputs', 'targets'), OBJECTIVES + PAIRS + CONVERSATIONS)
def test_a_batch_does_not_depend_on_earlier_batches(store_for, objective, inputs, targets):
  stream = opened(store_for(objective), objective, inputs, targets)
  batches = [stream.batch(step, slice(0, 8)) for step in range(30)]
  assert_equal(batches[29], opened(store_for(objective), objective, inputs, targets).batch(29, slice(0, 8)))
  assert len({digest(batch) for batch in batches}) == 30


def test_a_batch_is_the_same_in_another_process(text_store):
  code = (
    'import sys; from tests.data.batches.test_source import *; '
    'print(digest(opened(sys.argv[1]).batch(5, slice(0, 8))), "jax" in sys.modules)'
  )
  command = [sys.executable, '-c', code, str(text_store)]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert done.stdout.split() == [digest(opened(text_store).batch(5, slice(0, 8))), 'False']


def test_another_seed_gives_other_rows_and_other_noise(text_store):
  a, b = (opened(text_store, seed=seed).batch(0, slice(0, 8)) for seed in (0, 1))
  assert digest(a) != digest(b)


@pytest.mark.parametrize(('objective', 'inputs', 'targets'), OBJECTIVES)
def test_each_token_is_in_exactly_one_row_of_an_epoch(text_store, objective, inputs, targets):
  source, store = opened(text_store, objective, inputs, targets, batch_size=1), open_store(text_store)
  used, row = np.zeros(store.num_tokens, int), 0
  while (origin := source.describe_row(row)).epoch == 0:
    for _, start, length in origin.pieces:
      used[start : start + length] += 1
    row += 1
  text = store.read([(0, store.num_tokens)])[0] != EOS
  wanted = np.ones_like(used) if isinstance(objective, CausalLm | ObjectiveMixture) else text.astype(int)
  assert used.tolist() == wanted.tolist()
  assert source.describe_row(row).epoch == 1


def test_a_causal_epoch_contains_exactly_the_tokens_of_the_store(text_store):
  """The targets of an epoch's rows, sorted into the order of the text, are all tokens including EOS."""
  source, store = opened(text_store, CausalLm(), 0, 64, batch_size=1), open_store(text_store)
  rows, step = [], 0
  while (origin := source.describe_row(step)).epoch == 0:
    batch = source.batch(step, slice(0, 1))
    rows.append((origin.row, batch['decoder_target_tokens'][0][batch['decoder_segment_ids'][0] > 0]))
    step += 1
  text = np.concatenate([tokens for _, tokens in sorted(rows, key=lambda pair: pair[0])])
  assert text.tolist() == store.read([(0, store.num_tokens)])[0].tolist()


def examples(batch, side: str) -> list[list[int]]:
  """The tokens of each example of one side (decoder: targets), row after row."""
  tokens = batch[{'encoder': 'encoder_input_tokens', 'decoder': 'decoder_target_tokens'}[side]]
  segments = batch[f'{side}_segment_ids']
  return [row[own == k].tolist() for row, own in zip(tokens, segments, strict=True) for k in range(1, own.max() + 1)]


@pytest.mark.parametrize('side', ['encoder', 'decoder'])
def test_no_example_crosses_a_document_boundary_unless_configured(text_store, side):
  source = opened(text_store)
  apart = source.batch(0, slice(0, 8))
  across = opened(text_store, attend_across_documents=True).batch(0, slice(0, 8))
  pieces = [source.describe_row(row).pieces for row in range(8)]
  assert apart[f'{side}_segment_ids'].max(1).tolist() == [len(row) for row in pieces], 'a segment for each piece'
  assert max(len(row) for row in pieces) > 1
  assert across[f'{side}_segment_ids'].max() == 1
  store = open_store(text_store)
  for tokens, (document, begin, length) in zip(examples(apart, side), itertools.chain(*pieces), strict=True):
    assert store.offsets[document] <= begin
    assert begin + length < store.offsets[document + 1], 'within one document, without its EOS'
    assert tokens[-1] == EOS
    assert tokens.count(EOS) == 1, 'one EOS, at the end'
    text = store.read([(begin, length)])[0].tolist()
    assert is_subsequence([token for token in tokens if EOS < token < source.vocabulary.pieces], text)


def is_subsequence(short: list[int], long: list[int]) -> bool:
  rest = iter(long)
  return all(token in rest for token in short)


class SlowDict(collections.OrderedDict):
  """A dict that lets other threads run right after an item is stored."""

  def __setitem__(self, key, value):
    super().__setitem__(key, value)
    time.sleep(1e-3)


def test_threads_that_share_rows_get_the_same_batches_as_one_thread(text_store, monkeypatch):
  """More epochs' plans than the cache holds, requested in a different order by each thread."""
  monkeypatch.setattr(data.batches.rows, 'WINDOW', 1)
  shared, alone = (opened(text_store).sources[0] for _ in range(2))
  plan, planned = shared._planner.plan, []
  shared._planner.plan = lambda *which: (planned.append(which), plan(*which))[1]
  shared._plans = SlowDict()
  wanted = [(epoch, alone.num_rows(epoch), alone.batch(epoch, np.arange(3))) for epoch in range(4)]

  def ask(thread: int) -> None:
    for k in range(20):
      epoch, count, batch = wanted[(k * (thread + 1) + thread) % 4]
      assert_equal(shared.batch(epoch, np.arange(3)), batch)
      assert shared.num_rows(epoch) == count

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(ask, range(8)))
  assert len(planned) > 8, 'plans were dropped and made again'


def test_the_sequence_of_rows_is_endless(text_store):
  got = opened(text_store).batch(7, slice(2, 5))['example_index']
  assert got.tolist() == [58, 59, 60]
  assert got.dtype == np.int32


def test_a_batch_may_contain_the_end_of_one_epoch_and_the_start_of_the_next(text_store):
  source = opened(text_store, batch_size=1000)
  origins = [source.describe_row(row) for row in range(0, 1000, 10)]
  epochs = [origin.epoch for origin in origins]
  assert epochs == sorted(epochs)
  assert len(set(epochs)) > 2
  whole = source.batch(0, slice(0, 1000))
  alone = source.batch(0, slice(700, 701))
  assert_equal(alone, {name: values[700:701] for name, values in whole.items()})


def test_sources_are_mixed_at_exact_shares_in_every_block(two_stores):
  small, large = map(str, two_stores)
  sources = (Source(path=small, weight=0.3), Source(path=large, weight=0.7))
  source = opened(None, sources=sources, batch_size=10)
  for step in (0, 1, 50):
    paths = [source.describe_row(10 * step + row).path for row in range(10)]
    assert (paths.count(small), paths.count(large)) == (3, 7)
  whole = source.batch(4, slice(0, 10))
  for row in range(10):
    assert_equal(source.batch(4, slice(row, row + 1)), {name: v[row : row + 1] for name, v in whole.items()})


def test_each_source_goes_through_its_own_epochs(two_stores):
  small, large = map(str, two_stores)
  sources = (Source(path=small), Source(path=large))
  source = opened(None, CausalLm(), 0, 64, sources=sources, batch_size=1)
  seen = [source.describe_row(p) for p in range(400)]
  for path in (small, large):
    rows = [o.row for o in seen if o.path == path and o.epoch == 0]
    assert len(set(rows)) == len(rows), 'no row twice in an epoch'
  assert max(o.epoch for o in seen if o.path == small) > max(o.epoch for o in seen if o.path == large)


def test_the_fingerprint_is_json_and_identifies_the_stores(two_stores):
  small, large = (Source(path=str(path)) for path in two_stores)
  a, b = opened(None, sources=(small,)).fingerprint(), opened(None, sources=(large,)).fingerprint()
  assert json.loads(json.dumps(a)) == a
  assert a['tokenizer'] == b['tokenizer']
  assert a['stores'] != b['stores']


def test_heldout_batches_are_fixed_and_contain_each_row_once(two_stores):
  small, large = (Source(path=str(path)) for path in two_stores)
  sets = [opened(None, sources=(large,), heldout=(small,), seed=seed).heldout(99, slice(0, 8)) for seed in (0, 1)]
  assert list(sets[0]) == ['small']
  first, again = (list(s['small']) for s in sets)
  assert [digest(b) for b in first] == [digest(b) for b in again] == [digest(b) for b in sets[0]['small']]
  assert len(first) == len(sets[0]['small']) > 2
  rows = [r.tobytes() for b in first for r in b['encoder_input_tokens'] if r.any()]
  assert len(set(rows)) == len(rows)
  text = sum(int((b['decoder_loss_weights'] > 0).sum()) for b in first)
  assert text > 500


def test_the_last_heldout_batch_is_padded_with_rows_of_weight_zero(two_stores):
  small, large = (Source(path=str(path)) for path in two_stores)
  source = opened(None, sources=(large,), heldout=(small,), batch_size=16)
  *_, last = source.heldout(99, slice(0, 16))['small']
  weights = last['decoder_loss_weights'].sum(1)
  assert weights[0] > 0
  assert weights[-1] == 0
  assert not last['encoder_segment_ids'][-1].any()
  assert len(list(source.heldout(2, slice(0, 16))['small'])) == 2


def test_each_host_gets_its_rows_of_heldout_batches(two_stores):
  small, large = (Source(path=str(path)) for path in two_stores)
  source = opened(None, sources=(large,), heldout=(small,))
  taken = slice(0, 8), slice(6, 8), (slice(0, 1), slice(6, 8))
  for whole, *parts in zip(*(source.heldout(99, rows)['small'] for rows in taken), strict=True):
    for rows, part in zip(([6, 7], [0, 6, 7]), parts, strict=True):
      assert_equal({name: values[rows] for name, values in whole.items()}, part)


def test_heldout_sets_with_the_same_name_get_numbers(two_stores, tmp_path, tokenizer_model):
  with StoreWriter(tmp_path / 'small', Tokenizer(tokenizer_model, SENTINELS)) as writer:
    writer.add([[5, 6, 7, 8]])
    writer.finish()
  heldout = (Source(path=str(two_stores[0])), Source(path=str(tmp_path / 'small')))
  source = opened(two_stores[1], heldout=heldout)
  assert len(source.heldout(1, slice(0, 8))) == 2


def test_synthetic_tokens_need_no_disk_and_contain_only_text():
  cfg = Synthetic(batch_size=4, targets_length=128, sentinels=8)
  source = open_data(cfg, CausalLm(), seed=0, vocab_size=300, cache_dir='unused')
  batch = source.batch(0, slice(0, 4))
  targets = batch['decoder_target_tokens']
  assert targets.min() >= 3
  assert targets.max() < source.vocabulary.pieces == 300 - 8 - 3
  assert (source.tokenizer, source.heldout(4, slice(0, 4))) == (None, {})
  other = open_data(cfg, CausalLm(), seed=1, vocab_size=300, cache_dir='unused')
  assert digest(other.batch(0, slice(0, 4))) != digest(batch)


def test_a_vocabulary_too_small_for_the_store_is_refused(text_store):
  cfg = opened(text_store).cfg
  with pytest.raises(DataError, match=r'DATA: model.vocab_size=480 but .*license needs 483 ids \(448 pieces \+ data'):
    open_data(cfg, Ul2(), seed=0, vocab_size=480, cache_dir='unused')
  open_data(cfg, Ul2(), seed=0, vocab_size=483, cache_dir='unused')


def test_a_synthetic_vocabulary_without_pieces_is_refused():
  cfg = Synthetic(batch_size=4, targets_length=16)
  with pytest.raises(DataError, match=r'model.vocab_size=100 leaves no pieces beside data.sentinels=100'):
    open_data(cfg, CausalLm(), seed=0, vocab_size=100, cache_dir='unused')


def test_stores_of_different_tokenizers_are_refused(text_store, tmp_path):
  from data.prepare.prepare import prepare
  from tests.data.prepare.test_prepare import LICENSE

  prepare([LICENSE], tmp_path / 'other', vocab_size=500, sentinels=20)
  sources = (Source(path=str(text_store)), Source(path=str(tmp_path / 'other')))
  with pytest.raises(
    DataError, match=r'license and .*other have different tokenizers \(sha256 .* and .*\); prepare one'
  ):
    opened(None, sources=sources)
  with pytest.raises(DataError, match='have different tokenizers'):
    opened(text_store, heldout=sources[1:])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'sources': ()}, 'data.sources is empty; name at least one'),
    ({'sources': (Source(path='/none/at/all'),)}, 'no token store at /none/at/all; make one with: pretrain data'),
  ],
)
def test_invalid_sources_are_refused(options, message):
  with pytest.raises(DataError, match='DATA: ' + message):
    opened(None, **options)


def test_too_few_sentinels_are_also_refused_when_data_is_opened(text_store):
  cfg = dataclasses.replace(opened(text_store).cfg, sentinels=3)
  with pytest.raises(ValueError, match=r'data.sentinels=3 but denoiser'):
    open_data(cfg, Ul2(), seed=0, vocab_size=600, cache_dir='unused')
