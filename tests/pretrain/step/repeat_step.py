"""Prints the gradient norm of the first step four times, on one line for each of 1, 2 and 4 microbatches.

python -m tests.pretrain.step.repeat_step STORE
"""

import sys

from data.batches.source import open_data
from pretrain.devices.compilation_cache import cache_dir
from pretrain.devices.mesh import prepare_platform, to_global
from pretrain.experiment.program import build_program
from tests.pretrain import tiny

WIDE = ('model.embed=192', 'model.head_dim=48', 'model.mlp.hidden=512', 'model.vocab_size=4096', 'data.batch_size=48')
LONG = ('data.inputs_length=128', 'data.targets_length=128', 'model.encoder_layers=4', 'model.decoder_layers=4')


def norms(accumulate: int) -> list[float]:
  cfg = tiny.ul2(sys.argv[1], *WIDE, *LONG, 'model.dropout=0.1', 'mesh.fsdp=4', f'train.accumulate={accumulate}')
  prepare_platform(cfg.mesh)
  data = open_data(cfg.data, cfg.objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  program = build_program(cfg)
  batch = to_global(data.batch(0, slice(0, cfg.data.batch_size)), program.mesh)
  return [float(program.train_step(program.init(), batch)[1]['grad_norm']) for _ in range(4)]


if __name__ == '__main__':
  for count in (1, 2, 4):
    print(*norms(count))
