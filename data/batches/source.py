"""The data section of a config, and opening the stores that it names."""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
from typing import Annotated, Literal, assert_never

from data.batches.batches import DataSource
from data.batches.bucketed import BucketedSource, BucketRows
from data.batches.rows import StoreRows
from data.batches.synthetic import SyntheticStore
from data.errors import DataError
from data.examples.make import RowSpec
from data.examples.tags import Tags, check_tags
from data.mixing.curriculum import Order, Random, check_order
from data.mixing.mixture import Mixture, Stage, by_size, check_seen
from data.mixing.online import Odm, check_online
from data.objectives.fitting import check_objective
from data.objectives.objectives import Objective, OfUnits, is_encoder_only, tasks_of
from data.objectives.tasks import Budget
from data.packing.buckets import LengthBuckets
from data.packing.kept_plans import PlanFiles
from data.packing.packing import ConcatSplit, Packing, check_packing
from data.prepare.builtin import GROUPS, builtin_groups, builtin_store
from data.prepare.published import Published
from data.stores.store import TAG_LENGTHS, Store, open_store
from data.stores.vocabulary import MODES, Vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """A token store and its relative share of the rows. Metrics use its `name`, by default the last part of its path."""

  path: Annotated[str, 'path']
  weight: float = 1.0
  name: str | None = dataclasses.field(default=None, metadata={'rendered': 'if set'})


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureStage:
  """From step `start_step` on, the sources have these relative weights, in the order of `sources`; 0 leaves one out."""

  start_step: Annotated[int, '>= 0']
  weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Common:
  """`batch_size` counts the rows of all hosts. `inputs_length` is 0 for a decoder-only or encoder-only model, whose
  rows have `targets_length` tokens in total. Batches are made by `workers` processes, or by a thread if 0; `prefetch`
  batches are held ready (per worker)."""

  batch_size: Annotated[int, '>= 1']
  inputs_length: Annotated[int, '>= 0'] = 0
  targets_length: Annotated[int, '>= 1']
  sentinels: Annotated[int, '>= 0'] = 100
  attend_across_documents: bool = False
  packing: Packing = ConcatSplit()
  order: Order = Random()
  online: Odm | None = None
  tags: Tags | None = None
  workers: Annotated[int, '>= 0'] = 0
  prefetch: Annotated[int, '>= 0'] = 2

  @property
  def weights(self) -> tuple[float, ...]:
    """The relative shares of the sources."""
    return (1.0,)

  @property
  def num_sources(self) -> int:
    return len(self.weights)

  @property
  def budget(self) -> Budget:
    return Budget(self.inputs_length, self.targets_length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Mixed(_Common):
  """A source's share is its weight; with `temperature`, weight * tokens ** (1 / temperature); or set by `stages`."""

  stages: tuple[MixtureStage, ...] = ()
  temperature: Annotated[float, '> 0'] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Builtin(_Mixed):
  """Documentation strings of this Python installation, made into a store on first use; see data/prepare/builtin.py.

  With `groups` there are three sources: python (the standard library), arrays (packages about arrays) and tools.
  """

  name: Literal['builtin'] = 'builtin'
  groups: bool = False

  @property
  def weights(self) -> tuple[float, ...]:
    return (1.0,) * (len(GROUPS) if self.groups else 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreData(_Mixed):
  """Token stores made by `pretrain data prepare`. Each store in `heldout` is a separate evaluation set."""

  name: Literal['store'] = 'store'
  sources: tuple[Source, ...]
  heldout: tuple[Source, ...] = ()

  @property
  def weights(self) -> tuple[float, ...]:
    return tuple(source.weight for source in self.sources)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthetic(_Common):
  """Random tokens that need no files."""

  name: Literal['synthetic'] = 'synthetic'


Data = Builtin | StoreData | Synthetic


def has_heldout(cfg: Data) -> bool:
  """Whether there are evaluation sets."""
  return isinstance(cfg, Builtin) or (isinstance(cfg, StoreData) and bool(cfg.heldout))


def open_data(
  cfg: Data,
  objective: Objective,
  *,
  seed: int,
  vocab_size: int,
  cache_dir: str | os.PathLike[str],
  plans_url: str | None = None,
  model: Published | None = None,
) -> DataSource:
  """The batches of a config. `vocab_size` is the model's. The built-in corpus is made in `cache_dir` if missing.
  Plans are kept there and, for other hosts, in the folder `plans_url` of an object store.
  Synthetic data takes its vocabulary from the tokenizer `model`, if there is one.

  Raises DataError for stores that are missing, damaged or made with different tokenizers, and for a model vocabulary
  that is too small; ValueError if the objective does not fit (`check_objective`).
  """
  check_objective(objective, cfg.inputs_length, cfg.targets_length, cfg.sentinels)
  check_packing(cfg, objective)
  check_order(cfg)
  check_mixture(cfg)
  check_online(cfg)
  check_tags(cfg, objective)
  plans = PlanFiles(pathlib.Path(cache_dir) / 'plans', plans_url)
  match cfg:
    case Synthetic():
      tokenizer = None if model is None else model.open(cfg.sentinels)
      vocabulary = (
        tokenizer.vocabulary if tokenizer else Vocabulary(vocab_size - cfg.sentinels - len(MODES), cfg.sentinels)
      )
      if vocabulary.pieces < 4:
        raise DataError(f'model.vocab_size={vocab_size} leaves no pieces beside data.sentinels={cfg.sentinels}.')
      store = SyntheticStore(vocabulary.pieces, seed)
      return _source(cfg, objective, seed, vocabulary, tokenizer, {'synthetic': store}, [Stage(0, (1.0,))], {}, None)
    case Builtin(groups=True):
      groups, heldout = builtin_groups(cache_dir, vocab_size, cfg.sentinels)
      paths = {name: str(path) for name, path in groups.items()}
      return _open_stores(cfg, objective, seed, vocab_size, paths, {'builtin': str(heldout)}, plans)
    case Builtin():
      train, heldout = builtin_store(cache_dir, vocab_size, cfg.sentinels)
      return _open_stores(cfg, objective, seed, vocab_size, {'builtin': str(train)}, {'builtin': str(heldout)}, plans)
    case StoreData():
      return _open_stores(cfg, objective, seed, vocab_size, _names(cfg.sources), _names(cfg.heldout), plans)
    case _:
      assert_never(cfg)


def names_of(sources: tuple[Source, ...]) -> tuple[str, ...]:
  """The name of each store in metrics: its `name`, or the last part of its path, with a number if that is taken.

  Raises ValueError for a name that is given twice or empty.
  """
  given = [source.name for source in sources if source.name is not None]
  if '' in given:
    raise ValueError("data.sources or data.heldout: a name is empty; set one, or leave out 'name'.")
  if twice := [name for name in given if given.count(name) > 1]:
    raise ValueError(f'data.sources or data.heldout: two stores in one list have the name {twice[0]!r}; rename one.')
  names: list[str] = []
  for source in sources:
    stem = pathlib.PurePath(source.path.rstrip('/')).name
    numbered = (f'{stem}_{i}' for i in itertools.count(len(names)))
    free = (name for name in itertools.chain([stem], numbered) if name not in names and name not in given)
    names.append(source.name if source.name is not None else next(free))
  return tuple(names)


def _names(sources: tuple[Source, ...]) -> dict[str, str]:
  """name -> path."""
  return dict(zip(names_of(sources), (source.path for source in sources), strict=True))


def _open_stores(
  cfg, objective, seed, vocab_size, sources: dict[str, str], heldout: dict[str, str], plans: PlanFiles
) -> DataSource:
  if not sources:
    raise DataError("data.sources is empty; name at least one, e.g. data.sources = [{'path': 'my_store'}].")
  stores = {name: open_store(path) for name, path in sources.items()}
  others = {name: open_store(path) for name, path in heldout.items()}
  _check_same_tokenizer([*stores.values(), *others.values()])
  first = next(iter(stores.values()))
  tokenizer = first.tokenizer(cfg.sentinels)
  vocabulary = tokenizer.vocabulary
  _check_size(cfg, objective, vocabulary, vocab_size, first.path)
  stages = _stages(cfg, [store.num_tokens for store in stores.values()])
  return _source(cfg, objective, seed, vocabulary, tokenizer, stores, stages, others, plans)


def _check_size(cfg, objective: Objective, vocabulary: Vocabulary, vocab_size: int, path: str) -> None:
  """Raises DataError for a model without a row for each id that rows may have. Mode tokens count if a task has one;
  sentinels do not where a masked objective has the tokenizer's own mask token."""
  modes = len(MODES) * (
    not isinstance(objective, OfUnits) and any(task.mode is not None for task in tasks_of(objective))
  )
  masks = vocabulary.ids.mask is not None and is_encoder_only(objective)
  needed = vocabulary.pieces + (0 if masks else vocabulary.sentinels) + modes
  if vocab_size < needed:
    free = max(vocab_size - vocabulary.pieces - modes, 0)
    own = f', or data.sentinels <= {free} if objective.name needs no more' if vocab_size >= vocabulary.pieces else ''
    raise DataError(
      f'model.vocab_size={vocab_size} but {path} needs {needed} ids ({vocabulary.pieces} pieces + '
      f'data.sentinels={cfg.sentinels} + {modes} modes); set model.vocab_size >= {needed}{own}.'
    )


def _stages(cfg: _Mixed, sizes: list[int]) -> list[Stage]:
  """The stages of the mixture, with starts counted in rows. `sizes` are the sources' numbers of tokens."""
  if cfg.stages:
    return [Stage(stage.start_step * cfg.batch_size, stage.weights) for stage in cfg.stages]
  if cfg.temperature is not None:
    weights = by_size(sizes, cfg.weights, cfg.temperature)
    try:
      check_seen(weights, f'data.temperature={cfg.temperature} makes the weights')
    except ValueError as error:
      raise DataError(str(error)) from error
    return [Stage(0, tuple(weights))]
  return [Stage(0, cfg.weights)]


def wanted_shares(cfg: Data) -> list[tuple[int, dict[str, float]]]:
  """(row of the run, share of each source from there on) for each stage; [] if the shares depend on the stores' sizes
  (`temperature`)."""
  if isinstance(cfg, Synthetic) or cfg.temperature is not None:
    return []
  names = _names(cfg.sources) if isinstance(cfg, StoreData) else GROUPS if cfg.groups else ('builtin',)
  shares = lambda weights: {name: w / sum(weights) for name, w in zip(names, weights, strict=True)}
  return [(start, shares(weights)) for start, weights in _stages(cfg, [])]


def check_mixture(cfg: Data) -> None:
  """Raises ValueError if the sources' weights, temperature and stages are invalid or contradict each other."""
  if isinstance(cfg, Synthetic):
    return
  _check_names(cfg)
  number, weights = cfg.num_sources, list(cfg.weights)
  if any(not 0 < weight < math.inf for weight in weights):
    raise ValueError(f'data.sources have the weights {weights}; each must be finite and > 0. Remove unused sources.')
  if cfg.stages and (cfg.temperature is not None or len(set(weights)) > 1):
    other = 'data.temperature' if cfg.temperature is not None else 'the weights of data.sources'
    raise ValueError(f'both data.stages and {other} set the shares of the sources; remove one of them.')
  starts = [stage.start_step for stage in cfg.stages]
  if starts and (starts[0] != 0 or sorted(set(starts)) != starts):
    raise ValueError(f'data.stages start at steps {starts}; the first must be 0, and they must increase.')
  for i, stage in enumerate(cfg.stages):
    if len(stage.weights) != number:
      raise ValueError(f'data.stages[{i}].weights has {len(stage.weights)} values for {number} sources; give one each.')
    if not all(0 <= weight < math.inf for weight in stage.weights) or not sum(stage.weights):
      raise ValueError(f'data.stages[{i}].weights={list(stage.weights)}; they must be finite, >= 0, and not all 0.')
    check_seen(stage.weights, f'data.stages[{i}].weights')
  if weights and cfg.temperature is None:
    check_seen(weights, 'the weights of data.sources')
  idle = [i for i in range(number) if cfg.stages and not any(stage.weights[i] for stage in cfg.stages)]
  if idle:
    raise ValueError(f'data.sources[{idle[0]}] has weight 0 in every stage; leave it out.')


def _check_names(cfg: Data) -> None:
  if isinstance(cfg, StoreData):
    names_of(cfg.sources)
    names_of(cfg.heldout)


def _check_same_tokenizer(stores: list[Store]) -> None:
  first = stores[0]
  for other in stores[1:]:
    a, b = (s.manifest['tokenizer_sha256'] for s in (first, other))
    if a == b and first.special_ids != other.special_ids:
      raise DataError(
        f'{first.path} has the special ids {first.special_ids.used}, {other.path} has {other.special_ids.used}; '
        f'prepare one with --tokenizer={first.path}.'
      )
    if a != b:
      raise DataError(
        f'{first.path} and {other.path} have different tokenizers (sha256 {a[:8]}.. and {b[:8]}..); prepare one with '
        f'--tokenizer={first.path}/{first.tokenizer_file}.'
      )


KIND_OF = {'supervised': 'pairs', 'instruction': 'conversations'}  # objective -> kind of store; all others use text
PREPARED = {
  'pairs': '--inputs_field=inputs --targets_field=targets',
  'conversations': '--messages_field=messages',
  'text': '--field=text',
}


def _check_kind(store, objective: Objective) -> None:
  """Raises DataError if the store is not of the kind that `objective` learns from."""
  wanted = KIND_OF.get(objective.name, 'text')
  if store.kind == wanted:
    return
  others = {kind: name for name, kind in KIND_OF.items()}
  fix = f"set objective.name='{others[store.kind]}', or " if store.kind in others else ''
  raise DataError(
    f"{store.path} holds {store.kind}, but objective.name='{objective.name}' learns from {wanted}; {fix}make a store "
    f'of {wanted} with: pretrain data prepare {PREPARED[wanted]} …'
  )


def _check_tagged(cfg, stores) -> None:
  """Raises DataError if `data.tags` is set but no source has tags."""
  if cfg.tags is not None and not any(TAG_LENGTHS in store.column_names for store in stores.values()):
    paths = ', '.join(store.path for store in stores.values())
    raise DataError(
      f'data.tags.drop_rate={cfg.tags.drop_rate:g} but no source has tags ({paths}); '
      'make one with tags: pretrain data prepare --tag_fields=url …, or remove data.tags.'
    )


def _source(cfg, objective, seed, vocabulary, tokenizer, stores, stages, heldout, plans) -> DataSource:
  for store in [*stores.values(), *heldout.values()]:
    _check_kind(store, objective)
  _check_tagged(cfg, stores)
  spec = RowSpec(
    objective=objective, budget=cfg.budget, vocabulary=vocabulary, tokenizer=tokenizer,
    attend_across_documents=cfg.attend_across_documents, tags=cfg.tags,
  )  # fmt: skip
  # Evaluation sets have a fixed seed and packing, so that runs with other seeds or packings are evaluated on the same
  # rows.
  sets = {name: StoreRows(store, spec, ConcatSplit(), seed=0, purpose='heldout') for name, store in heldout.items()}
  if isinstance(cfg.packing, LengthBuckets):
    ((name, store),) = stores.items()
    return BucketedSource(cfg, vocabulary, tokenizer, name, BucketRows(store, spec, cfg, seed=seed), sets)
  numbered = functools.partial(_numbered, stores, spec, cfg, seed, plans)
  rows = {name: numbered(name, i) for i, name in enumerate(stores)}
  return DataSource(cfg, vocabulary, tokenizer, rows, Mixture(stages, seed), sets, numbered)


def _numbered(stores, spec: RowSpec, cfg, seed: int, plans: PlanFiles | None, name: str, number: int) -> StoreRows:
  """The rows of a source, in the order that belongs to this source number."""
  purpose = f'source {number}'
  return StoreRows(stores[name], spec, cfg.packing, seed=seed, purpose=purpose, plans=plans, order=cfg.order)
