"""`report.html` of a run: its plots and final numbers in one self-contained file, drawn from metrics.jsonl."""

import base64
import html
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from data.batches.source import wanted_shares
from data.stores.paths import looked_in
from pretrain.config import bindings
from pretrain.errors import CheckpointError
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.phases import phases_of
from pretrain.hosts.skipping import read_rewinds
from pretrain.records.goodput import KINDS, write_goodput
from pretrain.records.metrics import read_metrics
from pretrain.records.names import one_line
from pretrain.records.plots import Shares, draw, plots_of, sources_of
from pretrain.tools.eval_section import eval_section, read_results
from pretrain.workdirs.copies import small_files
from pretrain.workdirs.folder import Folder, as_folder

Rows = Sequence[Mapping[str, float]]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2.5em auto; padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: 0; } h2 { font-size: 1.1em; margin-top: 2em; } .path { color: #777; }
.plots { display: grid; grid-template-columns: repeat(2, 1fr); gap: 16px; } .plots img { width: 100%; }
.plots img:first-child { grid-column: 1 / -1; }
table { border-collapse: collapse; } td, th { padding: 3px 18px 3px 0; border-bottom: 1px solid #e5e5e5; }
th { text-align: left; font-weight: 600; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: flex; height: 26px; border-radius: 3px; overflow: hidden; margin: 0 0 10px; }
td i { display: inline-block; width: 10px; height: 10px; margin-right: 8px; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 13px; line-height: 1.4; }
"""


def write_report(workdir: str | os.PathLike[str] | Folder) -> Folder:
  """Draws workdir/plots/*.png and workdir/report.html again from the files of the run; returns the report's path.

  Raises CheckpointError where there is neither a metrics.jsonl with a row in it nor an eval.json.
  """
  place = as_folder(workdir)
  with small_files(place) as folder:
    return place / draw_report(folder).name


def draw_report(workdir: pathlib.Path) -> pathlib.Path:
  """`write_report`, for a folder of a disk."""
  rows, results = read_metrics(workdir), read_results(workdir)
  if not rows and not results:
    raise CheckpointError(
      'CKPT-NONE', f'no metrics of a run in {workdir}{looked_in(workdir)}; nothing was written. Check the path.'
    )
  baselines = read_baselines(workdir)
  images = draw(rows, baselines, workdir / 'plots', read_shares(workdir) if sources_of(rows) else ()) if rows else []
  report = workdir / 'report.html'
  temporary = report.with_suffix('.tmp')
  temporary.write_text(page(workdir, rows, baselines, images, results), encoding='utf-8')
  temporary.replace(report)
  return report


def read_baselines(workdir: pathlib.Path) -> dict[str, float]:
  """Losses of simpler models on the same held-out text, in nats per token: {'unigram': 6.59, …}; empty without file."""
  path = workdir / 'baselines.json'
  return json.loads(path.read_text()) if path.exists() else {}


def read_shares(workdir: pathlib.Path) -> Shares:
  """The intended shares of the sources of a run, each with its first step; empty without a config.

  For a run whose weights were changed (`--allow_data_change`) they are the last ones, which its config holds.
  """
  path = workdir / 'config.gin'
  return shares_of(bindings.load(Experiment, [str(path)])) if path.exists() else ()


def shares_of(cfg: Experiment) -> list[tuple[float, Mapping[str, float]]]:
  """(step, share of each source from that step on), phase by phase. Stages count rows from the start of the run."""
  found = []
  for phase in phases_of(cfg):
    for row, shares in wanted_shares(phase.cfg.data):
      step = phase.start + max(row - phase.first_example, 0) / phase.cfg.data.batch_size
      if phase.end is None or step < phase.end:
        found.append((step, shares))
  return found


def page(
  workdir: pathlib.Path, rows: Rows, baselines: Mapping[str, float], images: Sequence[pathlib.Path],
  results: Mapping[str, Any],
) -> str:  # fmt: skip
  """The whole report as HTML, with the images embedded."""
  saved = workdir / 'config.gin'
  name = text_of(workdir.resolve().name)
  titles = plots_of(rows)
  pictures = '\n'.join(embedded(image, titles[image.stem]) for image in images)
  numbers = table(('', 'value', 'unit'), [(label, show(value), unit) for label, value, unit in summary(rows)])
  sections = [goodput_section(write_goodput(workdir))]
  sections += [rewinds_section(read_rewinds(workdir)), f'<h2>Final numbers</h2>{numbers}' if rows else '']
  sections.append(eval_section(results, workdir / 'plots', show, table, embedded))
  if baselines:
    losses = [(label, show(value), 'nats per text token') for label, value in baselines.items()]
    sections.append(f'<h2>Baselines on the held-out text</h2>{table(("", "value", "unit"), losses)}')
  if saved.exists():
    sections.append(f'<h2>Config</h2><pre>{html.escape(saved.read_text(encoding="utf-8", errors="replace"))}</pre>')
  steps = f'{len(rows)} rows, steps {rows[0]["step"]} to {rows[-1]["step"]}' if rows else 'not trained here'
  return (
    f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style></head>\n'
    f'<body><h1>{name}</h1><p class="path">{steps}</p>\n'
    f'<div class="plots">{pictures}</div>\n{"".join(sections)}</body></html>\n'
  )


def goodput_section(found: Mapping[str, Any]) -> str:
  """Where the time went, as one bar and a table; empty for a run without a timeline."""
  if not found:
    return ''
  wall = found['wall_seconds']
  parts = {kind: seconds for kind, seconds in found['seconds'].items() if seconds > 0}
  bar = ''.join(
    f'<span title="{KINDS[kind]}: {show(seconds)} s" style="width:{100 * seconds / wall:.3f}%;'
    f'background:{COLORS[kind]}"></span>'
    for kind, seconds in parts.items()
  )
  cells = [
    (f'<i style="background:{COLORS[kind]}"></i>{kind}: {KINDS[kind]}', show(seconds), f's, {seconds / wall:.1%}')
    for kind, seconds in parts.items()
  ]
  cells += [(name, show(found[key]), unit) for key, name, unit in RECOVERY if found[key] is not None]
  rows = ''.join(f'<tr><td>{a}</td><td class="number">{b}</td><td>{c}</td></tr>' for a, b, c in cells)
  title = f'<h2>Goodput: {found["goodput"]:.1%} of {show(round(wall))} s made steps that count</h2>'
  return f'{title}<div class="bar">{bar}</div><table>{rows}</table>'


def rewinds_section(found: Sequence[Mapping[str, Any]]) -> str:
  """The loss spikes after which the run was rewound; empty without any."""
  left_out = lambda first, end: f'{first:,} to {end - 1:,}'
  rows = [(f'spike at step {x["step"]:,}', f'{x["to"]:,}', left_out(*x['examples'])) for x in found]
  return f'<h2>Rewinds</h2>{table(("", "back to step", "examples left out"), rows)}' if rows else ''


RECOVERY = (
  ('failures', 'failures', ''),
  ('mttr_seconds', 'mean time to recover: from a failure to the first step after it', 's'),
  ('mtbf_seconds', 'mean time between failures', 's'),
)
COLORS = {
  'productive': '#2563a8', 'lost': '#d1492e', 'data': '#c98a1b', 'save': '#8a4fa3', 'eval': '#3a8f4d',
  'init': '#a9c6e8', 'compile': '#7f9db9', 'restore': '#5b8c8a', 'hang': '#8c1d04', 'down': '#555', 'close': '#ccc',
}  # fmt: skip


def summary(rows: Rows) -> list[tuple[str, float, str]]:
  """(name, last value, unit) of every logged metric, training first; loads of single experts are in their plot."""
  last: dict[str, float] = {}
  for row in rows:
    last |= row
  told = [name for name in last if not name.startswith('expert_load/')]
  names = sorted(told, key=lambda name: (name != 'step', name.startswith('eval/')))
  return [(name, last[name], unit_of(name)) for name in names]


def unit_of(key: str) -> str:
  """The unit of a metric. In PREFIX/NAME the name is the user's: `share/loss` is a share.

  >>> unit_of('share/loss'), unit_of('eval/web/ema/loss'), unit_of('step')
  ('share of rows', 'nats per target', '')
  """
  group, slash, _ = key.partition('/')
  if slash and group != 'eval':
    return GROUP_UNITS.get(group, '')
  return UNITS.get(key.rpartition('/')[2], '')


GROUP_UNITS = {
  'loss': 'nats per target', 'share': 'share of rows', 'weight': 'share of rows wanted', 'epochs': 'epochs',
  'fill': 'share of positions', 'kurtosis': 'excess, mean of tokens', 'router_entropy': 'nats',
  'expert_load': 'share of choices, equal: 1 / experts', 'expert_dropped': 'share of choices',
}  # fmt: skip
UNITS = {
  'loss': 'nats per target', 'text_loss': 'nats per text token', 'z_loss': 'nats per target',
  'accuracy': 'share of targets', 'targets': 'tokens', 'loss_weight': 'targets in the last batch',
  'step_seconds': 's', 'tokens_per_second': 'tokens/s', 'data_wait': 'share of time',
  'hbm_mib': 'MiB of the fullest device', 'hbm_peak_mib': 'MiB of the fullest device', 'host_mib': 'MiB of process 0',
  'duty_cycle_pct': '% of time, least busy chip', 'tpu_throttle_score': '0 to 10, most throttled chip',
  'mfu': 'share of peak FLOPs', 'slowest_host': 'process', 'slowest_ratio': 'times the median',
  'save_stall': 's', 'save_seconds': 's', 'save_mib': 'MiB',
  'skipped': 'updates', 'spikes': 'updates', 'loss_limit': 'nats per target',
  'padding_flops': 'share of FLOPs', 'grad_norm': 'global norm', 'learning_rate': 'of the last update',
  'load_balance': '1: equal load', 'router_z': 'mean square of log Z',
  'perplexity': 'per target', 'exact_match': 'share of outputs',
}  # fmt: skip


def show(value: float) -> str:
  """Five significant digits, with thousands separators.

  >>> show(12345678), show(4.123456), show(0.0002), show(float('nan'))
  ('12,345,678', '4.1235', '0.0002', 'nan')
  """
  if value == value and abs(value) != float('inf') and value == int(value):
    return f'{int(value):,}'
  return f'{value:,.5g}'


def table(header: Sequence[str], rows: Sequence[tuple[str, str, str]]) -> str:
  head = ''.join(f'<th>{cell}</th>' for cell in header)
  body = ''.join(
    f'<tr><td>{text_of(name)}</td><td class="number">{value}</td><td>{unit}</td></tr>' for name, value, unit in rows
  )
  return f'<table><tr>{head}</tr>{body}</table>'


def text_of(name: str) -> str:
  """A name as HTML: one line of it, no markup."""
  return html.escape(one_line(name))


def embedded(image: pathlib.Path, title: str) -> str:
  data = base64.b64encode(image.read_bytes()).decode()
  return f'<img alt="{text_of(title)}" src="data:image/png;base64,{data}">'
