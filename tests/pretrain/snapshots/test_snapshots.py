"""Snapshots in memory: whose bytes, whole or not, made again by parity; what a run goes on from. Three real hosts that
lose one: test_snapshots_hosts.py."""

import contextlib
import dataclasses
import errno
import os
import shutil
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pretrain.checkpoints import manifest
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.cli.main import main
from pretrain.devices.mesh import AXES
from pretrain.errors import ConfigError
from pretrain.hosts.coordination import Interrupt
from pretrain.records.goodput import goodput
from pretrain.records.metrics import read_metrics
from pretrain.records.timeline import Timeline, read_timeline
from pretrain.run import starting, step_numbers
from pretrain.run.starting import start
from pretrain.run.train import train
from pretrain.snapshots import layout as snapshot_layout
from pretrain.snapshots import parity as snapshot_parity
from pretrain.snapshots import slots as snapshot_slots
from pretrain.snapshots.choice import Report, choose, said
from pretrain.snapshots.peers import PeerError, Peers, Server
from pretrain.snapshots.slots import Header, Slots, SnapshotConfig, folder_of
from tests.pretrain import tiny

pytestmark = pytest.mark.usefixtures('shared_programs')

KEYS = ('train.steps=20', 'checkpoint.every=1000', 'snapshot.every=5', 'data.batch_size=8')
EXACT = ('step', 'loss', 'grad_norm', 'batch_checksum')


@pytest.fixture(autouse=True)
def memory(monkeypatch, tmp_path):
  """Tests use a folder of their own instead of /dev/shm, and fail if they leave something in it."""
  folder = tmp_path / 'memory'
  folder.mkdir()
  monkeypatch.setattr(snapshot_slots, 'MEMORY', folder)
  return folder


# Parity


@pytest.mark.parametrize('hosts', [2, 3, 4, 7])
def test_the_block_of_any_host_is_rebuilt_from_the_others(hosts):
  draw, group = np.random.default_rng(hosts), list(range(10, 10 + hosts))
  sizes = draw.integers(64, 400, hosts) * 8
  chunk = snapshot_parity.chunk_size(sizes.tolist())
  blocks = {host: np.zeros(chunk * (hosts - 1), np.uint8) for host in group}
  for host, size in zip(group, sizes, strict=True):
    blocks[host][:size] = draw.integers(0, 256, size)
  for lost in group:
    seen = lambda host, first, end, lost=lost: _others(blocks, lost, host)[first:end]
    own = lambda source, first, end: blocks[source][first:end]
    kept = {host: snapshot_parity.parity(group, host, chunk, own) for host in group if host != lost}
    again = snapshot_parity.rebuild(group, lost, chunk, seen, kept.__getitem__)
    assert np.array_equal(again, blocks[lost])
    kept[group[0] if lost != group[0] else group[1]][5] ^= 1
    assert not np.array_equal(snapshot_parity.rebuild(group, lost, chunk, seen, kept.__getitem__), blocks[lost])


def _others(blocks, lost, host):
  assert host != lost, 'what was lost is not read'
  return blocks[host]


@pytest.mark.parametrize('hosts', [2, 3, 5])
def test_parity_takes_a_share_of_one_block_not_a_copy_of_the_others(hosts):
  size = 240_000
  chunk = snapshot_parity.chunk_size([size] * hosts)
  parity = snapshot_parity.parity(range(hosts), 0, chunk, lambda host, first, end: np.ones(end - first, np.uint8))
  assert parity.nbytes == size // (hosts - 1)


# Layout


@dataclasses.dataclass(frozen=True)
class Device:
  id: int
  process_index: int


def hosts_of(count: int, devices: int = 2):
  return [Device(i, i // devices) for i in range(count * devices)]


def leaf(shape, index_of, devices):
  """An array on a mesh of devices that do not exist."""
  sharding = types.SimpleNamespace(devices_indices_map=lambda shape: {d: index_of(d) for d in devices})
  return types.SimpleNamespace(shape=shape, dtype=np.dtype(np.float32), sharding=sharding)


def test_replicated_hosts_keep_equal_shares():
  devices = hosts_of(3)
  abstract = [leaf((90, 4, 7), lambda d: (slice(None),) * 3, devices), leaf((), lambda d: (), devices)]
  layout = snapshot_layout.Layout(abstract)
  assert sum(piece.size for piece in layout.pieces) == 4 * (90 * 4 * 7 + 1), 'each byte once'
  assert {host: sum(p.size for p in layout.of(host)) // 100 for host in range(3)} == {0: 33, 1: 33, 2: 33}


def test_sharded_hosts_keep_their_own_parts():
  devices = hosts_of(2)
  parts = {0: slice(0, 5), 1: slice(5, 10), 2: slice(10, 15), 3: slice(15, 20)}
  layout = snapshot_layout.Layout([leaf((20, 3), lambda d: (parts[d.id], slice(None)), devices)])
  assert [(p.process, p.index[0]) for p in layout.pieces] == [(0, (0, 5)), (0, (5, 10)), (1, (10, 15)), (1, (15, 20))]


def some_state():
  """Arrays of every kind on a mesh of eight devices."""
  mesh = jax.make_mesh((1, 2, 4, 1, 1, 1, 1), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 7)
  put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
  draw = np.random.default_rng(0)
  bits = draw.integers(0, 2**32, (8, 5), np.uint32).view(np.float32)  # NaNs among them
  return {
    'whole': put(bits), 'rows': put(bits + 0, 'fsdp'), 'step': put(jnp.int32(7)), 'flag': put(jnp.array([True, False])),
    'half': put(jnp.asarray(draw.standard_normal((3, 16)), jnp.bfloat16), None, 'fsdp'), 'none': put(jnp.zeros((0, 3))),
    'own': put(bits * 2, ('data', 'fsdp')),
  }  # fmt: skip


def bits_of(tree):
  return {key: (np.asarray(x).tobytes(), x.sharding) for key, x in tree.items()}


def test_a_state_is_restored_bit_for_bit_after_the_step_reused_its_buffers():
  state = some_state()
  wanted = bits_of(state)
  layout = snapshot_layout.Layout(state)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  copies = snapshot_layout.Copies(layout, 0).begin(state)
  taken = jax.jit(lambda s: jax.tree.map(lambda x: jnp.zeros_like(x), s), donate_argnums=0)(state)
  jax.block_until_ready(taken)
  block = np.zeros(layout.sizes[0], np.uint8)
  snapshot_layout.write(block, copies)
  read = lambda piece: block[piece.offset : piece.offset + piece.size]
  assert bits_of(snapshot_layout.assemble(abstract, layout, 0, read)) == wanted
  block[200] ^= 1
  assert bits_of(snapshot_layout.assemble(abstract, layout, 0, read)) != wanted


def test_the_layout_of_another_mesh_has_another_fingerprint():
  state = some_state()
  moved = state | {'rows': jax.device_put(state['rows'], state['whole'].sharding)}
  prints = [snapshot_layout.Layout(tree).fingerprint(tree) for tree in (state, moved, some_state())]
  assert prints[0] == prints[2] != prints[1]


# Slots


IDENTITY = {'run': 'a', 'config': 'b'}


def filled(folder, steps, identity=IDENTITY) -> Slots:
  slots = Slots(folder, identity)
  slots.allocate({'block': 128, 'parity': 64})
  for step in steps:
    slot = 0 if not slots.steps else 1 - slots.slot_of(max(slots.steps.values()))
    slots.open(slot)
    for kind in ('block', 'parity'):
      slots.array(slot, kind)[:] = step
      crc = snapshot_slots.zlib.crc32(slots.array(slot, kind))
      slots.close(slot, kind, Header(step, len(slots.array(slot, kind)), crc, [crc], dict(identity), {}))
  return slots


def found(folder, identity=IDENTITY):
  steps, reasons = Slots(folder, identity).find()
  return {step: whole for step, (_, whole) in steps.items()}, reasons


def test_two_steps_are_kept_and_one_while_the_next_is_written(tmp_path):
  slots = filled(tmp_path / 's', (5, 10, 15))
  assert found(tmp_path / 's') == ({10: True, 15: True}, [])
  slots.open(older := slots.slot_of(10))
  slots.array(older, 'block')[:40] = 20  # and the process is killed
  assert found(tmp_path / 's') == ({15: True}, [])


def test_a_slot_changed_after_its_header_was_written_is_not_used(tmp_path):
  slots = filled(tmp_path / 's', (5, 10))
  slots.array(slots.slot_of(5), 'block')[:40] = 20
  steps, (reason,) = found(tmp_path / 's')
  assert steps == {10: True}
  assert 'slot_0.block (step 5) has crc32' in reason


@pytest.mark.parametrize('kind', ['block', 'parity', 'header'])
def test_every_flipped_bit_is_detected(tmp_path, kind):
  filled(tmp_path / 's', (5,))
  path = tmp_path / 's' / {'block': 'slot_0.block', 'parity': 'slot_0.parity', 'header': 'slot_0.block.json'}[kind]
  whole = path.read_bytes()
  for place in range(0, 8 * len(whole), 41):
    broken = bytearray(whole)
    broken[place // 8] ^= 1 << place % 8
    path.write_bytes(broken)
    assert found(tmp_path / 's')[0] == ({5: False} if kind == 'parity' else {}), place
  path.write_bytes(whole)
  assert found(tmp_path / 's')[0] == {5: True}


def test_snapshots_of_another_run_are_refused_with_the_reason(tmp_path):
  filled(tmp_path / 's', (5,))
  steps, (reason,) = found(tmp_path / 's', IDENTITY | {'config': 'c'})
  assert steps == {}
  assert reason.endswith('slot_0.block.json has another config (b, not c)')


def test_missing_ram_is_detected_before_it_is_written_to(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, 'posix_fallocate', full)
  with pytest.raises(OSError, match='No space left'):
    filled(tmp_path / 's', ())
  assert not (tmp_path / 's').exists(), 'and what was taken is given back'


# Choice


def report(*steps, parity=True, reasons=()):
  return Report({step: (Header(step, 8, 1, [], {}, {}), parity) for step in steps}, reasons)


NONE, GROUP = [], [[0, 1, 2]]


@pytest.mark.parametrize(
  ('reports', 'groups', 'step', 'lost', 'why'),
  [
    ([report(5, 10)] * 3, NONE, 10, (), ''),
    (
      [report(5, 10), report(5), report(5, 10)],
      NONE,
      5,
      (),
      'step 10 lacks the share of process 1, and snapshot.group',
    ),
    ([report(5, 10), report(), report(5, 10)], GROUP, 10, (1,), ''),
    ([report(5, 10), report(), report(5)], GROUP, 5, (1,), 'step 10 lacks the shares of processes [1, 2]'),
    ([report(10), report(), report(10, parity=False)], GROUP, None, (), 'process 2 has no parity of it'),
    ([report(10), report(), report(reasons=['crc'])], GROUP, None, (), 'step 10 lacks the shares of processes [1, 2]'),
    ([report(10), report()] * 2, [[0, 1], [2, 3]], 10, (1, 3), ''),
    ([report(reasons=['old'])], NONE, None, (), 'process 0: old'),
    ([report()] * 3, GROUP, None, (), ''),
  ],
)
def test_the_newest_step_that_is_complete_or_can_be_rebuilt_is_used(reports, groups, step, lost, why):
  choice = choose(reports, groups)
  assert (choice.step, choice.lost) == (step, lost)
  assert why in choice.why if why else not choice.why


def test_shares_from_different_attempts_are_not_combined():
  """A host that was away has a step that the others have computed again since, with other bits."""
  made = lambda crcs: Report({step: (Header(step, 8, 1, crcs, {}, {}), True) for step in (5, 10)}, ())
  for others, whole in (([1, 2, 3], 10), ([1, 2, 4], None)):
    choice = choose([made([1, 2, 3]), made(others), report()], GROUP)
    assert choice.step == whole
    assert choice.why == ('' if whole else 'the shares of step 10 were written in different attempts')


def test_one_line_tells_what_a_run_resumes_from_and_why():
  choice = choose([report(10), report(), report(10)], GROUP)
  assert said(choice, None, 8) == (
    'SNAPSHOT: resuming from step 10 in host RAM, the newest checkpoint is step 8; the share of process 1 is rebuilt '
    'from parity on [0, 2].'
  )
  assert said(choice, 20, 20) == 'SNAPSHOT: resuming from step 20 on disk; host RAM has step 10.'
  assert said(choose([report()], NONE), 20, 20) == 'SNAPSHOT: resuming from step 20 on disk; host RAM: nothing.'
  assert said(choose([report()], NONE), None, None) == ''


# Peers


class Known:
  """Answers with the address of a server."""

  def __init__(self, place):
    self.place = place

  def ask(self, name, process, deadline):
    return self.place


@pytest.fixture
def server():
  blocks = {(5, 'block'): np.arange(200, dtype=np.uint8)}
  server = Server(lambda step, kind: blocks.get((step, kind)), '127.0.0.1', 5.0)
  yield server
  server.close()


def asking(place, seconds=5.0):
  return contextlib.closing(Peers(Known(place), seconds))


def test_peers_read_each_others_bytes(server):
  with asking(server.place) as peers:
    check_reads(peers)


def check_reads(peers):
  assert peers.read(1, 'block', 5, 3, 60).tolist() == list(range(3, 60))
  assert peers.read(1, 'block', 5, 100, 200).tolist() == list(range(100, 200)), 'over the same connection'
  for kind, step, end in (('parity', 5, 60), ('block', 6, 60), ('block', 5, 201)):
    with pytest.raises(PeerError, match=f'process 1 has no {kind} of step {step}'):
      peers.read(1, kind, step, 0, end)


def test_a_connection_without_the_token_gets_nothing(server):
  address, port, token = server.place.split()
  assert len(token) == 32
  with asking(f'{address} {port} {"00" * 16}') as peers, pytest.raises(PeerError, match='did not send'):
    peers.read(1, 'block', 5, 0, 8)


def test_peers_may_be_silent_for_longer_than_they_may_take_to_answer():
  server = Server(lambda step, kind: np.arange(200, dtype=np.uint8), '127.0.0.1', 0.2)
  with asking(server.place) as peers:
    for _ in range(2):
      assert peers.read(1, 'block', 5, 3, 5).tolist() == [3, 4]
      time.sleep(0.5)
  server.close()


def test_a_peer_that_does_not_answer_is_not_waited_for(server):
  server._serve = lambda step, kind: time.sleep(2)
  with asking(server.place, 0.2) as peers, pytest.raises(PeerError, match='process 1 did not send its block of step 5'):
    peers.read(1, 'block', 5, 0, 8)


def test_bytes_damaged_during_the_transfer_are_refused(server, monkeypatch):
  monkeypatch.setattr('pretrain.snapshots.peers.REPLY', types.SimpleNamespace(size=5, pack=_wrong_crc, unpack=_unpack))
  with asking(server.place) as peers, pytest.raises(PeerError, match='damaged during the transfer'):
    peers.read(1, 'block', 5, 0, 8)


def _wrong_crc(there, crc):
  return bytes([there]) + (crc ^ 1).to_bytes(4, 'little')


def _unpack(data):
  return bool(data[0]), int.from_bytes(bytes(data[1:]), 'little')


# Runs


def numbers(workdir):
  return [tuple(row[key] for key in EXACT) for row in read_metrics(workdir)]


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """A run without snapshots."""
  workdir = tmp_path_factory.mktemp('runs') / 'alone'
  assert train(tiny.decoder(*KEYS, 'snapshot.every=0'), workdir) == 0
  return workdir


def kill(workdir, memory, *overrides, step=13):
  """A run that ends at `step` like a killed process: its snapshots stay as they are."""
  log = step_numbers.log

  def dying(run, at, *rest):
    if at == step:
      run.checkpoints.poll(wait=True)
      run.snapshots._taking = None
      raise RuntimeError('killed')
    log(run, at, *rest)
    if run.snapshots._taking is not None and at % 5 == 0:
      run.snapshots._taking._thread.join()

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(snapshot_slots, 'MEMORY', memory)
    patch.setattr(step_numbers, 'log', dying)
    with pytest.raises(RuntimeError, match='killed'):
      train(tiny.decoder(*KEYS, *overrides), workdir)


@pytest.fixture(scope='module')
def killed(tmp_path_factory):
  """A run that was killed in step 13, with step 8 on disk, steps 5 and 10 in host RAM."""
  workdir = tmp_path_factory.mktemp('runs') / 'run'
  workdir.with_name('memory').mkdir()
  kill(workdir, workdir.with_name('memory'), 'checkpoint.every=8')
  return workdir


@pytest.fixture
def run(killed, memory, tmp_path):
  """A copy of `killed` and of its snapshots."""
  workdir = tmp_path / 'run'
  shutil.copytree(killed, workdir)
  shutil.copytree(folder_of(SnapshotConfig(folder=str(killed.with_name('memory'))), killed, 0), folder_at(workdir))
  return workdir


def folder_at(workdir):
  return folder_of(SnapshotConfig(), workdir, 0)


def test_a_run_resumes_from_host_ram_if_there_is_no_checkpoint(alone, run, monkeypatch, capsys, memory):
  shutil.rmtree(run / 'checkpoints')
  began, restored = [], starting.restore_or_initialise

  def noted(*args):
    found = restored(*args)
    began.append((int(found.state.step), found.position['examples']))
    return found

  monkeypatch.setattr(starting, 'restore_or_initialise', noted)
  assert train(tiny.decoder(*KEYS), run) == 0
  assert 'SNAPSHOT: resuming from step 10 in host RAM, there is no checkpoint.' in capsys.readouterr().err
  assert began == [(10, 80)]
  assert numbers(run) == numbers(alone)
  assert leaves(run) == leaves(alone)
  assert list(memory.iterdir()) == [], 'a finished run leaves nothing'


def leaves(workdir):
  return {key: leaf.digest for key, leaf in manifest.read(workdir / 'checkpoints/20').leaves.items()}


@pytest.mark.slow
def test_a_sharded_state_resumes_bit_for_bit(tmp_path, memory):
  mesh = ('mesh.data=2', 'mesh.fsdp=2')
  kill(tmp_path / 'run', memory, *mesh)
  for workdir in (tmp_path / 'run', tmp_path / 'left'):
    assert train(tiny.decoder(*KEYS, *mesh), workdir) == 0
  assert numbers(tmp_path / 'run') == numbers(tmp_path / 'left')
  assert leaves(tmp_path / 'run') == leaves(tmp_path / 'left')


def damage(run):
  for path in folder_at(run).glob('slot_*.block'):
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)


def of_another_run(run):
  (run / 'run_id').write_text('another')


@pytest.mark.parametrize(
  ('harm', 'overrides', 'reason'),
  [
    (damage, (), ' has crc32 '),
    (of_another_run, (), 'has another run ('),
    pytest.param(lambda run: None, ('mesh.data=2',), 'has another mesh (', marks=pytest.mark.slow),
  ],
)
def test_an_unusable_snapshot_is_refused_with_the_reason_and_the_disk_is_used(
  alone, run, capsys, harm, overrides, reason
):
  harm(run)
  assert train(tiny.decoder(*KEYS, 'checkpoint.every=8', *overrides), run) == 0
  said = capsys.readouterr().err
  assert 'SNAPSHOT: resuming from step 8 on disk; host RAM: process 0: ' in said
  assert reason in said
  if not overrides:
    assert numbers(run) == numbers(alone)


def test_the_disk_is_used_if_it_is_newer(run, capsys):
  for path in folder_at(run).glob('*.block.json'):
    if snapshot_slots.read_header(path).step == 10:
      path.unlink()
  run_ = start(tiny.decoder(*KEYS, 'checkpoint.every=8'), run, Timeline())
  run_.metrics.close()
  assert 'SNAPSHOT: resuming from step 8 on disk; host RAM has step 5.' in capsys.readouterr().err
  assert run_.step == run_.saved_step == 8


def test_host_ram_is_used_without_reading_the_disk_if_it_is_newer_and_then_saved(run, monkeypatch, capsys):
  """Damage on the disk is not even noticed. A run that is told to stop before its first step saves its state."""
  monkeypatch.setattr(Checkpoints, 'damage', lambda *_: pytest.fail('it was read'))
  monkeypatch.setattr(Interrupt, 'at', lambda *_: True)
  assert train(tiny.decoder(*KEYS, 'checkpoint.every=8'), run) == 75
  assert 'resuming from step 10 in host RAM, the newest checkpoint is step 8.' in capsys.readouterr().err
  assert sorted(path.name for path in (run / 'checkpoints').iterdir()) == ['10', '8']


def test_if_a_snapshot_cannot_be_read_the_disk_is_used(run, monkeypatch, capsys):
  def fail(*_):
    raise ValueError('no such bytes')

  monkeypatch.setattr(snapshot_layout, 'assemble', fail)
  monkeypatch.setattr(Interrupt, 'at', lambda *_: True)
  assert train(tiny.decoder(*KEYS, 'checkpoint.every=8'), run) == 75
  last = capsys.readouterr().err.splitlines()[-1]
  assert (
    last == 'SNAPSHOT: resuming from step 8 on disk; host RAM: step 10 could not be read: process 0: no such bytes.'
  )


def test_a_step_without_its_metrics_row_is_not_resumed_from(tmp_path, memory, capsys):
  kill(tmp_path / 'run', memory, step=10)
  assert [row['step'] for row in read_metrics(tmp_path / 'run')][-1] == 9
  assert train(tiny.decoder(*KEYS), tmp_path / 'run') == 0
  assert 'resuming from step 5 in host RAM' in capsys.readouterr().err
  assert [row['step'] for row in read_metrics(tmp_path / 'run')] == list(range(1, 21))


def test_full_ram_costs_one_warning(alone, tmp_path, monkeypatch, capfd):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, 'posix_fallocate', full)
  assert train(tiny.decoder(*KEYS, 'train.steps=6'), tmp_path / 'run') == 0
  text = ''.join(capfd.readouterr())
  assert text.count('SNAPSHOT:') == 1
  assert 'SNAPSHOT: no snapshots until the next start: process 0: two slots of this host need' in text
  assert numbers(tmp_path / 'run') == numbers(alone)[:6]


def test_a_failed_snapshot_is_reported_once_and_training_continues(alone, tmp_path, monkeypatch, capfd, memory):
  monkeypatch.setattr(snapshot_layout, 'write', lambda *_: (_ for _ in ()).throw(OSError('gone')))
  assert train(tiny.decoder(*KEYS, 'train.steps=11'), tmp_path / 'run') == 0
  assert ''.join(capfd.readouterr()).count('SNAPSHOT: step 5 was left out: process 0: gone.') == 1
  assert numbers(tmp_path / 'run') == numbers(alone)[:11]
  assert list(memory.iterdir()) == []


def test_snapshot_costs_are_logged_and_the_stall_counts_as_saving(killed):
  rows = [row for row in read_metrics(killed) if 'snapshot_stall' in row]
  assert [row['snapshot_step'] for row in rows] == [5, 10]
  state = sum(4 * np.prod(leaf.shape) for leaf in manifest.read(killed / 'checkpoints/8').leaves.values())
  for row in rows:
    assert 0 < row['snapshot_stall'] < row['snapshot_seconds']
    assert state <= row['snapshot_mib'] * 2**20 < 1.05 * state
  waited = rows[0]['snapshot_stall'] + sum(row.get('save_stall', 0.0) for row in read_metrics(killed))
  assert goodput(read_timeline(killed))['seconds']['save'] >= waited, 'up to step 8, which is in the timeline for sure'


def test_seconds_moved_between_phases_are_counted_once(tmp_path):
  timeline = Timeline()
  timeline.open(tmp_path, 0)
  timeline.enter('step')
  time.sleep(0.05)
  timeline.moved('save', 0.03)
  timeline.flush()
  lines = read_timeline(tmp_path)
  assert lines[-1]['seconds']['save'] == 0.03
  spent = sum(sum(line['seconds'].values()) for line in lines)
  assert spent == pytest.approx(lines[-1]['t'] - lines[0]['began'], abs=1e-3)
  assert goodput(read_timeline(tmp_path))['seconds']['save'] == 0.03


def test_a_list_names_the_snapshots_in_host_ram_if_there_are_any(run, monkeypatch, capsys):
  monkeypatch.setattr('pretrain.tools.weights.time', types.SimpleNamespace(time=lambda: 100.0))
  for path in folder_at(run).glob('slot_?.block.json'):
    os.utime(path, (100 - snapshot_slots.read_header(path).step,) * 2)
  lists = ['checkpoints', 'list', f'--workdir={run}']
  assert main(lists) == 0
  *_, last = capsys.readouterr().out.splitlines()
  size = (folder_at(run) / 'slot_0.block').stat().st_size / 2**20
  assert last == f'in host RAM: step 5 ({size:.1f} MiB, 5 s old), step 10 ({size:.1f} MiB, 10 s old)'
  shutil.rmtree(run / 'checkpoints')
  assert main(lists) == 66
  assert capsys.readouterr().out == f'{last}\n'
  shutil.rmtree(folder_at(run))
  assert main(lists) == 66
  assert capsys.readouterr().out == ''


def test_switched_off_snapshots_remove_earlier_ones(run, monkeypatch, memory, capsys):
  assert [path for path in memory.iterdir()] == [folder_at(run)]
  monkeypatch.setattr(Interrupt, 'at', lambda *_: True)
  assert train(tiny.decoder(*KEYS, 'checkpoint.every=8', 'snapshot.every=0'), run) == 75
  assert 'SNAPSHOT' not in capsys.readouterr().err
  assert list(memory.iterdir()) == []


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    (['snapshot.every=5', 'snapshot.group=1'], 'snapshot.group=1: a host cannot keep parity of itself; set it to 2'),
    (['snapshot.group=3'], 'snapshot.group=3 with snapshot.every=0: it would never be used; set snapshot.every'),
    (["snapshot.folder='/x'"], "snapshot.folder='/x' with snapshot.every=0: it would never be used"),
    (['snapshot.every=-1'], 'snapshot.every=-1.*must be >= 0'),
    (['snapshot.timeout=0.0'], 'snapshot.timeout=0.0.*must be > 0'),
  ],
)
def test_a_users_mistake_is_reported_with_the_fix(overrides, message):
  with pytest.raises(ConfigError, match=message):
    tiny.decoder(*overrides)


def test_a_missing_folder_is_refused_before_anything_is_written(tmp_path):
  with pytest.raises(ConfigError, match=r"snapshot.folder='.*/nowhere': no folder .*/nowhere that can be written"):
    train(tiny.decoder(*KEYS, f"snapshot.folder='{tmp_path}/nowhere'"), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_folder_of_another_user_is_not_used(tmp_path, memory, monkeypatch):
  """Every user may write to /dev/shm: the owner of the folder can write what a run would resume from."""
  folder = folder_of(SnapshotConfig(), tmp_path / 'run', 0)
  folder.symlink_to(tmp_path)
  with pytest.raises(ConfigError, match=f'{folder} does not belong to this user; remove it, or set snapshot.folder.'):
    folder_of(SnapshotConfig(), tmp_path / 'run', 0)
  folder.unlink()
  folder.mkdir()
  assert folder_of(SnapshotConfig(), tmp_path / 'run', 0) == folder
  monkeypatch.setattr(os, 'getuid', lambda: folder.stat().st_uid + 1)
  with pytest.raises(ConfigError, match='does not belong to this user'):
    folder_of(SnapshotConfig(), tmp_path / 'run', 0)


def test_headers_have_exactly_the_fields_that_are_read(tmp_path):
  slots = filled(tmp_path / 's', (5,))
  header = snapshot_slots.read_header(slots._header(0, 'block'))
  assert dataclasses.asdict(header) == {
    'step': 5, 'size': 128, 'crc': header.crc, 'crcs': [header.crc], 'identity': IDENTITY, 'position': {},
  }  # fmt: skip
