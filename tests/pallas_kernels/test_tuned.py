"""Tuned blocks: read from JSON, used by the kernels, and the messages for damaged and missing files."""

import configparser
import fnmatch
import json
import pathlib

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import pallas_kernels
from pallas_kernels import tuned
from pallas_kernels.attention import gpu, tpu
from pallas_kernels.errors import KernelError
from pretrain.cli.main import is_user_error

FILES = sorted(tuned.FOLDER.glob('*.json'))
H100 = AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', num_cores=132, platform='gpu')
V5E = AbstractDevice(device_kind='TPU v5 lite', num_cores=1, platform='tpu')


def blocks(length: int = 8192, device: AbstractDevice = V5E, **options) -> tpu.Blocks:
  with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ('data',), abstract_device=device)):
    return tpu.choose_blocks(length, length, 128, **({'causal': True, 'packed': False} | options))


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setattr(tuned, 'FOLDER', tmp_path)
  tuned._missing.cache_clear()
  return tmp_path


def test_blocks_come_from_the_file_of_this_chip_by_class_and_fit_short_rows(folder):
  entries = {
    'd128_causal': {'q': 512, 'kv': 2048, 'compute': 256},
    'd128_packed_full': {'q': 256, 'kv': 256, 'compute': 256},
  }
  (folder / 'v5e.json').write_text(json.dumps({'attention': entries}))
  assert blocks() == tpu.Blocks(q=512, kv=2048, compute=256)
  assert blocks(causal=False, packed=True) == tpu.Blocks(q=256, kv=256, compute=256)
  assert blocks(length=200) == tpu.Blocks(q=256, kv=256, compute=256)


def test_gpus_have_their_own_files(folder):
  sizes = {'q': 64, 'kv': 32, 'grad_q': 16, 'grad_kv': 128, 'warps': 8, 'stages': 3, 'grad_warps': 2, 'grad_stages': 1}
  (folder / 'h100.json').write_text(json.dumps({'attention': {'d128_bfloat16': sizes}}))
  with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ('data',), abstract_device=H100)):
    assert gpu.choose_blocks(1024, 1024, 128, 'bfloat16') == gpu.Blocks(**sizes)
    assert gpu.choose_blocks(1024, 1024, 64, 'bfloat16') == gpu.Blocks(q=128, kv=64, grad_q=64, grad_kv=64)


def test_untuned_shapes_get_the_default_which_is_logged_once(folder, caplog):
  caplog.set_level('INFO')
  assert blocks() == blocks() == tpu.Blocks(**tpu.DEFAULT)
  (folder / 'v5e.json').write_text('{"attention": {}}')
  assert blocks(causal=False) == tpu.Blocks(**tpu.DEFAULT)
  assert blocks(packed=True) == tpu.Blocks(**tpu.DEFAULT_PACKED)
  said = 'no tuned entry for d128_causal on TPU v5 lite, the default is used; scripts/tune_kernels.py finds one.'
  assert [said in message for message in caplog.messages] == [True, False, False]


@pytest.mark.parametrize(
  ('text', 'reason'),
  [
    ('{"attention', 'Unterminated string'),
    ('[]', 'list at the top'),
    ('{"attention": {"d128_causal": {"q": 512, "kv": 512}}}', 'attention.d128_causal = .* lacks one of q, kv, compute'),
    ('{"attention": {"d128_causal": {"q": 512, "kv": "512", "compute": 512}}}', 'lacks one of q, kv, compute'),
  ],
)
def test_a_damaged_file_is_a_one_line_error_with_the_fix(folder, text, reason):
  (folder / 'v5e.json').write_text(text)
  with pytest.raises(
    KernelError, match=rf'^CONFIG: tuned entries in .*v5e.json are damaged \(.*{reason}.*or delete'
  ) as e:
    blocks()
  assert is_user_error(e.value)
  assert e.value.exit_code == 64


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_shipped_blocks_are_valid(path):
  entries = json.loads(path.read_text())['attention']
  assert path.stem in tuned.CHIPS.values()
  for entry in [entry for entry in entries.values() if 'compute' in entry]:
    sizes = entry['q'], entry['kv'], entry['compute']
    assert all(size in tpu.BLOCKS for size in sizes)
    assert min(sizes[:2]) % sizes[2] == 0


def test_four_tpus_have_files_and_these_are_packaged():
  assert {'v5e', 'v5p', 'v6e', 'tpu7x'} <= {path.stem for path in FILES}
  setup, root = configparser.ConfigParser(), pathlib.Path(pallas_kernels.__file__).parent
  setup.read(root.parent / 'setup.cfg')
  assert set(root.glob(setup['options.package_data']['pallas_kernels'])) == set(FILES)
  patterns = setup['options.packages.find']['include'].split()
  for folder in (path.parent.relative_to(root.parent) for path in root.rglob('__init__.py')):
    assert any(fnmatch.fnmatch('.'.join(folder.parts), pattern) for pattern in patterns), folder
