"""The objectives of a config: what a model learns to do with text. fitting.py checks that they fit its lengths."""

import dataclasses
from typing import Annotated, Literal, assert_never

from data.objectives.tasks import Budget, Hide, Task
from data.prepare.messages import Role

MODE_OF_KIND = {'R': 0, 'X': 1, 'S': 2}
SMode = Literal['uniform_prefix', 'last_quarter']


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLm:
  """Every token is predicted from those before it in its document. Decoder-only."""

  name: Literal['causal_lm'] = 'causal_lm'


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLm:
  """A piece is cut at a uniformly random position; the second part is predicted from the first.

  Source: Raffel et al. 2020, §3.2.3; t5/data/preprocessors.py prefix_lm. `loss_on_prefix` (decoder-only) is seqio's
  loss_on_targets_only=False.
  """

  name: Literal['prefix_lm'] = 'prefix_lm'
  loss_on_prefix: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption:
  """T5: spans of text are replaced by sentinels and predicted. Source: Raffel et al. 2020, §3.3.4."""

  name: Literal['span_corruption'] = 'span_corruption'
  noise_density: float = 0.15
  mean_noise_span_length: float = 3.0
  random_roll: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class IidDenoising:
  """T5's noise without spans: each token is hidden with probability `noise_density`, independently.

  `hide` selects what is read: a sentinel for a run of hidden tokens, <extra_id_0> for each token ('mask'), or nothing
  ('drop'). `targets` selects what is written: the hidden tokens (with sentinels, if inputs have them: for each run of
  others), or the full text. The share `random` of the masks is a random piece instead. T5's variants:
  MASS-style is ('mask', 'full'), BERT-style (iid_15_r10s90_f) the same with random=0.1, dropped tokens
  ('drop', 'noise').
  Source: Raffel et al. 2020, §3.3.1, §3.3.2; t5/data/preprocessors.py iid_noise_mask, noise_token_to_sentinel,
  noise_token_to_random_token_or_sentinel (which draws random pieces from sentinels too; here they are text).
  """

  name: Literal['iid_denoising'] = 'iid_denoising'
  noise_density: Annotated[float, '(0, 1)'] = 0.15
  hide: Hide = 'sentinel_per_run'
  targets: Literal['noise', 'full'] = 'noise'
  random: Annotated[float, '[0, 1]'] = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bart:
  """BART: spans of whole words become one <extra_id_0> each, sentences are permuted; the target is the text.

  The share `noise_density` of the words is hidden; spans have Poisson(`mean_noise_span_length`) words, and one of none
  is a mask more. Source: Lewis et al. 2019, arXiv:1910.13461, §2.2; fairseq denoising_dataset.py (infilling.py).
  """

  name: Literal['bart'] = 'bart'
  noise_density: Annotated[float, '(0, 1)'] = 0.3
  mean_noise_span_length: Annotated[float, '[1, 16]'] = 3.0  # the reference never ends beyond
  permute_sentences: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillInTheMiddle:
  """A causal LM that also learns to write the middle of a text, having read its beginning and its end. Decoder-only.

  The share `rate` of the documents (of the parts that stand in one row) is cut at two random characters, and read as
  prefix, suffix, middle; the share `spm_rate` of these with the suffix first. The last three sentinels stand before the
  parts: data/objectives/fim.py. Source: Bavarian et al. 2022, arXiv:2207.14255, §3 (SPM in its variant 2, appendix D).
  """

  name: Literal['fim'] = 'fim'
  rate: Annotated[float, '[0, 1]'] = 0.5
  spm_rate: Annotated[float, '[0, 1]'] = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
  """R and X hide spans of this mean length and density, S the end of the text. `rate` is relative to the others."""

  kind: Literal['R', 'S', 'X']
  mean_noise_span_length: float | None = None
  noise_density: float | None = None
  rate: float = 1.0

  def __str__(self) -> str:
    if self.kind == 'S':
      return 'S'
    return f'{self.kind}(mu={self.mean_noise_span_length:g}, r={self.noise_density:g})'


def _denoiser(kind: str, mu: float | None = None, r: float | None = None, rate: float = 1.0) -> Denoiser:
  return Denoiser(kind=kind, mean_noise_span_length=mu, noise_density=r, rate=rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ul2:
  """The mixture of denoisers: short and long, sparse and dense spans, and prefixes.

  Source: Tay et al. 2022, arXiv:2205.05131, Table 1 and appendix 9.2 (S has no sentinel). `s_mode` settles where the
  paper's text and table differ: the prefix ends anywhere, or at three quarters. Mode tokens ([NLU] for R, [NLG] for X,
  [S2S] for S) stand before the inputs.
  """

  name: Literal['ul2'] = 'ul2'
  denoisers: tuple[Denoiser, ...] = (
    _denoiser('R', 3.0, 0.15),
    _denoiser('R', 8.0, 0.15),
    _denoiser('X', 3.0, 0.5),
    _denoiser('X', 8.0, 0.5),
    _denoiser('X', 64.0, 0.15),
    _denoiser('X', 64.0, 0.5),
    _denoiser('S'),
  )
  s_mode: SMode = 'uniform_prefix'
  mode_tokens: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ul2r:
  """UL2's mixture for going on with a decoder: half S, a quarter R, a quarter X. Decoder-only.

  Source: Tay et al. 2022, arXiv:2210.11399 (U-PaLM), §2.2-2.4.
  """

  name: Literal['ul2r'] = 'ul2r'
  denoisers: tuple[Denoiser, ...] = (
    _denoiser('S', rate=0.5),
    _denoiser('R', 3.0, 0.15, 0.25),
    _denoiser('X', 32.0, 0.15, 0.125),
    _denoiser('X', 3.0, 0.5, 0.125),
  )
  s_mode: SMode = 'uniform_prefix'
  mode_tokens: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLm:
  """BERT: the share `rate` of the tokens is predicted, each at its position. Encoder-only.

  Of these the share `mask` is read as the mask token (<extra_id_0>), the share `random` as a random piece, the rest as
  it is; each carries loss, however it is read. Source: Devlin et al. 2019, arXiv:1810.04805, §3.1 and A.1.

  What the generator of a replaced-token detector reads and is asked is this too: (mask, random) is (0.85, 0) in ELECTRA
  (Clark et al. 2020, arXiv:2003.10555; google-research/electra pretrain_helpers.py mask; there a place may be drawn
  twice, and then weighs double), (1, 0) in DeBERTaV3 (He et al. 2021, arXiv:2111.09543).
  """

  name: Literal['mlm'] = 'mlm'
  rate: Annotated[float, '(0, 1)'] = 0.15
  mask: Annotated[float, '[0, 1]'] = 0.8
  random: Annotated[float, '[0, 1]'] = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised:
  """Targets are predicted from inputs, over stores of pairs: fine-tuning.

  An encoder-decoder reads inputs in its encoder. A decoder sees them whole, as a prefix without loss; it needs
  `inputs_length`: inputs are cut to it, targets to the rest of data.targets_length (task_feature_lengths in seqio).
  Source: seqio feature_converters.py (EncDecFeatureConverter, PrefixLMFeatureConverter); utils.py trim_dataset: what is
  too long loses its end, with EOS.
  """

  name: Literal['supervised'] = 'supervised'
  inputs_length: Annotated[int, '>= 1'] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
  """Turns of a conversation are predicted from all that was said before, over stores of conversations. Decoder-only.

  A turn is its role as text (`user:`), what is said, and EOS. The words and the EOS of turns of `loss_on` carry loss, a
  role never does: who speaks next is for the program to say that runs the model. With `prefix_attention` what stands
  before the first token with loss is seen whole, as the prefix of prefix_lm.
  Source: Touvron et al. 2023, arXiv:2307.09288, §3.1 (loss on answers alone); Raffel et al. 2020, §3.2.1 (prefixes).
  """

  name: Literal['instruction'] = 'instruction'
  loss_on: tuple[Role, ...] = ('assistant',)
  prefix_attention: bool = False


OfText = (
  CausalLm | PrefixLm | SpanCorruption | IidDenoising | Bart | FillInTheMiddle | Ul2 | Ul2r | MaskedLm
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """An objective, and its share of the rows relative to the other parts."""

  objective: OfText
  rate: Annotated[float, '> 0'] = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveMixture:
  """Several objectives in one run, each in rows of its own: parts = [{'rate': 0.5, 'objective': {'name': …}}, …]."""

  name: Literal['mixture'] = 'mixture'
  parts: tuple[Part, ...]


OfUnits = Supervised | Instruction
Objective = OfText | OfUnits | ObjectiveMixture


def parts_of(objective: Objective) -> tuple[OfText | OfUnits, ...]:
  """The objectives of a mixture; any other is its own only part."""
  return tuple(part.objective for part in objective.parts) if isinstance(objective, ObjectiveMixture) else (objective,)


def is_encoder_only(objective: Objective) -> bool:
  return all(isinstance(part, MaskedLm) for part in parts_of(objective))


def is_decoder_only(objective: Objective) -> bool:
  return any(isinstance(part, CausalLm | Ul2r | FillInTheMiddle | Instruction) for part in parts_of(objective))


def is_causal(objective: Objective) -> bool:
  """Whether every token of a decoder's rows is read after those before it alone: no prefix is seen whole."""
  whole = lambda part: not isinstance(part, CausalLm | FillInTheMiddle | Instruction)
  return not any(whole(part) or getattr(part, 'prefix_attention', False) for part in parts_of(objective))


def tasks_of(objective: Objective) -> tuple[Task, ...]:
  """The tasks whose rows make up `objective`, in the order of its config."""
  match objective:
    case CausalLm():
      return (Task(label='causal', kind='causal'),)
    case PrefixLm(loss_on_prefix=loss):
      return (Task(label='prefix', kind='uniform_prefix', loss_on_inputs=loss),)
    case FillInTheMiddle(rate=rate, spm_rate=spm):
      return (Task(label=f'fim(r={rate:g}, spm={spm:g})', kind='fim', noise_density=rate, spm=spm),)
    case SpanCorruption() | IidDenoising() | Bart():
      return (_noise(objective),)
    case MaskedLm(rate=rate, mask=mask, random=random):
      return (Task(label=f'mlm(r={rate:g})', kind='masked', noise_density=rate, mask=mask, random=random),)
    case Supervised():
      return (Task(label='supervised', kind='pairs'),)
    case Instruction():
      return (Task(label='instruction', kind='turns'),)
    case Ul2() | Ul2r():
      return tuple(_task(d, objective.s_mode, objective.mode_tokens) for d in objective.denoisers)
    case ObjectiveMixture(parts=parts):
      return tuple(task for part in parts for task in _shared(part))
    case _:
      assert_never(objective)


def has_marks(task: Task) -> bool:
  """Whether its rows hold sentinels or mode tokens."""
  return task.mode is not None or task.sentinels(2) > 0


def _noise(objective: SpanCorruption | IidDenoising | Bart) -> Task:
  r = objective.noise_density
  match objective:
    case SpanCorruption(mean_noise_span_length=mu, random_roll=turned):
      label, kind = f'spans(mu={mu:g}, r={r:g})', {'kind': 'spans', 'mean_noise_span_length': mu, 'random_roll': turned}
    case IidDenoising(hide=hide, targets=targets, random=random):
      label = f'iid(r={r:g}, {hide}, {targets})'
      kind = {'kind': 'iid', 'hide': hide, 'full': targets == 'full', 'random': random}
    case Bart(mean_noise_span_length=mu, permute_sentences=permute):
      label = f'bart(mu={mu:g}, r={r:g})'
      kind = {'kind': 'infilling', 'mean_noise_span_length': mu, 'full': True, 'permute': permute}
    case _:
      assert_never(objective)
  return Task(label=label, noise_density=r, **kind)


def _shared(part: Part) -> list[Task]:
  """The tasks of a part, whose rates add up to its own."""
  tasks = tasks_of(part.objective)
  whole = sum(task.rate for task in tasks)
  return [dataclasses.replace(task, rate=part.rate * task.rate / whole) for task in tasks]


def _task(denoiser: Denoiser, s_mode: SMode, mode_tokens: bool) -> Task:
  mode = MODE_OF_KIND[denoiser.kind] if mode_tokens else None
  if denoiser.kind == 'S':
    return Task(label=str(denoiser), kind=s_mode, rate=denoiser.rate, mode=mode)
  mu, r = denoiser.mean_noise_span_length, denoiser.noise_density
  spans = {'noise_density': r, 'mean_noise_span_length': mu}
  return Task(label=str(denoiser), kind='spans', rate=denoiser.rate, mode=mode, **spans)


def pair_lengths(objective: Supervised, budget: Budget) -> tuple[int, int]:
  """The most tokens that (inputs, targets) of a pair have in a row, EOS included.

  >>> pair_lengths(Supervised(), Budget(64, 32)), pair_lengths(Supervised(inputs_length=64), Budget(0, 96))
  ((64, 32), (64, 32))
  """
  prefix = objective.inputs_length or 0
  return (budget.inputs_length or prefix), budget.targets_length - prefix
