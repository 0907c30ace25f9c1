"""`pretrain import`: a folder of `transformers` becomes a run with one step, 0, which holds parameters alone."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from data.stores.vocabulary import MODES, Tokenizer
from models.build import ModelConfig, build
from models.specs import ParamSpec, Tree, is_spec
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.config import bindings
from pretrain.errors import CheckpointError, ConfigError
from pretrain.evaluation.imported import FOLDER, SENTENCEPIECE, sentencepiece_in
from pretrain.experiment.checks import check
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.program import build_program
from pretrain.hosts.ownership import owned
from pretrain.interchange.config_json import FILE, ConfigJson, read_config
from pretrain.interchange.families import family_of
from pretrain.interchange.family import Family
from pretrain.interchange.layout import Entry, reader
from pretrain.interchange.safetensors import READ, Tensor, open_folder
from pretrain.tools.weights import NOT_ARCHITECTURE

TENSORS = 'tensors.json'  # the names and types of the imported tensors, so that an export has the same
KEPT = (
  FILE, 'generation_config.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'vocab.json',
  'merges.txt', 'vocab.txt', 'chat_template.jinja', 'tokenizer.json', *SENTENCEPIECE,
)  # fmt: skip
ROW = 512  # the longest row of the config that is made where none is given
OBJECTIVES = {'decoder': 'causal_lm', 'encoder_decoder': 'span_corruption', 'encoder': 'mlm'}


@dataclasses.dataclass(frozen=True)
class Source:
  """A folder that was read and checked: our config, the family, its tensors by their first name, and all names."""

  folder: pathlib.Path
  family: Family
  model: ModelConfig
  tensors: Mapping[str, Tensor]
  names: Mapping[str, str]  # each name in the files -> the first name of the tensor


def open_source(folder: pathlib.Path) -> Source:
  """The model in `folder`. Raises CheckpointError unless each tensor has one place and each parameter its tensors."""
  config = ConfigJson(read_config(folder), folder / FILE)
  family, found = family_of(config), open_folder(folder)
  names = {name: _first_name(name, family, found) for name in found if not _unused(name, family)}
  tensors = {first: found[name] for name, first in reversed(names.items())}
  tensors |= {name: found[name] for name, first in names.items() if name == first}
  model = family.read(config, tensors)
  config.finish()
  _check_tensors(folder, family, model, tensors)
  _check_aliases(folder, names, found, tensors)
  kept = {name: first for name, first in names.items() if first in needed(family, model)}
  return Source(folder, family, model, tensors, kept)


def _first_name(name: str, family: Family, found: Mapping[str, Tensor]) -> str:
  whole = name if name.startswith(family.prefix) or name in family.aliases else family.prefix + name
  return family.aliases.get(whole, whole)


def _unused(name: str, family: Family) -> bool:
  return any(re.fullmatch(pattern, text) for pattern in family.unused for text in (name, family.prefix + name))


def placed(family: Family, model: ModelConfig) -> list[tuple[Entry, ParamSpec]]:
  """Each parameter of the model with its entry. Raises ConfigError for one that the family has no name for."""
  specs, entries = flat(build(model).specs), {entry.ours: entry for entry in family.entries(model)}
  if absent := specs.keys() - entries.keys():
    raise ConfigError(f'{family.model_type} has no tensor for {", ".join(sorted(absent))}. Nothing was written.')
  return [(entries[path], spec) for path, spec in specs.items()]


def flat(tree: Tree) -> dict[str, Any]:
  """The leaves of nested dicts by their path."""
  leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)[0]
  return {'/'.join(str(part.key) for part in path): leaf for path, leaf in leaves}


def needed(family: Family, model: ModelConfig) -> dict[str, tuple[int, ...]]:
  """The first name and shape of each tensor of a model."""
  return {
    name: entry.shape(spec) for entry, spec in placed(family, model) for name in entry.names(spec).values()
  }  # fmt: skip


def _check_tensors(folder, family: Family, model: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
  wanted = needed(family, model)
  shared = {family.aliases.get(name, name) for name in tensors}  # a tied head is an alias whose values are checked
  free = {'lm_head.weight'} if model.head != 'untied' else set()
  shapes = [
    f'{name} is {list(tensors[name].shape)}, config.json makes it {list(shape)}'
    for name, shape in wanted.items() if name in tensors and tensors[name].shape != shape
  ]  # fmt: skip
  kinds = [f'{name} has type {t.dtype}' for name, t in tensors.items() if name in wanted and t.dtype not in READ]
  missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(shared - wanted.keys() - free)
  problems = [*_listed('missing: ', missing), *_listed('unknown: ', unknown), *_listed('', shapes), *_listed('', kinds)]
  if problems:
    raise CheckpointError(
      'IMPORT',
      f'the tensors in {folder} are not those of the {family.model_type} in its {FILE}: {"; ".join(problems)}. Nothing '
      'was written; both must be of one model.',
    )


def _listed(label: str, items: Sequence[str]) -> list[str]:
  return [label + ', '.join(items)] if items else []


def _check_aliases(
  folder, names: Mapping[str, str], found: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
  for name, first in names.items():
    a, b = found[name], tensors[first]
    if a is not b and ((a.dtype, a.shape) != (b.dtype, b.shape) or (a.map().tobytes() != b.map().tobytes())):
      raise CheckpointError(
        'IMPORT',
        f'{name} and {b.name} in {folder} differ, and Pretrain has one table for both. Nothing was written; choose a '
        'model that shares them.',
      )


def parameters(source: Source, shardings: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters as a nested dict, each placed by its sharding; only the part of a device is copied."""
  tree: dict[str, Any] = {}
  for entry, spec in placed(source.family, source.model):
    tensors = {place: source.tensors[name].map for place, name in entry.names(spec).items()}
    *parents, leaf = entry.ours.split('/')
    node = functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)
    read = reader(entry, spec, tensors)
    node[leaf] = jax.make_array_from_callback(spec.shape, shardings[entry.ours], read)
  return tree


def import_run(
  source: Source, cfg: Experiment, workdir: pathlib.Path, command: str, change: Callable[[Any], Any] = lambda x: x
) -> None:
  """Writes a new workdir with the weights of `source` and the config `cfg`, which `experiment` made for them.

  `change` of the parameters is what is written.
  """
  program = build_program(cfg)
  params = change(parameters(source, {path: leaf.sharding for path, leaf in flat(program.weights).items()}))
  text = f'# Parameters made by: {command}\n{bindings.render(cfg)}'
  tokenizer = sentencepiece_in(source.folder)
  fingerprint = None if tokenizer is None else hashlib.sha256(tokenizer.read_bytes()).hexdigest()
  with owned(workdir):
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    checkpoints.save_params(0, params, {'source': command, 'data': {'tokenizer': fingerprint}}, text)
    checkpoints.close()
    _keep(source, workdir / FOLDER)
    (workdir / 'config.gin').write_text(text)  # last: a folder without it is not a run


def _keep(source: Source, folder: pathlib.Path) -> None:
  folder.mkdir()
  for name in KEPT:
    if (source.folder / name).is_file():
      shutil.copyfile(source.folder / name, folder / name)
  types = {name: source.tensors[first].dtype for name, first in source.names.items()}
  (folder / TENSORS).write_text(json.dumps({'names': dict(source.names), 'types': types}, indent=1) + '\n')


def experiment(source: Source, files: Sequence[str], overrides: Sequence[str]) -> Experiment:
  """The config of the run: the model of `source`; other sections as given, or values to start from.

  Raises ConfigError for a key that config.json sets.
  """
  own = {key: value for key, value in bindings.flatten(source.model, 'model.').items() if key not in NOT_ARCHITECTURE}
  for override in overrides:
    key = override.split('=', 1)[0].strip()
    if key in own:
      raise ConfigError(f'--gin.{key} is set by {source.folder / FILE} ({own[key]!r}); remove it.')
  given = [] if files else start_from(source)
  cfg = bindings.load(Experiment, files, [*given, *overrides, *(f'{key}={value!r}' for key, value in own.items())])
  check(cfg)
  return cfg


def start_from(source: Source) -> list[str]:
  """Sections of a config for weights without a --gin_file: random tokens, rows of at most ROW."""
  model, tokenizer = source.model, sentencepiece_in(source.folder)
  longest = min(ROW, getattr(model, 'max_positions', None) or ROW)
  pieces = None if tokenizer is None else Tokenizer(tokenizer.read_bytes(), 0).vocabulary.pieces
  room = model.vocab_size - (pieces or 4) - len(MODES)
  pair = model.name == 'encoder_decoder'
  return [
    f"objective.name='{OBJECTIVES[model.name]}'", "data.name='synthetic'", 'data.batch_size=8',
    f'data.targets_length={longest // 4 if pair else longest}', f'data.inputs_length={longest if pair else 0}',
    f'data.sentinels={max(0, min(100, room)) if model.name != "decoder" else 0}', "schedule.name='constant'",
    'schedule.peak=1e-4', 'train.steps=1000',
  ]  # fmt: skip
