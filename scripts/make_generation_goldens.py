"""Writes tests/golden/generation/ again: what `transformers` generates with the models of tests/golden/interchange/.

Run by hand, like make_interchange_goldens.py and in the same environment (last written with torch 2.15 on a CPU and
transformers 5.24). FAMILY.npz has

  prompts, mask   int32[4, 24]: prompts of unequal lengths; a decoder's stand at the end of their rows, an encoder's at
                  the beginning
  eos             int32[1]: a token that ends some of the outputs early
  greedy          int32[4, 32]: `generate` with do_sample=False; 0 after the end
  beam, scores    for the families in BEAM: the 3 best sequences of num_beams=4 for each prompt, int32[12, 16], and
                  their `sequences_scores` (length_penalty=1.0, early_stopping=False)
  beam_eos        int32[11]: the tokens that end a sequence of a beam; many, so that beams end at different steps

Random weights nearly tie now and then, and a rounding error would decide. So the prompts are drawn anew until the two
most likely tokens of each greedy step differ by more than MARGIN (logits), and the scores of the sequences of a beam by
more than BEAM_MARGIN.

filters.npz has logits f32[3, 40], ids int32[3, 6] and the outputs of the logits processors for each of FILTERS, in the
order in which `generate` applies them. llama/ is a model without scaled rotary positions, t5/ one of T5 1.1,
gemma2/ one whose logits are capped at 30.
Outputs of the families in BEAM together have at least DIFFERENT tokens, and not all of the best beams are greedy.

  python scripts/make_generation_goldens.py [family …]
"""

import pathlib
import sys

import numpy as np
import torch
from make_interchange_goldens import FAMILIES, GOLDENS, VOCAB, logits, make_model
from transformers.generation import logits_process

FOLDER = GOLDENS.parent / 'generation'
LENGTHS, GREEDY, BEAM_TOKENS, MARGIN, BEAM_MARGIN = (24, 5, 17, 1), 32, 16, 1e-3, 1e-4
BEAM, DIFFERENT = ('plain_t5', 'gpt2', 'plain_llama'), 8
MORE_ENDS = 10
PENALTY, TEMPERATURE = logits_process.RepetitionPenaltyLogitsProcessor, logits_process.TemperatureLogitsWarper
TOP_K, TOP_P = logits_process.TopKLogitsWarper, logits_process.TopPLogitsWarper
FILTERS = {
  'penalty': [PENALTY(1.7)],
  'temperature': [TEMPERATURE(0.6)],
  'top_k': [TEMPERATURE(1.0), TOP_K(7)],
  'top_p': [TEMPERATURE(1.0), TOP_P(0.7)],
  'all': [PENALTY(1.3), TEMPERATURE(0.8), TOP_K(12), TOP_P(0.8)],
}


def prompts_of(seed: int, encoder: bool) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(seed)
  shape = len(LENGTHS), max(LENGTHS)
  mask = np.arange(shape[1]) < np.array(LENGTHS)[:, None]
  mask = (mask if encoder else mask[:, ::-1]).astype(np.int32)
  return (rng.integers(3, VOCAB, shape) * mask).astype(np.int32), mask


def generate(model, prompts: np.ndarray, mask: np.ndarray, tokens: int, **options):
  # T5's cache fails in this version where the decoder has more layers than the encoder.
  with torch.no_grad():
    found = model.generate(
      torch.tensor(prompts), attention_mask=torch.tensor(mask), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
      return_dict_in_generate=True, output_scores=True, use_cache=not model.config.is_encoder_decoder, **options,
    )  # fmt: skip
  begin = 1 if model.config.is_encoder_decoder else prompts.shape[1]
  written = found.sequences[:, begin:].numpy()
  return np.pad(written, ((0, 0), (0, tokens - written.shape[1]))).astype(np.int32), found


def early_end(outputs: np.ndarray) -> int | None:
  """A token that ends one output after 3 to 20 tokens, and another one not at all."""
  for token in np.unique(outputs[:, 3:20]):
    first = [np.flatnonzero(row == token) for row in outputs]
    if any(len(at) == 0 for at in first) and any(len(at) and 3 <= at[0] < 20 for at in first):
      return int(token)
  return None


def attempt(model, name: str, seed: int) -> dict[str, np.ndarray] | None:
  prompts, mask = prompts_of(seed, model.config.is_encoder_decoder)
  outputs, found = generate(model, prompts, mask, GREEDY, eos_token_id=None)
  two = torch.stack(found.scores, 1).topk(2).values
  margin, end = float((two[..., 0] - two[..., 1]).min()), early_end(outputs)
  if margin < MARGIN or end is None or (name in BEAM and len(np.unique(outputs)) < DIFFERENT):
    return None
  values = {'prompts': prompts, 'mask': mask, 'eos': np.int32([end])}
  values['greedy'] = generate(model, prompts, mask, GREEDY, eos_token_id=end)[0]
  if name in BEAM:
    options = {'num_beams': 4, 'length_penalty': 1.0, 'early_stopping': False, 'num_return_sequences': 3}
    ends = [end, *range(VOCAB - MORE_ENDS, VOCAB)]
    sequences, found = generate(model, prompts, mask, BEAM_TOKENS, eos_token_id=ends, **options)
    scores = found.sequences_scores.numpy()
    ended = np.isin(sequences, ends)
    after_end = np.cumsum(ended, 1) - ended > 0  # `transformers` fills with EOS where pad is 0
    values |= {'beam': np.where(after_end, 0, sequences), 'scores': scores, 'beam_eos': np.int32(ends)}
    greedy = values['greedy'][:, :BEAM_TOKENS]
    gap = float(-np.diff(scores.reshape(-1, 3), axis=1).max())
    if gap < BEAM_MARGIN or not after_end.any() or (values['beam'].reshape(-1, 3, BEAM_TOKENS)[:, 0] == greedy).all():
      return None
  print(f'{name}: seed {seed}, margin {margin:.1e}, outputs end after {(values["greedy"] > 0).sum(1)} tokens')
  return values


def check_weights(model, name: str) -> None:
  """The weights are drawn again, and must be those of the committed file."""
  with np.load(GOLDENS / name / 'expected.npz', allow_pickle=False) as golden:
    found = logits(model, golden['long'], golden.get('long_target'))
    assert np.abs(found - golden['long_logits']).max() < 1e-4, f'{name}: other weights than in {GOLDENS}'


def write_filters() -> None:
  rng = np.random.default_rng(0)
  scores, ids = rng.normal(0, 2, (3, 40)).astype(np.float32), rng.integers(0, 40, (3, 6)).astype(np.int32)
  found = {'logits': scores, 'ids': ids}
  for name, processors in FILTERS.items():
    values = torch.tensor(scores)
    for processor in processors:
      values = processor(torch.tensor(ids).long(), values)
    found[name] = values.numpy()
  np.savez_compressed(FOLDER / 'filters.npz', **found)


def save(model, folder: pathlib.Path) -> None:
  if model.config.is_encoder_decoder:  # they are one table in every published model
    model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
  model.save_pretrained(folder)
  (folder / 'generation_config.json').unlink()


def main(names: list[str]) -> None:
  FOLDER.mkdir(parents=True, exist_ok=True)
  write_filters()
  kind, values, model_class = FAMILIES['llama']
  plain = {'rope_parameters': {'rope_type': 'default', 'rope_theta': 700.0}, 'hidden_size': 16, 'intermediate_size': 24}
  FAMILIES['plain_llama'] = kind, values | plain, model_class
  kind, values, model_class = FAMILIES['t5_v1_1']
  FAMILIES['plain_t5'] = kind, values | {'d_model': 16, 'd_ff': 24}, model_class
  kind, values, model_class = FAMILIES.pop('gemma2')  # its logits are at most 3: several are nearly equal at each step
  FAMILIES['plain_gemma2'] = kind, values | {'final_logit_softcapping': 30.0, 'hidden_size': 16}, model_class
  for name in names or [name for name in FAMILIES if 'MaskedLM' not in FAMILIES[name][2]]:
    model = make_model(name)
    if name.startswith('plain_'):
      save(model, FOLDER / name.removeprefix('plain_'))
    else:
      check_weights(model, name)
    found = next(values for seed in range(200) if (values := attempt(model, name, seed)) is not None)
    np.savez_compressed(FOLDER / f'{name}.npz', **found)


if __name__ == '__main__':
  main(sys.argv[1:])
