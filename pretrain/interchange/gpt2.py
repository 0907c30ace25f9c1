"""GPT-2, whose matrices are stored [in, out], with query, key and value in one."""

from typing import Any

from models.families.decoder import DecoderConfig, DecoderMlpConfig
from models.layers.norm import LayerNormConfig
from pretrain.interchange.config_json import ConfigJson
from pretrain.interchange.family import Family, Tensors
from pretrain.interchange.layout import Entry

ACTIVATIONS = {
  'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu_exact', 'silu': 'silu', 'relu': 'relu',
}  # fmt: skip


def read(config: ConfigJson, tensors: Tensors) -> DecoderConfig:
  config.expect('scale_attn_weights', True)
  config.expect('scale_attn_by_inverse_layer_idx', False)
  config.expect('add_cross_attention', False)
  config.expect('tie_word_embeddings', True)
  config.ignore(
    'attn_pdrop', 'embd_pdrop', 'resid_pdrop', 'n_ctx', 'reorder_and_upcast_attn', 'summary_activation',
    'summary_first_dropout', 'summary_proj_to_labels', 'summary_type', 'summary_use_proj',
  )  # fmt: skip
  embed, heads = config.take('n_embd'), config.take('n_head')
  return DecoderConfig(
    vocab_size=config.take('vocab_size'), embed=embed, heads=heads, head_dim=embed // heads,
    layers=config.take('n_layer'),
    mlp=DecoderMlpConfig(
      hidden=config.take('n_inner', None) or 4 * embed, gated=False,
      activation=config.choose('activation_function', ACTIVATIONS, 'gelu_new'),
    ),
    norm=LayerNormConfig(eps=config.take('layer_norm_epsilon', 1e-5, float)), bias='all', positions='learned',
    max_positions=config.take('n_positions', 1024), head='tied',
  )  # fmt: skip


def write(cfg: DecoderConfig) -> dict[str, Any]:
  names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
  return {
    'vocab_size': cfg.vocab_size, 'n_embd': cfg.embed, 'n_head': cfg.heads, 'n_layer': cfg.layers,
    'n_inner': cfg.mlp.hidden, 'n_positions': cfg.max_positions, 'layer_norm_epsilon': cfg.norm.eps,
    'activation_function': names[cfg.mlp.activation], 'bos_token_id': 0, 'eos_token_id': 1, 'pad_token_id': 0,
    'attn_pdrop': cfg.dropout, 'embd_pdrop': cfg.dropout, 'resid_pdrop': cfg.dropout, 'tie_word_embeddings': True,
  }  # fmt: skip


def entries(cfg: DecoderConfig) -> list[Entry]:
  block, layer = 'decoder/blocks', 'transformer.h.{0}'
  attention = f'{block}/self_attention'
  found = [
    Entry('embedding/table', 'transformer.wte.weight', 'vocab embed'),
    Entry('embedding/positions', 'transformer.wpe.weight', 'length embed'),
    Entry(f'{attention}/out', f'{layer}.attn.c_proj.weight', '(heads head_dim) embed'),
    Entry(f'{attention}/out_bias', f'{layer}.attn.c_proj.bias', 'embed'),
    Entry(f'{block}/mlp/up', f'{layer}.mlp.c_fc.weight', 'embed mlp'),
    Entry(f'{block}/mlp/up_bias', f'{layer}.mlp.c_fc.bias', 'mlp'),
    Entry(f'{block}/mlp/down', f'{layer}.mlp.c_proj.weight', 'mlp embed'),
    Entry(f'{block}/mlp/down_bias', f'{layer}.mlp.c_proj.bias', 'embed'),
  ]
  for i, (name, heads) in enumerate((('query', 'heads'), ('key', 'kv_heads'), ('value', 'kv_heads'))):
    found.append(Entry(f'{attention}/{name}', f'{layer}.attn.c_attn.weight', f'embed (@{i}/3 {heads} head_dim)'))
    found.append(Entry(f'{attention}/{name}_bias', f'{layer}.attn.c_attn.bias', f'(@{i}/3 {heads} head_dim)'))
  norms = {
    f'{block}/self_norm': f'{layer}.ln_1',
    f'{block}/mlp_norm': f'{layer}.ln_2',
    'decoder/norm': 'transformer.ln_f',
  }
  for ours, theirs in norms.items():
    found += [Entry(f'{ours}/scale', f'{theirs}.weight', 'embed'), Entry(f'{ours}/bias', f'{theirs}.bias', 'embed')]
  return found


GPT2 = Family(
  'gpt2', 'GPT2LMHeadModel', read, write, entries, prefix='transformer.',
  aliases={'lm_head.weight': 'transformer.wte.weight'},
  unused=(r'transformer\.h\.\d+\.attn\.(bias|masked_bias)',),
)  # fmt: skip
