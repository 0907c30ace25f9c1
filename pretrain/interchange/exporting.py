"""`pretrain export`: a step of a run as a folder that `transformers` loads."""

import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from data.batches.batches import DataSource
from data.batches.source import open_data
from data.prepare.published import JSON
from data.stores.special_ids import T5_IDS
from models.specs import ParamSpec
from pretrain.config import bindings
from pretrain.devices.compilation_cache import cache_dir
from pretrain.errors import CheckpointError, ConfigError
from pretrain.evaluation.imported import FOLDER
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.trunk import weights_reader
from pretrain.interchange.config_json import FILE, ConfigJson, read_config
from pretrain.interchange.families import FAMILIES, family_for, lost
from pretrain.interchange.family import Family
from pretrain.interchange.importing import KEPT, ORIGINALS, TENSORS, needed, placed
from pretrain.interchange.layout import Entry
from pretrain.interchange.safetensors import Tensor, create, open_folder
from pretrain.tools.weights import NOT_ARCHITECTURE, Step, check_new, config_of
from pretrain.workdirs.copies import local_copy
from pretrain.workdirs.folder import Folder, as_folder

Names = Mapping[str, str]


def export(step: Step, output: Folder) -> Family:
  """Writes `step` to a new folder: weights, config.json, generation_config.json and the tokenizer's files.

  An imported run gets its tensors' names and types back, and its other files. Raises ConfigError for a folder that
  exists, and for a model that no family has; then nothing is written.
  """
  check_new(output, '--out')
  cfg = config_of(step.workdir)
  imported = origin(step.workdir, cfg)
  family = chosen_family(cfg, imported)
  partial = output.with_name(output.name + '.partial')
  if partial.exists():
    raise ConfigError(f'{partial} is left from an export that was interrupted; remove it.')
  partial.mkdir(parents=True)
  try:
    values = config_values(cfg, family, imported)
    _write_weights(step, cfg, family, values, imported, partial)
    _write_config(cfg, family, values, imported, partial)
    _write_tokenizer(cfg, family, imported, partial)
    partial.rename(output)
  except BaseException:
    shutil.rmtree(partial)
    raise
  return family


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


def _write_weights(step: Step, cfg: Experiment, family: Family, values, imported: pathlib.Path | None, output) -> None:
  names, types = _record(imported)
  places, kept = placed(family, cfg.model, values), _originals(imported, family)
  shapes = needed(family, cfg.model, values)
  shapes |= {name: tensor.shape for name, tensor in kept.items() if name not in shapes}
  tensors = {
    name: (types.get(name, 'F32'), shape) for first, shape in shapes.items() for name in _all_names(first, names)
  }  # fmt: skip
  arrays = create(output, tensors)
  for first, tensor in kept.items():  # the places of no parameter keep these values
    for name in _all_names(first, names):
      arrays[name][...] = tensor.values()
  with weights_reader(step.workdir, step.number, ema=step.ema) as read:
    for entry, spec in places:
      found, row = _read(read, step, entry, spec), _row(entry, kept)
      for at, first in entry.names(spec).items():
        before = kept[first].values() if first in kept and entry.folds else None
        for name in _all_names(first, names):
          entry.write(arrays[name], spec, found[at], before, row)


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


def _all_names(first: str, names: Names) -> list[str]:
  """The names that the imported files had for a tensor; its first name where it was not imported."""
  return [name for name, own in names.items() if own == first] or [first]


def _read(read: Callable[[str], Any], step: Step, entry: Entry, spec: ParamSpec) -> np.ndarray:
  """One parameter of the step, compared in shape with the model."""
  found = read(entry.ours)
  if found is None or found.shape != spec.shape:
    there = 'absent' if found is None else list(found.shape)
    key = f'{"extra/ema" if step.ema else "params"}/{entry.ours}'
    raise CheckpointError(
      'CKPT-MISMATCH',
      f'{key} is {there} in {step}, {list(spec.shape)} in its config.gin. Nothing was written; restore it from a copy.',
    )
  return np.asarray(jax.device_get(found))


def _write_config(cfg: Experiment, family: Family, values, imported: pathlib.Path | None, output) -> None:
  (output / FILE).write_text(_as_json(values))
  if imported is None or not (imported / 'generation_config.json').is_file():
    values = family.write(cfg.model) | _token_ids(cfg, family)
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
    return base | family.write(cfg.model) | _token_ids(cfg, family)
  old = read_config(imported)
  if old['model_type'] != family.model_type:
    return base | family.write(cfg.model)
  head = {'lm_head.weight': None} if cfg.model.head == 'untied' else {}
  before = family.read(ConfigJson(old, imported), head)
  ours, now = (bindings.flatten(m, 'model.') for m in (before, cfg.model))
  if all(ours.get(key) == value for key, value in now.items() if key not in NOT_ARCHITECTURE):
    return old
  theirs, new = family.write(before), family.write(cfg.model)
  changed = {key: value for key, value in new.items() if theirs.get(key) != value}
  return {key: value for key, value in old.items() if key in new or key not in theirs} | changed


def _token_ids(cfg: Experiment, family: Family) -> dict[str, Any]:
  """The ids of the run's tokenizer for the keys that the family writes, where they are not T5's."""
  if cfg.data.name == 'synthetic' or (ids := _data_of(cfg).vocabulary.ids) == T5_IDS:
    return {}
  found = {
    'bos_token_id': ids.first_input, 'decoder_start_token_id': ids.first_input, 'pad_token_id': ids.pad,
    'eos_token_id': ids.end if len(ids.eos) == 1 else list(ids.eos),
  }  # fmt: skip
  return {key: value for key, value in found.items() if key in family.write(cfg.model)}


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
