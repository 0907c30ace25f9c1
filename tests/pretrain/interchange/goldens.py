"""Models of `transformers` in tests/golden/interchange/, and our logits for their documents."""

import pathlib

import jax
import numpy as np
import pytest

from models.build import KernelsConfig, ModelConfig, build
from models.specs import Tree
from pretrain.interchange.importing import Source, flat, open_source, parameters

slow = lambda name: pytest.param(name, marks=pytest.mark.slow)
GOLDENS = pathlib.Path(__file__).parents[2] / 'golden/interchange'
FAMILIES = (
  't5_v1_0', 't5_v1_1', 'ul2', 'mt5', 'umt5', 'llama', 'yi', 'mistral', 'qwen2', 'qwen3', 'olmo2', 'gemma2', 'gpt2',
  'gpt_neox', 'falcon', 'falcon_40b', 'bert', 'roberta', 'electra', 'electra_generator', 'electra_discriminator',
  'deberta_v2', 'deberta_v3', 'mixtral',
)  # fmt: skip
# Other values of keys of their config.json, without goldens of generation.
VARIANTS = (
  'llama_bias', 'llama_mlp_bias', 'qwen2_windows', 'qwen3_bias', 'olmo2_bias', 'gemma2_bias', 'gpt2_unscaled',
  'gpt_neox_yarn', 'falcon_rw',
)  # fmt: skip
ALL = FAMILIES + VARIANTS
# Most variants are tested by `make test-all`.
EACH = [name if name in (*FAMILIES, 'qwen2_windows', 'falcon_rw') else slow(name) for name in ALL]


def read(name: str) -> tuple[Source, Tree]:
  return load(GOLDENS / name)


def read_source(name: str) -> Source:
  return open_source(GOLDENS / name)


def load(folder: pathlib.Path) -> tuple[Source, Tree]:
  source = open_source(folder)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return source, parameters(source, dict.fromkeys(flat(build(source.model).specs), device))


def expected(name: str) -> dict[str, np.ndarray]:
  with np.load(GOLDENS / name / 'expected.npz') as found:
    return dict(found)


def rows(documents: list[list[np.ndarray]], prefix: str) -> dict[str, np.ndarray]:
  """One row for each list of documents, as segments; 10 slots of the longest row are padding."""
  width = max(sum(map(len, row)) for row in documents) + 10
  shape = (len(documents), width)
  tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
  for i, row in enumerate(documents):
    at = 0
    for number, document in enumerate(row, 1):
      place = slice(at, at := at + len(document))
      tokens[i, place], segments[i, place], positions[i, place] = document, number, np.arange(len(document))
  names = f'{prefix}_input_tokens', f'{prefix}_segment_ids', f'{prefix}_positions'
  return dict(zip(names, (tokens, segments, positions), strict=True)) | {'example_index': np.arange(len(documents))}


def batch(cfg: ModelConfig, golden: dict[str, np.ndarray], order: list[list[str]]) -> dict[str, np.ndarray]:
  take = lambda suffix: [[golden[name + suffix] for name in row] for row in order]
  match cfg.name:
    case 'encoder_decoder':
      return rows(take(''), 'encoder') | rows(take('_target'), 'decoder')
    case 'encoder':
      return rows(take(''), 'encoder')
    case _:
      return rows(take(''), 'decoder')


PADDED, PACKED = [['long'], ['short']], [['short', 'long']]


def worst(
  cfg: ModelConfig, params: Tree, golden: dict[str, np.ndarray], orders=(PADDED, PACKED), attention: str = 'auto'
) -> float:
  """The largest error over padded and packed rows, in one batch, as a fraction of the logits' scale."""
  model, scale = build(cfg, KernelsConfig(attention=attention)), np.abs(golden['long_logits']).max()
  run = jax.jit(lambda params, batch: model.logits(params, model.apply(params, batch)[0]))
  order, errors = [row for rows in orders for row in rows], []
  for own, row in zip(np.asarray(run(params, batch(cfg, golden, order))), order, strict=True):
    ends = np.cumsum([len(golden[f'{name}_logits']) for name in row])
    for name, part in zip(row, np.split(own[: ends[-1]], ends[:-1]), strict=True):
      errors.append(np.abs(part - golden[f'{name}_logits']).max() / scale)
  return float(np.max(errors))
