"""Exact match is the share of held-out pairs whose greedy output is their targets, on any mesh."""

import json

import jax
import numpy as np
import pytest

from data.batches.source import open_data
from data.prepare.prepare import prepare
from data.prepare.text import Reading
from pretrain.devices.compilation_cache import cache_dir
from pretrain.errors import ConfigError
from pretrain.evaluation.exact_match import make_exact_match
from pretrain.evaluation.outputs import outputs as outputs_of
from pretrain.evaluation.writer import Writer
from pretrain.experiment.program import build_program
from pretrain.records.metrics import read_metrics
from pretrain.run.train import train
from tests.pretrain.evaluation.test_generate import config_of

OBJECTIVES = ['supervised', pytest.param('supervised+encoder', marks=pytest.mark.slow)]


def opened(cfg):
  """(data, program, initial parameters)."""
  data = open_data(cfg.data, cfg.objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  program = build_program(cfg)
  return data, program, program.init().params


@pytest.mark.slow
@pytest.mark.parametrize('objective', OBJECTIVES)
def test_exact_match_counts_the_outputs_of_each_prompt_decoded_alone(pair_store, objective):
  """Six pairs in batches of four: two have the model's own output as targets, the others have one more word."""
  cfg = config_of(pair_store, objective, 'mesh.data=1', 'data.batch_size=4')
  data, program, params = opened(cfg)
  (pairs,) = data.heldout_pairs(6).values()
  assert len({len(inputs) for inputs, _ in pairs}) > 2, 'prompts of unequal lengths'
  room = 40 if objective == 'supervised' else cfg.data.targets_length
  alone, prompts = Writer(cfg, data, build_program(cfg, jax.devices()[:1]).model, params), [own for own, _ in pairs]
  outputs = [output for _, output in outputs_of(alone, prompts, [room] * len(prompts))]
  assert len({tuple(output) for output in outputs}) > 2
  right = [(inputs, output) for (inputs, _), output in zip(pairs, outputs, strict=True)]
  more = data.tokenizer.encode('Work')
  mixed = [(inputs, output if i % 4 == 1 else output + more) for i, (inputs, output) in enumerate(right)]
  exact_match = make_exact_match(cfg, program, data)
  assert exact_match(params, right) == 1.0
  assert exact_match(params, mixed) == 2 / 6
  turned = [(inputs, output) for (inputs, _), (_, output) in zip(right, right[1:] + right[:1], strict=True)]
  assert exact_match(params, turned) < 1.0, 'the mutation: targets of the next pair'
  placed = config_of(pair_store, objective, 'mesh.data=2', 'mesh.fsdp=2', 'mesh.tensor=2', 'data.batch_size=4')
  data, program, params = opened(placed)
  assert make_exact_match(placed, program, data)(params, mixed) == 2 / 6


@pytest.mark.slow
def test_a_run_logs_exact_match_beside_its_losses(pair_store, tmp_path):
  more = ('train.steps=1', 'evaluation.every=1', 'evaluation.batches=1', 'evaluation.generate=3')
  train(config_of(pair_store, 'supervised', *more), tmp_path)
  (row,) = read_metrics(tmp_path)
  assert row['eval/pairs/exact_match'] in (0, 1 / 3, 2 / 3, 1)
  assert row['eval/pairs/loss'] > 0


def test_experts_do_not_write_on_devices_that_share_rows(pair_store):
  ring = ('mesh.data=1', 'mesh.sequence=2', 'evaluation.every=1', 'evaluation.generate=3')
  config_of(pair_store, 'supervised', *ring)
  with pytest.raises(
    ConfigError, match=r'generate=3 with model\.experts and mesh\.sequence=2: outputs .*generate=0, or'
  ):
    config_of(pair_store, 'supervised', *ring, 'model.experts=4')


WORDS = ('the', 'work', 'of', 'any', 'license', 'or', 'terms', 'you')


def make_stores(folder, tokenizer_model, shift: int = 0):
  """Three words and the same backwards: 448 pairs to learn from, 64 others held out; targets are `shift` pairs on."""
  (folder / 'm').write_bytes(tokenizer_model)
  order = np.random.default_rng(0).permutation(8**3)
  texts = [[WORDS[i // 64], WORDS[i // 8 % 8], WORDS[i % 8]] for i in order.tolist()]
  for name, own, by in (('train', texts[64:], shift), ('test', texts[:64], 0)):
    pairs = zip(own, own[by:] + own[:by], strict=True)
    lines = [json.dumps({'inputs': ' '.join(a), 'targets': ' '.join(reversed(b))}) for a, b in pairs]
    (folder / f'{name}.jsonl').write_text('\n'.join(lines))
    pair = Reading(pair=('inputs', 'targets'))
    prepare([folder / f'{name}.jsonl'], folder / name, tokenizer=folder / 'm', sentinels=32, reading=pair)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('objective', 'shift'), [('supervised', 0), ('supervised+encoder', 0), ('supervised+encoder', 1)]
)
def test_reversing_words_is_learned_and_shifted_targets_are_not(tokenizer_model, tmp_path, objective, shift):
  make_stores(tmp_path, tokenizer_model, shift)
  steps = 100 if objective == 'supervised' else 200
  cfg = config_of(
    tmp_path / 'train', objective, f"data.heldout=[{{'path': '{tmp_path}/test'}}]", 'data.batch_size=16',
    f'train.steps={steps}', f'evaluation.every={steps}', 'evaluation.generate=64', 'mesh.data=1', 'model.embed=64',
    'model.head_dim=16', 'model.mlp.hidden=128', "optimizer.name='adamw'", 'optimizer.parameter_scale=True',
    "schedule.name='cosine'", 'schedule.peak=0.02', 'schedule.warmup_steps=30', 'schedule.steps=300',
  )  # fmt: skip
  train(cfg, tmp_path / 'run')
  reached = read_metrics(tmp_path / 'run')[-1]['eval/test/exact_match']
  assert reached < 0.1 if shift else reached > 0.9
