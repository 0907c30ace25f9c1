"""Prompts of a file, in batches on a mesh: the answers of each alone, in their order."""

import gzip
import json

import jax
import numpy as np
import pytest

from models.decode.cached import PLACES
from models.decode.sampling import Sampling
from pretrain.cli.main import main
from pretrain.devices.mesh import MeshConfig
from pretrain.evaluation import outputs as module
from pretrain.evaluation.generate import Refused, answers, generate
from pretrain.evaluation.outputs import Decoding, grouped, outputs
from pretrain.evaluation.prompts import packing_of
from pretrain.evaluation.writer import open_run, open_writer
from pretrain.run.train import train
from tests.pretrain.evaluation.test_generate import config_of

PROMPTS = [
  'the License', 'You <extra_id_0> the Work', 'any', '[S2S] Contribution', 'a <extra_id_0>, <extra_id_1>',
  'the copyright owner or by an individual or Legal Entity',
]  # fmt: skip
DRAWN = Sampling(temperature=1.5, top_k=50, top_p=0.95)


@pytest.fixture(scope='module', params=['ul2r', pytest.param('ul2+encoder', marks=pytest.mark.slow)])
def run_dir(text_store, tmp_path_factory, request):
  workdir = tmp_path_factory.mktemp('runs') / 'run'
  train(config_of(text_store, request.param, 'train.steps=1', 'checkpoint.every=1'), workdir)
  return workdir


@pytest.mark.parametrize(
  'how',
  [
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param({'sampling': DRAWN, 'seed': 5}, marks=pytest.mark.slow),
    pytest.param({'beams': 3}, marks=pytest.mark.slow),
  ],
  ids=['greedy', 'drawn', 'beams'],
)
def test_a_batch_on_a_mesh_has_the_answers_of_each_prompt_alone(run_dir, how):
  alone = generate(run_dir, PROMPTS, 6, how=Decoding(**how))
  assert generate(run_dir, PROMPTS, 6, how=Decoding(**how, batch=4)) == alone
  mesh = MeshConfig(data=2, tensor=2)
  for batch in (2, 4):  # four are packed in a row for each part of the batch
    assert list(answers(lambda: open_run(run_dir), PROMPTS, 6, how=Decoding(**how, batch=batch), mesh=mesh)) == alone
  if 'seed' in how:
    assert generate(run_dir, PROMPTS, 6, how=Decoding(**how | {'seed': 6})) != alone
  assert len({result.output for result in alone}) > 1


@pytest.mark.slow
def test_stages_of_a_mesh_write_what_one_device_writes(run_dir):
  """Each stage computes all layers, and gathers the parameters of the others."""
  how = Decoding(batch=4)
  found = list(answers(lambda: open_run(run_dir), PROMPTS, 6, how=how, mesh=MeshConfig(stage=2)))
  assert found == generate(run_dir, PROMPTS, 6, how=how)


def test_prompts_of_a_batch_are_read_in_few_rows(run_dir, monkeypatch):
  """Sixteen prompts, one of them long, fill four rows as long as this one. Answers are the same."""
  writer, shapes = open_writer(run_dir), []
  decode = module._decode
  monkeypatch.setattr(
    module,
    '_decode',
    lambda writer, rows, *rest: shapes.append(jax.tree.map(np.shape, rows)) or decode(writer, rows, *rest),
  )
  encode, end = writer.data.tokenizer.encode, [writer.data.vocabulary.ids.end]
  text = encode('the copyright owner or by an individual or Legal Entity authorized to submit on behalf of the owner')
  inputs = [text[:n] + end for n in (31, 3, 9, 5, 2, 4, 7, 8, 2, 6, 3, 1, 5, 1, 4, 3)]
  found = lambda **how: dict(outputs(writer, inputs, [4] * 16, Decoding(batch=16, **how)))
  packed, padded = found(), found(packed=False)
  assert packed == padded
  assert len(set(map(tuple, packed.values()))) > 1
  (few, all_) = shapes
  side = 'encoder' if writer.cfg.data.inputs_length else 'decoder'
  assert few[f'{side}_input_tokens'][0] == 4
  assert all_[f'{side}_input_tokens'][0] == 16
  assert few[PLACES] == all_[f'{side}_input_tokens']


def test_packing_is_best_fit_and_has_few_numbers_of_rows():
  """30, 20 and 18 open rows; 12 fits behind 20, 11 behind 18, 2 behind 30 and 1 behind 18 and 11."""
  packed = packing_of([30, 2, 20, 12, 11, 18, 1], 32, 1)
  assert packed.rows.tolist() == [0, 0, 1, 1, 2, 2, 2]
  assert packed.number == 3
  assert packing_of([32] * 5, 32, 2).number == 6
  assert packing_of([32] * 5 + [1] * 27, 32, 1).number == 8, 'six rows, rounded up to eighths of 32'
  assert packing_of([32] * 5 + [1] * 27, 32, 3).number == 6


def test_answers_of_a_file_are_written_in_order(run_dir, tmp_path, capsys):
  """A prompt that is refused has its error there, and its line on stderr names the file's line."""
  prompts = [*PROMPTS[:2], 'x <extra_id_999>', *PROMPTS[2:]]
  path, out = tmp_path / 'p.jsonl.gz', tmp_path / 'new/answers.jsonl'
  path.write_bytes(gzip.compress(''.join(json.dumps({'text': p, 'id': 1}) + '\n\n' for p in prompts).encode()))
  code = main(['generate', f'--workdir={run_dir}', f'--prompts={path}', f'--out={out}', '--max_tokens=6'])
  assert code == 65
  found, said = [json.loads(line) for line in out.read_text().splitlines()], capsys.readouterr()
  assert said.out == f'{out}\n'
  assert [each['prompt'] for each in found] == prompts
  assert found[2].keys() == {'prompt', 'error'}
  assert f'({path}:5: ' in said.err
  assert '7/7 prompts' in said.err
  expected = generate(run_dir, PROMPTS, 6)
  assert [each['text'] for i, each in enumerate(found) if i != 2] == [own.text for own in expected]
  assert all(each['tokens'] == list(own.tokens) for each, own in zip(found[:2], expected, strict=False))
  assert [p.name for p in out.parent.iterdir()] == ['answers.jsonl']


def test_each_line_of_a_text_file_is_a_prompt(run_dir, tmp_path, capsys):
  path = tmp_path / 'p.txt'
  path.write_text('the License\r\n\n  the Work\n')
  assert main(['generate', f'--workdir={run_dir}', f'--prompts={path}', '--max_tokens=2', '--batch=2']) == 0
  assert [line for line in capsys.readouterr().out.splitlines() if line.startswith('prompt')] == [
    'prompt  the License', 'prompt    the Work',
  ]  # fmt: skip


def test_a_long_prompt_of_a_file_is_named_by_its_line(run_dir):
  (found,) = answers(lambda: open_run(run_dir), ['the Licensor ' * 90], places=['p.txt:3: '])
  assert isinstance(found, Refused)
  assert str(found.error).startswith("CONFIG: p.txt:3: 'the Licensor")


@pytest.mark.parametrize(
  ('flags', 'code', 'message'),
  [
    ([], 64, 'CONFIG: pretrain generate needs prompts: --text=… (repeatable), or --prompts=FILE; not both.'),
    (['--text=a', '--prompts=p'], 64, 'CONFIG: pretrain generate needs prompts'),
    (['--text=a', '--temperature=0'], 64, 'CONFIG: --temperature=0.0; it must be more than 0.'),
    (['--text=a', '--temperature=nan'], 64, 'CONFIG: --temperature=nan; it must be more than 0.'),
    (['--text=a', '--temperature=1', '--top_k=0'], 64, 'CONFIG: --top_k=0; it must be at least 1.'),
    (['--text=a', '--temperature=1', '--top_p=1.5'], 64, 'CONFIG: --top_p=1.5; it must be more than 0 and at most 1.'),
    (['--text=a', '--repetition_penalty=0'], 64, 'CONFIG: --repetition_penalty=0.0; it must be more than 0.'),
    (['--text=a', '--beams=65'], 64, 'CONFIG: --beams=65; it must be from 1 to 64.'),
    (['--text=a', '--seed=-1', '--temperature=1'], 64, 'CONFIG: --seed=-1; it must be from 0 to 4294967295.'),
    (['--text=a', '--batch=0'], 64, 'CONFIG: --batch=0; it must be at least 1.'),
    (['--text=a', '--top_p=0.9'], 64, 'CONFIG: --top_p changes nothing without --temperature: outputs are greedy; add'),
    (['--text=a', '--seed=3'], 64, 'CONFIG: --seed changes nothing without --temperature'),
    (
      ['--text=a', '--beams=2', '--temperature=1'],
      64,
      'CONFIG: --beams searches for the most likely output; leave out',
    ),
    (['--text=a', '--top=2', '--beams=2'], 64, 'CONFIG: --top lists the most likely outputs, one prompt at a time;'),
    (
      ['--text=a', '--gin.mesh.data=2', '--batch=3'],
      64,
      'CONFIG: --batch=3 does not divide over mesh.replica*data*fsdp*expert=2',
    ),
    (
      ['--text=a', '--gin.mesh.sequence=2'],
      64,
      'CONFIG: mesh.sequence=2: prompts and outputs are not divided by length',
    ),
    (['--text=a', '--gin.mesh.tensor=3'], 64, 'CONFIG: '),
    (['--text=a', '--gin.train.steps=3'], 64, 'CONFIG: --gin.train.steps=3: the run has its config; pretrain generate'),
    (['--prompts=EMPTY'], 65, 'DATA: EMPTY has no prompts; write one a line'),
    (['--prompts=FIELD.jsonl'], 65, "DATA: FIELD.jsonl:1: field 'text' is missing; the fields are prompt."),
    (['--prompts=LIST.jsonl'], 65, 'DATA: LIST.jsonl:2: not a JSON object; each line must be one.'),
    (['--prompts=none.txt'], 65, 'DATA: none.txt cannot be read'),
    (['--text=a', '--out=EMPTY/y.jsonl'], 64, 'CONFIG: --out=EMPTY cannot be written'),
    (['--text=a', '--out=.'], 64, 'CONFIG: --out=. is a folder; name a file.'),
  ],
)
def test_a_mistake_is_one_line(run_dir, tmp_path, monkeypatch, shared_programs, capsys, flags, code, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'EMPTY').write_text('\n \n')
  (tmp_path / 'FIELD.jsonl').write_text('{"prompt": "a"}\n')
  (tmp_path / 'LIST.jsonl').write_text('{"text": "a"}\n["a"]\n')
  assert main(['generate', f'--workdir={run_dir}', *flags]) == code
  err = capsys.readouterr().err
  assert err.startswith(message), err
  assert len(err.splitlines()) == 1


def test_batches_hold_prompts_of_one_kind_sorted_by_length():
  inputs = [[5] * n + [1] * ends for n, ends in ((3, 0), (9, 1), (1, 0), (7, 0), (2, 1), (8, 1))]
  assert grouped(inputs, 2, (1,)) == [[1, 5], [4], [3, 0], [2]]
  assert grouped(inputs, 1, (1,)) == [[0], [1], [2], [3], [4], [5]]
