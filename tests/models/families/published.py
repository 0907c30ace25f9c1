"""The goldens of `transformers` as models of this repository: a config and a tree of parameters for each family."""

import json
import pathlib
import struct

import numpy as np

from models.families.decoder import DecoderConfig, DecoderMlpConfig
from models.families.encoder import EncoderConfig
from models.families.encoder_decoder import EncoderDecoderConfig
from models.layers.mlp import MlpConfig
from models.layers.norm import LayerNormConfig, RmsNormConfig
from models.layers.positions.rotary import Linear, Llama3, NoScaling, Yarn

GOLDENS = pathlib.Path(__file__).parents[2] / 'golden/interchange'
RENAMED = {'original_max_position_embeddings': 'original_max_positions'}


def safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The float32 tensors of a file: the length of a JSON header in 8 bytes, the header, the values."""
  raw = path.read_bytes()
  start = 8 + struct.unpack('<Q', raw[:8])[0]
  header = json.loads(raw[8:start])
  header.pop('__metadata__', None)
  read = lambda about: np.frombuffer(raw[start:][slice(*about['data_offsets'])], '<f4').reshape(about['shape'])
  return {name: read(about) for name, about in header.items()}


class Weights:
  """The tensors of a family; every one must be used. A name with {} stands for the stack of all layers."""

  def __init__(self, name: str):
    self.tensors = safetensors(GOLDENS / name / 'model.safetensors')
    self.unused = set(self.tensors)

  def __call__(self, name: str, layers: int | None = None) -> np.ndarray:
    names = [name] if layers is None else [name.format(i) for i in range(layers)]
    self.unused -= set(names)
    found = [self.tensors[n] for n in names]
    return found[0] if layers is None else np.stack(found)


def incoming(w, head_dim):
  """[…, heads * head_dim, embed] -> […, embed, heads, head_dim]."""
  w = np.swapaxes(w, -1, -2)
  return w.reshape(*w.shape[:-1], -1, head_dim)


def outgoing(w, head_dim):
  """[…, embed, heads * head_dim] -> […, heads, head_dim, embed]."""
  w = np.swapaxes(w, -1, -2)
  return w.reshape(*w.shape[:-2], -1, head_dim, w.shape[-1])


def split_heads(b, head_dim):
  return b.reshape(*b.shape[:-1], -1, head_dim)


def turned(w):
  return np.swapaxes(w, -1, -2)


def scaling(rope: dict):
  kinds = {'default': NoScaling, 'linear': Linear, 'llama3': Llama3, 'yarn': Yarn}
  kind = kinds[rope['rope_type']]
  own = {RENAMED.get(key, key): value for key, value in rope.items()}
  return kind(**{key: own[key] for key in own if key in kind.__dataclass_fields__})


def llama(c: dict, w: Weights):
  """Llama, Mistral, Qwen 2 and 3, OLMo 2 and Gemma 2, whose tensors have the same names."""
  n, d, layer = (
    c['num_hidden_layers'],
    c.get('head_dim') or c['hidden_size'] // c['num_attention_heads'],
    'model.layers.{}.',
  )
  d = d if c['model_type'] not in ('qwen2', 'olmo2') else c['hidden_size'] // c['num_attention_heads']
  cfg = DecoderConfig(
    vocab_size=c['vocab_size'], embed=c['hidden_size'], layers=n, heads=c['num_attention_heads'], head_dim=d,
    kv_heads=c['num_key_value_heads'], mlp=DecoderMlpConfig(hidden=c['intermediate_size']),
    norm=RmsNormConfig(eps=c['rms_norm_eps']), rope_theta=c['rope_parameters']['rope_theta'],
    rope_scaling=scaling(c['rope_parameters']), head='tied' if c['tie_word_embeddings'] else 'untied',
  )  # fmt: skip
  attention = {
    ours: incoming(w(f'{layer}self_attn.{theirs}_proj.weight', n), d)
    for ours, theirs in (('query', 'q'), ('key', 'k'), ('value', 'v'))
  }
  attention['out'] = outgoing(w(f'{layer}self_attn.o_proj.weight', n), d)
  mlp = (
    {name: turned(w(f'{layer}mlp.{name}_proj.weight', n)) for name in ('gate', 'up', 'down')}
    if (f'{layer}mlp.up_proj.weight'.format(0) in w.tensors)
    else {}
  )
  blocks = {'self_attention': attention, 'mlp': mlp}
  params = {'embedding': {'table': w('model.embed_tokens.weight')}}
  params['decoder'] = {'blocks': blocks, 'norm': {'scale': w('model.norm.weight')}}
  if cfg.head == 'untied':
    params['head'] = {'kernel': turned(w('lm_head.weight'))}
  return cfg, params


def pre_norms(c, w, params):
  n = c['num_hidden_layers']
  params['decoder']['blocks']['self_norm'] = {'scale': w('model.layers.{}.input_layernorm.weight', n)}
  params['decoder']['blocks']['mlp_norm'] = {'scale': w('model.layers.{}.post_attention_layernorm.weight', n)}


def plain_llama(c, w):
  cfg, params = llama(c, w)
  pre_norms(c, w, params)
  return cfg, params


def mistral(c, w):
  cfg, params = plain_llama(c, w)
  return change(cfg, windows=(c['sliding_window'],)), params


def mixtral(c, w):
  cfg, params = plain_llama(c, w)
  n, experts, layer = cfg.layers, c['num_local_experts'], 'model.layers.{}.block_sparse_moe.'
  mlp = {'router': turned(w(f'{layer}gate.weight', n))}
  for ours, theirs in (('gate', 'w1'), ('up', 'w3'), ('down', 'w2')):
    each = [turned(w(f'{layer}experts.{i}.{theirs}.weight', n)) for i in range(experts)]
    mlp[ours] = np.stack(each, 1)
  params['decoder']['blocks']['mlp'] = mlp
  return change(cfg, experts=experts, experts_per_token=c['num_experts_per_tok']), params


def qwen2(c, w):
  cfg, params = plain_llama(c, w)
  for ours, theirs in (('query', 'q'), ('key', 'k'), ('value', 'v')):
    bias = w(f'model.layers.{{}}.self_attn.{theirs}_proj.bias', cfg.layers)
    params['decoder']['blocks']['self_attention'][f'{ours}_bias'] = split_heads(bias, cfg.head_dim)
  return change(cfg, bias='qkv'), params


def head_norms(c, w, params, shape):
  for ours, theirs in (('query_norm', 'q_norm'), ('key_norm', 'k_norm')):
    scale = w(f'model.layers.{{}}.self_attn.{theirs}.weight', c['num_hidden_layers'])
    params['decoder']['blocks']['self_attention'][ours] = {'scale': shape(scale)}


def qwen3(c, w):
  cfg, params = plain_llama(c, w)
  head_norms(c, w, params, lambda scale: scale)
  return change(cfg, qk_norm='heads'), params


def olmo2(c, w):
  cfg, params = llama(c, w)
  for ours, theirs in (('self_norm', 'post_attention_layernorm'), ('mlp_norm', 'post_feedforward_layernorm')):
    params['decoder']['blocks'][ours] = {'scale': w(f'model.layers.{{}}.{theirs}.weight', cfg.layers)}
  head_norms(c, w, params, lambda scale: split_heads(scale, cfg.head_dim))
  return change(cfg, qk_norm='all', norm_placement='inner'), params


def gemma2(c, w):
  """Norms multiply by 1 + weight; the scale of queries and the embeddings' factor move into weights."""
  cfg, params = llama(c, w)
  names = {
    'self_norm': 'input', 'self_out_norm': 'post_attention', 'mlp_norm': 'pre_feedforward',
    'mlp_out_norm': 'post_feedforward',
  }  # fmt: skip
  blocks = params['decoder']['blocks']
  for ours, theirs in names.items():
    blocks[ours] = {'scale': 1 + w(f'model.layers.{{}}.{theirs}_layernorm.weight', cfg.layers)}
  params['decoder']['norm']['scale'] = 1 + params['decoder']['norm']['scale']
  blocks['self_attention']['query'] = (
    blocks['self_attention']['query'] * (cfg.head_dim / c['query_pre_attn_scalar']) ** 0.5
  )
  params['embedding']['table'] = params['embedding']['table'] * cfg.embed**0.5
  windows = tuple(c['sliding_window'] if kind == 'sliding_attention' else None for kind in c['layer_types'][:2])
  return change(
    cfg, windows=windows, head='tied_scaled', norm_placement='sandwich', attention_softcap=c['attn_logit_softcapping'],
    logit_softcap=c['final_logit_softcapping'], mlp=DecoderMlpConfig(hidden=cfg.mlp.hidden, activation='gelu_tanh'),
  ), params  # fmt: skip


def layer_norm(w, name, n=None):
  return {'scale': w(f'{name}.weight', n), 'bias': w(f'{name}.bias', n)}


def gpt2(c, w):
  n, e, d, layer = c['n_layer'], c['n_embd'], c['n_embd'] // c['n_head'], 'transformer.h.{}.'
  cfg = DecoderConfig(
    vocab_size=c['vocab_size'], embed=e, layers=n, heads=c['n_head'], head_dim=d, positions='learned', head='tied',
    mlp=DecoderMlpConfig(hidden=c['n_inner'], activation='gelu_tanh', gated=False), max_positions=c['n_positions'],
    norm=LayerNormConfig(eps=c['layer_norm_epsilon']), bias='all',
  )  # fmt: skip
  parts = lambda x: zip(('query', 'key', 'value'), np.split(x, 3, -1), strict=True)
  attention = {name: split_heads(part, d) for name, part in parts(w(f'{layer}attn.c_attn.weight', n))}
  attention |= {f'{name}_bias': split_heads(part, d) for name, part in parts(w(f'{layer}attn.c_attn.bias', n))}
  attention |= {
    'out': w(f'{layer}attn.c_proj.weight', n).reshape(n, -1, d, e), 'out_bias': w(f'{layer}attn.c_proj.bias', n)
  }  # fmt: skip
  mlp = {
    'up': w(f'{layer}mlp.c_fc.weight', n), 'up_bias': w(f'{layer}mlp.c_fc.bias', n),
    'down': w(f'{layer}mlp.c_proj.weight', n), 'down_bias': w(f'{layer}mlp.c_proj.bias', n),
  }  # fmt: skip
  norms = {'self_norm': layer_norm(w, f'{layer}ln_1', n), 'mlp_norm': layer_norm(w, f'{layer}ln_2', n)}
  embedding = {'table': w('transformer.wte.weight'), 'positions': w('transformer.wpe.weight')}
  stack = {'blocks': norms | {'self_attention': attention, 'mlp': mlp}, 'norm': layer_norm(w, 'transformer.ln_f')}
  return cfg, {'embedding': embedding, 'decoder': stack}


def dense_mlp(w, n, up, down, bias):
  found = {'up': turned(w(f'{up}.weight', n)), 'down': turned(w(f'{down}.weight', n))}
  return found | ({'up_bias': w(f'{up}.bias', n), 'down_bias': w(f'{down}.bias', n)} if bias else {})


def gpt_neox(c, w):
  n, e, heads, layer = c['num_hidden_layers'], c['hidden_size'], c['num_attention_heads'], 'gpt_neox.layers.{}.'
  d = e // heads
  cfg = DecoderConfig(
    vocab_size=c['vocab_size'], embed=e, layers=n, heads=heads, head_dim=d, bias='all',
    norm=LayerNormConfig(eps=c['layer_norm_eps']),
    mlp=DecoderMlpConfig(hidden=c['intermediate_size'], activation='gelu_exact', gated=False),
    parallel='two_norms', rope_theta=c['rope_parameters']['rope_theta'],
    rotary_fraction=c['rope_parameters']['partial_rotary_factor'],
  )  # fmt: skip
  fused = w(f'{layer}attention.query_key_value.weight', n).reshape(n, heads, 3, d, e)
  fused_bias = w(f'{layer}attention.query_key_value.bias', n).reshape(n, heads, 3, d)
  attention = {}
  for i, name in enumerate(('query', 'key', 'value')):
    attention[name], attention[f'{name}_bias'] = np.moveaxis(fused[:, :, i], -1, 1), fused_bias[:, :, i]
  attention['out'] = outgoing(w(f'{layer}attention.dense.weight', n), d)
  attention['out_bias'] = w(f'{layer}attention.dense.bias', n)
  blocks = {
    'self_attention': attention, 'mlp': dense_mlp(w, n, f'{layer}mlp.dense_h_to_4h', f'{layer}mlp.dense_4h_to_h', True),
    'self_norm': layer_norm(w, f'{layer}input_layernorm', n),
    'mlp_norm': layer_norm(w, f'{layer}post_attention_layernorm', n),
  }  # fmt: skip
  return cfg, {
    'embedding': {'table': w('gpt_neox.embed_in.weight')}, 'head': {'kernel': turned(w('embed_out.weight'))},
    'decoder': {'blocks': blocks, 'norm': layer_norm(w, 'gpt_neox.final_layer_norm')},
  }  # fmt: skip


def falcon(c, w):
  n, e, heads, layer = c['num_hidden_layers'], c['hidden_size'], c['num_attention_heads'], 'transformer.h.{}.'
  d, new = e // heads, c['new_decoder_architecture']
  kv = c['num_kv_heads'] if new else 1
  cfg = DecoderConfig(
    vocab_size=c['vocab_size'], embed=e, layers=n, heads=heads, kv_heads=kv, head_dim=d, head='tied',
    norm=LayerNormConfig(eps=c['layer_norm_epsilon']), parallel='two_norms' if new else 'one_norm',
    mlp=DecoderMlpConfig(hidden=c['ffn_hidden_size'], activation='gelu_exact', gated=False),
    rope_theta=c['rope_parameters']['rope_theta'],
  )  # fmt: skip
  fused = w(f'{layer}self_attention.query_key_value.weight', n).reshape(n, kv, heads // kv + 2, d, e)
  q, k, v = np.split(np.moveaxis(fused, -1, 1), [heads // kv, heads // kv + 1], 3)
  attention = {name: x.reshape(n, e, -1, d) for name, x in (('query', q), ('key', k), ('value', v))}
  attention['out'] = outgoing(w(f'{layer}self_attention.dense.weight', n), d)
  mlp = dense_mlp(w, n, f'{layer}mlp.dense_h_to_4h', f'{layer}mlp.dense_4h_to_h', False)
  names = {'self_norm': 'ln_attn', 'mlp_norm': 'ln_mlp'} if new else {'self_norm': 'input_layernorm'}
  blocks = {ours: layer_norm(w, layer + theirs, n) for ours, theirs in names.items()}
  return cfg, {
    'embedding': {'table': w('transformer.word_embeddings.weight')},
    'decoder': {
      'blocks': blocks | {'self_attention': attention, 'mlp': mlp}, 'norm': layer_norm(w, 'transformer.ln_f'),
    },
  }  # fmt: skip


BERT_HEADS = {
  'bert': ('cls.predictions.transform.dense', 'cls.predictions.transform.LayerNorm', 'cls.predictions.bias'),
  'roberta': ('lm_head.dense', 'lm_head.layer_norm', 'lm_head.bias'),
  'electra': ('generator_predictions.dense', 'generator_predictions.LayerNorm', 'generator_lm_head.bias'),
}


def bert(c, w):
  """Token type 0 is added to every position; RoBERTa's first position is number 2 of its table."""
  kind, n, e, heads = c['model_type'], c['num_hidden_layers'], c['hidden_size'], c['num_attention_heads']
  d, layer, first = e // heads, f'{kind}.encoder.layer.{{}}.', 2 if kind == 'roberta' else 0
  positions = w(f'{kind}.embeddings.position_embeddings.weight')[first:]
  cfg = EncoderConfig(
    vocab_size=c['vocab_size'], embed=e, layers=n, heads=heads, head_dim=d, positions='learned', head='tied',
    max_positions=len(positions), norm=LayerNormConfig(eps=c['layer_norm_eps']), norm_placement='post', bias='all',
    mlp=MlpConfig(hidden=c['intermediate_size'], activation='gelu_exact', gated=False), embedding_norm=True,
    head_transform='gelu_exact', head_bias=True,
  )  # fmt: skip
  attention = {}
  for name in ('query', 'key', 'value'):
    attention[name] = incoming(w(f'{layer}attention.self.{name}.weight', n), d)
    attention[f'{name}_bias'] = split_heads(w(f'{layer}attention.self.{name}.bias', n), d)
  attention['out'] = outgoing(w(f'{layer}attention.output.dense.weight', n), d)
  attention['out_bias'] = w(f'{layer}attention.output.dense.bias', n)
  blocks = {
    'self_attention': attention, 'mlp': dense_mlp(w, n, f'{layer}intermediate.dense', f'{layer}output.dense', True),
    'self_norm': layer_norm(w, f'{layer}attention.output.LayerNorm', n),
    'mlp_norm': layer_norm(w, f'{layer}output.LayerNorm', n),
  }  # fmt: skip
  types = w(f'{kind}.embeddings.token_type_embeddings.weight')
  dense, norm, bias = BERT_HEADS[kind]
  transform = {'kernel': turned(w(f'{dense}.weight')), 'bias': w(f'{dense}.bias'), 'norm': layer_norm(w, norm)}
  table = {'table': w(f'{kind}.embeddings.word_embeddings.weight'), 'positions': positions + types[0]}
  return cfg, {
    'embedding': table, 'embedding_norm': layer_norm(w, f'{kind}.embeddings.LayerNorm'), 'encoder': {'blocks': blocks},
    'head_transform': transform, 'head': {'bias': w(bias)},
  }  # fmt: skip


def t5_stack(c, w, side, n):
  d, cross = c['d_kv'], side == 'decoder'
  layer = f'{side}.block.{{}}.layer.'
  heads = lambda name: {
    ours: f(w(f'{layer}{name}.{theirs}.weight', n), d)
    for ours, theirs, f in (
      ('query', 'q', incoming), ('key', 'k', incoming), ('value', 'v', incoming), ('out', 'o', outgoing)
    )
  }  # fmt: skip
  last, gated = 2 if cross else 1, c['feed_forward_proj'].startswith('gated')
  names = {'gate': 'wi_0', 'up': 'wi_1', 'down': 'wo'} if gated else {'up': 'wi', 'down': 'wo'}
  mlp = {ours: turned(w(f'{layer}{last}.DenseReluDense.{theirs}.weight', n)) for ours, theirs in names.items()}
  norm = lambda i: {'scale': w(f'{layer}{i}.layer_norm.weight', n)}
  blocks = {'self_attention': heads('0.SelfAttention'), 'self_norm': norm(0), 'mlp': mlp, 'mlp_norm': norm(last)}
  if cross:
    blocks |= {'cross_attention': heads('1.EncDecAttention'), 'cross_norm': norm(1)}
  return {'blocks': blocks, 'norm': {'scale': w(f'{side}.final_layer_norm.weight')}}


def t5(c, w):
  """T5 1.0 and 1.1, UL2 and umT5; 'tied_scaled' where there is no `lm_head.weight`."""
  layers = {'encoder': c['num_layers'], 'decoder': c['num_decoder_layers']}
  gated, activation = c['feed_forward_proj'].startswith('gated'), c['feed_forward_proj'].removeprefix('gated-')
  each, untied = c['model_type'] == 'umt5', 'lm_head.weight' in w.tensors
  cfg = EncoderDecoderConfig(
    vocab_size=c['vocab_size'], embed=c['d_model'], heads=c['num_heads'], head_dim=c['d_kv'],
    encoder_layers=layers['encoder'], decoder_layers=layers['decoder'], norm=RmsNormConfig(eps=c['layer_norm_epsilon']),
    mlp=MlpConfig(hidden=c['d_ff'], gated=gated, activation={'gelu': 'gelu_tanh'}.get(activation, activation)),
    relative_buckets=c['relative_attention_num_buckets'], relative_max_distance=c['relative_attention_max_distance'],
    relative_layers='each' if each else 'shared', head='untied' if untied else 'tied_scaled',
  )  # fmt: skip
  params = {'embedding': {'table': w('shared.weight')}}
  for side, n in layers.items():
    params[side] = t5_stack(c, w, side, n)
    table = f'{side}.block.{{}}.layer.0.SelfAttention.relative_attention_bias.weight'
    params[f'{side}_bias'] = {'table': w(table, n) if each else w(table.format(0))}
    w.unused.discard(f'{side}.embed_tokens.weight')  # the same tensor as shared.weight
  if untied:
    params['head'] = {'kernel': turned(w('lm_head.weight'))}
  return cfg, params


def change(cfg, **values):
  return type(cfg)(**{name: getattr(cfg, name) for name in cfg.__dataclass_fields__} | values)


READERS = {
  't5_v1_0': t5, 't5_v1_1': t5, 'ul2': t5, 'umt5': t5, 'llama': plain_llama, 'yi': plain_llama, 'mistral': mistral,
  'qwen2': qwen2, 'qwen3': qwen3, 'olmo2': olmo2, 'gemma2': gemma2, 'gpt2': gpt2, 'gpt_neox': gpt_neox,
  'falcon': falcon, 'falcon_40b': falcon, 'mixtral': mixtral, 'bert': bert, 'roberta': bert, 'electra': bert,
}  # fmt: skip


def read(name: str):
  """(config, parameters, expected arrays) of a golden; every tensor has found a place."""
  weights = Weights(name)
  cfg, params = READERS[name](json.loads((GOLDENS / name / 'config.json').read_text()), weights)
  assert not weights.unused, weights.unused
  return cfg, params, dict(np.load(GOLDENS / name / 'expected.npz'))
