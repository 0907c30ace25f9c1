"""`pretrain data plan`: the positions that rows use on each side, and the share of FLOPs that padding takes."""

import itertools
import re

import numpy as np
import pytest

from data.batches import plan_report
from data.batches.loader import loader
from data.batches.source import open_data
from data.objectives.objectives import Ul2, tasks_of
from data.objectives.tasks import Budget
from data.packing.full_rows import FullRows
from data.packing.packing import ConcatSplit, make_planner
from data.packing.plan import Stream
from pretrain.cli.main import main
from tests.pretrain import tiny

EMBED, HEADS, HEAD_DIM, HIDDEN, VOCABULARY = 32, 4, 8, 64, 512  # tiny.SMALL
DECODER = (*tiny.SMALL_DECODER, 'data.sentinels=32', 'mesh.data=1')


def flops_by_hand(inputs: int, targets: int) -> tuple[float, float]:
  """Multiply-adds of two layers a stack at an encoder position and at a decoder position, from the architecture.

  A layer has four attention matrices and a gated feed-forward part of three. Cross attention has two matrices for the
  decoder's positions, two for the encoder's. Scores and mixing: a product of HEADS * HEAD_DIM each, for each key.
  """
  projection, head, pair = EMBED * HEADS * HEAD_DIM, EMBED * VOCABULARY, 2 * HEADS * HEAD_DIM
  layer = 4 * projection + 3 * EMBED * HIDDEN
  if inputs:
    encoder = 2 * (layer + 2 * projection + pair * inputs)
    return encoder, 2 * (layer + 2 * projection + pair * (targets + inputs)) + head
  return 0.0, 2 * (layer + pair * targets) + head


def counted(cfg, first: int, rows: int) -> tuple[float, float, float]:
  """(used share of the encoder, of the decoder, share of FLOPs at padding) of the loader's rows; NaN: no such side."""
  data = open_data(cfg.data, cfg.objective, seed=cfg.seed, vocab_size=cfg.model.vocab_size, cache_dir='unused')
  size, used, places, lost, spent = cfg.data.batch_size, np.zeros(2), np.zeros(2), 0.0, 0.0
  for _, batch in itertools.islice(loader(data, {'examples': first}, slice(0, size)), rows // size):
    sides = [batch.get(f'{side}_segment_ids', np.zeros((1, 0))) for side in ('encoder', 'decoder')]
    lengths = [ids.shape[1] for ids in sides]
    each = flops_by_hand(*lengths) if all(lengths) else [flops_by_hand(0, max(lengths))[1]] * 2
    for i, (ids, flops) in enumerate(zip(sides, each, strict=True)):
      used[i] += (ids != 0).sum()
      places[i] += ids.size
      lost += (ids == 0).sum() * flops
      spent += ids.size * flops
  with np.errstate(invalid='ignore'):
    return *(used / places).tolist(), lost / spent


def printed(capsys, *args: str) -> list[tuple[str, ...]]:
  """(rows, encoder, decoder, padding FLOPs, source) of each line of the second table."""
  assert main(['data', 'plan', *args]) == 0
  out = capsys.readouterr().out
  return re.findall(r'^ *([\d,]+) +([\d.]+%|-) +([\d.]+%|-) +([\d.]+%|-)  (\S.*)$', out, re.MULTILINE)


def shown(rows: int, shares: tuple[float, ...]) -> tuple[str, ...]:
  return f'{rows:,}', *(f'{share:.2%}' if share == share else '-' for share in shares)


def flags(base, *overrides: str) -> list[str]:
  return [f'--gin_file={base}', *(f'--gin.{override}' for override in overrides)]


@pytest.fixture(autouse=True)
def small_sample(monkeypatch):
  monkeypatch.setattr(plan_report, 'SAMPLE', 40)


@pytest.mark.parametrize(
  ('base', 'overrides'),
  [
    (tiny.UL2, tiny.SMALL_UL2),
    (tiny.UL2, (*tiny.SMALL_UL2, "objective.name='span_corruption'", 'data.targets_length=32')),
    (tiny.ENCODER, tiny.SMALL_ENCODER),
    (tiny.ROOT / 'configs/prefix/tiny.gin', (*DECODER, 'model.kv_heads=4')),
  ],
  ids=['ul2', 't5', 'encoder', 'prefix'],
)  # fmt: skip
def test_both_sides_and_the_flops_of_padding_are_printed(text_store, capsys, base, overrides):
  overrides = (*tiny.over(text_store), *overrides)
  cfg = tiny.experiment(base, *overrides)
  found = counted(cfg, 0, 40)
  assert printed(capsys, *flags(base, *overrides)) == [(*shown(40, found), str(text_store))]
  if not cfg.data.inputs_length:
    assert found[2] == pytest.approx(1 - np.nansum(found[:2])), 'one stack: positions cost the same'
  else:
    assert found[2] > 0.05, 'rows of a denoiser are not full'


def test_rows_of_pairs_are_counted(pair_store, capsys):
  overrides = (*tiny.over(pair_store), *tiny.SMALL_UL2, "objective.name='supervised'")
  found = counted(tiny.experiment(tiny.UL2, *overrides), 0, 40)
  assert printed(capsys, *flags(tiny.UL2, *overrides)) == [(*shown(40, found), str(pair_store))]


def test_conversations_are_counted(chat_store, capsys):
  overrides = (*tiny.over(chat_store), *DECODER, "objective.name='instruction'", 'data.targets_length=96')  # fmt: skip
  found = counted(tiny.experiment(tiny.DECODER, *overrides), 0, 40)
  (line,) = printed(capsys, *flags(tiny.DECODER, *overrides))
  assert line == (*shown(40, found), str(chat_store))


def test_each_source_of_a_mixture_has_a_line(text_store, tmp_path, capsys):
  other = tmp_path / 'other'
  other.symlink_to(text_store)
  sources = f"data.sources=[{{'path': '{text_store}', 'weight': 3.0}}, {{'path': '{other}', 'weight': 1.0}}]"
  overrides = (*tiny.over(text_store), *tiny.SMALL_UL2, sources)
  lines = printed(capsys, *flags(tiny.UL2, *overrides))
  assert [(line[0], line[-1]) for line in lines] == [('40', 'all sources'), ('30', str(text_store)), ('10', str(other))]
  assert lines[0] == (*shown(40, counted(tiny.experiment(tiny.UL2, *overrides), 0, 40)), 'all sources')
  shares = [[float(cell.strip('%')) for cell in line[1:4]] for line in lines]
  np.testing.assert_allclose(shares[0], 0.75 * np.array(shares[1]) + 0.25 * np.array(shares[2]), atol=0.011)


def test_each_phase_is_counted_from_its_first_row(text_store, capsys):
  phases = "phases=[{'start_step': 2, 'set': {'objective.name': 'span_corruption', 'data.targets_length': 32}}]"
  overrides = (*tiny.over(text_store), *tiny.SMALL_UL2)
  lines = printed(capsys, *flags(tiny.UL2, *overrides, phases))
  later = (*overrides, "objective.name='span_corruption'", 'data.targets_length=32')
  wanted = [shown(16, counted(tiny.experiment(tiny.UL2, *overrides), 0, 16)),
            shown(40, counted(tiny.experiment(tiny.UL2, *later), 16, 40))]  # fmt: skip
  assert [line[:4] for line in lines] == wanted


def test_long_rows_of_buckets_weigh_more_than_short_ones(text_store, capsys, monkeypatch):
  """Attention makes a position of a long row cost more, so the share of FLOPs is not that of positions."""
  overrides = (*tiny.over(text_store), *DECODER, 'data.targets_length=256',
               "data.packing={'name': 'length_buckets', 'min_length': 32}")  # fmt: skip
  cfg = tiny.experiment(tiny.DECODER, *overrides)
  data = open_data(cfg.data, cfg.objective, seed=cfg.seed, vocab_size=cfg.model.vocab_size, cache_dir='unused')
  steps = data.sources[0].order.steps_per_epoch
  monkeypatch.setattr(plan_report, 'SAMPLE', 8 * steps)
  _, used, share = counted(cfg, 0, 8 * steps)
  ((_, _, decoder, cost, _),) = printed(capsys, *flags(tiny.DECODER, *overrides))
  assert (decoder, cost) == (f'{used:.2%}', f'{share:.2%}')
  assert cost != f'{1 - used:.2%}'


def test_full_rows_take_a_fifth_fewer_flops_for_the_same_text_than_rows_of_one_denoiser():
  """Multiply-adds of the layers of T5 1.1 base by hand, times the rows that each packing makes of the text."""
  lengths = np.clip(np.random.default_rng(0).lognormal(6, 1.1, 1000), 20, 20_000).astype(np.int64)
  text = Stream(np.cumsum(lengths) - lengths, lengths)
  flops = {}
  for packing, targets in ((ConcatSplit(), 512), (FullRows(), 328)):
    plan = make_planner(packing, lambda shard: text, tasks_of(Ul2()), Budget(512, targets), seed=0, purpose='test')
    attention, hidden = 4 * 768**2, 3 * 768 * 2048
    encoder = 12 * (attention + hidden + 2 * 768 * 512)
    decoder = 12 * (attention + attention / 2 + hidden + 2 * 768 * (targets + 512)) + 768 * 32_128
    keys = 12 * attention / 2 * 512  # cross attention reads the encoder's positions once
    flops[packing] = len(plan.plan(0, 0).tasks) * (512 * encoder + targets * decoder + keys)
  assert flops[FullRows()] <= 0.8 * flops[ConcatSplit()]


@pytest.mark.slow
def test_the_shipped_config_is_counted_over_2560_rows(capsys, monkeypatch):
  """Against a count of the loader's rows: `configs/ul2/tiny.gin` at its own size, on the built-in corpus."""
  from pretrain.devices.compilation_cache import cache_dir

  monkeypatch.setattr(plan_report, 'SAMPLE', 2560)
  cfg = tiny.experiment(tiny.UL2)
  data = open_data(cfg.data, cfg.objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  used = np.zeros(2)
  for _, batch in itertools.islice(loader(data, {'examples': 0}, slice(0, 32)), 80):
    used += (batch['encoder_segment_ids'] != 0).sum(), (batch['decoder_segment_ids'] != 0).sum()
  encoder, decoder = used / (2560 * 128)
  ((rows, *shares, _),) = printed(capsys, f'--gin_file={tiny.UL2}')
  assert rows == '2,560'
  assert shares[:2] == [f'{encoder:.2%}', f'{decoder:.2%}']
  assert encoder == pytest.approx(0.93, abs=0.015)
  assert decoder == pytest.approx(0.58, abs=0.015)
