"""pretrain import, then pretrain export: the files are those that `save_pretrained` wrote, byte for byte."""

import json

import pytest

from pretrain.cli.main import main
from tests.pretrain.interchange import goldens


@pytest.mark.parametrize('name', goldens.FAMILIES)
def test_round_trip_gives_the_same_files(name, tmp_path):
  source, run, out = goldens.GOLDENS / name, tmp_path / 'run', tmp_path / 'out'
  assert main(['import', f'--from={source}', f'--workdir={run}']) == 0
  assert main(['export', f'--workdir={run}', f'--out={out}']) == 0
  assert (out / 'model.safetensors').read_bytes() == (source / 'model.safetensors').read_bytes()
  assert json.loads((out / 'config.json').read_text()) == json.loads((source / 'config.json').read_text())
  assert sorted(path.name for path in out.iterdir()) == ['config.json', 'generation_config.json', 'model.safetensors']
