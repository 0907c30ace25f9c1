"""The state in host RAM, every few steps: a restart resumes from it if it is newer than the newest checkpoint.

Each process copies its share after a step, while the next step runs, and writes it to one of two slots in its host's
RAM. The hosts of a group keep parity of each other's shares, so that one of them may be lost with its RAM. A snapshot
holds the same bits as a checkpoint. Sources: GEMINI (Wang et al., SOSP 2023); REFT (arXiv:2310.12670).
"""

import contextlib
import dataclasses
import json
import secrets
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pretrain.checkpoints.checkpoints import Checkpoints, DamagedError, Restored
from pretrain.errors import ConfigError
from pretrain.hosts.coordination import Agreement
from pretrain.snapshots import layout as layouts
from pretrain.snapshots import parity as parities
from pretrain.snapshots.choice import Choice, Report, choose, said
from pretrain.snapshots.peers import ADDRESS, Answers, PeerError, Peers, Server, own_address
from pretrain.snapshots.slots import Header, Kind, Slots, SnapshotConfig, folder_of, remove_beyond
from pretrain.snapshots.taking import Taken, Taking
from pretrain.step.train_step import TrainState
from pretrain.workdirs.folder import Folder

BUSY = 'the one before it is still being written'
RUN_ID = 'run_id'  # RUN/run_id: distinguishes this run's snapshots from those of an earlier run in the same workdir


class Snapshots:
  """The snapshots of one run in this host's RAM. A snapshot is usable only if its identity equals `identity`."""

  def __init__(
    self, cfg: SnapshotConfig, workdir: Folder, identity: Mapping[str, str], *, read_only: bool = False,
    place: Folder | None = None,
  ):  # fmt: skip
    """`place` is the workdir itself where that is in a store, and `workdir` only has its small files."""
    self._cfg, self._workdir, self._read_only = cfg, workdir, read_only
    self._place = place or self._workdir
    self._identity = {'snapshot.group': str(cfg.group), **identity}
    self._host, self._count = jax.process_index(), jax.process_count()
    self._groups = parities.groups(self._count, cfg.group)
    self._group = parities.group_of(self._host, self._groups)
    self._agreement = Agreement('snapshot')  # while the run starts; `_answers` while it trains
    self._answers = Answers(cfg.timeout)
    self._peers = Peers(self._answers, cfg.timeout)
    self._slots: Slots | None = None  # None if snapshots are off
    self._server: Server | None = None
    self._choice: Choice | None = None
    self._agreed: int | None = None  # the newest step that all processes have
    self._taking: Taking | None = None
    self._ended, self._recorded, self._said = list[Taken](), -1, set[str]()

  def newest(self) -> Choice | None:
    """The newest step whose shares all exist or can be rebuilt, the same in all processes; None: snapshots are off."""
    if not self._cfg.every:
      return None
    if self._choice is None:
      path = self._workdir / RUN_ID
      run = self._agreement.first(path.read_text() if path.exists() else '')
      self._identity['run'] = run or self._agreement.first(secrets.token_hex(8))
      self._slots = Slots(folder_of(self._cfg, self._place, self._host), self._identity)
      found, reasons = self._slots.find()
      own = {step: [dataclasses.asdict(header), protected] for step, (header, protected) in found.items()}
      answers = self._agreement.gather(json.dumps([own, reasons]))
      self._choice = choose([Report.of(*json.loads(answer)) for answer in answers], self._groups)
    return self._choice

  def restore(self, abstract: TrainState, step: int) -> Restored:
    """The state of the step that `newest` returned, placed as in `abstract`; lost shares are rebuilt.

    Raises DamagedError in all processes if that fails in one of them; after that, `newest` returns no step.
    """
    position, found = self._choice.header.position, []
    error = error_of(lambda: found.append(self._restore(abstract, step)))
    if error := first_error(self._agreement.gather(error)):
      self._choice = Choice(None, f'step {step} could not be read: {error}')
      raise DamagedError(f'the snapshot of step {step}: {error}. Nothing was deleted.')
    self._agreed = step
    return Restored(found[0], position)

  def _restore(self, abstract: TrainState, step: int) -> TrainState:
    own, header = self._lay_out(abstract), self._choice.header
    error = '' if own == header.identity['layout'] else 'it has other arrays, or other shards of them'
    error = error or error_of(self._allocate)
    if error := first_error(self._agreement.gather(error)):
      raise PeerError(error)
    self._rebuild_lost(step)
    return layouts.assemble(abstract, self._layout, self._host, lambda piece: self._read_piece(step, piece))

  def start(self, abstract: TrainState) -> str:
    """Allocates RAM for new snapshots and forgets every step except the restored one; returns a warning or ''."""
    if self._slots is None:
      if not self._read_only:
        self._discard()
      return ''
    self._lay_out(abstract)
    if error := first_error(self._agreement.gather(error_of(self._allocate))):
      self._slots.remove()
      self._slots = None
      return (
        f'SNAPSHOT: no snapshots until the next start: {error}. Checkpoints are still written; free RAM, or set '
        'snapshot.folder.'
      )
    self._slots.keep(self._agreed)
    if self._host == 0:
      remove_beyond(self._slots.folder, self._count)
      (self._workdir / RUN_ID).write_text(self._identity['run'])
    self._copies = layouts.Copies(self._layout, self._host)
    return ''

  def begin(self, step: int, state: TrainState, position: Mapping[str, Any]) -> float:
    """Starts to copy the state of `step`, which the next step may then reuse; returns the seconds that took.

    The snapshot is usable only after `recorded(step)`: a run that resumes from it must not lack earlier metrics.
    """
    if self._slots is None:
      return 0.0
    start = time.perf_counter()
    if not self._settle():
      self._answers.tell(f'{step}/block', json.dumps({'error': BUSY}))
      self._ended.append(Taken(step, 0.0, 0.0, 0, BUSY))
      return time.perf_counter() - start
    copies = self._copies.begin(state)
    self._taking = Taking(step, copies, dict(position), self._write, known=self._recorded >= step)
    self._taking.start(time.perf_counter() - start)
    return self._taking.stall

  def recorded(self, step: int, decided: Mapping[str, Any]) -> None:
    """Call when the metrics of `step` are in the files of the run; `decided` is what they add to the data position."""
    self._recorded = step
    if self._taking is not None and self._taking.step == step:
      self._taking.position['loader'] = {**self._taking.position['loader'], **decided}
      self._taking.known.set()

  def poll(self) -> list[Taken]:
    """The snapshots that ended since the last call."""
    self._settle()
    ended, self._ended = self._ended, []
    return ended

  def news(self) -> tuple[dict[str, float], str]:
    """(metrics, a warning) from `poll`; each kind of failure is reported once."""
    metrics, warning = {}, ''
    for taken in self.poll():
      metrics = metrics if taken.error else taken.metrics()
      if taken.error and taken.error not in self._said:
        warning = f'SNAPSHOT: step {taken.step} was left out: {taken.error}. Training and checkpoints continue.'
      self._said.add(taken.error)
    return metrics, warning

  def stop(self) -> None:
    """Cancels a snapshot under way; complete snapshots stay for the next start."""
    if self._taking is not None:
      self._taking.cancel()
    self._peers.close()
    if self._server is not None:
      self._server.close()

  def close(self) -> None:
    """Frees the RAM: the run has ended."""
    self.stop()
    if self._slots is not None:
      self._slots.remove()

  def _lay_out(self, abstract: TrainState) -> str:
    """Computes the layout and the sizes; returns the layout's fingerprint, which must match to read a block."""
    self._layout = layouts.Layout(abstract)
    self._identity['layout'] = self._layout.fingerprint(abstract)
    self._sizes = [max(self._layout.sizes.get(host, 0), layouts.ALIGNMENT) for host in range(self._count)]
    self._chunk = parities.chunk_size([self._sizes[host] for host in self._group]) if self._group else 0
    return self._identity['layout']

  def _allocate(self) -> None:
    """Allocates the slots and starts to serve other processes. Raises OSError if there is not enough RAM."""
    needed: dict[Kind, int] = {'block': max(self._sizes[self._host], self._chunk * (len(self._group) - 1))}
    if self._group:
      needed['parity'] = self._chunk
    try:
      self._slots.allocate(needed)
    except OSError as error:
      need, folder = 2 * sum(needed.values()) / 2**20, self._slots.folder.parent
      raise OSError(f'two slots of this host need {need:.0f} MiB in {folder} ({error.strerror})') from error
    if self._count > 1 and self._server is None:
      self._server = Server(self._slots.holding, own_address(), self._cfg.timeout)
      self._answers.tell(ADDRESS, self._server.place)

  def _discard(self) -> None:
    """Removes the snapshots of an earlier start, which could otherwise be taken for newer ones later."""
    with contextlib.suppress(ConfigError):  # the folder does not exist, so there is nothing in it
      Slots(folder_of(self._cfg, self._place, self._host), {}).remove()

  def _write(self, taking: Taking) -> int:
    """Runs in the thread: writes the block, all agree; writes parity, all agree. Returns the bytes on this host."""
    slot = 0 if self._agreed is None else 1 - self._slots.slot_of(self._agreed)
    answer: dict[str, Any] = {}
    if error := error_of(lambda: answer.update(crc=self._write_block(slot, taking))) or taking.cancelled:
      answer = {'error': error}
    texts = self._answers.gather(f'{taking.step}/block', json.dumps(answer))
    found = [json.loads(text) for text in texts]
    if error := first_error([each.get('error', '') for each in found]):
      raise PeerError(error)
    crcs, size = [each['crc'] for each in found], self._sizes[self._host]
    header = Header(taking.step, size, answer['crc'], crcs, dict(self._identity), taking.position)
    self._slots.close(slot, 'block', header)
    error = error_of(lambda: self._protect(slot, header))
    if error := first_error(self._answers.gather(f'{taking.step}/parity', error)):
      raise PeerError(error)
    self._agreed = taking.step
    return size + self._chunk

  def _write_block(self, slot: int, taking: Taking) -> int:
    """Writes this process's share to `slot`; returns its crc32 once the metrics of the step are recorded."""
    self._slots.open(slot)
    block = self._slots.array(slot, 'block')
    layouts.write(block, taking.copies)
    taking.copies.clear()  # frees device memory or pinned host RAM
    crc = zlib.crc32(block[: self._sizes[self._host]])
    self._slots.steps[slot, 'block'] = taking.step  # other processes may read it now
    taking.known.wait()
    return crc

  def _protect(self, slot: int, header: Header) -> None:
    """Stores the parity of the blocks of the other hosts of the group."""
    if not self._group:
      return
    read, mine = self._reader(header.step), self._slots.array(slot, 'parity')
    mine[:] = parities.parity(self._group, self._host, self._chunk, read)
    own = dataclasses.replace(header, size=len(mine), crc=zlib.crc32(mine), position={})
    self._slots.close(slot, 'parity', own)

  def _rebuild_lost(self, step: int) -> None:
    """A host that has lost its share rebuilds it; then its group has parity again."""
    if not (lost := self._choice.lost):
      return
    error = error_of(lambda: self._rebuild(step)) if self._host in lost else ''
    if error := first_error(self._agreement.gather(error)):
      raise PeerError(error)
    if set(lost) & set(self._group):
      self._protect(self._slots.slot_of(step), self._choice.header)

  def _rebuild(self, step: int) -> None:
    header, read_parity = self._choice.header, lambda host: self._peers.read(host, 'parity', step, 0, self._chunk)
    block = parities.rebuild(self._group, self._host, self._chunk, self._reader(step), read_parity)
    size, crc = self._sizes[self._host], header.crcs[self._host]
    if (found := zlib.crc32(block[:size])) != crc:
      raise PeerError(f'process {self._host} rebuilt its share with crc32 {found:08x}; the lost one had {crc:08x}')
    self._slots.open(0)
    self._slots.array(0, 'block')[: len(block)] = block
    self._slots.close(0, 'block', dataclasses.replace(header, size=size, crc=crc))

  def _reader(self, step: int) -> parities.Read:
    return lambda host, first, end: self._peers.read(host, 'block', step, first, end)

  def _read_piece(self, step: int, piece: layouts.Piece) -> np.ndarray:
    first, end = piece.offset, piece.offset + piece.size
    if piece.process == self._host:
      return self._slots.holding(step, 'block')[first:end]
    return self._peers.read(piece.process, 'block', step, first, end)

  def _settle(self) -> bool:
    """Collects a snapshot that has ended; returns whether none is under way."""
    taking = self._taking
    if taking is not None and taking.ended():
      self._ended.append(taking.outcome())
      self._taking = None
    return self._taking is None


def error_of(act: Callable[[], Any]) -> str:
  """The error of `act` as a sentence, '' if it succeeded."""
  try:
    act()
  except (PeerError, OSError, ValueError) as error:
    return str(error) or type(error).__name__
  return ''


def first_error(errors: Sequence[str]) -> str:
  return next((f'process {host}: {error}' for host, error in enumerate(errors) if error), '')


def freshest(snapshots: Snapshots, checkpoints: Checkpoints) -> tuple[Snapshots | Checkpoints, int | None]:
  """(what restores it, the newest step of a run), in host RAM or on disk; prints the choice if snapshots are on."""
  choice = snapshots.newest()
  if choice is None:
    return checkpoints, checkpoints.newest_whole()
  saved = checkpoints.newest_whole(after=choice.step)
  if (line := said(choice, saved, checkpoints.latest())) and jax.process_index() == 0:
    print(line, file=sys.stderr)
  return (checkpoints, saved) if choice.step is None or saved is not None else (snapshots, choice.step)
