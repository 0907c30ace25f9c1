"""`pretrain export`: a step of a run as a folder that `transformers` loads."""

import contextlib
import dataclasses
import errno
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from data.batches.batches import DataSource
from data.batches.source import open_data
from data.prepare.published import JSON, published, tokenizer_in
from data.stores.special_ids import T5_IDS, SpecialIds
from models.build import trunk_of
from models.specs import ParamSpec
from pretrain.config import bindings
from pretrain.devices.compilation_cache import cache_dir
from pretrain.errors import CheckpointError, ConfigError
from pretrain.evaluation.imported import FOLDER
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.trunk import Weight, weights_reader
from pretrain.interchange import placing
from pretrain.interchange.config_json import FILE, ConfigJson, read_config
from pretrain.interchange.families import FAMILIES, family_for, lost
from pretrain.interchange.family import Family
from pretrain.interchange.importing import KEPT, ORIGINALS, TENSORS, needed, placed
from pretrain.interchange.layout import Entry
from pretrain.interchange.safetensors import SHARD_BYTES, SIZES, Tensor, allocate, open_folder
from pretrain.tools.weights import NOT_ARCHITECTURE, Step, check_new, check_space, config_of
from pretrain.workdirs.copies import local_copy
from pretrain.workdirs.folder import Folder, as_folder

Names = Mapping[str, str]
TYPES = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}  # of --dtype
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Export:
  """What an export of `step` writes: `values` is its config.json."""

  step: Step
  cfg: Experiment
  imported: pathlib.Path | None
  family: Family
  values: dict[str, Any]
  weights: 'Weights'

  def write_weights(self, read: Callable[[str], Weight | None], output: pathlib.Path, shard_bytes: int) -> None:
    found = {entry.ours: _found(read, self.step, entry, spec) for entry, spec in self.weights.places}
    self.weights.write(found, output, shard_bytes)

  def write_files(self, output: pathlib.Path) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    _write_config(self.values, self.imported, output)
    _write_tokenizer(self.cfg, self.family, self.imported, output)


def exported(step: Step, dtype: str | None = None) -> Export:
  """The export of `step`, of which nothing is read or written yet. Raises ConfigError for a model of no family."""
  cfg = config_of(step.workdir)
  cfg = dataclasses.replace(cfg, model=trunk_of(cfg.model))
  imported = origin(step.workdir, cfg)
  family = chosen_family(cfg, imported)
  values = config_values(cfg, family, imported) | ({'dtype': dtype} if dtype else {})
  values = {key: value for key, value in values.items() if not (dtype and key == 'torch_dtype')}
  return Export(step, cfg, imported, family, values, Weights(cfg, family, values, imported, dtype))


def reader_of(step: Step):
  """What reads the parameters of `step`, one at a time."""
  return weights_reader(step.workdir, step.number, ema=step.ema)


def export(step: Step, output: pathlib.Path, *, dtype: str | None = None, shard_bytes: int = SHARD_BYTES) -> Family:
  """Writes `step` to a new folder: weights, config.json, generation_config.json and the tokenizer's files.

  An imported run gets its tensors' names and types back, and its other files; with `dtype`, all tensors have that type.
  The host holds one tensor at a time. Raises ConfigError for a folder that exists or is inside of the run, for a full
  disk, and for a model that no family has; then nothing is written.
  """
  check_new(output, '--out')
  plan = exported(step, dtype)
  with reader_of(step) as read, new_folder(output, plan.weights.size) as partial:
    plan.write_weights(read, partial, shard_bytes)
    plan.write_files(partial)
  return plan.family


@contextlib.contextmanager
def new_folder(output: pathlib.Path, size: int = 0) -> Iterator[pathlib.Path]:
  """Inside, an empty folder that becomes `output` at the end, complete or not at all; it needs `size` bytes.

  Raises ConfigError where the disk is full or cannot be written.
  """
  partial = output.with_name(output.name + '.partial')
  if partial.exists():
    raise ConfigError(f'{partial} is left from an export that was interrupted. Nothing was written; remove it.')
  check_space(output, size, '--out')
  try:
    partial.mkdir(parents=True)
    yield partial
    partial.rename(output)
  except BaseException as error:
    shutil.rmtree(partial, ignore_errors=True)
    if isinstance(error, OSError) and error.errno in FULL:
      raise ConfigError(
        f'--out={output} cannot be written ({error.strerror}). Its remains were removed; free space or choose another '
        'disk.'
      ) from error
    raise


def origin(workdir: Folder, cfg: Experiment) -> pathlib.Path | None:
  """The files of the import that a run's weights come from: its own, or those of the run that it started from."""
  seen: set[Folder] = set()
  while workdir not in seen:
    seen.add(workdir)
    if (workdir / FOLDER / TENSORS).is_file():
      return local_copy(workdir / FOLDER)
    initial = cfg.checkpoint.initial
    if initial is None or not (as_folder(initial).parent / 'config.gin').is_file():
      return None
    workdir = as_folder(initial).parent
    cfg = config_of(workdir)
  return None


def chosen_family(cfg: Experiment, imported: pathlib.Path | None) -> Family:
  """The family of the import, if the model still has only parts of it; else the one that has all of its parts."""
  if imported is not None:
    family = FAMILIES[read_config(imported)['model_type']]
    if not lost(family, cfg.model):
      return family
  return family_for(cfg.model)


class Weights:
  """The tensors of an export: `places` (a parameter and its entry), `tensors` (type and shape by name) and their
  `size` in bytes.
  """

  def __init__(self, cfg: Experiment, family: Family, values, imported: pathlib.Path | None, dtype: str | None):
    self._names, types = _record(imported)
    self.places, self._kept = placed(family, cfg.model, values), _originals(imported, family)
    shapes = needed(family, cfg.model, values)
    shapes |= {name: tensor.shape for name, tensor in self._kept.items() if name not in shapes}
    self.tensors = {
      name: (TYPES[dtype] if dtype else types.get(name, 'F32'), shape)
      for first, shape in shapes.items() for name in self.names_of(first)
    }  # fmt: skip
    self.size = sum(math.prod(shape) * SIZES[kind] for kind, shape in self.tensors.values())

  def names_of(self, first: str) -> list[str]:
    """The names that the imported files had for a tensor; its first name where it was not imported."""
    return [name for name, own in self._names.items() if own == first] or [first]

  def write(self, found: Mapping[str, Weight], output: pathlib.Path, shard_bytes: int) -> None:
    """Writes the files, of which one tensor at a time is in memory."""
    tensors, kept = allocate(output, self.tensors, shard_bytes), self._kept
    for first, tensor in kept.items():  # the places of no parameter keep these values
      for name in self.names_of(first):
        placing.copy(tensor, tensors[name])
    for entry, spec in self.places:
      row, own = _row(entry, kept), entry.names(spec)
      parts = found[entry.ours].parts(own)
      for first in own.values():
        before = kept.get(first) if entry.folds else None
        into = [tensors[name] for name in self.names_of(first)]
        _put(entry, spec, into, next(parts), before, row)  # no name here holds the part while the next one is read


def _put(entry: Entry, spec: ParamSpec, tensors: list[Tensor], values: np.ndarray, before, row) -> None:
  for tensor in tensors:
    placing.write(entry, spec, tensor, values, before, row)


def _originals(imported: pathlib.Path | None, family: Family) -> dict[str, Tensor]:
  """Tensors of the import that parameters do not give back, where the export is of the same family."""
  if imported is None or not (imported / ORIGINALS).is_dir():
    return {}
  return open_folder(imported / ORIGINALS) if read_config(imported)['model_type'] == family.model_type else {}


def _row(entry: Entry, kept: Mapping[str, Tensor]) -> np.ndarray | None:
  """The row that the fold of an entry adds; without an import, the tensor has zeros."""
  return kept[entry.row].values()[0].astype(np.float32) if entry.row in kept else None


def _record(imported: pathlib.Path | None) -> tuple[Names, Names]:
  if imported is None:
    return {}, {}
  record = json.loads((imported / TENSORS).read_text())
  return record['names'], record['types']


def _found(read: Callable[[str], Weight | None], step: Step, entry: Entry, spec: ParamSpec) -> Weight:
  """One parameter of the step, compared in shape with the model."""
  found = read(entry.ours)
  if found is None or found.shape != spec.shape:
    there = 'absent' if found is None else list(found.shape)
    key = f'{"extra/ema" if step.ema else "params"}/{entry.ours}'
    raise CheckpointError(
      'CKPT-MISMATCH',
      f'{key} is {there} in {step}, {list(spec.shape)} in its config.gin. Nothing was written; restore it from a copy.',
    )
  return found


def _write_config(values, imported: pathlib.Path | None, output: pathlib.Path) -> None:
  (output / FILE).write_text(_as_json(values))
  if imported is None or not (imported / 'generation_config.json').is_file():  # what is imported is copied
    ids = {key: value for key, value in values.items() if key.endswith('_token_id')}
    (output / 'generation_config.json').write_text(_as_json(ids))


def config_values(cfg: Experiment, family: Family, imported: pathlib.Path | None) -> dict[str, Any]:
  """The imported config.json, unchanged where it still makes the model; with the keys that changed elsewhere."""
  longest = max(cfg.data.inputs_length, cfg.data.targets_length)
  base = {
    'architectures': [family.architecture], 'model_type': family.model_type, 'dtype': 'float32',
    'max_position_embeddings': longest,
  }  # fmt: skip
  if imported is None:
    return base | family.write(cfg.model) | _token_ids(cfg, family, None)
  old = read_config(imported)
  if old['model_type'] != family.model_type:
    return base | family.write(cfg.model) | _token_ids(cfg, family, imported)
  head = {'lm_head.weight': None} if cfg.model.head == 'untied' else {}
  before = family.read(ConfigJson(old, imported), head)
  ours, now = (bindings.flatten(m, 'model.') for m in (before, cfg.model))
  if all(ours.get(key) == value for key, value in now.items() if key not in NOT_ARCHITECTURE):
    return old
  theirs, new = family.write(before), family.write(cfg.model)
  changed = {key: value for key, value in new.items() if theirs.get(key) != value}
  return {key: value for key, value in old.items() if key in new or key not in theirs} | changed


def _token_ids(cfg: Experiment, family: Family, imported: pathlib.Path | None) -> dict[str, Any]:
  """The ids of the run's tokenizer for the keys that the family writes, where they are not T5's."""
  ids = _ids(cfg, imported)
  if ids is None or ids == T5_IDS:
    return {}
  found = {
    'bos_token_id': ids.first_input, 'decoder_start_token_id': ids.first_input, 'pad_token_id': ids.pad,
    'eos_token_id': ids.end if len(ids.eos) == 1 else list(ids.eos),
  }  # fmt: skip
  return {key: value for key, value in found.items() if key in family.write(cfg.model)}


def _ids(cfg: Experiment, imported: pathlib.Path | None) -> SpecialIds | None:
  if cfg.data.name != 'synthetic':
    return _data_of(cfg).vocabulary.ids
  path = None if imported is None else tokenizer_in(imported)
  return None if path is None else published(path).ids


def _data_of(cfg: Experiment) -> DataSource:
  return open_data(cfg.data, cfg.objective, seed=cfg.seed, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())


def _as_json(values: Mapping[str, Any]) -> str:
  return json.dumps(dict(sorted(values.items())), indent=2, ensure_ascii=False) + '\n'


def _write_tokenizer(cfg: Experiment, family: Family, imported: pathlib.Path | None, output: Folder) -> None:
  """The tokenizer's files of the import, or the SentencePiece model of the run's data under the family's name."""
  if imported is not None:
    for name in KEPT:
      if name != FILE and (imported / name).is_file():
        shutil.copyfile(imported / name, output / name)
    return
  if cfg.data.name == 'synthetic':
    return
  tokenizer = _data_of(cfg).tokenizer
  name = tokenizer.file_name
  (output / (name if name == JSON else family.sentencepiece)).write_bytes(tokenizer.model)
