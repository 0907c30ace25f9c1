"""`pretrain import` of a T5X checkpoint, which has no config.json: shapes give sizes, the config gives the rest."""

import dataclasses
import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from data.prepare.published import JSON, SENTENCEPIECE, Published, published, tokenizer_in
from data.stores.tokenizer_json import is_json
from models.build import ModelConfig
from pretrain.config import bindings
from pretrain.config.gin_text import read_file
from pretrain.errors import CheckpointError, ConfigError
from pretrain.experiment.checks import check
from pretrain.experiment.experiment import Experiment
from pretrain.interchange.config_json import FILE
from pretrain.interchange.families import family_for
from pretrain.interchange.importing import TENSORS, Source, check_pieces, differences, needed, placed, start_from
from pretrain.interchange.published import t5x
from pretrain.interchange.published.t5 import T5
from pretrain.interchange.zarr import checkpoint_in, open_checkpoint
from pretrain.tools.weights import NOT_ARCHITECTURE

ACTIVATION = 'model.mlp.activation'
BUCKETS, USUAL_BUCKETS = 'model.relative_buckets', 32
# Keys that no shape shows and that have one value in all of T5X's examples, or that any run may change.
FREE = (*NOT_ARCHITECTURE, ACTIVATION, 'model.norm.eps', 'model.relative_max_distance')


@dataclasses.dataclass(frozen=True)
class T5xSource(Source):
  """A checkpoint that was read and checked; `shown_by` names the array that shows the value of a key of the model.

  `others` are the parts of the checkpoint that are left out.
  """

  shown_by: Mapping[str, str]
  others: Sequence[str]


def is_t5x(folder: pathlib.Path) -> bool:
  """Whether `folder` is, or has, a checkpoint of T5X. Raises CheckpointError where it has several."""
  return not (folder / FILE).is_file() and checkpoint_in(folder) is not None


def open_source(given: pathlib.Path, tokenizer: pathlib.Path | None) -> T5xSource:
  """The model in a folder. Raises CheckpointError unless each array has one place and each parameter its array."""
  folder = checkpoint_in(given) or given
  arrays, others = open_checkpoint(folder)
  found = t5x.read({name: array.shape for name, array in arrays.items()})
  # T5's family, with the arrays of T5X in place of its tensors.
  family = dataclasses.replace(T5, entries=lambda model, _: t5x.entries(model, found.form))
  differing = differences(arrays, needed(family, found.model, {}), (), 'the other arrays make it')
  if not found.complete:  # then the sizes are not known, but the names are
    differing = [problem for problem in differing if problem.startswith(('missing: ', 'unknown: '))]
  if problems := [*found.problems, *differing]:
    raise CheckpointError(
      'IMPORT',
      f'the arrays in {folder} are not those of an encoder-decoder of T5X: {"; ".join(problems)}. Nothing was written; '
      'choose a checkpoint of t5x/examples/t5 or scalable_t5, or of UL2.',
    )
  return T5xSource(
    folder, family, {}, found.model, arrays, {}, _tokenizer(folder, tokenizer, found.model), found.shown_by, others
  )


def _tokenizer(folder: pathlib.Path, given: pathlib.Path | None, model: ModelConfig) -> Published | None:
  """The tokenizer that was given, else the one in the checkpoint's folder or in the folder around it."""
  path = given or tokenizer_in(folder) or tokenizer_in(folder.absolute().parent)
  found = None if path is None else published(path)
  if found is not None:
    check_pieces(found, model, folder)
  return found


def experiment(source: T5xSource, files: Sequence[str], overrides: Sequence[str]) -> Experiment:
  """The config of the run: sizes as in `source`; its other values as given, or values to start from.

  Raises ConfigError for a config without an activation, which no shape shows, for keys that differ from the arrays, and
  for a model that no family can express.
  """
  given = {binding.key for file in files for binding in read_file(pathlib.Path(file), '--gin_file=', ())}
  given |= {override.split('=', 1)[0].strip() for override in overrides}
  _check_given(source, given)
  own = bindings.flatten(source.model, 'model.')
  start = [] if files else start_from(source)
  cfg = bindings.load(Experiment, files, [*start, *overrides], absent=own)
  _check_model(source, own, bindings.flatten(cfg.model, 'model.'))
  check(cfg)
  family_for(cfg.model)  # `keep_files` writes its config.json
  return cfg


def _check_given(source: T5xSource, given: Collection[str]) -> None:
  """Raises ConfigError, with what to set, where the keys in `given` lack one that shapes do not show."""
  missing, table = [], source.shown_by[BUCKETS]
  if ACTIVATION not in given:
    missing.append(
      f"no shape shows the activation (mlp_activations in the checkpoint's config.gin): set --gin.{ACTIVATION}="
      "\"'relu'\" for T5 1.0, 'gelu_tanh' for ('gelu', 'linear') (T5 1.1, mT5, ByT5, umT5), 'silu' for ('swish', "
      "'linear') (UL2)"
    )
  if source.model.relative_buckets != USUAL_BUCKETS and BUCKETS not in given:  # else a transposed table may be read
    missing.append(
      f'{table} is {list(source.tensors[table].shape)}, heads first, then {source.model.relative_buckets} buckets, and '
      f'T5X has {USUAL_BUCKETS}: set --gin.{BUCKETS}={source.model.relative_buckets} if that is right'
    )
  if missing:
    raise ConfigError(f'{source.folder}: {"; ".join(missing)}. Nothing was written.')


def _check_model(source: T5xSource, own: Mapping[str, Any], found: Mapping[str, Any]) -> None:
  """Raises ConfigError, with all of them, for keys of the model that are not those of the arrays."""
  free = {*FREE, *(['model.head'] if found.get('model.head') == 'tied' and own['model.head'] != 'untied' else [])}
  differing = [key for key in own.keys() | found.keys() if key not in free and own.get(key) != found.get(key)]
  if differing:
    listed = '; '.join(_difference(source, key, own, found) for key in sorted(differing))
    raise ConfigError(
      f'the config has another model than {source.folder}: {listed}. '
      'Nothing was written; remove these keys, or choose the checkpoint of this model.'
    )


def _difference(source: T5xSource, key: str, own: Mapping[str, Any], found: Mapping[str, Any]) -> str:
  name = source.shown_by.get(key)
  shown = 'T5X has' if name is None else f'{name}, {list(source.tensors[name].shape)}, makes it'
  return f'{key}={found.get(key)!r}, but {shown} {own.get(key)!r}'


def keep_files(source: T5xSource, cfg: Experiment, folder: pathlib.Path) -> None:
  """Writes what an export reads: a config.json of the model, the types of the arrays, and the tokenizer's file."""
  if source.tokenizer is not None:
    name = JSON if is_json(source.tokenizer.content) else SENTENCEPIECE[0]
    (folder / name).write_bytes(source.tokenizer.content)
  family = family_for(cfg.model)
  values = {'architectures': [family.architecture], 'model_type': family.model_type, **family.write(cfg.model)}
  if source.tokenizer is not None:
    values['eos_token_id'] = source.tokenizer.ids.end
  (folder / FILE).write_text(json.dumps(values, indent=2) + '\n')
  ours = {entry.ours: entry.names(spec) for entry, spec in placed(source.family, source.model, {})}
  types = {
    name: source.tensors[next(iter(ours[entry.ours].values()))].dtype
    for entry, spec in placed(family, cfg.model, values) for name in entry.names(spec).values()
  }  # fmt: skip
  (folder / TENSORS).write_text(json.dumps({'names': {name: name for name in types}, 'types': types}, indent=1) + '\n')
