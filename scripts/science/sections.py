"""The parts of the study: which runs each part needs, and the section of the document made from them."""

import statistics
from collections.abc import Callable

from study import Results, Seeds, Wanted
from trials import group, summary, table

DECODER, ENCODER_DECODER = 'configs/science/decoder.gin', 'configs/science/encoder_decoder.gin'
Run = Callable[[Wanted, Seeds], Results]

OBJECTIVES = {
  'causal LM': ("objective.name='causal_lm'",),
  'prefix LM': ("objective.name='prefix_lm'",),
  'T5 spans': ("objective.name='span_corruption'",),
  'UL2': ("objective.name='ul2'",),
  'UL2 without modes': ("objective.name='ul2'", 'objective.mode_tokens=False'),
}
QUESTIONS = {'causal': 'causal loss', 'prefix': 'prefix loss', 'infill': 'infilling loss'}
COSINE = ("schedule.name='cosine'", 'schedule.steps={1}')
OPTIMIZERS = {
  'adamw': (3e-3, 1e-2, 3e-2, 1e-1),
  'adafactor': (3e-2, 1e-1, 3e-1, 1.0),
  'muon': (3e-3, 1e-2, 3e-2, 1e-1),
  'lion': (3e-4, 1e-3, 3e-3, 1e-2),
}
SCHEDULES = {
  'cosine to 10%': COSINE,
  'WSD, last fifth 1-sqrt': ("schedule.name='wsd'", 'schedule.steps={1}', 'schedule.decay_steps={1/5}'),
  'WSD, last fifth linear': (
    "schedule.name='wsd'", "schedule.decay='linear'", 'schedule.steps={1}', 'schedule.decay_steps={1/5}'
  ),
  'infinite, last fifth annealed': (
    "schedule.name='infinite'", 'schedule.cooldown_steps={1/4}', 'schedule.anneal_start={4/5}',
    'schedule.anneal_steps={1/5}',
  ),
  'constant': (),
}  # fmt: skip
SCHEDULE_PEAKS = (3e-3, 1e-2)  # the peak of the other tables, and the best one for AdamW
AVERAGES = (
  "averaging.name='ema'", 'averaging.decay=0.95', 'averaging.warmup=True', 'evaluation.lawa_checkpoints=5',
  'evaluation.every={1}', 'evaluation.batches=16', 'checkpoint.every={1/20}', 'checkpoint.keep=5',
)  # fmt: skip


def objectives(run: Run, seeds: Seeds) -> str:
  models = {'decoder': DECODER, 'encoder-decoder': ENCODER_DECODER}
  cases = [(model, name) for model in models for name in OBJECTIVES]
  cases.remove(('encoder-decoder', 'causal LM'))
  names = {case: 'objective/' + ' '.join(case).replace(' ', '_') for case in cases}
  results = run([(names[m, n], models[m], (*OBJECTIVES[n], *COSINE)) for m, n in cases], seeds)
  rows = [[*case, *(summary(group(results, names[case], key)) for key in QUESTIONS)] for case in cases]
  return f"""## Objectives and architectures

Causal loss: every token is predicted from the tokens before it; an encoder-decoder reads an empty prefix. Prefix loss:
the second part of a text is predicted from the first; the cut is anywhere. Infilling loss: T5 spans, 15% of the tokens
in spans of mean length 3. Models that were trained with mode tokens get the token of the task ([S2S], [S2S], [NLU]).

{table(['model', 'trained on', *QUESTIONS.values()], rows)}
"""


def optimizers(run: Run, seeds: Seeds) -> str:
  """Learning rates are tuned on the first seed; the best rate of each optimizer is run with the other seeds."""
  tried = run([_optimizer(name, rate) for name, rates in OPTIMIZERS.items() for rate in rates], seeds[:1])
  loss = lambda name, rate: group(tried, _optimizer(name, rate)[0], 'causal')[0]
  peaks = {name: min(rates, key=lambda rate, name=name: loss(name, rate)) for name, rates in OPTIMIZERS.items()}
  results = run([_optimizer(name, peak) for name, peak in peaks.items()], seeds)
  rows = []
  for name, peak in peaks.items():
    edge = ' (edge)' if peak in (OPTIMIZERS[name][0], OPTIMIZERS[name][-1]) else ''
    others = ', '.join(f'{rate:g}: {loss(name, rate):.3f}' for rate in OPTIMIZERS[name])
    rows.append([name, f'{peak:g}{edge}', summary(group(results, _optimizer(name, peak)[0], 'causal')), others])
  return f"""## Optimizers

A decoder on causal LM, with a cosine schedule to a tenth of the peak. The peak learning rate of each optimizer was
tuned on one seed over four values ("edge": the best value was the lowest or highest one, a better one may lie outside).

{table(['optimizer', 'peak', 'causal loss', 'tuning, one seed'], rows)}
"""


def _optimizer(name: str, peak: float) -> tuple[str, str, tuple[str, ...]]:
  return f'optimizer/{name}_{peak:g}', DECODER, (f"optimizer.name='{name}'", f'schedule.peak={peak}', *COSINE)


def schedules(run: Run, seeds: Seeds) -> str:
  """At two peaks, because with a peak that is too low the schedule that keeps the rate high longest always wins."""
  wanted = [_schedule(name, peak) for peak in SCHEDULE_PEAKS for name in SCHEDULES]
  results = run(wanted, seeds)
  rows = []
  for peak in SCHEDULE_PEAKS:
    for name in SCHEDULES:
      raw, ema, lawa = (group(results, _schedule(name, peak)[0], key) for key in ('raw', 'ema', 'lawa'))
      gains = [statistics.mean(raw) - statistics.mean(average) for average in (ema, lawa)]
      rows.append([f'{peak:g}', name, summary(raw), summary(ema), summary(lawa), *(f'{gain:+.3f}' for gain in gains)])
  return f"""## Schedules and averages of weights

The same decoder and AdamW, at two peak learning rates (the infinite schedule falls to 55% of its peak in between). EMA:
decay 0.95 with warm-up. LAWA: the mean of the last five of twenty checkpoints. Gain: mean loss of the raw weights minus
mean loss of the averaged weights.

{table(['peak', 'schedule', 'raw', 'EMA', 'LAWA', 'gain of EMA', 'gain of LAWA'], rows)}
"""


def _schedule(name: str, peak: float) -> tuple[str, str, tuple[str, ...]]:
  own = f'schedule/{name}_{peak:g}'.replace(' ', '_').replace(',', '').replace('%', '')
  return own, DECODER, (f'schedule.peak={peak}', *SCHEDULES[name], *AVERAGES)


GROUPS = {'objectives': objectives, 'optimizers': optimizers, 'schedules': schedules}
