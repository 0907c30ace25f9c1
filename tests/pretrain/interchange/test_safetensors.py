"""The reader refuses every file that is not whole; the writer's bytes are those of the reference implementation."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from pretrain.errors import CheckpointError
from pretrain.interchange.safetensors import INDEX, SINGLE, create, open_file, open_folder
from tests.pretrain.interchange.goldens import GOLDENS

GOLDEN = GOLDENS / 'gpt2' / SINGLE


def raw(header: object, data: bytes) -> bytes:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(text).to_bytes(8, 'little') + text + data


def entry(begin: int, end: int, shape=(2,), dtype='F32') -> dict:
  return {'dtype': dtype, 'shape': list(shape), 'data_offsets': [begin, end]}


REFUSED = {
  'empty': (b'', 'too short for its header'),
  'no length': (b'\0\0\0', 'too short for its header'),
  'length beyond the file': ((99).to_bytes(8, 'little') + b'{}', 'too short for its header'),
  'huge length': ((2**63).to_bytes(8, 'little') + b'{}', 'too short for its header'),
  'not JSON': (raw(b'{"a"', b''), 'not readable'),
  'not an object': (raw([1], b''), 'not readable'),
  'entry without shape': (raw({'a': {'dtype': 'F32', 'data_offsets': [0, 8]}}, bytes(8)), 'not readable'),
  'negative size': (raw({'a': entry(0, 8, (-2,))}, bytes(8)), 'shape [-2]'),
  'unknown type': (raw({'a': entry(0, 8, (2,), 'F31')}, bytes(8)), "unknown type 'F31'"),
  'bytes that do not fit the shape': (raw({'a': entry(0, 8, (3,))}, bytes(8)), 'needs 12 bytes and has 8'),
  'truncated': (raw({'a': entry(0, 8)}, bytes(7)), '(truncated)'),
  'bytes left over': (raw({'a': entry(0, 8)}, bytes(9)), 'its tensors need'),
  'overlap': (raw({'a': entry(0, 8), 'b': entry(4, 12)}, bytes(12)), 'b overlaps'),
  'hole': (raw({'a': entry(0, 8), 'b': entry(12, 20)}, bytes(20)), 'b does not follow'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_a_damaged_file_is_refused(tmp_path, case):
  content, message = REFUSED[case]
  (tmp_path / 'x.safetensors').write_bytes(content)
  with pytest.raises(CheckpointError) as error:
    open_file(tmp_path / 'x.safetensors')
  assert message in str(error.value)
  assert str(tmp_path / 'x.safetensors') in str(error.value)
  assert 'Nothing was written' in str(error.value)
  assert '\n' not in str(error.value)


def test_a_golden_truncated_anywhere_is_refused(tmp_path):
  whole = GOLDEN.read_bytes()
  for size in (len(whole) - 1, len(whole) // 2, 100, 8):
    (tmp_path / SINGLE).write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match='truncated'):
      open_folder(tmp_path)


def test_a_type_that_is_no_weight_is_refused_when_read(tmp_path):
  (tmp_path / SINGLE).write_bytes(raw({'a': entry(0, 16, (2,), 'I64')}, bytes(16)))
  with pytest.raises(CheckpointError, match='has type I64'):
    open_folder(tmp_path)['a'].values()


def test_written_bytes_are_those_of_the_reference(tmp_path):
  found = open_file(GOLDEN)
  arrays = create(tmp_path, {name: (t.dtype, t.shape) for name, t in reversed(found.items())})
  for name, array in arrays.items():
    array[...] = found[name].values()
  assert (tmp_path / SINGLE).read_bytes() == GOLDEN.read_bytes()


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_come_back(tmp_path, dtype):
  names = {np.float32: 'F32', np.float16: 'F16', ml_dtypes.bfloat16: 'BF16'}
  values = np.linspace(-3, 3, 24).reshape(4, 6).astype(dtype)
  create(tmp_path, {'a': (names[dtype], (4, 6)), 'none': (names[dtype], (0, 6))})['a'][...] = values
  found = open_folder(tmp_path)
  assert found['a'].values().dtype == dtype
  assert (found['a'].values() == values).all()
  assert found['none'].values().shape == (0, 6)


def test_shards_have_an_index(tmp_path):
  shapes = {name: ('F32', (8,)) for name in 'abc'}
  for i, array in enumerate(create(tmp_path, shapes, limit=64).values()):
    array[...] = i
  index = json.loads((tmp_path / INDEX).read_text())
  first, second = 'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'
  assert index == {'metadata': {'total_size': 96}, 'weight_map': {'a': first, 'b': first, 'c': second}}
  assert [tensor.values()[0] for tensor in open_folder(tmp_path).values()] == [0, 1, 2]
  (tmp_path / second).unlink()
  with pytest.raises(CheckpointError, match=f'shard {second} is missing'):
    open_folder(tmp_path)


@pytest.mark.parametrize(
  ('index', 'message'),
  [
    ('{}', 'no index of shards'),
    ('{"weight_map": [1]}', 'no index of shards'),
    ('{"weight_map": {"a": "../x.safetensors"}}', 'not a file beside it'),
    ('{"weight_map": {"a": "model.safetensors"}}', 'does not have a, which'),
  ],
)
def test_a_wrong_index_is_refused(tmp_path, index, message):
  shutil.copy(GOLDEN, tmp_path / SINGLE)
  (tmp_path / INDEX).write_text(index)
  with pytest.raises(CheckpointError, match=message):
    open_folder(tmp_path)
