"""DeBERTa v2 and v3 as models for masked tokens, with disentangled attention."""

from typing import Any

from models.families.encoder import EncoderConfig
from models.layers.mlp import MlpConfig
from models.layers.norm import LayerNormConfig
from pretrain.interchange.config_json import ConfigJson
from pretrain.interchange.family import Family, Tensors, Values
from pretrain.interchange.layout import Entry
from pretrain.interchange.published.gpt import ACTIVATIONS, NAMES

BLOCK, HEAD = 'encoder/blocks', 'cls.predictions'
# What v2 and v3 have, with the forms of the value; a file must have each key, because its absence means another model.
REQUIRED: dict[str, tuple[Any, ...]] = {
  'relative_attention': (True,),
  'pos_att_type': ('p2c|c2p', 'c2p|p2c', ['p2c', 'c2p'], ['c2p', 'p2c']),
  'share_att_key': (True,),
  'norm_rel_ebd': ('layer_norm',),
  'position_biased_input': (False,),
}


def read(config: ConfigJson, tensors: Tensors) -> EncoderConfig:
  for key, allowed in REQUIRED.items():
    if key in config.values:
      config.expect(key, *allowed)
    else:
      config.problems.append(f'{key} is missing (supported: {allowed[0]!r})')
  config.expect('type_vocab_size', 0)
  config.expect('conv_kernel_size', 0)
  config.expect('tie_word_embeddings', True)
  config.ignore('attention_probs_dropout_prob', 'hidden_dropout_prob', 'pooler_dropout', 'pooler_hidden_act', 'legacy')
  config.ignore('pooler_hidden_size', 'pad_token_id', 'conv_act', 'z_steps')
  embed, heads = config.take('hidden_size'), config.take('num_attention_heads')
  config.expect('attention_head_size', embed // heads)
  config.expect('embedding_size', embed)
  activation = config.choose('hidden_act', ACTIVATIONS, 'gelu')
  longest, distance = config.take('max_position_embeddings', 512), config.take('max_relative_positions', -1)
  return EncoderConfig(
    vocab_size=config.take('vocab_size'), embed=embed, layers=config.take('num_hidden_layers'), heads=heads,
    head_dim=embed // heads, positions='disentangled', relative_buckets=2 * config.take('position_buckets'),
    relative_max_distance=distance if distance > 0 else longest, head='tied', norm_placement='post', bias='all',
    embedding_norm=True, norm=LayerNormConfig(eps=config.take('layer_norm_eps', 1e-7, float)),
    mlp=MlpConfig(hidden=config.take('intermediate_size'), activation=activation, gated=False),
    head_transform=activation, head_bias=True, dropout_sites='bert',
  )  # fmt: skip


def write(cfg: EncoderConfig) -> dict[str, Any]:
  return {
    'vocab_size': cfg.vocab_size, 'hidden_size': cfg.embed, 'num_hidden_layers': cfg.layers,
    'num_attention_heads': cfg.heads, 'intermediate_size': cfg.mlp.hidden, 'hidden_act': NAMES[cfg.mlp.activation],
    'layer_norm_eps': cfg.norm.eps, 'max_position_embeddings': cfg.relative_max_distance,
    'max_relative_positions': cfg.relative_max_distance, 'position_buckets': cfg.relative_buckets // 2,
    'relative_attention': True, 'pos_att_type': ['p2c', 'c2p'], 'share_att_key': True, 'norm_rel_ebd': 'layer_norm',
    'position_biased_input': False, 'type_vocab_size': 0, 'hidden_dropout_prob': cfg.dropout,
    'attention_probs_dropout_prob': cfg.dropout, 'tie_word_embeddings': True, 'pad_token_id': 0,
  }  # fmt: skip


def entries(cfg: EncoderConfig, values: Values) -> list[Entry]:
  layer, attention = 'deberta.encoder.layer.{0}', f'{BLOCK}/self_attention'
  found = [
    Entry('embedding/table', 'deberta.embeddings.word_embeddings.weight', 'vocab embed'),
    Entry('encoder_bias/table', 'deberta.encoder.rel_embeddings.weight', 'buckets embed'),
    Entry('head_transform/kernel', f'{HEAD}.transform.dense.weight', 'mlp embed'),
    Entry('head_transform/bias', f'{HEAD}.transform.dense.bias', 'mlp'),
    Entry('head/bias', f'{HEAD}.bias', 'vocab'),
    Entry(f'{attention}/out', f'{layer}.attention.output.dense.weight', 'embed (heads head_dim)'),
    Entry(f'{attention}/out_bias', f'{layer}.attention.output.dense.bias', 'embed'),
  ]
  for name, heads in (('query', 'heads'), ('key', 'kv_heads'), ('value', 'kv_heads')):
    theirs = f'{layer}.attention.self.{name}_proj'
    found.append(Entry(f'{attention}/{name}', f'{theirs}.weight', f'({heads} head_dim) embed'))
    found.append(Entry(f'{attention}/{name}_bias', f'{theirs}.bias', f'({heads} head_dim)'))
  for ours, theirs, layout in (('up', 'intermediate', 'mlp embed'), ('down', 'output', 'embed mlp')):
    found.append(Entry(f'{BLOCK}/mlp/{ours}', f'{layer}.{theirs}.dense.weight', layout))
    found.append(Entry(f'{BLOCK}/mlp/{ours}_bias', f'{layer}.{theirs}.dense.bias', layout.split()[0]))
  norms = {
    'embedding_norm': 'deberta.embeddings.LayerNorm', 'encoder_bias/norm': 'deberta.encoder.LayerNorm',
    'head_transform/norm': f'{HEAD}.transform.LayerNorm', f'{BLOCK}/self_norm': f'{layer}.attention.output.LayerNorm',
    f'{BLOCK}/mlp_norm': f'{layer}.output.LayerNorm',
  }  # fmt: skip
  for ours, theirs in norms.items():
    found += [Entry(f'{ours}/scale', f'{theirs}.weight', 'embed'), Entry(f'{ours}/bias', f'{theirs}.bias', 'embed')]
  return found


# Microsoft's files name the head lm_predictions.lm_head, as `legacy: false` does; v3 also has the head of its
# discriminator and `_weight`, what the discriminator's table adds to the generator's.
DEBERTA = Family(
  'deberta-v2', 'DebertaV2ForMaskedLM', read, write, entries,
  aliases={
    f'{HEAD}.decoder.weight': 'deberta.embeddings.word_embeddings.weight', f'{HEAD}.decoder.bias': f'{HEAD}.bias',
  },
  renamed={
    r'^lm_predictions\.lm_head\.(dense|LayerNorm)\.': rf'{HEAD}.transform.\1.',
    r'^lm_predictions\.lm_head\.bias$': f'{HEAD}.bias',
  },
  carried=(r'mask_predictions\..*', r'deberta\.embeddings\.word_embeddings\._weight'),
  unused=(r'deberta\.embeddings\.position_ids',), sentencepiece='spm.model',
)  # fmt: skip
