"""A model class for EleutherAI's lm-evaluation-harness (extra `eval`), over a run or imported weights.

import lm_eval
from pretrain.benchmarks.harness import harness_model
from pretrain.evaluation.writer import open_writer

lm_eval.simple_evaluate(model=harness_model(open_writer(pathlib.Path('RUN'))), tasks=['arc_easy'])
"""

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from models.decode.sampling import Sampling
from pretrain.benchmarks.scoring import Piece, Scored, Scorer
from pretrain.benchmarks.tasks import encode_pair
from pretrain.errors import ConfigError
from pretrain.evaluation.outputs import Decoding, check_decoding, outputs
from pretrain.evaluation.prompts import continues_text, framed, special_ids
from pretrain.evaluation.writer import Writer

MAX_GEN_TOKS = 256  # the harness's default


class Answers:
  """The three kinds of requests of lm-evaluation-harness (api/model.py), for a decoder that reads from left to right.

  A request is an object with `args`. Rows have at most `max_length` tokens (default: those of training), and begin with
  the token that rows of training begin with; `starts=False` leaves it out where there is other context, as the class
  `hf` does without add_bos_token. Contexts that are too long lose their beginning.
  """

  def __init__(self, writer: Writer, batch: int = 8, max_length: int | None = None, starts: bool = True):
    super().__init__()
    if not continues_text(writer.cfg) or framed([], writer.cfg, writer.data):
      raise ConfigError(
        f"lm-evaluation-harness continues text from left to right; a run with model.name='{writer.cfg.model.name}' and "
        f"objective.name='{writer.cfg.objective.name}' does not. Use pretrain eval --rank or --exact."
      )
    self.writer, self.batch, self.starts = writer, batch, starts
    self.max_length = writer.cfg.data.targets_length if max_length is None else max_length
    self.scorer, self._encode = Scorer(writer, batch), writer.data.tokenizer.encode

  def loglikelihood(self, requests: Sequence[Any], **_) -> list[tuple[float, bool]]:
    """(log-probability of the continuation, whether it is greedy) of each (context, continuation)."""
    return [(-float(s.nats.sum()), bool(s.correct.all())) for s in self.scorer([*map(self._pair, requests)])]

  def _pair(self, request: Any) -> Piece:
    context, continuation = request.args
    before, after = encode_pair(self.writer, context, continuation) if context else ([], self._encode(continuation))
    return self._cut(before, after)

  def _cut(self, before: list[int], after: list[int]) -> Piece:
    if self.starts or not before:
      return Piece(before[max(len(before) + len(after) - self.max_length, 0) :], after[-self.max_length :])
    kept = before[max(len(before) + len(after) - self.max_length - 1, 0) :]
    return Piece(kept[1:], after, first=kept[0]) if kept else Piece([], after[-self.max_length :])

  def loglikelihood_rolling(self, requests: Sequence[Any], **_) -> list[float]:
    """The log-probability of each whole text, in windows; the first begins as rows do.

    Every other window is full, with tokens of the one before in front, which are not scored again. As `hf` has
    them (utils.py get_rolling_token_windows with context_len=1, make_disjoint_window).
    """
    pieces = [[*self._windows(self._encode(request.args[0]))] for request in requests]
    scored: Iterator[Scored] = iter(self.scorer([piece for own in pieces for piece in own]))
    return [-sum(float(next(scored).nats.sum()) for _ in own) for own in pieces]

  def _windows(self, ids: list[int]) -> Iterator[Piece]:
    yield Piece([], ids[: self.max_length])
    for begin in range(self.max_length, len(ids), self.max_length):
      end = min(begin + self.max_length, len(ids))
      context = ids[end - self.max_length - 1 : begin]
      yield Piece(context[1:], ids[begin:end], first=context[0])

  def generate_until(self, requests: Sequence[Any], **_) -> list[str]:
    """The text after each context up to the first of its `until` strings, the end, or `max_gen_toks` tokens."""
    found: list[str] = [''] * len(requests)
    kinds: dict[tuple[str, bool], list[int]] = {}
    for number, request in enumerate(requests):
      context, options = request.args
      kinds.setdefault((repr(sorted(options.items())), not self._encode(context)), []).append(number)
    for numbers in kinds.values():
      for number, text in self._generate([requests[number].args for number in numbers]):
        found[numbers[number]] = text
    return found

  def _generate(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[tuple[int, str]]:
    room, stops, sampling = options_of(asked[0][1])
    most = self.max_length - room
    if most < 1:
      raise ConfigError(
        f'max_gen_toks={room} leaves no room in rows of {self.max_length} tokens; use a smaller number.'
      )
    prompts = [self._encode(context)[-most:] for context, _ in asked]
    how = Decoding(batch=self.batch, sampling=sampling)
    check_decoding(how)
    starts = self.starts or not all(prompts)
    for number, output in outputs(self.writer, prompts, [room] * len(prompts), how, starts=starts):
      special = self.writer.data.vocabulary.special
      known = [token for token in output if special(token) is None]
      text = self.writer.data.tokenizer.decode_after(prompts[number], known)
      yield number, min((text.split(stop)[0] for stop in stops if stop), key=len, default=text)

  @property
  def eot_token_id(self) -> int:
    return special_ids(self.writer.data).eos[0]


def options_of(options: dict[str, Any]) -> tuple[int, list[str], Sampling]:
  """(max_gen_toks, until, how tokens are chosen). Raises ConfigError for an option that is not known."""
  options = dict(options)
  until = options.pop('until', [])
  room = options.pop('max_gen_toks', MAX_GEN_TOKS)
  temperature, drawn = options.pop('temperature', 0.0), options.pop('do_sample', False)
  filters = {name: options.pop(name) for name in ('top_k', 'top_p') if name in options}
  if options:
    raise ConfigError(f'{", ".join(options)}: generation options that are not supported; use until, max_gen_toks, '
                      'do_sample, temperature, top_k or top_p.')  # fmt: skip
  greedy = not drawn or not temperature
  return (
    room,
    [until] if isinstance(until, str) else list(until),
    Sampling() if greedy else Sampling(temperature=temperature, **filters),
  )


def harness_model(writer: Writer, batch: int = 8, max_length: int | None = None, starts: bool = True):
  """An `lm_eval.api.model.LM` with these answers. Raises ConfigError where lm-eval is not installed."""
  try:
    base = importlib.import_module('lm_eval.api.model').LM
  except ImportError as error:
    raise ConfigError("lm-evaluation-harness is not installed; pip install -e '.[eval]'.") from error
  return type('PretrainLM', (Answers, base), {})(writer, batch, max_length, starts)
