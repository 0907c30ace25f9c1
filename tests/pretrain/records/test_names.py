"""Names of sources and evaluation sets are text, never markup: in plots, the report, TensorBoard and the terminal."""

import html
import html.parser
import io
import warnings

import matplotlib.text
import pytest

from pretrain.records import plots
from pretrain.records.metrics import Metrics, read_metrics
from pretrain.records.names import one_line
from pretrain.records.progress import make_display
from pretrain.tools import report
from tests.pretrain.records.test_metrics import records

NAMES = [
  '$x_{$', '$a$', r'\frac{', 'a_b^c', '<b>bold', '&amp;', '"quoted" \'name\'', '[red]x[/red]', '[/]', ':fire:',
  'a\nb\tc', '\x1b[31mred', '\u202eright to left', 'émoji 😀', '书', '_hidden', '', 'long' * 40, 'loss', 'text_loss',
  '%s {x} %(y)s', '\ud83d', '</script><script>', 'z_loss', 'ema',
]  # fmt: skip


def rows_of(*names: str) -> list[dict[str, float]]:
  """Rows of a run with these sources, each an evaluation set and a baseline too."""
  rows = [{'step': step, 'loss': 5.0 - step, 'grad_norm': 1.0, 'learning_rate': 0.1} for step in range(1, 4)]
  for row in rows:
    for i, name in enumerate(names):
      row |= {f'share/{name}': 0.5, f'loss/{name}': 4.0 + i, f'weight/{name}': 0.5, f'epochs/{name}': 0.1}
      row |= {f'eval/{name}/loss': 3.0 + i, f'eval/{name}/text_loss': 3.5 + i, f'eval/{name}/ema/loss': 2.0 + i}
  return rows


@pytest.fixture
def drawn(monkeypatch):
  """The texts that matplotlib has drawn, with whether they were read as mathematics."""
  found, draw = {}, matplotlib.text.Text.draw

  def watched(self, renderer):
    found[self.get_text()] = self.get_parse_math()
    draw(self, renderer)

  monkeypatch.setattr(matplotlib.text.Text, 'draw', watched)
  return found


def test_plots_show_names_as_they_are(tmp_path, drawn):
  with warnings.catch_warnings():
    warnings.simplefilter('error')  # a missing glyph is one, a legend that leaves no room for the plot another
    baselines = {name: 3.0 + i for i, name in enumerate(NAMES)}
    plots.draw(rows_of(*NAMES), baselines, tmp_path, [(0, dict.fromkeys(NAMES, 0.05))])
  assert not any(drawn.values()), 'nothing is read as mathematics'
  for name, value in baselines.items():
    shown = plots.label(name)
    assert {shown, f'{shown} {value:.2f}', f'{shown}, text only', f'{shown}/ema'} <= set(drawn)
    assert len(shown) <= plots.NAME + 1
    assert '\n' not in shown
    if name.isascii() and name.isprintable() and 0 < len(name) <= plots.NAME:
      assert shown.strip() == name


def test_what_the_font_does_not_have_is_shown_by_its_code():
  assert plots.label('书 1') == 'U+4E66  1'
  assert plots.label('é') == 'é'
  assert plots.label('x' * 100 + 'y') == 'x' * 14 + '…' + 'x' * 12 + 'y'


def test_marks_of_a_logarithmic_axis_are_plain_numbers(tmp_path, drawn):
  rows = [{'step': step, 'grad_norm': 10.0**step, 'loss': 1.0} for step in range(-2, 3)]
  plots.draw(rows, {}, tmp_path)
  assert {'0.01', '0.1', '1', '10', '100'} <= set(drawn)
  assert not any('mathdefault' in text for text in drawn)
  plots.draw([row | {'grad_norm': 1.0 + step / 2} for step, row in enumerate(rows)], {}, tmp_path)
  assert {'2', '3'} <= set(drawn), 'less than a power of ten has numbers too'


def test_frequent_tokens_are_text(tmp_path, drawn):
  pieces = ['$', '$x_{$', '\\frac', '\n', '_', '<b>']
  tokens = [{'piece': piece, 'id': i, 'count': 1} for i, piece in enumerate(pieces)]
  values = {'length_histogram': [{'from': 1, 'documents': 1, 'tokens': 9}], 'num_documents': 1, 'num_tokens': 9}
  plots.draw_stats(values | {'frequent_tokens': tokens}, tmp_path / 'stats.png')
  assert {'"$"', '"$x_{$"', '"\\frac"', '"\\n"', '"<b>"'} <= set(drawn)


def test_the_title_of_a_schedule_is_text(tmp_path, drawn):
  plots.draw_schedule(lambda steps: steps * 1.0, 5, '$x_{$', tmp_path / 'rate.png')
  assert 'Learning rate: $x_{$' in drawn


class Cells(html.parser.HTMLParser):
  """The text of each cell of a report, and its tags."""

  def __init__(self):
    super().__init__()
    self.cells, self.tags = [], set()

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    if tag == 'td':
      self.cells.append('')

  def handle_data(self, data):
    if self.cells:
      self.cells[-1] += data


def run_of(names, folder) -> None:
  metrics = Metrics(folder, resume_step=0, total_steps=3)
  for row in rows_of(*names):
    metrics.write(row['step'], {key: value for key, value in row.items() if key != 'step'})
  metrics.close()


def test_the_report_shows_names_as_they_are(tmp_path, monkeypatch):
  monkeypatch.setattr(report, 'draw', lambda *_: [])
  folder = tmp_path / '<i>$&"'
  run_of(NAMES, folder)
  text = report.write_report(folder).read_text(encoding='utf-8')
  found = Cells()
  found.feed(text)
  assert not {'b', 'script', 'i'} & found.tags
  assert '<title>&lt;i&gt;$&amp;&quot;</title>' in text
  units = dict(zip(found.cells[::3], found.cells[2::3], strict=True))
  for name in NAMES:
    assert units[f'share/{one_line(name)}'] == 'share of rows'
    assert units[f'loss/{one_line(name)}'] == units[f'eval/{one_line(name)}/loss'] == 'nats per target'


def test_tensorboard_and_metrics_have_each_name(tmp_path):
  from tensorboardX.proto.event_pb2 import Event

  run_of(NAMES, tmp_path)
  assert {f'share/{name}' for name in NAMES} <= set(read_metrics(tmp_path)[0])
  (file,) = (tmp_path / 'tensorboard').iterdir()
  tags = {value.tag for record in records(file.read_bytes()) for value in Event.FromString(record).summary.value}
  assert {f'share/{one_line(name)}' for name in NAMES} <= tags


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.mark.parametrize('kind', [io.StringIO, Terminal])
@pytest.mark.parametrize('name', [name for name in NAMES if len(name) < 40])
def test_a_terminal_shows_names_as_they_are(kind, name, monkeypatch):
  monkeypatch.setenv('COLUMNS', '200')
  stream = kind()
  display = make_display(3, stream)
  display.print(f'step 1  eval/{name} 1.0')
  display.warn(f'DATA-CUT: {name}: 3 of 4')
  display.close()
  text = stream.getvalue()
  assert f'step 1  eval/{one_line(name)} 1.0' in text
  assert f'DATA-CUT: {one_line(name)}: 3 of 4' in text


def test_the_live_line_reads_no_markup(monkeypatch):
  stream = Terminal()
  display = make_display(3, stream)
  monkeypatch.setattr(display._clock, 'describe', lambda step, values: 'loss [red]x[/red] [/]')
  display.show(1, {})
  display.close()
  assert '[red]x[/red] [/]' in stream.getvalue()
