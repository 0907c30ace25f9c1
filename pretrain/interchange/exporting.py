"""`pretrain export`: a step of a run as a folder that `transformers` loads."""

import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from data.batches.source import open_data
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
from pretrain.interchange.importing import KEPT, TENSORS, placed
from pretrain.interchange.layout import Entry
from pretrain.interchange.safetensors import create
from pretrain.tools.weights import NOT_ARCHITECTURE, Step, check_new, config_of

Names = Mapping[str, str]


def export(step: Step, output: pathlib.Path) -> Family:
  """Writes `step` to a new folder: weights, config.json, generation_config.json and the tokenizer's files.

  An imported run gets its tensors' names and types back, and its other files. Raises ConfigError for a folder that
  exists, and for a model that no family has; then nothing is written.
  """
  check_new(output, '--out')
  cfg = config_of(step.workdir)
  imported = origin(step.workdir, cfg)
  family = _family(cfg, imported)
  partial = output.with_name(output.name + '.partial')
  if partial.exists():
    raise ConfigError(f'{partial} is left from an export that was interrupted; remove it.')
  partial.mkdir(parents=True)
  try:
    _write_weights(step, cfg, family, imported, partial)
    _write_config(cfg, family, imported, partial)
    _write_tokenizer(cfg, family, imported, partial)
    partial.rename(output)
  except BaseException:
    shutil.rmtree(partial)
    raise
  return family


def origin(workdir: pathlib.Path, cfg: Experiment) -> pathlib.Path | None:
  """The files of the import that a run's weights come from: its own, or those of the run that it started from."""
  seen: set[pathlib.Path] = set()
  while workdir not in seen:
    seen.add(workdir)
    if (workdir / FOLDER / TENSORS).is_file():
      return workdir / FOLDER
    initial = cfg.checkpoint.initial
    if initial is None or not (pathlib.Path(initial).parent / 'config.gin').is_file():
      return None
    workdir = pathlib.Path(initial).parent
    cfg = config_of(workdir)
  return None


def _family(cfg: Experiment, imported: pathlib.Path | None) -> Family:
  """The family of the import, if the model still has only parts of it; else the one that has all of its parts."""
  if imported is not None:
    family = FAMILIES[read_config(imported)['model_type']]
    if not lost(family, cfg.model):
      return family
  return family_for(cfg.model)


def _write_weights(step: Step, cfg: Experiment, family: Family, imported: pathlib.Path | None, output) -> None:
  names, types = _record(imported)
  places = placed(family, cfg.model)
  shapes = {name: entry.shape(spec) for entry, spec in places for name in entry.names(spec).values()}
  tensors = {
    name: (types.get(name, 'F32'), shape) for first, shape in shapes.items() for name in _all_names(first, names)
  }  # fmt: skip
  arrays = create(output, tensors)
  with weights_reader(step.workdir, step.number, ema=step.ema) as read:
    for entry, spec in places:
      values = _read(read, step, entry, spec)
      for place, first in entry.names(spec).items():
        for name in _all_names(first, names):
          entry.write(arrays[name], spec, values[place])


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


def _write_config(cfg: Experiment, family: Family, imported: pathlib.Path | None, output: pathlib.Path) -> None:
  (output / FILE).write_text(_as_json(_config_json(cfg, family, imported)))
  if imported is None or not (imported / 'generation_config.json').is_file():
    values = family.write(cfg.model)
    ids = {key: value for key, value in values.items() if key.endswith('_token_id')}
    (output / 'generation_config.json').write_text(_as_json(ids))


def _config_json(cfg: Experiment, family: Family, imported: pathlib.Path | None) -> dict[str, Any]:
  """The imported config.json, unchanged where it still makes the model; with the keys that changed elsewhere."""
  longest = max(cfg.data.inputs_length, cfg.data.targets_length)
  base = {
    'architectures': [family.architecture], 'model_type': family.model_type, 'dtype': 'float32',
    'max_position_embeddings': longest,
  }  # fmt: skip
  if imported is None:
    return base | family.write(cfg.model)
  old = read_config(imported)
  if old['model_type'] != family.model_type:
    return base | family.write(cfg.model)
  head = {'lm_head.weight': None} if cfg.model.head == 'untied' else {}
  before, now = (bindings.flatten(m, 'model.') for m in (family.read(ConfigJson(old, imported), head), cfg.model))
  same = all(before.get(key) == value for key, value in now.items() if key not in NOT_ARCHITECTURE)
  return old if same else {**old, **family.write(cfg.model)}


def _as_json(values: Mapping[str, Any]) -> str:
  return json.dumps(dict(sorted(values.items())), indent=2, ensure_ascii=False) + '\n'


def _write_tokenizer(cfg: Experiment, family: Family, imported: pathlib.Path | None, output: pathlib.Path) -> None:
  """The tokenizer's files of the import, or the SentencePiece model of the run's data under the family's name."""
  if imported is not None:
    for name in KEPT:
      if name != FILE and (imported / name).is_file():
        shutil.copyfile(imported / name, output / name)
    return
  if cfg.data.name == 'synthetic':
    return
  data = open_data(cfg.data, cfg.objective, seed=cfg.seed, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  (output / family.sentencepiece).write_bytes(data.tokenizer.model)
