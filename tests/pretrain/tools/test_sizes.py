"""Shipped configs have the published sizes: equal to the checkpoints' counts, and to sums made without model code."""

import dataclasses
import os
import subprocess
import sys

import pytest

from models.build import build
from models.specs import count
from pretrain.config import bindings
from pretrain.experiment.checks import check
from pretrain.experiment.experiment import Experiment
from tests.pretrain import tiny


@dataclasses.dataclass(frozen=True)
class T5:
  """Sizes from google/t5-v1_1-* (config.json), t5-* and google/ul2; embedding and head of 32,128 rows both count."""

  embed: int
  layers: int
  heads: int
  hidden: int
  head_dim: int = 64
  gated: bool = True
  tied: bool = False

  def parameters(self) -> int:
    attention = 4 * self.embed * self.heads * self.head_dim
    mlp = (3 if self.gated else 2) * self.embed * self.hidden
    norms = (2 + 3) * self.embed
    block_pair = 3 * attention + 2 * mlp + norms
    ends = 2 * self.embed + 2 * 32 * self.heads  # a final norm and a table of 32 distances on each side
    return self.layers * block_pair + ends + (1 if self.tied else 2) * 32128 * self.embed


@dataclasses.dataclass(frozen=True)
class Llama:
  """Sizes from each model's params.json or config.json; an embedding and a head that is not tied to it both count.

  `norms` of the width of the model in a block; `head_norms` of the width of a head; Mixtral's `experts` have a router.
  """

  embed: int
  layers: int
  heads: int
  kv_heads: int
  hidden: int
  vocab: int = 32000
  head_dim: int | None = None
  norms: int = 2
  head_norms: int = 0
  experts: int = 1
  tied: bool = False

  def parameters(self) -> int:
    head_dim = self.head_dim or self.embed // self.heads
    attention = self.embed * head_dim * (2 * self.heads + 2 * self.kv_heads) + self.head_norms * head_dim
    router = self.embed * self.experts if self.experts > 1 else 0
    block = attention + router + self.experts * 3 * self.embed * self.hidden + self.norms * self.embed
    return self.layers * block + self.embed + (1 if self.tied else 2) * self.vocab * self.embed


@dataclasses.dataclass(frozen=True)
class Gpt:
  """GPT-3 Small (Brown et al. 2020, Table 2.1) with GPT-2's 50,257 pieces, a tied head and biases everywhere."""

  embed: int = 768
  layers: int = 12
  positions: int = 2048

  def parameters(self) -> int:
    block = 12 * self.embed**2 + 13 * self.embed  # Radford et al. 2019: four matrices, their biases, two norms
    return self.layers * block + 2 * self.embed + (50257 + self.positions) * self.embed


@dataclasses.dataclass(frozen=True)
class Deberta:
  """Sizes of microsoft/deberta-v3-base (config.json), with the head of DebertaV2ForMaskedLM."""

  embed: int = 768
  layers: int = 12
  vocab: int = 128100
  buckets: int = 256  # on each side

  def parameters(self) -> int:
    block = 12 * self.embed**2 + 13 * self.embed  # as in BERT: positions have no projections of their own
    positions = 2 * self.buckets * self.embed + 2 * self.embed  # a table and its norm
    backbone = self.vocab * self.embed + 2 * self.embed + self.layers * block + positions
    assert backbone == 183_831_552
    return backbone + self.embed**2 + 3 * self.embed + self.vocab


# The parameters in each published checkpoint (t5-large's file holds an unused table of 512 more). ul2/20b's are not
# published to the last digit: the sum of its config's sizes, the paper's 20B.
PUBLISHED = {
  't5/small': (76_961_152, T5(512, 8, 6, 1024)),
  't5/finetune_small': (76_961_152, T5(512, 8, 6, 1024)),
  't5/base': (247_577_856, T5(768, 12, 12, 2048)),
  't5/large': (783_150_080, T5(1024, 24, 16, 2816)),
  't5/xl': (2_849_757_184, T5(2048, 24, 32, 5120)),
  't5/xxl': (11_135_332_352, T5(4096, 24, 64, 10240)),
  't5_1_0/small': (60_506_624, T5(512, 6, 8, 2048, gated=False, tied=True)),
  't5_1_0/base': (222_903_552, T5(768, 12, 12, 3072, gated=False, tied=True)),
  't5_1_0/large': (737_668_096, T5(1024, 24, 16, 4096, gated=False, tied=True)),
  'ul2/base': (247_577_856, T5(768, 12, 12, 2048)),
  'ul2/20b': (19_591_209_984, T5(4096, 32, 16, 16384, head_dim=256)),
  'decoder/125m': (125_226_240, Gpt()),
  'decoder/1b': (1_100_048_384, Llama(2048, 22, 32, 4, 5632)),
  'decoder/7b': (6_738_415_616, Llama(4096, 32, 32, 32, 11008)),
  'decoder/70b': (68_976_648_192, Llama(8192, 80, 64, 8, 28672)),
  'decoder/llama3_8b': (8_030_261_248, Llama(4096, 32, 32, 8, 14336, vocab=128256)),
  'decoder/qwen3_8b': (8_190_735_360, Llama(4096, 36, 32, 8, 12288, vocab=151936, head_norms=2)),
  'decoder/gemma2_9b': (9_241_705_984, Llama(3584, 42, 16, 8, 14336, vocab=256000, head_dim=256, norms=4, tied=True)),
  'decoder/mixtral_8x7b': (46_702_792_704, Llama(4096, 32, 32, 8, 14336, experts=8)),
  'ul2/flan_20b': (19_591_209_984, T5(4096, 32, 16, 16384, head_dim=256)),
  'encoder/deberta_v3_base': (184_551_780, Deberta()),
  'prefix/1b': (1_100_048_384, Llama(2048, 22, 32, 4, 5632)),
}


def load(name: str) -> Experiment:
  return bindings.load(Experiment, [str(tiny.ROOT / f'configs/{name}.gin')])


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_config_has_the_published_size(name):
  published, sizes = PUBLISHED[name]
  assert count(build(load(name).model).specs) == published == sizes.parameters()
  header = (tiny.ROOT / f'configs/{name}.gin').read_text()
  assert f'# Size: {published:,} parameters' in header


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_config_leaves_ids_for_its_sentinels_and_modes(name):
  """Its header says how large a tokenizer may be: the rest of the vocabulary holds sentinels and three modes."""
  cfg = load(name)
  check(cfg)
  pieces = cfg.model.vocab_size - cfg.data.sentinels - 3
  needed = {'t5': 32000, 't5_1_0': 32000, 'ul2': 31869, 'prefix': 31485, 'decoder': 31997, 'encoder': 128000}[
    name.split('/')[0]
  ]
  assert pieces >= needed


def test_the_config_of_20b_is_printed_without_a_device():
  """JAX_PLATFORMS names a platform that does not exist, so that code that asks for a device fails."""
  done = subprocess.run(
    [sys.executable, '-m', 'pretrain', 'config', '--gin_file=configs/ul2/20b.gin'],
    cwd=tiny.ROOT, env=os.environ | {'JAX_PLATFORMS': 'none'}, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  assert '19,591,209,984' in done.stdout
