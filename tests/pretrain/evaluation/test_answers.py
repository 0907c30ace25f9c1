"""A run answers every prompt that it can; each prompt that it cannot answer costs one line."""

import io
import itertools
import math
import sys

import jax
import numpy as np
import pytest

from data.objectives.features import decoder_features
from data.ragged import join
from data.stores.vocabulary import EOS
from models.decode.writing import write
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.cli.main import main
from pretrain.evaluation import best, outputs
from pretrain.evaluation.generate import Refused, generate
from pretrain.evaluation.prompts import prompt_inputs
from pretrain.evaluation.writer import config_of as config_in
from pretrain.evaluation.writer import open_writer
from pretrain.run.train import train
from tests.pretrain.evaluation.test_generate import config_of, opened

LONG = 'the Licensor ' * 40


@pytest.fixture(scope='module')
def run_dir(text_store, tmp_path_factory):
  """A decoder on ul2r after one step; its model has 64 ids more than its tokenizer."""
  workdir = tmp_path_factory.mktemp('runs') / 'ul2r'
  cfg = config_of(text_store, 'ul2r', 'train.steps=1', 'checkpoint.every=1', 'model.vocab_size=1024')
  train(cfg, workdir)
  return workdir


def test_a_run_generates_no_more_than_a_row_holds(run_dir, monkeypatch):
  rooms = []
  monkeypatch.setattr(outputs, 'write', lambda *given, **ids: rooms.append(given[3]) or write(*given, **ids))
  prompts = ['the <extra_id_0> of', 'the License', '[S2S] the License']
  filled, went_on, same = generate(run_dir, prompts, 1000)
  cfg = config_in(run_dir)
  assert rooms == [64 - len(prompt_inputs(prompt, cfg, opened(cfg))) for prompt in prompts]
  assert '<extra_id_0>' not in filled.text or '<extra_id_0>' not in filled.output
  assert went_on.text.startswith('the License')
  assert (went_on.output, went_on.text) == (same.output, same.text), 'the mode token of a prompt is not doubled'


def test_ids_that_the_tokenizer_lacks_are_never_chosen(run_dir, monkeypatch):
  """Their logits are made the greatest."""
  seen = []

  def spoilt(model, params, batch, max_tokens, vocab_size, sampling, **ids):
    kernel = params['head']['kernel']
    params = params | {'head': {'kernel': kernel.at[:, vocab_size:].set(100 * kernel[:, :1])}}
    both = [write(model, params, batch, max_tokens, size, sampling, **ids) for size in (None, vocab_size)]
    seen.append((vocab_size, int(both[0].max()), int(both[1].max())))
    return both[1]

  monkeypatch.setattr(outputs, 'write', spoilt)
  generate(run_dir, ['the', 'License', 'of any Work'], 8)
  assert {size for size, _, _ in seen} == {448 + 32 + 3}
  assert max(top for _, top, _ in seen) >= 483, 'the mutation: without the bound they are chosen'
  assert max(top for _, _, top in seen) < 483


@pytest.mark.parametrize(
  ('flags', 'code', 'message'),
  [
    (['--text=<extra_id_999>'], 65, 'DATA: <extra_id_999> is beyond the 32 sentinels of this vocabulary (data.sent'),
    (['--text=a', '--max_tokens=0'], 64, 'CONFIG: --max_tokens=0; it must be at least 1.'),
    (['--text=a', '--max_tokens=-1'], 64, 'CONFIG: --max_tokens=-1; it must be at least 1.'),
    ([f'--text={LONG}'], 64, "CONFIG: --text='the Licensor...the Licensor ' is "),
  ],
)
def test_a_mistake_is_one_line(run_dir, capsys, flags, code, message):
  assert main(['generate', f'--workdir={run_dir}', *flags]) == code
  err = capsys.readouterr().err
  assert err.startswith(message), err
  assert len(err.splitlines()) == 1


def writes(monkeypatch, output):
  """The model's output is `output`, whatever the prompt is."""

  def fixed(model, params, batch, max_tokens, *more, **ids):
    return np.int32([(output + [EOS] + [0] * max_tokens)[:max_tokens]])

  monkeypatch.setattr(outputs, 'write', fixed)


def test_an_output_without_sentinels_leaves_the_blank_in_the_text(run_dir, monkeypatch, capsys):
  """A young run writes any tokens; every prompt gets its answer."""
  words = open_writer(run_dir).data.tokenizer.encode('of the Work')
  writes(monkeypatch, words)
  prompts = ['The <extra_id_0> sat.', '☃<extra_id_1>☃', 'the Work']
  assert main(['generate', f'--workdir={run_dir}', *(f'--text={prompt}' for prompt in prompts)]) == 0
  texts = [line for line in capsys.readouterr().out.splitlines() if line.startswith('text')]
  assert texts == [f'text    {text}' for text in ('The <extra_id_0> sat.', '☃<extra_id_1>☃', 'the Work of the Work')]


BAD = {
  LONG: (64, "CONFIG: --text='the Licensor"),
  'a <extra_id_32>': (65, 'DATA: <extra_id_32> is beyond the 32 sentinels'),
  'a <extra_id_' + '9' * 5000 + '>': (65, 'DATA: <extra_id_9999'),
  'caf\udce9 <extra_id_0>': (64, "CONFIG: argument --text: 'caf\\udce9 <extra_id_0>' has bytes that are not UTF-8"),
}
GOOD = [
  'the <extra_id_0> of',
  '',
  '<extra_id_0>',
  '<extra_id_1><extra_id_0><extra_id_1>',
  '</s><pad> [S2S] \x00\n',
  '☃ ½ \ue000',
]


@pytest.mark.parametrize('top', [(), pytest.param(('--top=2',), marks=pytest.mark.slow)], ids=['greedy', 'top'])
def test_a_refused_prompt_costs_no_other_answer(run_dir, capsys, top):
  prompts = [prompt for pair in zip(GOOD, itertools.cycle(BAD), strict=False) for prompt in pair]
  flags = [f'--text={prompt}' for prompt in prompts]
  code = main(['generate', f'--workdir={run_dir}', '--max_tokens=4', *top, *flags])
  found = capsys.readouterr()
  refused = [prompt for prompt in prompts if prompt in BAD]
  assert code == BAD[refused[0]][0], 'the code of the first'
  lines = found.err.splitlines()
  assert len(lines) == len(refused)
  for line, prompt in zip(lines, refused, strict=True):
    assert line.startswith(BAD[prompt][1]), line
  assert len(refused) == len(GOOD) > len(BAD), 'every kind of mistake between answers'
  assert all(f'prompt  {prompt}\noutput  ' in found.out for prompt in GOOD)
  assert found.out.count('\ntext    ') == len(GOOD)


def test_prompts_that_are_all_refused_read_no_parameters(run_dir, monkeypatch):
  monkeypatch.setattr(Checkpoints, 'restore_params', lambda *_: pytest.fail('read'))
  refused = generate(run_dir, [LONG, 'a <extra_id_999>'])
  assert [type(each) for each in refused] == [Refused, Refused]
  assert str(refused[1].error).endswith("(--text='a <extra_id_999>')")


def test_answers_are_escaped_where_the_terminal_lacks_a_character(run_dir, monkeypatch):
  out = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
  monkeypatch.setattr(sys, 'stdout', out)
  assert main(['generate', f'--workdir={run_dir}', '--text=☃ <extra_id_0>', '--text=the', '--max_tokens=2']) == 0
  out.flush()
  written = out.buffer.getvalue().decode('ascii')
  assert 'prompt  \\u2603 <extra_id_0>' in written
  assert 'prompt  the' in written


def log_prob_of(writer, inputs: list[int], output: list[int], ends: list[int]) -> float:
  """log P(output, then any of `ends` | inputs) from one row made as training makes it."""
  both = [np.array([ids], np.int32).ravel() for ids in (inputs, [*output, EOS])]
  length = sum(map(len, both))
  row = decoder_features(join(both[:1]), join(both[1:]), np.zeros(1, int), 1, length)
  hidden, _ = writer.model.apply(writer.params, row | {'example_index': np.zeros(1, np.int32)})
  log_probs = np.asarray(jax.nn.log_softmax(writer.model.logits(writer.params, hidden)))[0, len(inputs) :]
  return float(sum(log_probs[i, token] for i, token in enumerate(output)) + np.logaddexp.reduce(log_probs[-1, ends]))


@pytest.mark.slow
def test_top_lists_the_best_fillings_of_each_blank_with_their_probabilities(run_dir):
  """The second blank's are given the best filling of the first, as targets of training follow each other."""
  prompt, writer = 'the <extra_id_0> of any <extra_id_1> Work', open_writer(run_dir)
  v, inputs = writer.data.vocabulary, prompt_inputs(prompt, writer.cfg, writer.data)
  (result,) = generate(run_dir, [prompt], 4, top=3)
  assert list(result.top) == ['<extra_id_0>', '<extra_id_1>']
  ends, forced = [EOS, *range(v.pieces, v.first_sentinel + 1)], []
  for k, candidates in enumerate(result.top.values()):
    found = best.search(writer, inputs, [*forced, v.sentinel(k)], 4 - len(forced) - 1, 3)
    forced.append(v.sentinel(k))
    assert len({c.text for c in candidates}) == len(candidates) == 3
    assert [c.probability for c in candidates] == sorted((c.probability for c in candidates), reverse=True)
    assert candidates[0].probability == pytest.approx(math.exp(found[0][1]), rel=1e-5)
    before = log_prob_of(writer, inputs, forced, list(range(writer.cfg.model.vocab_size)))
    assert all(ids for ids, _, _ in found), 'no empty filling'
    for ids, log_prob, _ in found[:4]:
      assert log_prob == pytest.approx(log_prob_of(writer, inputs, [*forced, *ids], ends) - before, abs=2e-4)
      assert all(token < v.pieces for token in ids)
      assert best.log_prob(writer, inputs, forced, ids) == pytest.approx(log_prob, abs=2e-4)
    forced += found[0][0]
  words = {name: candidates[0].text for name, candidates in result.top.items()}
  assert result.text == f'the {words["<extra_id_0>"]} of any {words["<extra_id_1>"]} Work'
  assert generate(run_dir, [prompt], 4, top=3) == [result], 'the same again'


def test_top_of_a_prompt_without_blanks_lists_continuations(run_dir):
  (result,) = generate(run_dir, ['the License'], 3, top=4)
  (candidates,) = result.top.values()
  assert len(candidates) == 4
  assert result.text.startswith('the License')
  assert result.text.endswith(candidates[0].text)


@pytest.mark.parametrize('top', [0, -1, 65])
def test_a_top_that_cannot_be_is_one_line(run_dir, capsys, top):
  assert main(['generate', f'--workdir={run_dir}', '--text=a', f'--top={top}']) == 64
  assert capsys.readouterr().err == f'CONFIG: --top={top}; it must be from 1 to 64.\n'
