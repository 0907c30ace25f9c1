"""`pretrain checkpoints extend-vocabulary`: the weights of a step with the embeddings and head of another tokenizer.

Tokens that both tokenizers have keep their rows, under their new ids. The others get rows by a method:
mean: the mean of the old rows; multivariate: drawn from a normal distribution with the mean and covariance of the old
rows (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"); subword: the mean of the rows of
the old tokens that spell the new one, and where it cannot be spelled, the mean of all; ofa: the mean of the nearest old
tokens in a space of word vectors (`word_vectors`), with a rank also in fewer dimensions.
"""

import dataclasses
import hashlib
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from data.batches.source import open_data
from data.objectives.objectives import OfUnits
from data.prepare.published import Published
from data.stores.vocabulary import MODES, SPACE, Tokenizer
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.config import bindings
from pretrain.devices.compilation_cache import cache_dir
from pretrain.errors import ConfigError
from pretrain.evaluation.imported import FOLDER, tokenizer_of
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.trunk import plain
from pretrain.hosts.ownership import owned
from pretrain.tools.weights import Step, check_new, config_of, program_on_one_device
from pretrain.tools.word_vectors import Nearest, factorised, nearest
from pretrain.workdirs.copies import made_in
from pretrain.workdirs.folder import Folder

Method = Literal['mean', 'multivariate', 'subword', 'ofa']
METHODS: tuple[Method, ...] = ('mean', 'multivariate', 'subword', 'ofa')
OBJECTIVES = {'decoder': 'causal_lm', 'encoder_decoder': 'span_corruption', 'encoder': 'mlm'}
LARGEST_FACTOR = 128
IDS_BESIDE = ('generation_config.json', 'tokenizer_config.json')  # they name the ids of a tokenizer


@dataclasses.dataclass(frozen=True)
class Extended:
  """How many tokens kept a row, how many got a new one, and the rows of the new tables."""

  kept: int
  new: int
  rows: int


@dataclasses.dataclass(frozen=True)
class WordVectors:
  """The file of method ofa, how many of its words are read, and the rank of the new tables (None: that of the old)."""

  path: pathlib.Path
  most: int | None = None
  rank: int | None = None


def extend_vocabulary(
  step: Step,
  tokenizer: Published,
  method: Method,
  output: Folder,
  source: str,
  seed: int = 0,
  vectors: WordVectors | None = None,
) -> Extended:
  """Writes a new workdir with the weights of `step` for another `tokenizer`.

  Raises ConfigError for a run whose tokenizer is not known, and DataError for a file of vectors that is not readable;
  then nothing is written.
  """
  check_new(output, '--to')
  _check_vectors(method, vectors)
  cfg = plain(config_of(step.workdir))
  old, new = tokenizer_of_run(step.workdir, cfg), tokenizer.open(cfg.data.sentinels)
  if new.fingerprint == old.fingerprint:
    raise ConfigError(f'--tokenizer is already the tokenizer of {step.workdir}. Nothing was written; give another one.')
  places = old_ids(old, new)
  rows = padded(new.vocabulary.size, cfg.model.vocab_size)
  spelled = spellings(old, new, places) if method == 'subword' else None
  missing, rank = np.flatnonzero(places < 0), vectors and vectors.rank
  near = nearest(vectors.path, old, new, missing, vectors.most) if vectors is not None and len(missing) else None
  program = program_on_one_device(cfg)
  axes = {path: spec.axes for path, spec in flatten_dict(dict(program.model.specs)).items()}
  params = flatten_dict(step.read(program.abstract.params))
  for path, x in params.items():
    if 'vocab' in axes[path]:
      dim = axes[path].index('vocab')
      table = np.moveaxis(np.asarray(x), dim, 0)
      flat = table.reshape(len(table), -1)
      fill, given = filler(method, spelled, seed, near), (flat, places, old.vocabulary.size, rows)
      made = narrow_rows(*given, fill, rank) if rank else new_rows(*given, fill)
      params[path] = jax.numpy.asarray(np.moveaxis(made.reshape(rows, *table.shape[1:]), 0, dim))
  _write(output, unflatten_dict(params), _config(cfg, rows), tokenizer, source)
  return Extended(int((places >= 0).sum()), int((places < 0).sum()), rows)


def tokenizer_of_run(workdir: Folder, cfg: Experiment) -> Tokenizer:
  """The tokenizer that the weights of a run were trained with."""
  if cfg.data.name == 'synthetic':
    model = tokenizer_of(workdir)
    if model is None:
      raise ConfigError(
        f"{workdir}/config.gin: data.name='synthetic' has no tokenizer, so no row of it is known. Nothing was written; "
        'choose a run that was trained on text, or imported with its tokenizer.'
      )
    return model.open(cfg.data.sentinels)
  data = open_data(cfg.data, cfg.objective, seed=cfg.seed, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  return data.tokenizer


def written(tokenizer: Tokenizer) -> list[tuple[str, str]]:
  """(kind, name) of each id, equal for tokens that are the same in two tokenizers."""
  names, _, kinds = tokenizer.pieces()
  sentinels = [('sentinel', str(k)) for k in reversed(range(tokenizer.vocabulary.sentinels))]
  return [*zip(kinds, names, strict=True), *sentinels, *(('mode', mode) for mode in MODES)]


def old_ids(old: Tokenizer, new: Tokenizer) -> np.ndarray:
  """int64: the old id of each new one, -1 for a token that the old tokenizer lacks."""
  known = {token: i for i, token in reversed([*enumerate(written(old))])}
  return np.array([known.get(token, -1) for token in written(new)])


def spellings(old: Tokenizer, new: Tokenizer, places: np.ndarray) -> list[list[int]]:
  """The ids of the old tokenizer for the text of each new token that it lacks; none where it cannot be spelled.

  A piece without a space before it is spelled as inside of a word.
  """
  guarded, tokens = (
    Tokenizer(old.model, 1, old.vocabulary.ids),
    written(new),
  )  # text behind a sentinel gets no space of its own

  def spell(kind: str, name: str) -> list[int]:
    ids = guarded.encode_prompt('<extra_id_0>' + name.replace(SPACE, ' '))[1:] if kind == 'text' else []
    return [i for i in ids if i != old.vocabulary.ids.unknown and i < old.vocabulary.pieces]

  return [spell(*tokens[i]) for i in np.flatnonzero(places < 0)]


def padded(size: int, before: int) -> int:
  """At least `size`, and divisible by what divided the old number of rows, up to LARGEST_FACTOR."""
  factor = LARGEST_FACTOR
  while before % factor:
    factor //= 2
  return -(-size // factor) * factor


def _check_vectors(method: Method, vectors: WordVectors | None) -> None:
  if (method == 'ofa') != (vectors is not None):
    raise ConfigError(
      '--method=ofa and --vectors=FILE belong together. Nothing was written; give both, or neither of them.'
    )


Fill = Callable[[np.ndarray, int], np.ndarray]  # (old rows of tokens, number of new ones) -> new rows


def filler(method: Method, spelled: Sequence[Sequence[int]] | None, seed: int, near: Nearest | None = None) -> Fill:
  match method:
    case 'ofa' if near is not None:
      return lambda old, count: near.rows(old, seed)
    case 'mean':
      return lambda old, count: np.broadcast_to(old.mean(0), (count, old.shape[1]))
    case 'multivariate':
      return lambda old, count: drawn(old, count, seed)
    case 'subword':
      return lambda old, count: np.array([old[own].mean(0) if own else old.mean(0) for own in spelled or ()])


def drawn(old: np.ndarray, count: int, seed: int) -> np.ndarray:
  """float64[count, features] from the normal distribution with the mean and the covariance of the rows of `old`."""
  values, vectors = np.linalg.eigh(np.cov(old, rowvar=False, bias=True))
  noise = np.random.default_rng(seed).normal(size=(count, len(values)))
  return old.mean(0) + (noise * np.sqrt(np.maximum(values, 0))) @ vectors.T


def new_rows(table: np.ndarray, places: np.ndarray, size: int, rows: int, fill: Fill) -> np.ndarray:
  """[rows, features]: the row of each new token, in the dtype of `table`, whose first `size` rows are tokens.

  Rows beyond the tokens, which no id uses, are the mean.
  """
  old = table[:size].astype(np.float64)
  made = np.empty((rows, table.shape[1]), table.dtype)
  made[:] = old.mean(0)
  missing = np.flatnonzero(places < 0)
  if len(missing):
    made[missing] = fill(old, len(missing))
  kept = np.flatnonzero(places >= 0)
  made[kept] = table[places[kept]]
  return made


def narrow_rows(table: np.ndarray, places: np.ndarray, size: int, rows: int, fill: Fill, rank: int) -> np.ndarray:
  """As `new_rows`, for a table of this rank: coordinates times primitives. Rows that both tokenizers have change too.

  Raises ConfigError for a rank that the table does not have.
  """
  if rank > (most := min(size, table.shape[1])):
    raise ConfigError(f'--rank={rank} is above {most}, that of the table. Nothing was written; choose a smaller one.')
  coordinates, primitives = factorised(table[:size].astype(np.float64), rank)
  return (new_rows(coordinates, places, size, rows, fill) @ primitives).astype(table.dtype)


def _config(cfg: Experiment, rows: int) -> Experiment:
  """The config of the new run: as after an import, on random tokens, until it is given text of the new tokenizer."""
  data = ('batch_size', 'inputs_length', 'targets_length', 'sentinels')
  values: dict[str, Any] = {f'data.{key}': getattr(cfg.data, key) for key in data}
  values |= {'model.vocab_size': rows, 'data.name': 'synthetic', 'checkpoint.initial': None, 'phases': ()}
  values |= {'evaluation.every': 0, 'evaluation.generate': 0, 'evaluation.lawa_checkpoints': 0}
  values |= {'checkpoint.best_of': None, 'checkpoint.keep_best': 0}
  if isinstance(cfg.objective, OfUnits):
    values['objective.name'] = OBJECTIVES[cfg.model.name]
  return bindings.override(cfg, values, 'extend-vocabulary')


def _write(output: Folder, params: Any, cfg: Experiment, tokenizer: Published, source: str) -> None:
  text = f'# Parameters made by: {source}\n{bindings.render(cfg)}'
  with owned(output, '--to'):
    checkpoints = Checkpoints(output, CheckpointConfig())
    position = {'source': source, 'data': {'tokenizer': hashlib.sha256(tokenizer.content).hexdigest()}}
    checkpoints.save_params(0, params, position, text)
    checkpoints.close()
    with made_in(output / FOLDER) as folder:
      (folder / tokenizer.open(0).file_name).write_bytes(tokenizer.content)
      for name in IDS_BESIDE:
        if (path := tokenizer.path.with_name(name)).is_file():
          shutil.copyfile(path, folder / name)
    (output / 'config.gin').write_text(text)  # last: a folder without it is not a run
