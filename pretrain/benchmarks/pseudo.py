"""What an encoder scores: pseudo-log-likelihoods of texts and choices, and hidden words.

Results are named pseudo or masked: no number of an encoder can be compared with one of a model that writes.
"""

import math
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from data.errors import DataError
from data.stores.vocabulary import Tokenizer
from pretrain.benchmarks.masked import Hidden, MaskedScorer
from pretrain.benchmarks.tasks import encode_pair, ranked, shares_of
from pretrain.evaluation.blanks import Blank, choose
from pretrain.evaluation.losses import bits_per_byte

MOST_BYTES = 16_384  # of a domain, unless a command asks for more: a token costs the forward pass of its whole text


def score_pseudo(scorer: MaskedScorer, texts: Sequence[str], said=lambda done: None) -> dict[str, float]:
  """Results of a domain: each token of the texts is hidden alone; those around a text are not scored.

  pseudo_perplexity = exp(pseudo_nats / tokens); `masked_accuracy` is the share of tokens that are the most likely at
  their place. Raises DataError if the text is empty.
  """
  encode = scorer.writer.data.tokenizer.encode
  hidden = [own for text in texts for own in scorer.alone(encode(text))]
  if not hidden:
    raise DataError('there is no text to score.')
  scored, size = scorer(hidden, said), sum(len(text.encode()) for text in texts)
  nats, tokens = float(sum(own.nats.sum() for own in scored)), len(scored)
  return {
    'documents': len(texts), 'tokens': tokens, 'bytes': size, 'pseudo_nats': nats,
    'pseudo_nats_per_token': nats / tokens, 'pseudo_perplexity': math.exp(min(nats / tokens, 700.0)),
    'pseudo_bits_per_byte': bits_per_byte(nats, size), 'masked_accuracy': _share(scored), 'context': scorer.context,
  }  # fmt: skip


def rank_pseudo(scorer: MaskedScorer, path: pathlib.Path, said=lambda done: None) -> dict[str, float]:
  """As `tasks.rank`, with pseudo-log-likelihoods: the tokens of a choice are hidden, one at a time, behind the context.

  Where contexts are empty, choices are whole texts (Salazar et al. 2020, §4.3). Raises DataError, with the line, for a
  choice without tokens too.
  """
  groups = ranked(path)
  hidden = [[_of_choice(scorer, place, context, own) for own in choices] for place, context, choices, _ in groups]
  scored = iter(scorer([one for choices in hidden for choice in choices for one in choice], said))
  totals = [[-sum(next(scored).nats.sum() for _ in choice) for choice in choices] for choices in hidden]
  accuracy, per_byte = shares_of(groups, totals)
  return {'examples': len(groups), 'pseudo_accuracy': accuracy, 'pseudo_accuracy_per_byte': per_byte}


def _of_choice(scorer: MaskedScorer, place: str, context: str, choice: str) -> list[Hidden]:
  before, after = encode_pair(scorer.writer, context, choice)
  if not after:
    raise DataError(f'{place}: the choice {choice!r:.40} has no tokens behind its context; correct the line.')
  return scorer.alone([*before, *after], first=len(before))


def fill_masked(scorer: MaskedScorer, texts: Iterable[str], number: int, said=lambda done: None) -> dict[str, float]:
  """Results for at most `number` sentences, picked and hidden as in `pretrain.evaluation.blanks`: no run chooses them.

  The tokens that touch the hidden words are masked together, so the model knows how many they are. `masked_accuracy` is
  the share of them that are the most likely at their place, `masked_exact_match` that of the sentences in which all
  are. Sentences beyond `scorer.context` are left out, and counted. Raises DataError where no sentence can be hidden.
  """
  tokenizer = scorer.writer.data.tokenizer
  hidden = [words_hidden(blank, tokenizer) for blank in choose(texts, number)]
  kept = [own for own in hidden if len(own.ids) <= scorer.room]
  if not kept:
    raise DataError('--infill: the text has no sentence of plain English words in which words can be hidden.')
  scored = scorer(kept, said)
  return {
    'sentences': len(kept), 'too_long': len(hidden) - len(kept), 'tokens': sum(len(own.places) for own in kept),
    'masked_accuracy': _share(scored), 'masked_exact_match': float(np.mean([own.correct.all() for own in scored])),
  }  # fmt: skip


def words_hidden(blank: Blank, tokenizer: Tokenizer) -> Hidden:
  """The sentence, with the places of the tokens that touch its hidden words."""
  start, end = (len(blank.sentence[:at].encode()) for at in (blank.start, blank.end))
  spans = tokenizer.spans(blank.sentence)
  places = [i for i, (_, first, stop) in enumerate(spans) if first < end and stop > start]
  return Hidden(np.array([token for token, *_ in spans], np.int32), places)


def _share(scored) -> float:
  return float(np.concatenate([own.correct for own in scored]).mean())
