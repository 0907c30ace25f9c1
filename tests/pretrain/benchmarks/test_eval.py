"""`pretrain eval`: results in eval.json and the report, the same from an export; a mistake is one line."""

import json
import shutil

import numpy as np
import pytest
from matplotlib.axes import Axes

from models.build import KernelsConfig
from models.precision import BF16, PrecisionConfig
from pretrain.benchmarks.infilling import infill
from pretrain.benchmarks.needles import Haystacks, haystack, probe
from pretrain.benchmarks.scoring import Scored, Scorer
from pretrain.cli.eval import recipe_of
from pretrain.cli.main import main
from pretrain.errors import ConfigError
from pretrain.evaluation.blanks import choose
from pretrain.evaluation.writer import config_of as config_of_run
from pretrain.evaluation.writer import open_writer
from pretrain.records.heat_map import draw_needles
from pretrain.run.train import train
from tests.pretrain.benchmarks.test_scores import writer_on
from tests.pretrain.evaluation.test_generate import config_of

TEXT = 'The Licensor grants a License.\nYou may reproduce copies of the Work.\n'


@pytest.fixture(scope='module')
def run_dir(text_store, tmp_path_factory):
  """A causal decoder after two steps."""
  workdir = tmp_path_factory.mktemp('runs') / 'causal'
  train(config_of(text_store, 'causal_lm', 'train.steps=2', 'checkpoint.every=1', 'model.vocab_size=512'), workdir)
  return workdir


@pytest.fixture
def text(tmp_path):
  path = tmp_path / 'notes.txt'
  path.write_text(TEXT)
  return path


@pytest.mark.slow
def test_results_are_in_a_file_and_in_the_report(run_dir, text, tmp_path, capsys):
  rank = tmp_path / 'q.jsonl'
  rank.write_text(json.dumps({'context': 'the', 'choices': [' Work', ' License'], 'answer': 0}) + '\n')
  needle = ['--needle_lengths=64,96', '--needle_depths=0,1', '--needle_trials=2']
  assert main(['eval', f'--workdir={run_dir}', f'--text={text}', f'--rank=quiz={rank}', *needle]) == 0
  found = json.loads((run_dir / 'eval.json').read_text())
  assert found['step'] == 2
  assert found['text']['notes']['bytes'] == len(TEXT.encode())
  assert found['rank']['quiz']['examples'] == 1
  assert np.shape(found['needle']['accuracy']) == (2, 2)
  assert capsys.readouterr().out.splitlines()[0].startswith('text/notes  documents=1')
  report = (run_dir / 'report.html').read_text()
  assert 'notes: bits per byte' in report
  assert '<img alt="Needles found" src="data:image/png;base64,' in report
  assert (run_dir / 'plots/needles.png').read_bytes()[:4] == b'\x89PNG'


def test_an_older_step_and_an_export_have_their_own_results(run_dir, text, tmp_path, capsys):
  """The export of a step gives the numbers of the step; nothing is written for it without --out."""
  results = {}
  assert main(['export', f'--workdir={run_dir}', '--step=1', f'--out={tmp_path / "out"}']) == 0
  for name, flags in {
    'one': [f'--workdir={run_dir}', '--step=1'],
    'two': [f'--workdir={run_dir}'],
    'export': [f'--from={tmp_path / "out"}', '--context=64'],
  }.items():
    assert main(['eval', *flags, f'--text=a={text}', f'--out={tmp_path / name}.json', '--batch=1']) == 0
    results[name] = json.loads((tmp_path / f'{name}.json').read_text())
  assert results['one']['step'] == 1
  assert results['one']['text'] == results['export']['text']
  assert results['one']['text']['a']['nats'] != results['two']['text']['a']['nats']
  capsys.readouterr()
  before = sorted((tmp_path / 'out').iterdir())
  assert main(['eval', f'--from={tmp_path / "out"}', f'--text=a={text}']) == 0
  assert sorted((tmp_path / 'out').iterdir()) == before


@pytest.mark.slow
def test_a_recipe_at_evaluation_has_the_numbers_of_an_export_with_its_codes(run_dir, text, tmp_path):
  """Weights of 8 bits alone; activations of 8 bits too are another recipe."""
  assert main(['export', f'--workdir={run_dir}', f'--out={tmp_path / "out"}', '--quantize=int8']) == 0
  found, run = {}, f'--workdir={run_dir}'
  for name, flags in {
    'plain': [run],
    'recipe': [run, "--gin.precision.recipe='int8_weights'"],
    'export': [f'--from={tmp_path / "out"}', '--context=64'],
    'both': [run, "--gin.precision.recipe='int8'"],
  }.items():
    assert main(['eval', *flags, f'--text=a={text}', f'--out={tmp_path / name}.json', '--batch=1']) == 0
    found[name] = json.loads((tmp_path / f'{name}.json').read_text())
  nats = {name: own['text']['a']['nats'] for name, own in found.items()}
  assert nats['recipe'] == pytest.approx(nats['export'], rel=1e-6)
  assert len(set(nats.values()) - {nats['export']}) == 3
  assert max(nats.values()) - min(nats.values()) < 0.01 * nats['plain']
  assert found['recipe']['precision']['recipe'] == 'int8_weights'
  assert 'precision' not in found['plain']


def test_results_name_the_recipe_that_they_have():
  """That of the run too; nothing where products are not quantized, but what was asked for."""
  int8 = PrecisionConfig(recipe='int8')
  assert recipe_of(int8, None)['precision']['recipe'] == 'int8'
  assert recipe_of(int8, int8) == recipe_of(int8, None)
  assert recipe_of(BF16, BF16)['precision']['recipe'] == 'bf16'
  assert recipe_of(BF16, None) == {}


def test_a_run_whose_kernels_do_not_run_here_is_measured(run_dir, text, tmp_path):
  """A run of a TPU on a CPU: kernels of the run are replaced by 'auto', which chooses by platform."""
  shutil.copytree(run_dir, tmp_path / 'run')
  own = (run_dir / 'config.gin').read_text()
  named = "kernels.attention = 'tpu'\nkernels.quantized_matmul = 'tpu'\nprecision.recipe = 'int8'\n"
  (tmp_path / 'run/config.gin').write_text(f'{own}\n{named}')
  assert config_of_run(tmp_path / 'run').kernels == KernelsConfig()
  assert main(['eval', f'--workdir={tmp_path / "run"}', f'--text=a={text}', '--batch=1']) == 0
  found = json.loads((tmp_path / 'run/eval.json').read_text())
  assert found['precision']['recipe'] == 'int8'
  assert np.isfinite(found['text']['a']['nats'])


@pytest.mark.parametrize(
  ('flags', 'code', 'message'),
  [
    ([], 64, 'CONFIG: pretrain eval needs a model: --workdir=RUN, or --from=DIR; not both.'),
    (['--workdir=RUN', '--from=x'], 64, 'CONFIG: pretrain eval needs a model: '),
    (['--from=x', '--step=1'], 64, 'CONFIG: --step is a step of a run; leave it out with --from.'),
    (['--workdir=RUN'], 64, 'CONFIG: pretrain eval measures nothing: give --text, --rank, --exact, --infill, --ne'),
    (['--workdir=RUN', '--text=a=b.txt'], 65, 'DATA: --text: b.txt does not exist'),
    (['--workdir=RUN', '--rank=a=TEXT', '--rank=a=TEXT'], 64, 'CONFIG: --rank: a names two files; give each its own n'),
    (['--workdir=RUN', '--text=a=TEXT', '--batch=0'], 64, 'CONFIG: --batch=0; it must be at least 1.'),
    (['--workdir=RUN', '--infill=a=TEXT', '--sentences=0'], 64, 'CONFIG: --sentences=0; it must be at least 1.'),
    (['--workdir=RUN', '--text=a=TEXT', '--step=7'], 66, 'CKPT-NONE: RUN has no finished step 7; it has 1, 2.'),
    (['--workdir=RUN', '--needle_lengths=64', '--needle_depths=2'], 64, 'CONFIG: --needle_depths: 2 is no depth; each'),
    (['--workdir=RUN', '--needle_lengths=64', '--needle_trials=0'], 64, 'CONFIG: --needle_trials=0; it must be at le'),
    (
      ['--workdir=RUN', '--needle_lengths=9'],
      64,
      'CONFIG: --needle_lengths: 9 tokens do not hold the question, which has',
    ),
    (['--workdir=RUN', '--needle_lengths=a'], 64, "CONFIG: argument --needle_lengths: 'a' is no list of numbers; wri"),
    (['--workdir=RUN', '--text=a=TEXT', '--gin.train.steps=3'], 64, 'CONFIG: --gin.train.steps=3: the run has its co'),
    (
      ['--workdir=RUN', '--text=a=TEXT', "--gin.precision.recipe='int9'"],
      64,
      "CONFIG: --gin.precision.recipe: precision.recipe='int9' is not one of 'bf16', 'int8', ",
    ),
    (
      ['--workdir=RUN', '--text=a=TEXT', "--gin.precision.overrides={'mpl': 'int8'}"],
      64,
      "CONFIG: precision.overrides has 'mpl', which is not a product of this model; did you mean 'mlp'?",
    ),
    (
      ['--workdir=RUN', '--text=a=TEXT', "--gin.precision.recipe='int4_weights'"],
      64,
      "CONFIG: precision: recipe 'int4_weights' of decoder.",
    ),
    (['--workdir=RUN', '--infill=a=TEXT'], 64, 'CONFIG: --infill: '),
    (['--from=x', '--pathways=1'], 64, 'CONFIG: --pathways are steps of a run; leave them out with --from.'),
    (['--workdir=RUN', '--text=a=TEXT', '--pathways=7'], 66, 'CKPT-NONE: RUN has no finished step 7; it has 1, 2.'),
    (['--workdir=RUN', '--pathways=1'], 64, 'CONFIG: --pathways compares the experts of tokens, and this run has no '),
  ],
)
def test_a_mistake_is_one_line(run_dir, text, capsys, monkeypatch, flags, code, message):
  known = {'RUN': str(run_dir), 'TEXT': str(text)}
  put = lambda line: line.replace('RUN', known['RUN']).replace('TEXT', known['TEXT'])
  if flags[-1:] == ['--infill=a=TEXT']:
    text.write_text('The owner grants each of these persons a license to all of the words. ' * 2)
  if any('--pathways' in flag for flag in flags):  # before anything is measured
    monkeypatch.setattr('pretrain.benchmarks.evaluate.evaluate', lambda *_: pytest.fail('measured'))
  assert main(['eval', *map(put, flags)]) == code
  err = capsys.readouterr().err
  shown = message if '--workdir=RUN' in message else put(message)
  assert err.startswith(shown), err
  assert len(err.splitlines()) == 1


@pytest.mark.parametrize('objective', ['causal_lm', 'ul2r', 'span_corruption'])
def test_a_haystack_has_its_length_and_the_needle_at_its_depth(text_store, objective):
  writer = writer_on(text_store, objective)
  render, blank = writer.data.tokenizer.render, objective == 'span_corruption'
  places = []
  for depth in (0.0, 0.5, 1.0):
    piece = haystack(writer, 200, depth, trial=3, seed=0)
    assert len(piece.inputs) + len(piece.targets) == 200
    text, answer = render(piece.inputs), render(piece.targets).removeprefix('<extra_id_0>').strip()
    assert text.count('The secret number of the') == 2
    assert f' is {answer}.' in text, 'the needle has the answer'
    assert text.endswith(' is' if objective == 'causal_lm' else ' is <extra_id_0> </s>' if blank else ' is </s>')
    places.append(text.index('The secret number') / len(text))
  assert places[0] < 0.1 < 0.25 < places[1] < 0.5 < 0.6 < places[2]
  assert haystack(writer, 200, 0.5, 1, 0) != haystack(writer, 200, 0.5, 2, 0)


def test_a_map_has_a_row_for_each_length_and_a_column_for_each_depth(text_store):
  """A reader that finds needles only at the beginning of texts below 150 tokens."""
  writer = writer_on(text_store, 'causal_lm')

  class Reader:
    def __call__(self, pieces, said):
      for piece in pieces:
        size = len(piece.inputs) + len(piece.targets)
        found = size < 150 and 'The secret' in writer.data.tokenizer.render(piece.inputs[:20])
        yield Scored(np.full(len(piece.targets), 0.5 if found else 2.0), np.arange(len(piece.targets)) >= (not found))

  Reader.writer = writer
  found = probe(Reader(), Haystacks(lengths=(100, 200, 140), depths=(0.0, 1.0), trials=3), lambda done: None)
  assert found['accuracy'] == [[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
  assert found['nats_per_token'] == [[0.5, 2.0], [2.0, 2.0], [0.5, 2.0]]


SENTENCES = [
  'The grant of a license is free for all of the people.',
  'Any of the words in this text may be taken away now.',
]


def test_a_cell_of_the_map_is_at_its_depth_and_length(tmp_path, monkeypatch):
  """Lengths go across and depths down; the numbers in the cells are those of the colours."""
  drawn, written = [], {}
  imshow, text = Axes.imshow, Axes.text
  monkeypatch.setattr(
    Axes, 'imshow', lambda axes, values, **how: drawn.append((axes, values)) or imshow(axes, values, **how)
  )
  monkeypatch.setattr(
    Axes, 'text', lambda axes, x, y, s, **how: written.update({(x, y): s}) or text(axes, x, y, s, **how)
  )
  found = {'lengths': [64, 1024, 4096], 'depths': [0.0, 0.5], 'accuracy': [[1.0, 0.5], [0.25, 0.0], [0.75, 0.125]]}
  draw_needles(found, tmp_path / 'plots/needles.png')
  ((axes, values),) = drawn
  assert values.tolist() == [[100, 25, 75], [50, 0, 12.5]]
  assert [label.get_text() for label in axes.get_xticklabels()] == ['64', '1,024', '4,096']
  assert [label.get_text() for label in axes.get_yticklabels()] == ['0', '50']
  assert {place: written[place] for place in ((2, 0), (0, 1))} == {(2, 0): '75', (0, 1): '50'}


def test_words_that_are_filled_exactly_count(text_store, monkeypatch):
  """Outputs are given: the hidden words for one sentence, and others for the second."""
  from pretrain.benchmarks import infilling

  writer = writer_on(text_store, 'ul2r')
  blanks, v = choose(SENTENCES, 5), writer.data.vocabulary
  assert len(blanks) == 2
  encode = writer.data.tokenizer.encode
  for truth, share in (([0, 1], 1.0), ([0], 0.5), ([], 0.0)):
    outputs = [[v.sentinel(0), *encode(b.truth if i in truth else 'nothing')] for i, b in enumerate(blanks)]
    monkeypatch.setattr(infilling, 'outputs_of', lambda *_, outputs=outputs: outputs)
    assert infill(writer, SENTENCES, 5, 1)['exact_match'] == share
  monkeypatch.setattr(infilling, 'outputs_of', lambda *_: [encode(b.truth) for b in blanks])
  assert infill(writer, SENTENCES, 5, 1)['exact_match'] == 0.0, 'without its sentinel nothing is filled'


def test_a_step_is_opened_by_its_number(run_dir):
  one, two = open_writer(run_dir, 1), open_writer(run_dir)
  assert one.cfg.data.targets_length == two.cfg.data.targets_length == 64


def test_needles_are_for_runs_that_continue_text_or_fill_blanks(pair_store):
  with pytest.raises(ConfigError, match=r"objective\.name='supervised' neither continues text nor fills blanks"):
    probe(Scorer(writer_on(pair_store, 'supervised')), Haystacks(lengths=(64,)), lambda done: None)


def test_a_report_needs_no_training_and_a_damaged_file_is_one_line(tmp_path, capsys):
  """Weights that were imported have results and no metrics."""
  results = {'model': 'x', 'step': 0, 'rank': {'a<b': {'examples': 4, 'accuracy': 0.25, 'accuracy_per_byte': 0.5}}}
  (tmp_path / 'eval.json').write_text(json.dumps(results))
  assert main(['report', str(tmp_path)]) == 0
  report = (tmp_path / 'report.html').read_text()
  assert '<h2>Evaluation, step 0</h2>' in report
  assert '<td>a&lt;b: accuracy</td><td class="number">0.25</td>' in report
  (tmp_path / 'eval.json').write_text('{')
  capsys.readouterr()
  assert main(['report', str(tmp_path)]) == 66
  assert capsys.readouterr().err.startswith(f'EVAL: {tmp_path}/eval.json is damaged (')
