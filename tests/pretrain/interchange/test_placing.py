"""Parameters are read a block at a time, and each device gets its part alone."""

import pathlib

import jax
import numpy as np
import pytest

from models import partition
from models.build import build
from pretrain.devices.mesh import MeshConfig, make_mesh
from pretrain.interchange import placing
from pretrain.interchange.importing import flat, open_source, parameter, parameters, placed
from pretrain.interchange.safetensors import Tensor
from tests.pretrain.interchange.goldens import GOLDENS, load, slow


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of 100 elements, so that the matrices of the goldens have many."""
  monkeypatch.setattr(placing, 'BLOCK', 100)


@pytest.mark.parametrize('name', ['falcon', 'gpt_neox', 'mixtral', *map(slow, ('gpt2', 'gemma2', 'roberta'))])
def test_blocks_give_the_values_of_whole_tensors(name, monkeypatch):
  whole = flat(load(GOLDENS / name)[1])
  monkeypatch.setattr(placing, 'BLOCK', 100)
  source = open_source(GOLDENS / name)
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=2) if name != 'mixtral' else MeshConfig(fsdp=2, expert=2))
  shardings = flat(partition.shardings(build(source.model).specs, mesh))
  for path, found in flat(parameters(source, shardings)).items():
    np.testing.assert_array_equal(found, whole[path], err_msg=path)
    assert found.sharding == shardings[path]


def test_each_device_has_its_part_alone(small_blocks):
  source = open_source(GOLDENS / 'llama')
  mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
  shardings = flat(partition.shardings(build(source.model).specs, mesh))
  for path, array in flat(parameters(source, shardings)).items():
    parts = [shard.data.nbytes for shard in array.addressable_shards]
    assert len(parts) == 8
    if path.endswith(('query', 'gate', 'up', 'down', 'table', 'kernel')):
      assert parts == [array.nbytes // 8] * 8, path


def test_no_read_is_larger_than_a_block(small_blocks, monkeypatch):
  """Nor than a row, where that is larger: the host holds a block of the file, not a tensor."""
  source, reads, read = open_source(GOLDENS / 'llama'), [], Tensor.read

  def counted(self, begin=0, end=None):
    reads.append((end - begin, self.shape[-1]))
    return read(self, begin, end)

  monkeypatch.setattr(Tensor, 'read', counted)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  for entry, spec in placed(source.family, source.model, source.values):
    parameter(source, entry, spec, device)
  largest = max(np.prod(tensor.shape) for tensor in source.tensors.values())
  assert max(size for size, _ in reads) < largest / 2
  assert all(size <= max(100, 16 * row) for size, row in reads)  # a row of heads has 16 of the matrix


def test_a_damaged_block_is_told_apart(small_blocks, tmp_path):
  """The test above would not see it if blocks were put in wrong places: here one element changes."""
  import shutil

  folder = pathlib.Path(shutil.copytree(GOLDENS / 'llama', tmp_path / 'llama'))
  tensor = open_source(folder).tensors['model.layers.1.self_attn.o_proj.weight']
  raw = bytearray(tensor.path.read_bytes())
  raw[tensor.begin + 4 * 70 + 2] ^= 1
  tensor.path.write_bytes(raw)
  changed, whole = flat(load(folder)[1]), flat(load(GOLDENS / 'llama')[1])
  differing = {path: np.argwhere(np.asarray(changed[path]) != np.asarray(whole[path])).tolist() for path in whole}
  found = {path: places for path, places in differing.items() if places}
  assert found == {'decoder/blocks/self_attention/out': [[1, 0, 6, 1]]}
