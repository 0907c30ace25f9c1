"""The state every few steps in the memory of the hosts: what a restart goes on from where it is newer than the disk.

Each process copies its share behind a step, while the next one runs, and writes it to one of two slots in its host's
memory. The hosts of a group keep parity of each other's shares, so that one of them may be lost with its memory. What
a snapshot holds is what a checkpoint holds, bit for bit. Sources: GEMINI (Wang et al., SOSP 2023); REFT
(arXiv:2310.12670).
"""

import contextlib
import dataclasses
import json
import pathlib
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

BUSY = 'the one before it is still being written'
RUN_ID = 'run_id'  # RUN/run_id: memory that outlived its run is told from that of this one


class Snapshots:
  """The snapshots of one run in this process's memory. `identity` is what must be equal for one to be of use."""

  def __init__(
    self, cfg: SnapshotConfig, workdir: pathlib.Path, identity: Mapping[str, str], *, read_only: bool = False
  ):
    self._cfg, self._workdir, self._read_only = cfg, pathlib.Path(workdir), read_only
    self._identity = {'snapshot.group': str(cfg.group), **identity}
    self._host, self._count = jax.process_index(), jax.process_count()
    self._groups = parities.groups(self._count, cfg.group)
    self._group = parities.group_of(self._host, self._groups)
    self._agreement = Agreement('snapshot')  # while the run starts; `_answers` while it trains
    self._answers = Answers(cfg.timeout)
    self._peers = Peers(self._answers, cfg.timeout)
    self._slots: Slots | None = None  # None where there are none
    self._server: Server | None = None
    self._choice: Choice | None = None
    self._agreed: int | None = None  # the newest step that all processes have
    self._taking: Taking | None = None
    self._ended, self._recorded, self._said = list[Taken](), -1, set[str]()

  def newest(self) -> Choice | None:
    """The newest step whose shares are all there, or can be made again, in all processes; None: switched off."""
    if not self._cfg.every:
      return None
    if self._choice is None:
      path = self._workdir / RUN_ID
      run = self._agreement.first(path.read_text() if path.exists() else '')
      self._identity['run'] = run or self._agreement.first(secrets.token_hex(8))
      self._slots = Slots(folder_of(self._cfg, self._workdir, self._host), self._identity)
      found, reasons = self._slots.find()
      own = {step: [dataclasses.asdict(header), protected] for step, (header, protected) in found.items()}
      answers = self._agreement.gather(json.dumps([own, reasons]))
      self._choice = choose([Report.of(*json.loads(answer)) for answer in answers], self._groups)
    return self._choice

  def restore(self, abstract: TrainState, step: int) -> Restored:
    """The state of the step that `newest` has named, placed as in `abstract`; its lost shares are made again.

    Raises DamagedError, in all processes, where that fails in one of them; `newest` has none then.
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
    """Takes the memory for what comes, forgets every step but the one restored; returns why there is none to take."""
    if self._slots is None:
      if not self._read_only:
        self._discard()
      return ''
    self._lay_out(abstract)
    if error := first_error(self._agreement.gather(error_of(self._allocate))):
      self._slots.remove()
      self._slots = None
      return f'SNAPSHOT: none until the next start: {error}. Checkpoints go on; free memory, or set snapshot.folder.'
    self._slots.keep(self._agreed)
    if self._host == 0:
      remove_beyond(self._slots.folder, self._count)
      (self._workdir / RUN_ID).write_text(self._identity['run'])
    self._copies = layouts.Copies(self._layout, self._host)
    return ''

  def begin(self, step: int, state: TrainState, position: Mapping[str, Any]) -> float:
    """Begins to copy the state of `step`, which the next step may then take; returns the seconds that took.

    It can be used once `recorded(step)` was called: a run that goes on from it must not lack what came before.
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
    """The numbers of `step` are in the files of the run; `decided` is what they add to its position in the data."""
    self._recorded = step
    if self._taking is not None and self._taking.step == step:
      self._taking.position['loader'] = {**self._taking.position['loader'], **decided}
      self._taking.known.set()

  def poll(self) -> list[Taken]:
    """How snapshots ended that this was not told yet."""
    self._settle()
    ended, self._ended = self._ended, []
    return ended

  def news(self) -> tuple[dict[str, float], str]:
    """(metrics, a warning) of what `poll` tells; each thing that goes wrong is said once."""
    metrics, warning = {}, ''
    for taken in self.poll():
      metrics = metrics if taken.error else taken.metrics()
      if taken.error and taken.error not in self._said:
        warning = f'SNAPSHOT: step {taken.step} was left out: {taken.error}. Training goes on, and so do checkpoints.'
      self._said.add(taken.error)
    return metrics, warning

  def stop(self) -> None:
    """Ends what is under way, as it is; what is whole stays for the next start."""
    if self._taking is not None:
      self._taking.cancel()
    self._peers.close()
    if self._server is not None:
      self._server.close()

  def close(self) -> None:
    """The run needs them no longer: frees the memory."""
    self.stop()
    if self._slots is not None:
      self._slots.remove()

  def _lay_out(self, abstract: TrainState) -> str:
    """Whose bytes lie where; what must be equal for blocks to be read."""
    self._layout = layouts.Layout(abstract)
    self._identity['layout'] = self._layout.fingerprint(abstract)
    self._sizes = [max(self._layout.sizes.get(host, 0), layouts.ALIGNMENT) for host in range(self._count)]
    self._chunk = parities.chunk_size([self._sizes[host] for host in self._group]) if self._group else 0
    return self._identity['layout']

  def _allocate(self) -> None:
    """Takes the memory and answers other processes from then on. Raises OSError where there is not enough."""
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
    """Removes what an earlier start has left that took snapshots: what comes now would be older than it."""
    with contextlib.suppress(ConfigError):  # there is no such memory, and nothing in it
      Slots(folder_of(self._cfg, self._workdir, self._host), {}).remove()

  def _write(self, taking: Taking) -> int:
    """In its thread: the block, all agree; parity, all agree. Returns the bytes of both on this host."""
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
    """The crc32 of this process's share, now in `slot`, once the numbers of the step are recorded."""
    self._slots.open(slot)
    block = self._slots.array(slot, 'block')
    layouts.write(block, taking.copies)
    taking.copies.clear()  # the device, or its host, may need the memory
    crc = zlib.crc32(block[: self._sizes[self._host]])
    self._slots.steps[slot, 'block'] = taking.step  # others may read it
    taking.known.wait()
    return crc

  def _protect(self, slot: int, header: Header) -> None:
    """Keeps the parity of the blocks that the others of the group have of this step."""
    if not self._group:
      return
    read, mine = self._reader(header.step), self._slots.array(slot, 'parity')
    mine[:] = parities.parity(self._group, self._host, self._chunk, read)
    own = dataclasses.replace(header, size=len(mine), crc=zlib.crc32(mine), position={})
    self._slots.close(slot, 'parity', own)

  def _rebuild_lost(self, step: int) -> None:
    """The host that has lost its share makes it again; then its group keeps parity as before."""
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
      raise PeerError(f'process {self._host} made its share again, with crc32 {found:08x}; it had {crc:08x}')
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
    """Whether none is under way."""
    taking = self._taking
    if taking is not None and taking.ended():
      self._ended.append(taking.outcome())
      self._taking = None
    return self._taking is None


def error_of(act: Callable[[], Any]) -> str:
  """What went wrong in a sentence, '' where nothing did."""
  try:
    act()
  except (PeerError, OSError, ValueError) as error:
    return str(error) or type(error).__name__
  return ''


def first_error(errors: Sequence[str]) -> str:
  return next((f'process {host}: {error}' for host, error in enumerate(errors) if error), '')


def freshest(snapshots: Snapshots, checkpoints: Checkpoints) -> tuple[Snapshots | Checkpoints, int | None]:
  """(who restores it, the newest step of a run), in memory or on disk; says which, and why, where memory had any."""
  choice = snapshots.newest()
  if choice is None:
    return checkpoints, checkpoints.newest_whole()
  saved = checkpoints.newest_whole(after=choice.step)
  if (line := said(choice, saved, checkpoints.latest())) and jax.process_index() == 0:
    print(line, file=sys.stderr)
  return (checkpoints, saved) if choice.step is None or saved is not None else (snapshots, choice.step)
