"""report.html: one file with every plot in it, drawn from the files of a run."""

import base64
import html.parser
import json
import math
import re

import matplotlib.image
import numpy as np
import pytest

from pretrain.config import bindings
from pretrain.errors import CheckpointError
from pretrain.experiment.experiment import Experiment
from pretrain.records import plots
from pretrain.records.metrics import Metrics
from pretrain.records.plots import PLOTS, SOURCE_PLOTS, curve, draw, evaluations, layers_of
from pretrain.tools.report import shares_of, unit_of, write_report


@pytest.fixture
def run(tmp_path):
  """A run of 100 steps, one of them not finite."""
  metrics = Metrics(tmp_path, resume_step=0, total_steps=100)
  for step in range(1, 101):
    metrics.write(step, {
      'loss': math.nan if step == 7 else 9.0 - step / 20, 'learning_rate': step * 1e-5, 'grad_norm': 1.0 + step % 3,
      'tokens_per_second': 1234.5, 'data_wait': 0.01,
    })  # fmt: skip
  metrics.eval(100, {'eval/books & co/loss': 4.25, 'eval/books & co/text_loss': 4.75})
  metrics.close()
  (tmp_path / 'config.gin').write_text("data.name = '<builtin>'\n")
  return tmp_path


def test_the_report_needs_no_other_file(run):
  text = write_report(run).read_text()
  sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
  assert len(sources) == len(PLOTS) == 5
  assert all(source.startswith('data:image/png;base64,') for source in sources)
  embedded = [base64.b64decode(data) for data in re.findall(r'base64,([^"]+)"', text)]
  assert embedded == [(run / 'plots' / f'{name}.png').read_bytes() for name in PLOTS]


def test_the_report_is_well_formed_and_escapes_what_it_quotes(run):
  text = write_report(run).read_text()
  opened = []

  class Checker(html.parser.HTMLParser):
    def handle_starttag(self, tag, attrs):
      if tag not in ('meta', 'img'):
        opened.append(tag)

    def handle_endtag(self, tag):
      assert opened.pop() == tag

  Checker().feed(text)
  assert opened == []
  assert 'data.name = &#x27;&lt;builtin&gt;&#x27;' in text
  assert 'eval/books &amp; co/loss' in text


def test_the_summary_has_the_last_value_of_everything(run):
  rows = re.findall(
    r'<tr><td>([^<]*)</td><td class="number">([^<]*)</td><td>([^<]*)</td>', write_report(run).read_text()
  )
  assert {
    ('step', '100', ''), ('loss', '4', 'nats per target'), ('tokens_per_second', '1,234.5', 'tokens/s'),
    ('eval/books &amp; co/text_loss', '4.75', 'nats per text token'),
  } <= set(rows)  # fmt: skip


def test_baselines_are_listed_and_drawn(run, tmp_path_factory):
  rows = [{'step': s, 'loss': 5.0 - s} for s in range(3)]
  plain, lined = (draw(rows, baselines, tmp_path_factory.mktemp('plots'))[0] for baselines in ({}, {'bigram': 4.69}))
  assert not np.array_equal(matplotlib.image.imread(plain), matplotlib.image.imread(lined))
  assert 'Baselines' not in write_report(run).read_text()
  (run / 'baselines.json').write_text(json.dumps({'unigram': 6.59, 'bigram': 4.69}))
  assert '<td>bigram</td><td class="number">4.69</td>' in write_report(run).read_text()


def test_every_plot_shows_its_numbers(run, tmp_path_factory):
  """Other numbers give another picture: no plot reads the wrong key."""
  rows = [{'step': s, 'loss': 5.0, 'learning_rate': 1.0, 'grad_norm': 1.0, 'tokens_per_second': 1.0, 'data_wait': 0.1}
          for s in range(5)]  # fmt: skip
  keys = dict(zip(PLOTS, ('loss', 'learning_rate', 'grad_norm', 'tokens_per_second', 'data_wait'), strict=True))
  before = [path.read_bytes() for path in draw(rows, {}, tmp_path_factory.mktemp('plots'))]
  for i, key in enumerate(keys.values()):
    other = [row | {key: row[key] * (1 + row['step'])} for row in rows]
    after = [path.read_bytes() for path in draw(other, {}, tmp_path_factory.mktemp('plots'))]
    assert [a != b for a, b in zip(after, before, strict=True)] == [j == i for j in range(5)], key


def test_used_positions_and_padding_are_drawn_where_they_are_logged(monkeypatch, tmp_path):
  monkeypatch.setattr(plots, 'PLOTS', {})
  rows = [{'step': s, 'fill/encoder': 0.9, 'fill/decoder': 0.5, 'padding_flops': 0.3} for s in range(5)]
  (before,) = (path.read_bytes() for path in draw(rows, {}, tmp_path))
  for key in ('fill/encoder', 'fill/decoder', 'padding_flops'):
    (after,) = draw([row | {key: row[key] + 0.02 * row['step']} for row in rows], {}, tmp_path)
    assert after.read_bytes() != before, key
    draw([{k: v for k, v in row.items() if k in (key, 'step', 'padding_flops')} for row in rows], {}, tmp_path)
  assert draw([{'step': 1, 'loss': 2.0}], {}, tmp_path) == []


def test_the_kurtosis_of_each_layer_is_drawn_where_it_is_logged(monkeypatch, tmp_path):
  monkeypatch.setattr(plots, 'PLOTS', {})
  keys = [f'kurtosis/{stack}/{layer}' for stack in ('encoder', 'decoder') for layer in range(3)]
  rows = [{'step': s} | {key: 0.5 for key in keys} for s in range(5)]
  (before,) = (path.read_bytes() for path in draw(rows, {}, tmp_path))
  for key in keys:
    (after,) = draw([row | {key: 0.5 + 40.0 * row['step']} for row in rows], {}, tmp_path)
    assert after.read_bytes() != before, key
  assert unit_of(keys[0]) == 'excess, mean of tokens'
  assert layers_of([{'step': 1, 'kurtosis/decoder/10': 1.0, 'kurtosis/decoder/9': 1.0}], 'kurtosis') == {
    'decoder': ['kurtosis/decoder/9', 'kurtosis/decoder/10']
  }


@pytest.mark.slow
def test_the_routers_of_each_layer_are_drawn_where_they_are_logged(monkeypatch, tmp_path):
  """The most and the least used expert of a layer are: another load of one of them is another picture."""
  monkeypatch.setattr(plots, 'PLOTS', {})
  loads = [f'expert_load/decoder/{layer}/{expert}' for layer in range(2) for expert in range(3)]
  keys = [*loads, *(f'{name}/decoder/{layer}' for name in ('router_entropy', 'expert_dropped') for layer in range(2))]
  rows = [{'step': s} | {key: 0.3 + 0.05 * int(key[-1]) for key in keys} for s in range(5)]
  pictures = lambda rows: {path.stem: path.read_bytes() for path in draw(rows, {}, tmp_path)}
  before = pictures(rows)
  assert list(before) == ['expert_load', 'router_entropy', 'expert_dropped']
  for key in keys:
    if key[-1] != '1' or key not in loads:
      after = pictures([row | {key: row[key] + 0.2 * row['step'] * (1 if key[-1] != '0' else -0.2)} for row in rows])
      assert [name for name in before if after[name] != before[name]] == [key.split('/')[0]], key
  assert list(pictures([{k: v for k, v in row.items() if 'dropped' not in k} for row in rows])) == [*before][:2]
  assert unit_of(loads[0]) == 'share of choices, equal: 1 / experts'


MIXTURE = 'configs/ul2/tiny_mixture.gin'
TWO_SOURCES = [
  {'step': s, 'loss': 5.0, 'share/a': 0.5, 'share/b': 0.5, 'loss/a': 5.0, 'loss/b': 6.0} for s in range(1, 6)
]


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  """The plots of TWO_SOURCES without wanted shares."""
  return [path.read_bytes() for path in draw(TWO_SOURCES, {}, tmp_path_factory.mktemp('plots'))]


def test_a_mixture_has_two_more_plots_than_a_run_of_one_source(tmp_path):
  metrics = Metrics(tmp_path, resume_step=0, total_steps=5)
  for row in TWO_SOURCES:
    metrics.write(row['step'], {k: v for k, v in row.items() if k != 'step'})
  metrics.close()
  (tmp_path / 'config.gin').write_text(bindings.render(bindings.load(Experiment, [MIXTURE])))
  text = write_report(tmp_path).read_text()
  assert re.findall(r'alt="([^"]*)"', text) == [*PLOTS.values(), *SOURCE_PLOTS.values()]
  one = [{'step': 1, 'loss': 5.0, 'loss/a': 5.0}]
  assert [path.stem for path in draw(one, {}, tmp_path / 'one')] == list(PLOTS)


@pytest.mark.parametrize(
  ('key', 'wanted', 'changed'),
  [('share/b', (), ['shares']), ('loss/b', (), ['source_loss']), ('', [(0, {'a': 0.3, 'b': 0.7})], ['shares']),
   ('', [(0, {'a': 0.5}), (2, {'a': 0.5})], ['shares', 'source_loss']), ('', [(0, {'other': 0.7})], [])],
)  # fmt: skip
def test_the_plots_of_a_mixture_show_their_numbers(plain, tmp_path, key, wanted, changed):
  rows = [row | ({key: row[key] * (1 + row['step'])} if key else {}) for row in TWO_SOURCES]
  after = {path.stem: path.read_bytes() for path in draw(rows, {}, tmp_path, wanted)}
  assert [name for (name, a), b in zip(after.items(), plain, strict=True) if a != b] == changed


@pytest.mark.parametrize(
  ('overrides', 'wanted'),
  [
    ((), [(0, (0.5, 0.3, 0.2)), (200, (0.1, 0.7, 0.2))]),
    (('data.stages=()',), [(0, (1 / 3, 1 / 3, 1 / 3))]),
    (('data.stages=()', 'data.temperature=2.0'), []),
    # Stages count rows from the first of the run: row 200 * 16 is the first at step 100, row 200 * 64 comes at 275.
    (("phases=[{'start_step': 100, 'set': {'data.batch_size': 16}}]", 'data.batch_size=32'),
     [(0, (0.5, 0.3, 0.2)), (100, (0.5, 0.3, 0.2)), (100, (0.1, 0.7, 0.2))]),
    (("phases=[{'start_step': 150, 'set': {'data.batch_size': 64}}]", 'data.batch_size=32'),
     [(0, (0.5, 0.3, 0.2)), (150, (0.5, 0.3, 0.2)), (275, (0.1, 0.7, 0.2))]),
  ],
)  # fmt: skip
def test_the_wanted_shares_follow_stages_and_phases(overrides, wanted):
  found = shares_of(bindings.load(Experiment, [MIXTURE], overrides))
  assert [step for step, _ in found] == [step for step, _ in wanted]
  for (_, shares), (_, own) in zip(found, wanted, strict=True):
    assert shares == pytest.approx(dict(zip(('python', 'arrays', 'tools'), own, strict=True)))


def test_averages_come_after_the_weights_and_no_curve_hides_another():
  near, far = ({f'eval/{name}loss': 4.0, f'eval/{name}text_loss': loss} for name, loss in (('a/', 4.03), ('b/', 4.1)))
  rows = [near | far | {'step': 1}, far | {'eval/b/lawa/loss': 4.0, 'eval/b/ema/loss': 4.0, 'loss': 4.0, 'step': 2}]
  assert list(evaluations(rows).items()) == [
    ('eval/a/loss', 'a, text only within 1%'),
    ('eval/b/loss', 'b'), ('eval/b/ema/loss', 'b/ema'), ('eval/b/lawa/loss', 'b/lawa'),
    ('eval/b/text_loss', 'b, text only'),
  ]  # fmt: skip


def test_values_that_are_not_finite_are_left_out_of_curves():
  steps, values = curve([{'step': 1, 'x': 1.0}, {'step': 2, 'x': math.nan}, {'step': 3}, {'step': 4, 'x': 2.0}], 'x')
  assert (steps.tolist(), values.tolist()) == ([1, 4], [1.0, 2.0])


def test_a_run_of_one_step_has_a_report(tmp_path):
  metrics = Metrics(tmp_path, resume_step=0, total_steps=1)
  metrics.write(1, {'loss': 1.0})
  metrics.close()
  assert write_report(tmp_path).exists()


def test_a_folder_without_a_run_is_refused_and_unchanged(tmp_path):
  with pytest.raises(CheckpointError, match=r'CKPT-NONE: no metrics of a run in .*; nothing was written'):
    write_report(tmp_path)
  assert list(tmp_path.iterdir()) == []
