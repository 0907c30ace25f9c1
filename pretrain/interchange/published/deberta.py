"""DeBERTa v2 and v3 as models for masked tokens. Source: `transformers` modeling_deberta_v2.py."""

from typing import Any

from models.families.encoder import EncoderConfig
from models.layers.mlp import MlpConfig
from models.layers.norm import LayerNormConfig
from pretrain.interchange.config_json import ConfigJson
from pretrain.interchange.family import Family, Tensors, Values
from pretrain.interchange.layout import Entry
from pretrain.interchange.published.bert import block_entries, norm_entries
from pretrain.interchange.published.gpt import ACTIVATIONS, NAMES

TABLE, TRANSFORM, BIAS = (
  'deberta.embeddings.word_embeddings.weight', 'cls.predictions.transform', 'cls.predictions.bias',
)  # fmt: skip


def read(config: ConfigJson, tensors: Tensors) -> EncoderConfig:
  config.expect('relative_attention', True)
  config.expect('share_att_key', True)
  config.expect('position_biased_input', False)
  config.expect('type_vocab_size', 0)
  config.expect('conv_kernel_size', 0)
  config.expect('tie_word_embeddings', True)
  config.ignore('attention_probs_dropout_prob', 'hidden_dropout_prob', 'legacy', 'conv_act', 'conv_groups')
  config.ignore('pooler_dropout', 'pooler_hidden_act', 'pooler_hidden_size')
  for key in ('relative_attention', 'share_att_key', 'position_biased_input'):  # what is absent means something else
    if key not in config.values:
      config.problems.append(f'{key} is missing')
  embed, heads = config.take('hidden_size', 1536), config.take('num_attention_heads', 24)
  config.expect('embedding_size', embed)
  config.expect('attention_head_size', embed // heads)
  buckets, distance = (config.take(key, -1, least=-1) for key in ('position_buckets', 'max_relative_positions'))
  if buckets < 2:
    config.problems.append(f'position_buckets={buckets} (supported: logarithmic buckets, 2 or more)')
  longest = config.take('max_position_embeddings', 512)
  activation = config.choose('hidden_act', ACTIVATIONS, 'gelu')
  return EncoderConfig(
    vocab_size=config.take('vocab_size', 128100), embed=embed, layers=config.take('num_hidden_layers', 24),
    heads=heads, head_dim=embed // heads, positions='disentangled', relative_buckets=2 * max(buckets, 2),
    relative_max_distance=distance if distance > 0 else longest, position_scores=_scores(config),
    relative_norm=_norm(config), head='tied', norm_placement='post', bias='all', embedding_norm=True,
    norm=LayerNormConfig(eps=config.take('layer_norm_eps', 1e-7, float)),
    mlp=MlpConfig(hidden=config.take('intermediate_size', 6144), activation=activation, gated=False),
    head_transform=activation, head_bias=True, dropout_sites='bert',
  )  # fmt: skip


def _scores(config: ConfigJson) -> tuple[str, ...]:
  """`pos_att_type`, in older files 'p2c|c2p': in our order, which has no effect."""
  given = config.values.get('pos_att_type') or []
  config.ignore('pos_att_type')
  found = [part.strip() for part in given.lower().split('|')] if isinstance(given, str) else given
  if not found or set(found) - {'c2p', 'p2c'}:
    config.problems.append(f"pos_att_type={given!r} (supported: 'c2p' and 'p2c')")
  return tuple(kind for kind in ('c2p', 'p2c') if kind in found)


def _norm(config: ConfigJson) -> bool:
  given = config.take('norm_rel_ebd', 'none', str)
  if given not in ('none', 'layer_norm'):
    config.problems.append(f"norm_rel_ebd={given!r} (supported: 'none' or 'layer_norm')")
  return given == 'layer_norm'


def write(cfg: EncoderConfig) -> dict[str, Any]:
  return {
    'vocab_size': cfg.vocab_size, 'hidden_size': cfg.embed, 'num_hidden_layers': cfg.layers,
    'num_attention_heads': cfg.heads, 'intermediate_size': cfg.mlp.hidden, 'hidden_act': NAMES[cfg.mlp.activation],
    'layer_norm_eps': cfg.norm.eps, 'relative_attention': True, 'share_att_key': True, 'position_biased_input': False,
    'position_buckets': cfg.relative_buckets // 2, 'max_relative_positions': cfg.relative_max_distance,
    'pos_att_type': list(cfg.position_scores), 'norm_rel_ebd': 'layer_norm' if cfg.relative_norm else 'none',
    'type_vocab_size': 0, 'hidden_dropout_prob': cfg.dropout, 'attention_probs_dropout_prob': cfg.dropout,
    'legacy': True, 'tie_word_embeddings': True, 'pad_token_id': 0,
  }  # fmt: skip


def entries(cfg: EncoderConfig, values: Values) -> list[Entry]:
  return [
    Entry('embedding/table', TABLE, 'vocab embed'),
    *norm_entries('embedding_norm', 'deberta.embeddings.LayerNorm'),
    *block_entries('deberta.encoder.layer.{0}', '_proj'),
    Entry('encoder_bias/table', 'deberta.encoder.rel_embeddings.weight', 'buckets embed'),
    *norm_entries('encoder_bias/norm', 'deberta.encoder.LayerNorm'),
    Entry('head_transform/kernel', f'{TRANSFORM}.dense.weight', 'mlp embed'),
    Entry('head_transform/bias', f'{TRANSFORM}.dense.bias', 'mlp'),
    *norm_entries('head_transform/norm', f'{TRANSFORM}.LayerNorm'),
    Entry('head/bias', BIAS, 'vocab'),
  ]


DEBERTA = Family(
  'deberta-v2', 'DebertaV2ForMaskedLM', read, write, entries,
  aliases={'cls.predictions.decoder.weight': TABLE, 'cls.predictions.decoder.bias': BIAS},
  # The head of files with `legacy=false`, and of the authors' own; it computes what the other one does.
  renamed={r'^lm_predictions\.lm_head\.bias$': BIAS, r'^lm_predictions\.lm_head': TRANSFORM},
  # Heads for other tasks, and the position ids of older files.
  carried=(r'mask_predictions\..*', r'pooler\.dense\.(weight|bias)'),
  unused=(r'deberta\.embeddings\.position_ids',), sentencepiece='spm.model',
)  # fmt: skip
