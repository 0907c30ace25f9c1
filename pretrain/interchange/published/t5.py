"""T5 1.0, T5 1.1 and UL2, and the families with its names: mT5 and umT5."""

import functools
from collections.abc import Iterator
from typing import Any

from models.families.encoder_decoder import EncoderDecoderConfig
from models.layers.mlp import MlpConfig
from models.layers.norm import RmsNormConfig
from pretrain.interchange.config_json import ConfigJson
from pretrain.interchange.family import Family, Tensors, Values
from pretrain.interchange.layout import Entry
from pretrain.interchange.safetensors import equal

# feed_forward_proj -> (activation, gated). 'gated-gelu' means the tanh form, for files of before 2021.
MLPS = {
  'relu': ('relu', False), 'gelu': ('gelu_exact', False), 'gelu_new': ('gelu_tanh', False), 'silu': ('silu', False),
  'gated-gelu': ('gelu_tanh', True), 'gated-silu': ('silu', True), 'gated-relu': ('relu', True),
}  # fmt: skip
TABLE, HEAD = 'shared.weight', 'lm_head.weight'


def read(kind: str, config: ConfigJson, tensors: Tensors) -> EncoderDecoderConfig:
  activation, gated = config.choose('feed_forward_proj', MLPS, 'relu')
  config.ignore('dense_act_fn', 'is_gated_act')  # transformers derives them from feed_forward_proj
  layers = config.take('num_layers')
  return EncoderDecoderConfig(
    vocab_size=config.take('vocab_size'), embed=config.take('d_model'), heads=config.take('num_heads'),
    head_dim=config.take('d_kv'), encoder_layers=layers,
    decoder_layers=config.take('num_decoder_layers', None) or layers,
    mlp=MlpConfig(hidden=config.take('d_ff'), activation=activation, gated=gated),
    norm=RmsNormConfig(eps=config.take('layer_norm_epsilon', 1e-6, float)),
    relative_buckets=config.take('relative_attention_num_buckets', 32),
    relative_max_distance=config.take('relative_attention_max_distance', 128), head=_head(kind, config, tensors),
    relative_layers='each' if kind == 'umt5' else 'shared',
  )  # fmt: skip


def _head(kind: str, config: ConfigJson, tensors: Tensors) -> str:
  """Untied where the file has a head of its own. The flag alone misleads: transformers 5 sets and saves it.

  A tied head is scaled unless `scale_decoder_outputs`, or in files without it `tie_word_embeddings`, is false; that of
  mT5 is never scaled.
  """
  tied = config.take('tie_word_embeddings', True, bool)
  scaled = config.take('scale_decoder_outputs', tied, bool) and kind != 'mt5'
  own = HEAD in tensors and not (TABLE in tensors and equal(tensors[HEAD], tensors[TABLE]))
  if own and 'scale_decoder_outputs' in config.values and scaled:
    config.problems.append(f'scale_decoder_outputs=True with a {HEAD} of its own')
  return 'untied' if own else 'tied_scaled' if scaled else 'tied'


def write(cfg: EncoderDecoderConfig) -> dict[str, Any]:
  names = {mlp: name for name, mlp in MLPS.items()}
  return {
    'is_encoder_decoder': True, 'vocab_size': cfg.vocab_size, 'd_model': cfg.embed, 'd_kv': cfg.head_dim,
    'd_ff': cfg.mlp.hidden, 'num_heads': cfg.heads, 'num_layers': cfg.encoder_layers,
    'num_decoder_layers': cfg.decoder_layers, 'layer_norm_epsilon': cfg.norm.eps, 'dropout_rate': cfg.dropout,
    'feed_forward_proj': names.get((cfg.mlp.activation, cfg.mlp.gated), 'relu'),
    'relative_attention_num_buckets': cfg.relative_buckets,
    'relative_attention_max_distance': cfg.relative_max_distance,
    'tie_word_embeddings': cfg.head != 'untied', 'scale_decoder_outputs': cfg.head == 'tied_scaled',
    'decoder_start_token_id': 0, 'pad_token_id': 0, 'eos_token_id': 1,
  }  # fmt: skip


def entries(cfg: EncoderDecoderConfig, values: Values) -> list[Entry]:
  return [
    Entry('embedding/table', TABLE, 'vocab embed'), Entry('head/kernel', HEAD, 'vocab embed'),
    *_stack('encoder', cfg), *_stack('decoder', cfg),
  ]  # fmt: skip


def _stack(stack: str, cfg: EncoderDecoderConfig) -> Iterator[Entry]:
  sublayers = [('self', 'SelfAttention')] + [('cross', 'EncDecAttention')] * (stack == 'decoder')
  first = '{0}' if cfg.relative_layers == 'each' else '0'
  table = f'{stack}.block.{first}.layer.0.SelfAttention.relative_attention_bias.weight'
  yield Entry(f'{stack}_bias/table', table, 'buckets heads')
  yield Entry(f'{stack}/norm/scale', f'{stack}.final_layer_norm.weight', 'embed')
  for i, (name, theirs) in enumerate(sublayers):
    layer = f'{stack}.block.{{0}}.layer.{i}'
    yield Entry(f'{stack}/blocks/{name}_norm/scale', f'{layer}.layer_norm.weight', 'embed')
    for letter, ours, heads in (('q', 'query', 'heads'), ('k', 'key', 'kv_heads'), ('v', 'value', 'kv_heads')):
      path = f'{stack}/blocks/{name}_attention/{ours}'
      yield Entry(path, f'{layer}.{theirs}.{letter}.weight', f'({heads} head_dim) embed')
    yield Entry(f'{stack}/blocks/{name}_attention/out', f'{layer}.{theirs}.o.weight', 'embed (heads head_dim)')
  layer = f'{stack}.block.{{0}}.layer.{len(sublayers)}'
  yield Entry(f'{stack}/blocks/mlp_norm/scale', f'{layer}.layer_norm.weight', 'embed')
  for ours, theirs in {'gate': 'wi_0', 'up': 'wi_1'}.items() if cfg.mlp.gated else [('up', 'wi')]:
    yield Entry(f'{stack}/blocks/mlp/{ours}', f'{layer}.DenseReluDense.{theirs}.weight', 'mlp embed')
  yield Entry(f'{stack}/blocks/mlp/down', f'{layer}.DenseReluDense.wo.weight', 'embed mlp')


def _family(model_type: str, architecture: str) -> Family:
  return Family(
    model_type=model_type, architecture=architecture, read=functools.partial(read, model_type), write=write,
    entries=entries, tied=(HEAD, TABLE),
    # Files without `shared` exist (madlad400); the encoder's name comes last.
    aliases={'decoder.embed_tokens.weight': TABLE, 'encoder.embed_tokens.weight': TABLE},
    unused=(r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',),
    sentencepiece='spiece.model',
  )  # fmt: skip


T5 = _family('t5', 'T5ForConditionalGeneration')
MT5 = _family('mt5', 'MT5ForConditionalGeneration')
UMT5 = _family('umt5', 'UMT5ForConditionalGeneration')
