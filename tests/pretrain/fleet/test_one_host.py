"""`pretrain run --hosts=1` trains like `pretrain train`, and restarts by itself."""

import io
import subprocess

import pytest

from pretrain.fleet import launch
from pretrain.fleet.supervise import Policy, Supervisor
from pretrain.records.metrics import read_metrics
from tests.pretrain import tiny

KEYS = (*tiny.SMALL_DECODER, 'train.steps=6', 'checkpoint.every=1000', 'data.batch_size=8', 'mesh.data=4')


@pytest.mark.slow
def test_one_process_under_the_supervisor_has_the_losses_of_plain_train(tmp_path, monkeypatch):
  """JAX's default for processes with a coordinator adds in another order, over sockets, even for a single process."""
  monkeypatch.setenv('XLA_FLAGS', '')
  monkeypatch.setenv('PYTHONPATH', str(tiny.ROOT))
  found = []
  for name in ('plain', 'supervised'):
    flags = [f'--gin_file={tiny.DECODER}', f'--workdir={tmp_path / name}', *(f'--gin.{key}' for key in KEYS)]
    if name == 'plain':
      subprocess.run(launch.program(['train', *flags]), check=True, capture_output=True)
    else:
      stream = io.StringIO()
      run = Supervisor(1, launch.program(['train', *flags]), tmp_path / name, Policy(), stream=stream)
      assert run.run() == 0, stream.getvalue()
    found.append([(row['loss'], row['grad_norm']) for row in read_metrics(tmp_path / name)])
  assert found[0] == found[1]
