"""The plots of a run and of a schedule. matplotlib is imported when they are drawn: it takes a second."""

import contextlib
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pretrain.records.curves import EQUAL, Curve, Rows, curve, layers_of, loads_of, running_mean, scaled
from pretrain.records.names import one_line, shortened
from pretrain.records.spacing import apart

Shares = Sequence[tuple[float, Mapping[str, float]]]  # (step, share of each source from there on)

# File name -> what the picture shows; also its alt text in the report.
PLOTS = {
  'loss': 'Loss',
  'learning_rate': 'Learning rate',
  'grad_norm': 'Gradient norm',
  'throughput': 'Throughput',
  'data_wait': 'Waiting for data',
}
FILL_PLOTS = {'fill': 'Positions used, and padding'}  # where they are logged
KURTOSIS_PLOTS = {'kurtosis': 'Kurtosis of activations'}
EXPERT_PLOTS = {
  'expert_load': 'Most and least used experts',
  'router_entropy': 'Entropy of routers',
  'expert_dropped': 'Choices without a place',
}
SOURCE_PLOTS = {'shares': 'Shares of the sources', 'source_loss': 'Loss of each source'}  # where there are several
LABELS = {
  'loss': 'nats per target',
  'learning_rate': 'learning rate',
  'grad_norm': 'global norm before clipping',
  'throughput': 'thousand tokens/s',
  'data_wait': '% of step time',
  'fill': '% of positions, of FLOPs',
  'kurtosis': 'excess of outputs of layers',
  'expert_load': EQUAL,
  'router_entropy': 'nats',
  'expert_dropped': '% of choices',
  'shares': "% of the stage's rows",
  'source_loss': 'nats per target',
}
LOOK = {
  'figure.dpi': 110, 'font.size': 10, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True,
  'grid.color': '#e8e8e8', 'axes.titleweight': 'bold', 'axes.titlelocation': 'left', 'legend.frameon': False,
  'lines.linewidth': 1.6, 'axes.axisbelow': True, 'text.parse_math': False, 'text.usetex': False,
}  # fmt: skip
BLUE, PALE = '#2563a8', '#a9c6e8'
NAME = 28  # characters of a name in a plot
FILL = {
  'fill/encoder': ('encoder positions used', BLUE, '-'),
  'fill/decoder': ('decoder positions used', '#3a8f4d', '-'),
  'padding_flops': ('FLOPs of padding', '#d1492e', '--'),
}
STYLES = {'': 'o-', 'ema': 's--', 'lawa': '^:'}  # averaged weights share the colour of the weights
EVALUATION = ('#d1492e', '#3a8f4d', '#8a4fa3', '#c98a1b')


def draw(rows: Rows, baselines: Mapping[str, float], folder: pathlib.Path, wanted: Shares = ()) -> list[pathlib.Path]:
  """Writes one PNG for each of `plots_of(rows)` into `folder`; returns their paths in that order."""
  plt = pyplot()
  folder.mkdir(parents=True, exist_ok=True)
  paths = []
  with plt.rc_context(LOOK):
    for name, title in plots_of(rows).items():
      with figure(plt, folder / f'{name}.png', (9.6, 4.2) if name == 'loss' else (4.8, 2.9)) as axes:
        axes.set(title=title, xlabel='step', ylabel=LABELS[name])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.xaxis.set_major_formatter('{x:,.0f}')
        plot(axes, name, rows, baselines, wanted)
      paths.append(folder / f'{name}.png')
  return paths


def plots_of(rows: Rows) -> dict[str, str]:
  """Which plots a run has, and their titles."""
  fill = FILL_PLOTS if any('padding_flops' in row for row in rows) else {}
  experts = {name: title for name, title in EXPERT_PLOTS.items() if layers_of(rows, name)}
  kurtosis = KURTOSIS_PLOTS if layers_of(rows, 'kurtosis') else {}
  return PLOTS | fill | kurtosis | experts | (SOURCE_PLOTS if sources_of(rows) else {})


def sources_of(rows: Rows) -> list[str]:
  """The sources of a mixture, in their order; none where there is one."""
  return list(dict.fromkeys(key.removeprefix('share/') for row in rows for key in row if key.startswith('share/')))


def pyplot():
  """matplotlib.pyplot, drawing into files: it needs no display."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  return plt


def label(name: str) -> str:
  """A name as a plot can show it: one short line, and the code of each character that the font does not have.

  It is drawn as it stands: LOOK turns mathematics off. A legend leaves out what begins with an underscore: a space goes
  before it.
  """
  known = glyphs()
  text = ''.join(c if ord(c) in known else f'U+{ord(c):04X} ' for c in one_line(name))
  return ' ' * (not name or name.startswith('_')) + shortened(text.strip(), NAME)


@functools.cache
def glyphs() -> frozenset[int]:
  """The characters that the font of plots has."""
  from matplotlib import font_manager

  return frozenset(font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap())


def legend(axes) -> None:
  """The names of the curves below the plot, where they hide none: in as many columns as fit, the figure grows."""
  lengths = [len(text) for text in axes.get_legend_handles_labels()[1]]
  if lengths:
    # In inches: a letter is at most 1/13 wide, a line's sample as wide as 6 letters, a row 0.2 high.
    columns = min(max(int(axes.figure.get_figwidth() * 13 // (max(lengths) + 6)), 1), 4)
    rows = -(-len(lengths) // columns)
    axes.figure.set_figheight(axes.figure.get_figheight() + 0.2 * (rows - 1))
    axes.figure.legend(loc='outside lower center', ncols=columns, fontsize=9)


def draw_schedule(schedule: Callable[[np.ndarray], Any], num_steps: int, name: str, path: pathlib.Path) -> None:
  """Writes `path`: the learning rate at steps 0 .. num_steps - 1, the steps of a run."""
  plt = pyplot()
  steps = np.unique(np.linspace(0, num_steps - 1, 20_000).astype(np.int64))
  rates = np.asarray(schedule(steps), np.float64)
  with plt.rc_context(LOOK), figure(plt, path, (9.6, 4.2)) as axes:
    axes.set(title=f'{LABELS["learning_rate"].capitalize()}: {name}', xlabel='step', ylabel=LABELS['learning_rate'])
    axes.plot(steps, rates, color=BLUE)
    axes.set_xlim(0, max(num_steps - 1, 1))
    axes.set_ylim(0, 1.08 * rates.max() or 1)
    axes.xaxis.set_major_formatter('{x:,.0f}')
    axes.ticklabel_format(axis='y', style='sci', scilimits=(-2, 3))
    note_ends(axes, steps, rates)


def note_ends(axes, steps: np.ndarray, rates: np.ndarray) -> None:
  """Marks the first highest rate and the last rate with their values; the last label is right of the plot."""
  top, last = int(rates.argmax()), len(rates) - 1
  axes.plot(steps[[top, last]], rates[[top, last]], 'o', color=BLUE, markersize=4, clip_on=False)
  note = {'fontsize': 9, 'color': '#555', 'textcoords': 'offset points', 'annotation_clip': False}
  axes.annotate(f'{rates[last]:.3g}', (steps[last], rates[last]), xytext=(7, 0), va='center', **note)
  if top != last:
    side = 'right' if steps[top] > steps[last] / 2 else 'left'
    axes.annotate(f'{rates[top]:.3g} at step {steps[top]:,}', (steps[top], rates[top]), xytext=(0, 5), ha=side, **note)


@contextlib.contextmanager
def figure(plt, path: pathlib.Path, size: tuple[float, float]):
  """Axes of a new figure, which is saved to `path` at the end of the block."""
  picture, axes = plt.subplots(figsize=size, layout='constrained')
  yield axes
  picture.savefig(path)
  plt.close(picture)


def plot(axes, name: str, rows: Rows, baselines: Mapping[str, float], wanted: Shares) -> None:
  match name:
    case 'loss':
      plot_loss(axes, rows, baselines)
    case 'throughput':
      plot_smoothed(axes, scaled(curve(rows, 'tokens_per_second'), 1e-3))
      axes.set_ylim(bottom=0)
    case 'data_wait':
      plot_smoothed(axes, scaled(curve(rows, 'data_wait'), 100))
      axes.set_ylim(bottom=0)
    case 'grad_norm':
      plot_smoothed(axes, curve(rows, 'grad_norm'))
      plot_log(axes)
    case 'fill':
      plot_fill(axes, rows)
    case 'kurtosis' | 'router_entropy' | 'expert_dropped':
      plot_layers(axes, name, rows)
    case 'expert_load':
      plot_loads(axes, rows)
    case 'shares':
      plot_shares(axes, rows, wanted)
    case 'source_loss':
      plot_source_loss(axes, rows, [start for start, _ in wanted])
    case _:
      axes.plot(*curve(rows, name), color=BLUE)


def plot_log(axes) -> None:
  """A logarithmic axis whose numbers are plain text: the formatter of matplotlib writes them as mathematics."""
  from matplotlib.ticker import FuncFormatter, LogFormatter

  axes.set_yscale('log')
  axes.grid(which='both', axis='y')
  axes.yaxis.set_major_formatter('{x:g}')
  chosen = LogFormatter(minor_thresholds=(1, 0.4))  # which of the marks between powers of ten have a number
  chosen.set_axis(axes.yaxis)
  axes.yaxis.set_minor_formatter(FuncFormatter(lambda x, place: f'{x:g}' if chosen(x, place) else ''))


def plot_fill(axes, rows: Rows) -> None:
  """The share of positions that hold tokens on each side, and the share of FLOPs that padding takes."""
  for key, (name, color, style) in FILL.items():
    if any(key in row for row in rows):
      plot_smoothed(axes, scaled(curve(rows, key), 100), name, color, style)
  axes.set_ylim(0, 102)
  legend(axes)


def plot_layers(axes, name: str, rows: Rows) -> None:
  """Each layer's value, deeper ones darker; for kurtosis the axis is linear up to 2 and logarithmic above."""
  factor = 100 if name == 'expert_dropped' else 1
  for (stack, keys), color in zip(sorted(layers_of(rows, name).items()), (BLUE, EVALUATION[0]), strict=False):
    for i, key in enumerate(keys):
      style = {'label': f'{stack}, layer {i}'} if i in (0, len(keys) - 1) else {}
      alpha = 0.3 + 0.7 * (i + 1) / len(keys)
      axes.plot(*scaled(curve(rows, key), factor), color=color, alpha=alpha, **style)
  if name == 'kurtosis':
    axes.set(yscale='symlog')
    axes.yaxis.set_major_formatter('{x:g}')
  else:
    axes.set_ylim(bottom=0)
  legend(axes)


def plot_loads(axes, rows: Rows) -> None:
  """In each layer the most and the least used expert, deeper layers darker; 1 is an equal share."""
  for (stack, layers), color in zip(sorted(loads_of(rows).items()), (BLUE, EVALUATION[0]), strict=False):
    for i, (steps, loads) in enumerate(layers):
      alpha = 0.3 + 0.7 * (i + 1) / len(layers)
      for values, style in ((loads.max(1), '-'), (loads.min(1), '--')):
        named = {'label': f'{stack}, layer {i}'} if i in (0, len(layers) - 1) and style == '-' else {}
        axes.plot(steps, values, style, color=color, alpha=alpha, **named)
  axes.axhline(1, color='#777', linestyle=(0, (5, 3)), linewidth=1)
  axes.set_ylim(bottom=0)
  legend(axes)


def plot_loss(axes, rows: Rows, baselines: Mapping[str, float]) -> None:
  """Training loss, held-out losses, and the baselines as lines across; n-grams are comparable with text loss only."""
  plot_smoothed(axes, curve(rows, 'loss'), 'training')
  found = evaluations(rows)
  colors = list(dict.fromkeys(map(raw_of, found)))
  for key, text in found.items():
    color = EVALUATION[colors.index(raw_of(key)) % len(EVALUATION)]
    axes.plot(*curve(rows, key), STYLES[average_of(key)], markersize=3.5, color=color, label=text)
  for value in baselines.values():
    axes.axhline(value, color='#777', linestyle=(0, (5, 3)), linewidth=1)
  note_baselines(axes, baselines)
  legend(axes)


def note_baselines(axes, baselines: Mapping[str, float]) -> None:
  """The name and the value of each line, right of the plot; apart from each other where lines are close."""
  names = sorted((name for name, value in baselines.items() if math.isfinite(value)), key=lambda name: baselines[name])
  low, high = axes.get_ylim()
  axes.set_ylim(low, high)  # fixed: the heights of labels are shares of this range
  places = apart([(baselines[name] - low) / (high - low) for name in names], 0.055)
  for name, place in zip(names, places, strict=True):
    text = f'{label(name)} {baselines[name]:.2f}'
    axes.annotate(text, (1, place), xycoords='axes fraction', fontsize=9, color='#555', va='center', xytext=(5, 0),
                  textcoords='offset points', annotation_clip=False)  # fmt: skip


def plot_shares(axes, rows: Rows, wanted: Shares) -> None:
  """The share of the rows of each mixture stage so far that came from each source; dashed, the wanted share."""
  colors, last = source_colors(rows), rows[-1]['step']
  for source, (color, style) in colors.items():
    # A row counts the steps up to it: a border of stages is a jump.
    points = scaled(curve(rows, f'share/{source}'), 100)
    axes.plot(*points, style, color=color, label=label(source), drawstyle='steps-pre')
  named = {'label': 'wanted'}
  for start, end, source, share in lines_of(wanted, last):
    if source in colors:
      axes.plot([start, end], [100 * share] * 2, color='#222', linestyle=(0, (4, 3)), linewidth=1, zorder=3, **named)
      named = {}
  axes.set_ylim(bottom=0)
  legend(axes)


def lines_of(wanted: Shares, last: float) -> list[tuple[float, float, str, float]]:
  """(first step, last step, source, share): the wanted shares in a run of `last` steps.

  >>> lines_of([(0, {'a': 1.0}), (20, {'a': 0.4}), (60, {'a': 0.1})], 50)
  [(0, 20, 'a', 1.0), (20, 50, 'a', 0.4)]
  """
  ends = [*(start for start, _ in wanted[1:]), last]
  spans = [(start, min(end, last), shares) for (start, shares), end in zip(wanted, ends, strict=False)]
  return [(start, end, name, share) for start, end, own in spans for name, share in own.items() if start < end]


def plot_source_loss(axes, rows: Rows, borders: Sequence[float]) -> None:
  """The training loss on each source; a vertical line where the wanted shares change."""
  for source, (color, style) in source_colors(rows).items():
    plot_smoothed(axes, curve(rows, f'loss/{source}'), label(source), color, style)
  for step in borders:
    if 0 < step < rows[-1]['step']:
      axes.axvline(step, color='#777', linestyle=(0, (4, 3)), linewidth=1)
  legend(axes)


def source_colors(rows: Rows) -> dict[str, tuple[str, str]]:
  """The colour and the style of line of each source, the same in all plots."""
  palette, styles = (BLUE, *EVALUATION), ('-', '--', '-.', ':')
  place = lambda i: (palette[i % len(palette)], styles[i // len(palette) % len(styles)])
  return {source: place(i) for i, source in enumerate(sources_of(rows))}


def evaluations(rows: Rows) -> dict[str, str]:
  """The held-out losses to draw and their labels: first the weights' own, then those of averaged weights.

  A loss on text alone that stays within 1% of the loss on all targets would hide that curve: only the label names it.
  """
  keys = sorted(
    {key for row in rows for key in row if key.startswith('eval/') and key.endswith('loss')},
    key=lambda key: (raw_of(key), average_of(key)),
  )
  same = {whole_of(text): text for text in keys if hides(rows, text)}
  return {
    key: evaluation_label(key) + ', text only within 1%' * (key in same) for key in keys if key not in same.values()
  }


def evaluation_label(key: str) -> str:
  """The set and the average of `eval/SET/loss` or `eval/SET/AVERAGE/text_loss`, for a legend."""
  average, text = average_of(key), key.endswith('/text_loss')
  return label(set_of(key)) + f'/{average}' * bool(average) + ', text only' * text


def whole_of(key: str) -> str:
  """The key of the loss on all targets that belongs to a loss on text alone."""
  return key.removesuffix('/text_loss') + '/loss' if key.endswith('/text_loss') else key


def hides(rows: Rows, text: str) -> bool:
  """Whether `text`, the key of a loss on text alone, is everywhere within 1% of the loss on all targets."""
  whole = whole_of(text)
  pairs = [(row[text], row[whole]) for row in rows if text in row and whole in row]
  return whole != text and bool(pairs) and all(abs(a - b) <= 0.01 * abs(b) for a, b in pairs)


def raw_of(key: str) -> str:
  """The key for the weights themselves that corresponds to a key for averaged weights.

  >>> raw_of('eval/books/ema/loss'), raw_of('eval/books/loss')
  ('eval/books/loss', 'eval/books/loss')
  """
  return f'eval/{set_of(key)}/{key.rpartition("/")[2]}'


def set_of(key: str) -> str:
  """The evaluation set of a key: 'books' of eval/books/loss and of eval/books/ema/loss."""
  name, average = key.removeprefix('eval/').rpartition('/')[0], average_of(key)
  return name.removesuffix(f'/{average}') if average else name


def average_of(key: str) -> str:
  """'ema' of eval/<set>/ema/loss, '' of eval/<set>/loss."""
  *name, last = key.removeprefix('eval/').split('/')[:-1]
  return last if name and last in STYLES else ''


def plot_smoothed(axes, points: Curve, name: str | None = None, color: str = BLUE, style: str = '-') -> None:
  """The points pale, their running mean strong."""
  steps, values = points
  if len(values) < 40:
    axes.plot(steps, values, style, color=color, label=name)
    return
  axes.plot(steps, values, color=color, alpha=0.35, linewidth=0.8)
  axes.plot(steps, running_mean(values, len(values) // 80), style, color=color, label=name)


def draw_stats(values: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws the result of `pretrain data stats`: lengths of documents and frequent tokens."""
  plt = pyplot()
  with plt.rc_context(LOOK):
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2), layout='constrained')
    bins = values['length_histogram']
    names = [f'{b["from"]:,}' for b in bins]
    left.bar(names, [b['documents'] / values['num_documents'] * 100 for b in bins], color=BLUE, label='documents')
    shares = [b['tokens'] / values['num_tokens'] * 100 for b in bins]
    left.plot(names, shares, 'o-', color=EVALUATION[0], label='tokens')
    left.set(title='Lengths of documents', xlabel='tokens, from … to the next', ylabel='%')
    left.tick_params('x', rotation=45)
    left.legend()
    common = values['frequent_tokens'][:20][::-1]
    pieces = [token['piece'].replace('\u2581', '_') for token in common]
    labels = [f'"{label(p)}"' if p.isascii() else f'id {token["id"]}' for p, token in zip(pieces, common, strict=True)]
    right.barh(range(len(common)), [token['count'] / values['num_tokens'] * 100 for token in common], color=PALE)
    right.set_yticks(range(len(common)), labels)
    right.set(title='Most frequent tokens', xlabel='% of all tokens')
    fig.savefig(path)
    plt.close(fig)
