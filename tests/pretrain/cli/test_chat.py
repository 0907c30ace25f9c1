"""The shipped configs of conversations and tags train, on what scripts/tiny_jsonl.py makes of a few texts."""

import json
import math

import pytest

from data.batches.source import open_data
from data.prepare.prepare import prepare
from data.prepare.text import Reading
from pretrain.devices.compilation_cache import cache_dir
from pretrain.records.metrics import read_metrics
from pretrain.run.train import train
from scripts.tiny_jsonl import chat, document
from tests.conftest import paragraphs
from tests.pretrain import tiny

CONFIGS = tiny.ROOT / 'configs/decoder'
READINGS = {'chat': Reading(messages='messages'), 'tags': Reading(tag_fields=('package',)), 'bare': Reading()}


@pytest.fixture
def stores(tmp_path, tokenizer_model):
  """A store of each kind, by name; and what overrides point a config at them."""
  (tmp_path / 'm').write_bytes(tokenizer_model)
  parts = paragraphs()
  texts = [(f'python/part{i}.py', ' '.join(parts[i : i + 3])) for i in range(0, len(parts), 3)]
  for name, reading in READINGS.items():
    make = chat if name == 'chat' else document
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(json.dumps(make(*own)) for own in texts))
    prepare([tmp_path / f'{name}.jsonl'], tmp_path / name, tokenizer=tmp_path / 'm', sentinels=32, reading=reading)
  return lambda *names: [{'path': str(tmp_path / name)} for name in names]


@pytest.mark.parametrize('name', ['chat', pytest.param('tags', marks=pytest.mark.slow)])
def test_a_shipped_config_trains_and_tells_what_is_cut(stores, tmp_path, capsys, name):
  """Two steps, of two phases where there are: the loss is that of the tokens asked for, and a run says what it cut."""
  own = ('chat',) if name == 'chat' else ('tags', 'bare')
  cfg = tiny.experiment(
    CONFIGS / f'tiny_{name}.gin', *tiny.SMALL_DECODER, f'data.sources={stores(own[0])}', f'data.heldout={stores(*own)}',
    'data.targets_length=128', 'data.sentinels=32', 'train.steps=2', 'mesh.data=1', 'evaluation.every=0',
    *(["phases=[{'start_step': 1, 'set': {'data.tags.drop_rate': 1.0}}]"] if name == 'tags' else []),
  )  # fmt: skip
  train(cfg, tmp_path / 'run')
  rows = read_metrics(tmp_path / 'run')
  assert [row['step'] for row in rows] == [1, 2]
  assert rows[0]['loss'] == pytest.approx(math.log(512), rel=0.1)
  assert rows[1]['loss'] < rows[0]['loss'] + 0.3
  said = capsys.readouterr()
  assert ('DATA-CUT: ' in said.err + said.out) == (name == 'chat')
  assert name != 'chat' or 'conversations' in (said.err + said.out).split('DATA-CUT')[1]
  first = open_data(cfg.data, cfg.objective, seed=cfg.seed, vocab_size=512, cache_dir=cache_dir()).batch(0, slice(0, 8))
  assert 0 < first['decoder_loss_weights'].sum() < (first['decoder_segment_ids'] > 0).sum()
