"""Writes tests/golden/interchange/ again: tiny random models of `transformers` and the logits that it gives for them.

Run by hand, in an environment of its own (`pip install torch transformers`; last written with torch 2.15 on a CPU and
transformers 5.24). Neither the tests nor the packages import these libraries. Each family has

  config.json, model.safetensors   as `save_pretrained` writes them, float32
  expected.npz                     `long` and `short`: two documents (for an encoder-decoder also `long_target` and
                                   `short_target`: decoder inputs); `long_logits` and `short_logits`; `greedy`: the 32
                                   most likely next tokens after the first 20 tokens of `short`, end tokens ignored (for
                                   an encoder-decoder after the decoder's start, with `short` in the encoder)

Numbers that a model could confuse with its defaults (eps, theta, buckets, windows) are not at their defaults, and no
norm or bias is at its init.

masked.npz has, by the name of each encoder that predicts tokens, log P(token | all others) of the first tokens of its
`short` between CLS and SEP, each hidden alone (Salazar et al. 2020, arXiv:1910.14659, eq. 1).

  python scripts/make_interchange_goldens.py [family …]
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

GOLDENS = pathlib.Path(__file__).parents[1] / 'tests/golden/interchange'
VOCAB, LONG, SHORT, GREEDY = 96, 200, 60, 32
ENCODERS = ('bert', 'roberta', 'electra_generator', 'deberta_v2', 'deberta_v3')
MASKED, CLS, SEP, MASK = 24, 3, 4, 5

T5 = dict(
  vocab_size=VOCAB, d_model=32, d_kv=12, d_ff=48, num_heads=4, num_layers=2, num_decoder_layers=3,
  relative_attention_num_buckets=16, relative_attention_max_distance=50, layer_norm_epsilon=1e-3, dropout_rate=0.0,
  decoder_start_token_id=0,
)  # fmt: skip
LLAMA = dict(
  vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
  num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-3, max_position_embeddings=256, tie_word_embeddings=False,
)  # fmt: skip
BERT = dict(
  vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
  max_position_embeddings=220, layer_norm_eps=1e-3, type_vocab_size=2,
)  # fmt: skip
DEBERTA = BERT | dict(
  type_vocab_size=0, relative_attention=True, position_biased_input=False, share_att_key=True, position_buckets=16,
  max_relative_positions=70, pos_att_type=['p2c', 'c2p'], norm_rel_ebd='none',
)  # fmt: skip
FALCON = dict(
  vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, layer_norm_epsilon=1e-3, bias=False,
  alibi=False, parallel_attn=True, rope_parameters={'rope_type': 'default', 'rope_theta': 700.0},
)  # fmt: skip


def rope(theta: float, kind: str = 'default', **values) -> dict:
  return {'rope_parameters': {'rope_type': kind, 'rope_theta': theta, **values}}


LLAMA3 = rope(
  5000.0, 'llama3', factor=4.0, low_freq_factor=1.0, high_freq_factor=3.0, original_max_position_embeddings=64
)
YARN = rope(900.0, 'yarn', factor=4.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=2.0)
LINEAR = rope(600.0, 'linear', factor=3.0)

# name -> (config class, arguments, model class)
FAMILIES = {
  't5_v1_0': ('T5Config', T5 | {'feed_forward_proj': 'relu'}, 'T5ForConditionalGeneration'),
  't5_v1_1': (
    'T5Config', T5 | {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}, 'T5ForConditionalGeneration',
  ),
  'ul2': (
    'T5Config', T5 | {'feed_forward_proj': 'gated-silu', 'tie_word_embeddings': False}, 'T5ForConditionalGeneration',
  ),
  'mt5': (
    'MT5Config', T5 | {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}, 'MT5ForConditionalGeneration',
  ),
  'umt5': (
    'UMT5Config', T5 | {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False},
    'UMT5ForConditionalGeneration',
  ),
  'llama': ('LlamaConfig', LLAMA | LLAMA3, 'LlamaForCausalLM'),
  'yi': ('LlamaConfig', LLAMA | LINEAR, 'LlamaForCausalLM'),
  'mistral': ('MistralConfig', LLAMA | rope(800.0) | {'sliding_window': 48}, 'MistralForCausalLM'),
  'qwen2': (
    'Qwen2Config', {**LLAMA, **rope(800.0), 'tie_word_embeddings': True, 'head_dim': 8}, 'Qwen2ForCausalLM',
  ),
  'qwen3': ('Qwen3Config', LLAMA | YARN, 'Qwen3ForCausalLM'),
  'olmo2': ('Olmo2Config', {**LLAMA, **rope(800.0), 'head_dim': 8, 'eos_token_id': 2}, 'Olmo2ForCausalLM'),
  'gemma2': (
    'Gemma2Config',
    {
      **LLAMA, **rope(800.0), 'num_hidden_layers': 4, 'sliding_window': 40, 'query_pre_attn_scalar': 20,
      'attn_logit_softcapping': 5.0, 'final_logit_softcapping': 3.0, 'tie_word_embeddings': True,
    },
    'Gemma2ForCausalLM',
  ),
  'gpt2': (
    'GPT2Config',
    dict(
      vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=220, layer_norm_epsilon=1e-3,
      bos_token_id=2, eos_token_id=2,
    ),
    'GPT2LMHeadModel',
  ),
  'gpt_neox': (
    'GPTNeoXConfig',
    dict(
      vocab_size=VOCAB, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
      layer_norm_eps=1e-3, max_position_embeddings=256, use_parallel_residual=True,
      **rope(700.0, partial_rotary_factor=0.25),
    ),
    'GPTNeoXForCausalLM',
  ),
  'falcon': (
    'FalconConfig', FALCON | {'multi_query': True, 'new_decoder_architecture': False}, 'FalconForCausalLM',
  ),
  'falcon_40b': (
    'FalconConfig',
    FALCON | {'new_decoder_architecture': True, 'num_kv_heads': 2, 'ffn_hidden_size': 48},
    'FalconForCausalLM',
  ),
  'bert': ('BertConfig', BERT, 'BertForMaskedLM'),
  'roberta': ('RobertaConfig', BERT, 'RobertaForMaskedLM'),
  'electra': ('ElectraConfig', BERT | {'embedding_size': 32}, 'ElectraForMaskedLM'),
  'electra_generator': ('ElectraConfig', BERT | {'embedding_size': 24}, 'ElectraForMaskedLM'),
  'electra_discriminator': (
    'ElectraConfig', BERT | {'embedding_size': 24, 'hidden_act': 'gelu_new'}, 'ElectraForPreTraining',
  ),
  'deberta_v2': (
    'DebertaV2Config', DEBERTA | {'position_buckets': 15, 'pos_att_type': ['c2p']}, 'DebertaV2ForMaskedLM',
  ),
  'deberta_v3': ('DebertaV2Config', DEBERTA | {'legacy': False, 'norm_rel_ebd': 'layer_norm'}, 'DebertaV2ForMaskedLM'),
  'mixtral': (
    'MixtralConfig',
    {**LLAMA, **rope(800.0), 'intermediate_size': 24, 'num_local_experts': 4, 'num_experts_per_tok': 2},
    'MixtralForCausalLM',
  ),
}  # fmt: skip
# Keys of a family's config.json that its model above does not have. Smaller, so that the files are.
TINY, HALF = LLAMA | {'vocab_size': 40, 'hidden_size': 16, 'head_dim': 8}, rope(800.0)
WINDOWED = {'use_sliding_window': True, 'sliding_window': 40}
VARIANTS = {
  'llama_bias': ('LlamaConfig', TINY | HALF | {'attention_bias': True, 'mlp_bias': True}, 'LlamaForCausalLM'),
  'llama_mlp_bias': ('LlamaConfig', TINY | HALF | {'mlp_bias': True, 'num_hidden_layers': 1}, 'LlamaForCausalLM'),
  'qwen2_windows': (
    'Qwen2Config', {**TINY, **HALF, **WINDOWED, 'head_dim': 4, 'num_hidden_layers': 3, 'max_window_layers': 2},
    'Qwen2ForCausalLM',
  ),
  'qwen3_bias': (
    'Qwen3Config', TINY | LINEAR | WINDOWED | {'max_window_layers': 1, 'attention_bias': True}, 'Qwen3ForCausalLM',
  ),
  'olmo2_bias': (
    'Olmo2Config', {**TINY, **HALF, 'head_dim': 4, 'num_hidden_layers': 1, 'attention_bias': True, 'eos_token_id': 2},
    'Olmo2ForCausalLM',
  ),
  'gemma2_bias': (
    'Gemma2Config', {**TINY, **HALF, 'sliding_window': 40, 'query_pre_attn_scalar': 20, 'attention_bias': True},
    'Gemma2ForCausalLM',
  ),
  'gpt2_unscaled': (
    'GPT2Config',
    dict(
      vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=220, layer_norm_epsilon=1e-3, bos_token_id=2,
      eos_token_id=2, scale_attn_weights=False, tie_word_embeddings=False, activation_function='relu',
    ),
    'GPT2LMHeadModel',
  ),
  'gpt_neox_yarn': (
    'GPTNeoXConfig',
    dict(
      vocab_size=40, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
      layer_norm_eps=1e-3, max_position_embeddings=256, use_parallel_residual=False, attention_bias=False,
      rope_parameters={
        **YARN['rope_parameters'], 'original_max_position_embeddings': 256, 'partial_rotary_factor': 0.5,
      },
    ),
    'GPTNeoXForCausalLM',
  ),
  # With its eager attention, transformers 5.24 adds ALiBi's biases twice: in the mask, and to the scores.
  'falcon_rw': (
    'FalconConfig',
    dict(
      vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, layer_norm_epsilon=1e-3, bias=True,
      alibi=True, parallel_attn=False, multi_query=False, new_decoder_architecture=False, attn_implementation='sdpa',
    ),
    'FalconForCausalLM',
  ),
}  # fmt: skip
ALL = FAMILIES | VARIANTS


def is_untied_t5(name: str) -> bool:
  kind, arguments, _ = ALL[name]
  return 'T5' in kind and arguments.get('tie_word_embeddings') is False


def make_model(name: str):
  kind, arguments, model = ALL[name]
  cfg = getattr(transformers, kind)(**{'attn_implementation': 'eager'} | arguments)
  for site in (key for key in vars(cfg) if 'dropout' in key or key.endswith('pdrop')):
    setattr(cfg, site, 0.0)
  found = getattr(transformers, model)(cfg).eval().float()
  if is_untied_t5(name):  # these classes tie the head whatever they are given; a published file has a head of its own
    found.lm_head.weight = torch.nn.Parameter(found.lm_head.weight.detach().clone())
  shake(found, torch.Generator().manual_seed(0))
  return found


@torch.no_grad()
def shake(model, generator: torch.Generator) -> None:
  """Norms and biases move by 0.2 from their init; matrices get unit gain, T5's queries divided by the root of their
  size, as its init has it; tables get a std of 1 (T5's biases: 0.5)."""
  tables = {id(m.weight): m for m in model.modules() if isinstance(m, torch.nn.Embedding)}
  transposed = {id(m.weight) for m in model.modules() if type(m).__name__ == 'Conv1D'}
  for name, p in model.named_parameters():
    noise = torch.randn(p.shape, generator=generator)
    if p.ndim == 1:
      p += 0.2 * noise
    elif id(p) in tables:
      p.copy_(noise * (0.5 if 'relative_attention_bias' in name else 1.0))
    else:
      gain = model.config.d_kv**-0.5 if name.endswith('Attention.q.weight') else 1.0
      p.copy_(noise * gain * p.shape[0 if id(p) in transposed else -1] ** -0.5)


@torch.no_grad()
def logits(model, document: np.ndarray, target: np.ndarray | None = None) -> np.ndarray:
  own = {} if target is None else {'decoder_input_ids': torch.tensor(target)[None]}
  found = model(input_ids=torch.tensor(document)[None], **own).logits[0].float().numpy()
  return found if found.ndim == 2 else found[:, None]  # a discriminator has one logit for each token


def next_tokens(model, document: np.ndarray) -> np.ndarray:
  """The most likely token, GREEDY times: no cache and no end, so that only the logits decide."""
  seq2seq = model.config.is_encoder_decoder
  tokens = np.array([model.config.decoder_start_token_id]) if seq2seq else document[:20]
  start = len(tokens)
  for _ in range(GREEDY):
    found = logits(model, document, tokens) if seq2seq else logits(model, tokens)
    tokens = np.append(tokens, found[-1].argmax())
  return tokens[start:]


def expected(model) -> dict[str, np.ndarray]:
  rng, pieces = np.random.default_rng(0), model.config.vocab_size
  draw = lambda length: rng.integers(3, pieces, length).astype(np.int32)  # low ids are padding, end, start
  found = {'long': draw(LONG), 'short': draw(SHORT)}
  if model.config.is_encoder_decoder:
    found |= {f'{name}_target': np.append(0, draw(length - 1)) for name, length in (('long', LONG), ('short', SHORT))}
  for name in ('long', 'short'):
    found[f'{name}_logits'] = logits(model, found[name], found.get(f'{name}_target'))
  if not type(model).__name__.endswith(('ForMaskedLM', 'ForPreTraining')):
    found['greedy'] = next_tokens(model, found['short'])
  return {key: value.astype(np.float32 if value.dtype.kind == 'f' else np.int32) for key, value in found.items()}


def write(name: str) -> None:
  folder, model = GOLDENS / name, make_model(name)
  model.save_pretrained(folder)
  if is_untied_t5(name):  # as published: the flag is what `transformers` 5 forgets, the scale follows from it
    path = folder / 'config.json'
    cfg = {k: v for k, v in json.loads(path.read_text()).items() if k != 'scale_decoder_outputs'}
    path.write_text(json.dumps(cfg | {'tie_word_embeddings': False}, indent=2) + '\n')
    again, some = type(model).from_pretrained(folder).eval(), np.arange(3, 9)
    np.testing.assert_allclose(logits(again, some, some), logits(model, some, some), atol=1e-4)
  for path in folder.iterdir():
    if path.name not in ('config.json', 'model.safetensors'):
      path.unlink()
  found = expected(model)
  np.savez_compressed(folder / 'expected.npz', **found)
  sizes = [path.stat().st_size // 1000 for path in sorted(folder.iterdir())]
  print(f'{name}: {sizes} kB, scale of the logits {np.abs(found["long_logits"]).max():.2f}')


def write_ropes() -> None:
  """Frequencies and the factor on sin and cos of each scaling, with a head_dim of 64, where all branches occur."""
  found, exact = {}, {'rope_parameters': YARN['rope_parameters'] | {'truncate': False}}
  for name, values in {'llama3': LLAMA3, 'yarn': YARN, 'linear': LINEAR, 'yarn_exact': exact}.items():
    cfg = transformers.LlamaConfig(**LLAMA | values | {'head_dim': 64})
    frequencies, factor = ROPE_INIT_FUNCTIONS[name.partition('_')[0]](cfg, torch.device('cpu'))
    found |= {f'{name}_frequencies': frequencies.numpy(), f'{name}_factor': np.float32(factor)}
  np.savez(GOLDENS / 'rope.npz', **found)


def write_buckets() -> None:
  """DeBERTa's bucket of each distance from -600 to 600, for pairs of buckets on each side and a largest distance."""
  distance = torch.arange(-600, 601)
  sizes = ((256, 512), (32, 128), (16, 70), (15, 70), (2, 40))
  found = {f'{b}_{most}': make_log_bucket_position(distance, b, most).long().numpy() for b, most in sizes}
  np.savez_compressed(GOLDENS / 'deberta_buckets.npz', **found)


@torch.no_grad()
def pseudo_log_probs(name: str) -> np.ndarray:
  """f32[MASKED]: one forward pass for each token, no batch, no packing."""
  config = json.loads((GOLDENS / name / 'config.json').read_text())
  model = getattr(transformers, config['architectures'][0]).from_pretrained(GOLDENS / name).eval()
  with np.load(GOLDENS / name / 'expected.npz', allow_pickle=False) as found:
    text = [CLS, *found['short'][:MASKED].tolist(), SEP]
  scores = []
  for i in range(1, MASKED + 1):
    read = [*text[:i], MASK, *text[i + 1 :]]
    scores.append(model(input_ids=torch.tensor([read])).logits[0, i].log_softmax(-1)[text[i]].item())
  return np.float32(scores)


def write_masked() -> None:
  np.savez(GOLDENS / 'masked.npz', **{name: pseudo_log_probs(name) for name in ENCODERS})


if __name__ == '__main__':
  GOLDENS.mkdir(parents=True, exist_ok=True)
  for family in sys.argv[1:] or ALL:
    write(family)
  write_ropes()
  write_buckets()
  write_masked()
