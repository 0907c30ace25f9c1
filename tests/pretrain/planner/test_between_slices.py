"""What a compiled train step sends between two slices: each device's part of the gradients, once, in a stated dtype."""

import pytest

from models.build import build
from models.specs import count
from pretrain.devices.chips import parse
from pretrain.planner import compiled, hlo
from tests.pretrain import tiny

pytestmark = [pytest.mark.aot, pytest.mark.slow]

SIZES = (
  'model.layers=2', 'model.embed=256', 'model.heads=2', 'model.head_dim=128', 'model.mlp.hidden=512',
  'model.vocab_size=512', "model.dtype='bfloat16'", 'data.targets_length=256', 'data.batch_size=16',
  'train.accumulate=2', 'compiler.chip_defaults=False',
)  # fmt: skip
OF = parse('v5e:2x2', 2)
EXPERTS = ('model.experts=4', 'model.experts_per_token=2')
LAYOUTS = {
  'fsdp, in float32': (4, ('mesh.fsdp=4',)),
  'data, in bfloat16': (2, ('mesh.data=2', 'mesh.fsdp=2', "train.replica_dtype='bfloat16'")),
  'a ring with experts': (4, ('mesh.sequence=2', 'mesh.expert=2', *EXPERTS)),
}


@pytest.mark.parametrize(('size', 'keys'), LAYOUTS.values(), ids=LAYOUTS)
def test_a_device_sends_its_part_of_the_gradients_once_a_step(size, keys, capfd):
  """With two microbatches: the parameters / 4 devices of a slice; less than a hundredth more is tiles around small
  arrays, and numbers. No other collective has devices of both slices. Kernels of attention compile inside."""
  cfg = tiny.experiment(tiny.DECODER, *SIZES, 'mesh.replica=2', *keys)
  _, program, devices = compiled.compile_step(cfg, OF)
  found = compiled.collected(hlo.parse(text := program.as_text()), len(devices))
  crossing = [one for one in found if one.crosses]
  assert {(one.kind, one.times) for one in crossing} == {('all-reduce', 1)}
  part = size * count(build(cfg.model).specs) / 4
  assert part <= sum(one.bytes for one in crossing) <= 1.01 * part
  assert {len({devices[i].slice_index for i in one.devices}) for one in found if not one.crosses} == {1}
  assert 'attention_grad_keys_values' in text
  assert 'Involuntary full rematerialization' not in ''.join(capfd.readouterr())
