"""BERT, RoBERTa and ELECTRA's generator as models for masked tokens; ELECTRA's discriminator of replaced tokens."""

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


@dataclasses.dataclass(frozen=True)
class Kind:
  """What differs: names of the head, and the positions of a table before the first one that is used.

  `norm` is that of the transform before the head, `head` the kernel of a head that is not the table; '' for none.
  """

  name: str
  dense: str
  norm: str
  bias: str
  head: str = ''

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


DISCRIMINATOR_KIND = Kind(
  'electra', 'discriminator_predictions.dense', '', 'discriminator_predictions.dense_prediction.bias',
  head='discriminator_predictions.dense_prediction.weight',
)  # fmt: skip


def read(kind: Kind, config: ConfigJson, tensors: Tensors) -> EncoderConfig:
  config.expect('position_embedding_type', 'absolute')
  config.expect('add_cross_attention', False)
  config.expect('is_decoder', False)
  config.expect('tie_word_embeddings', True)
  config.ignore('attention_probs_dropout_prob', 'hidden_dropout_prob', 'summary_activation', 'summary_last_dropout')
  config.ignore('summary_type', 'summary_use_proj')
  config.take('type_vocab_size', 2)
  config.take('pad_token_id', None)
  embed, heads = config.take('hidden_size'), config.take('num_attention_heads')
  width = config.take('embedding_size', 128) if kind.name == 'electra' else embed
  activation = config.choose('hidden_act', ACTIVATIONS, 'gelu')
  return EncoderConfig(
    vocab_size=config.take('vocab_size'), embed=embed, layers=config.take('num_hidden_layers'), heads=heads,
    head_dim=embed // heads, positions='learned', head='binary' if kind.head else 'tied', norm_placement='post',
    bias='all', embedding_norm=True, embedding_size=None if width == embed else width,
    max_positions=config.take('max_position_embeddings', 512) - kind.skipped(config.values),
    norm=LayerNormConfig(eps=config.take('layer_norm_eps', 1e-12, float)),
    mlp=MlpConfig(hidden=config.take('intermediate_size'), activation=activation, gated=False),
    head_transform=activation if kind in (BERT_KIND, DISCRIMINATOR_KIND) else 'gelu_exact', head_bias=True,
    dropout_sites='bert',
  )  # fmt: skip


def write(kind: Kind, cfg: EncoderConfig) -> dict[str, Any]:
  ids = {'bos_token_id': 0, 'eos_token_id': 2, 'pad_token_id': 1} if kind is ROBERTA_KIND else {'pad_token_id': 0}
  width = {'embedding_size': cfg.embedding_size or cfg.embed} if kind.name == 'electra' else {}
  return {
    'vocab_size': cfg.vocab_size, 'hidden_size': cfg.embed, 'num_hidden_layers': cfg.layers,
    'num_attention_heads': cfg.heads, 'intermediate_size': cfg.mlp.hidden, 'hidden_act': NAMES[cfg.mlp.activation],
    'layer_norm_eps': cfg.norm.eps, 'max_position_embeddings': cfg.max_positions + kind.skipped(ids),
    'type_vocab_size': 2, 'hidden_dropout_prob': cfg.dropout, 'attention_probs_dropout_prob': cfg.dropout,
    'tie_word_embeddings': True, **ids, **width,
  }  # fmt: skip


def entries(kind: Kind, cfg: EncoderConfig, values: Values) -> list[Entry]:
  """Token type 0, which all tokens of a text have, is added to every position."""
  layer, skipped = f'{kind.name}.encoder.layer.{{0}}', kind.skipped(values)
  length = f'length@{skipped}/{cfg.max_positions + skipped}'
  attention = f'{BLOCK}/self_attention'
  found = [
    Entry('embedding/table', kind.table, 'vocab embed'),
    Entry('embedding/positions', kind.positions, f'{length} embed', row=kind.types),
    Entry('head_transform/kernel', f'{kind.dense}.weight', 'mlp embed'),
    Entry('head_transform/bias', f'{kind.dense}.bias', 'mlp'),
    Entry('head/bias', kind.bias, 'outputs' if kind.head else 'vocab'),
    Entry(f'{attention}/out', f'{layer}.attention.output.dense.weight', 'embed (heads head_dim)'),
    Entry(f'{attention}/out_bias', f'{layer}.attention.output.dense.bias', 'embed'),
  ]
  if kind.name == 'electra':
    project = 'electra.embeddings_project'
    found.append(Entry('embedding_projection/kernel', f'{project}.weight', 'mlp embed'))
    found.append(Entry('embedding_projection/bias', f'{project}.bias', 'mlp'))
  if kind.head:
    found.append(Entry('head/kernel', kind.head, 'outputs embed'))
  for name, heads in (('query', 'heads'), ('key', 'kv_heads'), ('value', 'kv_heads')):
    theirs = f'{layer}.attention.self.{name}'
    found.append(Entry(f'{attention}/{name}', f'{theirs}.weight', f'({heads} head_dim) embed'))
    found.append(Entry(f'{attention}/{name}_bias', f'{theirs}.bias', f'({heads} head_dim)'))
  for ours, theirs, layout in (('up', 'intermediate', 'mlp embed'), ('down', 'output', 'embed mlp')):
    found.append(Entry(f'{BLOCK}/mlp/{ours}', f'{layer}.{theirs}.dense.weight', layout))
    found.append(Entry(f'{BLOCK}/mlp/{ours}_bias', f'{layer}.{theirs}.dense.bias', layout.split()[0]))
  norms = {
    'embedding_norm': f'{kind.name}.embeddings.LayerNorm',
    **({'head_transform/norm': kind.norm} if kind.norm else {}),
    f'{BLOCK}/self_norm': f'{layer}.attention.output.LayerNorm', f'{BLOCK}/mlp_norm': f'{layer}.output.LayerNorm',
  }  # fmt: skip
  for ours, theirs in norms.items():
    found += [Entry(f'{ours}/scale', f'{theirs}.weight', 'embed'), Entry(f'{ours}/bias', f'{theirs}.bias', 'embed')]
  return found


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
  return values.get('embedding_size', 128) if kind.name == 'electra' else values['hidden_size']


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
DISCRIMINATOR = _family(DISCRIMINATOR_KIND, 'ElectraForPreTraining', {})
