"""BERT, RoBERTa and ELECTRA: models for masked tokens, and ELECTRA's discriminator."""

import dataclasses
import functools
from typing import Any

from models.families.encoder import EncoderConfig
from models.layers.mlp import MlpConfig
from models.layers.norm import LayerNormConfig
from pretrain.interchange.config_json import ConfigJson
from pretrain.interchange.family import Family, Tensors, Values
from pretrain.interchange.layout import Entry
from pretrain.interchange.published.gpt import ACTIVATIONS, NAMES

BLOCK = 'encoder/blocks'
DISCRIMINATOR, HEAD = 'ElectraForPreTraining', 'discriminator_predictions'


@dataclasses.dataclass(frozen=True)
class Kind:
  """What differs: names of the head, and the positions of a table before the first one that is used."""

  name: str
  dense: str
  norm: str
  bias: str

  @property
  def types(self) -> str:
    return f'{self.name}.embeddings.token_type_embeddings.weight'

  @property
  def positions(self) -> str:
    return f'{self.name}.embeddings.position_embeddings.weight'

  @property
  def table(self) -> str:
    return f'{self.name}.embeddings.word_embeddings.weight'

  def skipped(self, values: Values) -> int:
    """RoBERTa counts positions from the padding id + 1 on (fairseq)."""
    pad = values.get('pad_token_id')
    return 0 if self.name != 'roberta' else 2 if pad is None else pad + 1


BERT_KIND = Kind(
  'bert', 'cls.predictions.transform.dense', 'cls.predictions.transform.LayerNorm', 'cls.predictions.bias'
)
ROBERTA_KIND = Kind('roberta', 'lm_head.dense', 'lm_head.layer_norm', 'lm_head.bias')
ELECTRA_KIND = Kind(
  'electra', 'generator_predictions.dense', 'generator_predictions.LayerNorm', 'generator_lm_head.bias'
)


def read(kind: Kind, config: ConfigJson, tensors: Tensors) -> EncoderConfig:
  config.expect('position_embedding_type', 'absolute')
  config.expect('add_cross_attention', False)
  config.expect('is_decoder', False)
  config.expect('tie_word_embeddings', True)
  config.ignore('attention_probs_dropout_prob', 'hidden_dropout_prob', 'summary_activation', 'summary_last_dropout')
  config.ignore('summary_type', 'summary_use_proj')
  config.take('type_vocab_size', 2, least=0)
  config.take('pad_token_id', None, least=-1)
  embed, heads = config.take('hidden_size'), config.take('num_attention_heads')
  size = config.take('embedding_size', 128) if kind is ELECTRA_KIND else embed
  activation = config.choose('hidden_act', ACTIVATIONS, 'gelu')
  binary = kind is ELECTRA_KIND and config.values.get('architectures') == [DISCRIMINATOR]
  return EncoderConfig(
    vocab_size=config.take('vocab_size'), embed=embed, layers=config.take('num_hidden_layers'), heads=heads,
    head_dim=embed // heads, positions='learned', head='binary' if binary else 'tied', norm_placement='post',
    bias='all', embedding_norm=True, embedding_size=None if size == embed else size,
    max_positions=config.take('max_position_embeddings', 512) - kind.skipped(config.values),
    norm=LayerNormConfig(eps=config.take('layer_norm_eps', 1e-12, float)),
    mlp=MlpConfig(hidden=config.take('intermediate_size'), activation=activation, gated=False),
    head_transform=activation if binary or kind is BERT_KIND else 'gelu_exact', head_bias=True, dropout_sites='bert',
  )  # fmt: skip


def write(kind: Kind, cfg: EncoderConfig) -> dict[str, Any]:
  ids = {'bos_token_id': 0, 'eos_token_id': 2, 'pad_token_id': 1} if kind is ROBERTA_KIND else {'pad_token_id': 0}
  width = {'embedding_size': cfg.width} if kind is ELECTRA_KIND else {}
  width |= {'architectures': [DISCRIMINATOR]} if cfg.head == 'binary' and kind is ELECTRA_KIND else {}
  return {
    'vocab_size': cfg.vocab_size, 'hidden_size': cfg.embed, 'num_hidden_layers': cfg.layers,
    'num_attention_heads': cfg.heads, 'intermediate_size': cfg.mlp.hidden, 'hidden_act': NAMES[cfg.mlp.activation],
    'layer_norm_eps': cfg.norm.eps, 'max_position_embeddings': cfg.max_positions + kind.skipped(ids),
    'type_vocab_size': 2, 'hidden_dropout_prob': cfg.dropout, 'attention_probs_dropout_prob': cfg.dropout,
    'tie_word_embeddings': True, **ids, **width,
  }  # fmt: skip


def entries(kind: Kind, cfg: EncoderConfig, values: Values) -> list[Entry]:
  """Token type 0, which all tokens of a text have, is added to every position."""
  skipped = kind.skipped(values)
  length = f'length@{skipped}/{cfg.max_positions + skipped}'
  found = [
    Entry('embedding/table', kind.table, 'vocab embed'),
    Entry('embedding/positions', kind.positions, f'{length} embed', row=kind.types),
    *norm_entries('embedding_norm', f'{kind.name}.embeddings.LayerNorm'),
    *block_entries(f'{kind.name}.encoder.layer.{{0}}'),
  ]
  if cfg.embedding_size:
    found += _dense('embedding_projection', f'{kind.name}.embeddings_project', 'mlp embed')
  if cfg.head == 'binary':
    last = f'{HEAD}.dense_prediction'
    return [
      *found, *_dense('head_transform', f'{HEAD}.dense', 'mlp embed'), *_dense('head', last, 'outputs embed'),
    ]  # fmt: skip
  return [
    *found, *_dense('head_transform', kind.dense, 'mlp embed'), *norm_entries('head_transform/norm', kind.norm),
    Entry('head/bias', kind.bias, 'vocab'),
  ]  # fmt: skip


def _dense(ours: str, theirs: str, layout: str) -> list[Entry]:
  return [
    Entry(f'{ours}/kernel', f'{theirs}.weight', layout), Entry(f'{ours}/bias', f'{theirs}.bias', layout.split()[0]),
  ]  # fmt: skip


def norm_entries(ours: str, theirs: str) -> list[Entry]:
  return [Entry(f'{ours}/scale', f'{theirs}.weight', 'embed'), Entry(f'{ours}/bias', f'{theirs}.bias', 'embed')]


def block_entries(layer: str, suffix: str = '') -> list[Entry]:
  """The blocks of BERT and its relatives; `suffix` of the names of queries, keys and values."""
  attention = f'{BLOCK}/self_attention'
  found = [
    Entry(f'{attention}/out', f'{layer}.attention.output.dense.weight', 'embed (heads head_dim)'),
    Entry(f'{attention}/out_bias', f'{layer}.attention.output.dense.bias', 'embed'),
  ]
  for name, heads in (('query', 'heads'), ('key', 'kv_heads'), ('value', 'kv_heads')):
    theirs = f'{layer}.attention.self.{name}{suffix}'
    found.append(Entry(f'{attention}/{name}', f'{theirs}.weight', f'({heads} head_dim) embed'))
    found.append(Entry(f'{attention}/{name}_bias', f'{theirs}.bias', f'({heads} head_dim)'))
  for ours, theirs, layout in (('up', 'intermediate', 'mlp embed'), ('down', 'output', 'embed mlp')):
    found.append(Entry(f'{BLOCK}/mlp/{ours}', f'{layer}.{theirs}.dense.weight', layout))
    found.append(Entry(f'{BLOCK}/mlp/{ours}_bias', f'{layer}.{theirs}.dense.bias', layout.split()[0]))
  found += norm_entries(f'{BLOCK}/self_norm', f'{layer}.attention.output.LayerNorm')
  return found + norm_entries(f'{BLOCK}/mlp_norm', f'{layer}.output.LayerNorm')


def _family(kind: Kind, architecture: str, aliases: dict[str, str], *carried: str) -> Family:
  """`carried`: heads for other tasks, which were trained with these weights. Old files have gamma and beta."""
  return Family(
    kind.name, architecture, functools.partial(read, kind), functools.partial(write, kind),
    functools.partial(entries, kind), aliases=aliases,
    renamed={r'LayerNorm\.gamma$': 'LayerNorm.weight', r'LayerNorm\.beta$': 'LayerNorm.bias'},
    others=lambda values: {kind.types: (values.get('type_vocab_size', 2), _width(kind, values))},
    carried=(_pattern(kind.positions), *carried), unused=(rf'{kind.name}\.embeddings\.position_ids',),
    sentencepiece='spiece.model',
  )  # fmt: skip


def _width(kind: Kind, values: Values) -> int:
  return values.get('embedding_size', 128) if kind is ELECTRA_KIND else values['hidden_size']


def _pattern(name: str) -> str:
  return name.replace('.', r'\.')


BERT = _family(
  BERT_KIND, 'BertForMaskedLM',
  {'cls.predictions.decoder.weight': BERT_KIND.table, 'cls.predictions.decoder.bias': BERT_KIND.bias},
  r'bert\.pooler\.dense\.(weight|bias)', r'cls\.seq_relationship\.(weight|bias)',
)  # fmt: skip
ROBERTA = _family(
  ROBERTA_KIND, 'RobertaForMaskedLM',
  {'lm_head.decoder.weight': ROBERTA_KIND.table, 'lm_head.decoder.bias': ROBERTA_KIND.bias},
  r'roberta\.pooler\.dense\.(weight|bias)',
)  # fmt: skip
ELECTRA = _family(ELECTRA_KIND, 'ElectraForMaskedLM', {'generator_lm_head.weight': ELECTRA_KIND.table})
