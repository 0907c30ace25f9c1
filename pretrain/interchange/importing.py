"""`pretrain import`: a folder of `transformers` becomes a run with one step, 0, which holds parameters alone."""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data.batches.batches import DataSource
from data.prepare.published import JSON, SENTENCEPIECE, Published, published, tokenizer_in
from data.stores.vocabulary import MODES
from models.build import ModelConfig, build
from models.precision import PrecisionConfig
from models.specs import ParamSpec, Tree, is_spec
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.config import bindings
from pretrain.devices.mesh import MeshConfig
from pretrain.errors import CheckpointError, ConfigError
from pretrain.evaluation.imported import FOLDER, tokenizer_from
from pretrain.evaluation.writer import Writer, at_precision, data_of, program_for
from pretrain.experiment.checks import check
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.program import build_program
from pretrain.experiment.rules.offload import without_offload
from pretrain.hosts.ownership import owned
from pretrain.interchange.config_json import FILE, ConfigJson, read_config
from pretrain.interchange.families import family_of
from pretrain.interchange.family import Family
from pretrain.interchange.layout import Entry
from pretrain.interchange.packed.reading import KEY as QUANTIZATION
from pretrain.interchange.packed.reading import unpacked_tensors
from pretrain.interchange.placing import BLOCK, copy, place
from pretrain.interchange.safetensors import READ, Tensor, allocate, equal, open_folder
from pretrain.interchange.zarr import checkpoint_in
from pretrain.tools.weights import NOT_ARCHITECTURE, check_space
from pretrain.workdirs.copies import made_in
from pretrain.workdirs.folder import Folder

TENSORS = 'tensors.json'  # the names and types of the imported tensors, so that an export has the same
ORIGINALS = 'originals'  # tensors that an export cannot make from the parameters alone
KEPT = (
  FILE, 'generation_config.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'vocab.json',
  'merges.txt', 'vocab.txt', 'chat_template.jinja', JSON, *SENTENCEPIECE,
)  # fmt: skip
ROW = 512  # the longest row of the config that is made where none is given
OBJECTIVES = {'decoder': 'causal_lm', 'encoder_decoder': 'span_corruption', 'encoder': 'mlm'}


@dataclasses.dataclass(frozen=True)
class Source:
  """A folder that was read and checked: our config, the family, its tensors by their first name, and all names."""

  folder: pathlib.Path
  family: Family
  values: Mapping[str, Any]  # of config.json
  model: ModelConfig
  tensors: Mapping[str, Tensor]
  names: Mapping[str, str]  # each name in the files -> the first name of the tensor
  tokenizer: Published | None


def open_source(folder: pathlib.Path) -> Source:
  """The model in `folder`. Raises CheckpointError unless each tensor has one place and each parameter its tensors."""
  _refuse_t5x(folder)
  values = read_config(folder)
  quantization = values.pop(QUANTIZATION, None)
  config = ConfigJson(values, folder / FILE)
  family, found = family_of(config), unpacked_tensors(open_folder(folder), quantization, folder)
  names = {name: _first_name(name, family, found) for name in found if not _unused(name, family)}
  model = family.read(config, _by_first_name(names, found))
  config.finish()
  if family.tied is not None and model.head != 'untied' and family.tied[0] in names:
    names[family.tied[0]] = family.tied[1]
  source = Source(folder, family, config.values, model, _by_first_name(names, found), names, _tokenizer(folder, model))
  _check_tensors(source)
  _check_aliases(source, found)
  return source


def _refuse_t5x(folder: pathlib.Path) -> None:
  if not (folder / FILE).is_file() and (found := checkpoint_in(folder)) is not None:
    raise ConfigError(
      f'{found} is a checkpoint of T5X, which has no {FILE}. Nothing was written; make a run of it with '
      f'pretrain import --from={folder} --workdir=RUN, and take the run.'
    )


def _by_first_name(names: Mapping[str, str], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
  tensors = {first: found[name] for name, first in reversed(names.items())}
  return tensors | {name: found[name] for name, first in names.items() if name == first}


def _tokenizer(folder: pathlib.Path, model: ModelConfig) -> Published | None:
  """The tokenizer in `folder`. Raises CheckpointError for one with more pieces than the embedding has rows."""
  path = tokenizer_in(folder)
  found = None if path is None else published(path)
  if found is not None:
    check_pieces(found, model, folder)
  return found


def check_pieces(found: Published, model: ModelConfig, folder: pathlib.Path) -> None:
  """Raises CheckpointError for a tokenizer with more pieces than the embedding has rows."""
  if found.pieces > model.vocab_size:
    raise CheckpointError(
      'IMPORT',
      f'{found.path} has {found.pieces} pieces, the embedding in {folder} has {model.vocab_size} rows. Nothing was '
      'written; both must be of one model.',
    )


def _first_name(name: str, family: Family, found: Mapping[str, Tensor]) -> str:
  for old, new in family.renamed.items():
    name = re.sub(old, new, name)
  known = (*family.aliases, *(family.tied or ()))
  whole = name if name.startswith(family.prefix) or name in known else family.prefix + name
  return family.aliases.get(whole, whole)


def _unused(name: str, family: Family) -> bool:
  return _matches(name, family.unused) or _matches(family.prefix + name, family.unused)


def _matches(name: str, patterns: Sequence[str]) -> bool:
  return any(re.fullmatch(pattern, name) for pattern in patterns)


def placed(family: Family, model: ModelConfig, values: Mapping[str, Any]) -> list[tuple[Entry, ParamSpec]]:
  """Each parameter of the model with its entry. Raises ConfigError for one that the family has no name for."""
  specs, entries = flat(build(model).specs), {entry.ours: entry for entry in family.entries(model, values)}
  if absent := specs.keys() - entries.keys():
    raise ConfigError(f'{family.model_type} has no tensor for {", ".join(sorted(absent))}. Nothing was written.')
  return [(entries[path], spec) for path, spec in specs.items()]


def flat(tree: Tree) -> dict[str, Any]:
  """The leaves of nested dicts by their path."""
  leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)[0]
  return {'/'.join(str(part.key) for part in path): leaf for path, leaf in leaves}


def needed(family: Family, model: ModelConfig, values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """The first name and shape of each tensor of a model."""
  places = placed(family, model, values)
  own = {name: entry.shape(spec) for entry, spec in places for name in entry.names(spec).values()}
  return own | family.others(values)


def _check_tensors(source: Source) -> None:
  family = source.family
  wanted = needed(family, source.model, source.values)
  carried = {name for name in source.tensors if _matches(name, family.carried)}
  if problems := differences(source.tensors, wanted, carried, 'config.json makes it'):
    raise CheckpointError(
      'IMPORT',
      f'the tensors in {source.folder} are not those of the {family.model_type} in its {FILE}: {"; ".join(problems)}. '
      'Nothing was written; both must be of one model.',
    )


def differences(
  tensors: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], others: Collection[str], makes: str
) -> list[str]:
  """What is wrong with tensors that should be those in `wanted`, and may be those in `others`."""
  shapes = [
    f'{name} is {list(tensors[name].shape)}, {makes} {list(shape)}'
    for name, shape in wanted.items() if name in tensors and tensors[name].shape != shape
  ]  # fmt: skip
  read = wanted.keys() | others
  kinds = [f'{name} has type {t.dtype}' for name, t in tensors.items() if name in read and t.dtype not in READ]
  missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - read)
  return [*_listed('missing: ', missing), *_listed('unknown: ', unknown), *_listed('', shapes), *_listed('', kinds)]


def _listed(label: str, items: Sequence[str]) -> list[str]:
  return [label + ', '.join(items)] if items else []


def _check_aliases(source: Source, found: Mapping[str, Tensor]) -> None:
  differing = [
    f'{name} and {source.tensors[first].name}' for name, first in source.names.items()
    if not equal(found[name], source.tensors[first])
  ]  # fmt: skip
  if differing:
    raise CheckpointError(
      'IMPORT',
      f'{", ".join(differing)} in {source.folder} differ, and Pretrain has one table for both. Nothing was written; '
      'choose a model that shares them.',
    )


def parameters(source: Source, shardings: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters as a nested dict, each placed by its sharding; only the part of a device is copied."""
  tree: dict[str, Any] = {}
  for entry, spec in placed(source.family, source.model, source.values):
    *parents, leaf = entry.ours.split('/')
    node = functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)
    node[leaf] = parameter(source, entry, spec, shardings[entry.ours])
  return tree


def parameter(source: Source, entry: Entry, spec: ParamSpec, sharding: Any) -> jax.Array:
  tensors = {at: source.tensors[name] for at, name in entry.names(spec).items()}
  return place(entry, spec, tensors, None if entry.row is None else source.tensors[entry.row], sharding)


def import_run(
  source: Source,
  cfg: Experiment,
  workdir: Folder,
  command: str,
  change: Callable[[Any], Any] = lambda x: x,
  keep: Callable[[Source, Experiment, pathlib.Path], None] | None = None,
) -> None:
  """Writes a new workdir with the weights of `source` and the config `cfg`, which `experiment` made for them.

  It writes `change(parameters)`; `keep` writes the other files beside them.
  """
  check_space(workdir, sum(4 * math.prod(tensor.shape) for tensor in source.tensors.values()), '--workdir')
  program = build_program(without_offload(cfg))
  params = change(parameters(source, {path: leaf.sharding for path, leaf in flat(program.weights).items()}))
  text = f'# Parameters made by: {command}\n{bindings.render(cfg)}'
  fingerprint = None if source.tokenizer is None else hashlib.sha256(source.tokenizer.content).hexdigest()
  try:
    with owned(workdir):
      checkpoints = Checkpoints(workdir, CheckpointConfig())
      checkpoints.save_params(0, params, {'source': command, 'data': {'tokenizer': fingerprint}}, text)
      checkpoints.close()
      with made_in(workdir / FOLDER) as folder:
        (keep or keep_files)(source, cfg, folder)
      (workdir / 'config.gin').write_text(text)  # last: a folder without it is not a run
  except BaseException:
    if isinstance(workdir, pathlib.Path):
      shutil.rmtree(workdir, ignore_errors=True)  # it was new, and is no run
    raise


def keep_files(source: Source, _: Experiment, folder: pathlib.Path) -> None:
  for name in KEPT:
    if (source.folder / name).is_file():
      shutil.copyfile(source.folder / name, folder / name)
  if QUANTIZATION in read_config(source.folder):  # the run's weights are float32
    (folder / FILE).write_text(json.dumps(source.values, indent=2, sort_keys=True) + '\n')
  types = {name: source.tensors[first].dtype for name, first in source.names.items()}
  (folder / TENSORS).write_text(json.dumps({'names': dict(source.names), 'types': types}, indent=1) + '\n')
  if kept := {name: source.tensors[name] for name in sorted(_to_keep(source))}:
    (folder / ORIGINALS).mkdir()
    for name, tensor in allocate(folder / ORIGINALS, {name: (t.dtype, t.shape) for name, t in kept.items()}).items():
      copy(kept[name], tensor)


def _to_keep(source: Source) -> set[str]:
  """Tensors that cannot be restored from the parameters: unused tensors, and tensors that a fold rounds."""
  found = {name for name in source.tensors if _matches(name, source.family.carried)}
  found |= source.family.others(source.values).keys()
  for entry, spec in placed(source.family, source.model, source.values):
    if entry.folds:
      found |= {name for name in entry.names(spec).values() if not _gives_back(entry, source.tensors[name])}
  return found


def _gives_back(entry: Entry, tensor: Tensor) -> bool:
  """Whether the inverse of the fold has the tensor's bits, which it has for bfloat16 unless values are tiny."""
  if entry.row is not None:
    return False
  count = math.prod(tensor.shape)
  parts = (tensor.read(at, min(at + BLOCK, count)) for at in range(0, count, BLOCK))
  return all(np.array_equal(entry.unfold(entry.fold(x, None), None).astype(x.dtype), x) for x in parts)


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
  if (sites := source.model.dropout_sites) != 't5':  # the recipe's, where --gin has no other ones
    given = [*given, f'model.dropout_sites={sites!r}']
  cfg = bindings.load(Experiment, files, [*given, *overrides, *(f'{key}={value!r}' for key, value in own.items())])
  check(cfg)
  return cfg


def start_from(source: Source) -> list[str]:
  """Sections of a config for weights without a --gin_file: random tokens, rows of at most ROW."""
  model = source.model
  longest = min(ROW, getattr(model, 'max_positions', None) or ROW)
  pieces = 4 if source.tokenizer is None else source.tokenizer.pieces
  room = model.vocab_size - pieces - len(MODES)
  pair, least = model.name == 'encoder_decoder', int(model.name == 'encoder')  # the mask token takes its place
  return [
    f"objective.name='{OBJECTIVES[model.name]}'", "data.name='synthetic'", 'data.batch_size=8',
    f'data.targets_length={longest // 4 if pair else longest}', f'data.inputs_length={longest if pair else 0}',
    f'data.sentinels={max(least, min(100, room)) if model.name != "decoder" else 0}', "schedule.name='constant'",
    'schedule.peak=1e-4', 'train.steps=1000',
  ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OpenedWeights:
  """Published weights that have not been read, their config and their tokenizer: see `evaluation.writer.Readable`."""

  cfg: Experiment
  data: DataSource
  source: Source

  def writer(self, mesh: MeshConfig) -> Writer:
    """With the weights placed on a mesh; nothing is written."""
    program = program_for(self.cfg, mesh)
    shardings = {path: leaf.sharding for path, leaf in flat(program.abstract.params).items()}
    return Writer(self.cfg, self.data, program.model, parameters(self.source, shardings))


def open_weights(
  folder: pathlib.Path, precision: PrecisionConfig | None = None, *, encoders: bool = False
) -> OpenedWeights:
  """The weights in `folder`, with the products that `precision` quantizes.

  Raises the errors of `open_source`, `tokenizer_from` and `at_precision`, and ConfigError for an encoder, which writes
  no text, unless `encoders`.
  """
  source = open_source(folder)
  if source.model.name == 'encoder' and not encoders:
    raise ConfigError(
      f'{folder / FILE}: {source.family.model_type} is an encoder and writes no text; pretrain eval measures it.'
    )
  cfg = at_precision(experiment(source, [], []), precision)
  return OpenedWeights(cfg, data_of(cfg, tokenizer_from(folder)), source)
