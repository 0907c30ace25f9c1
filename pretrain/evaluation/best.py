"""`--top`: the most likely fillings of each blank, or outputs, by an exact beam search over one prompt at a time."""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from data.stores.vocabulary import MODES, SPECIAL, Tokenizer
from models.decode.cached import teacher_forced
from models.decode.fillings import Sequences, beam
from pretrain.evaluation.outputs import padded
from pretrain.evaluation.prompts import prompt_batch, special_ids
from pretrain.evaluation.texts import answers_whole, fills_middle, words_of
from pretrain.evaluation.writer import Writer

LEAST_WIDTH = 8


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A filling or a continuation, and the probability that the model writes it: exp(sum of its tokens' log-probs).

  Where it has `ended`, the probability includes that of ending there (`models.decode.fillings.beam`).
  """

  text: str
  probability: float
  ended: bool


def best_outputs(
  writer: Writer, prompt: str, inputs: list[int], room: int, top: int
) -> tuple[list[int], dict[str, tuple[Candidate, ...]]]:
  """(the best output, the `top` best candidates for each blank, or for the whole output under the name '').

  The decoder reads a blank's sentinel and writes text up to another sentinel or EOS. For later blanks it has also read
  the best filling of each earlier one, as in training, where fillings follow each other. A text that
  several tokenizations spell is listed once, with the probability of the most likely one.
  """
  tokenizer, vocabulary = writer.data.tokenizer, writer.data.vocabulary
  blanks = [part for part in SPECIAL.split(prompt)[1::2] if part not in MODES]
  if answers_whole(writer.cfg) or fills_middle(inputs, tokenizer) or not blanks:
    name = blanks[0] if fills_middle(inputs, tokenizer) else ''
    found = search(writer, inputs, [], room, top, whole=not name)
    return found[0][0] if found else [], {name: _candidates(found, tokenizer, top)}
  output, fillings = [], {}
  for blank in dict.fromkeys(blanks):
    output = [*output, vocabulary.special_id(blank)]
    found = search(writer, inputs, output, room - len(output), top)
    fillings[blank] = _candidates(found, tokenizer, top)
    output = [*output, *(found[0][0] if found else [])]
  return output, fillings


def search(
  writer: Writer, inputs: list[int], forced: list[int], max_tokens: int, top: int, whole: bool = False
) -> list[tuple[list[int], float, bool]]:
  """(ids, log-probability, whether it ended) after `inputs` and `forced` by `models.decode.fillings`, best first.

  A filling ends at EOS or at a sentinel, and behind a sentinel it has at least one token, as every span of training
  has. A `whole` output ends at EOS; those cut off at `max_tokens` are listed too.
  """
  if max_tokens < 1:
    return []
  ids, ends = np.arange(writer.cfg.model.vocab_size), _ends(writer, whole)
  allowed = writer.data.vocabulary.is_text(ids)
  batch = prompt_batch([inputs], writer.cfg, padded(len(inputs)), writer.data.vocabulary.ids)
  width = max(LEAST_WIDTH, 2 * top)
  ended, unfinished = beam(
    writer.model, writer.params, batch, jnp.asarray(forced, jnp.int32), allowed, ends, max_tokens, width,
    decoder_start=special_ids(writer.data).decoder_start,
  )  # fmt: skip
  found = [(*each, True) for each in _listed(ended) if each[0] or not forced]
  found += [(*each, False) for each in _listed(unfinished) if whole]
  return sorted(found, key=lambda each: -each[1])


def log_prob(writer: Writer, inputs: list[int], forced: list[int], ids: list[int]) -> float:
  """The log-probability of the filling `ids` after `inputs` and `forced`, and of ending there, as in `search`."""
  batch = prompt_batch([inputs], writer.cfg, padded(len(inputs)), writer.data.vocabulary.ids)
  begun = batch['decoder_input_tokens']
  written = [*forced, *ids]
  row = np.zeros((1, padded(len(written))), np.int32)
  row[0, : len(written)] = written
  tokens = np.concatenate([begun, row], 1)
  logits = teacher_forced(writer.model, writer.params, batch, jnp.asarray(tokens), at_once=begun.shape[1])
  log_probs = np.asarray(jax.nn.log_softmax(logits[0, begun.shape[1] - 1 :]))[len(forced) :]
  end = np.logaddexp.reduce(log_probs[len(ids), _ends(writer)])
  return float(sum(log_probs[i, token] for i, token in enumerate(ids)) + end)


def _ends(writer: Writer, whole: bool = False) -> np.ndarray:
  """bool[vocab]: the tokens behind a filling, or behind a `whole` output."""
  vocabulary, ids = writer.data.vocabulary, np.arange(writer.cfg.model.vocab_size)
  return np.isin(ids, special_ids(writer.data).eos) | (
    (ids >= vocabulary.pieces) & (ids <= vocabulary.first_sentinel) & (not whole)
  )


def _listed(sequences: Sequences) -> Iterator[tuple[list[int], float]]:
  log_probs, tokens, lengths = (np.asarray(values) for values in sequences)
  for log_prob, row, length in zip(log_probs.tolist(), tokens.tolist(), lengths.tolist(), strict=True):
    if log_prob > -math.inf:
      yield row[:length], log_prob


def _candidates(found: list[tuple[list[int], float, bool]], tokenizer: Tokenizer, top: int) -> tuple[Candidate, ...]:
  texts: dict[str, Candidate] = {}
  for ids, log_prob, ended in found:
    text = words_of(ids, tokenizer)
    texts.setdefault(text, Candidate(text, math.exp(log_prob), ended))
  return tuple(texts.values())[:top]
