"""Compiler options and the defaults of chips: given to the step's compiler, refused by name, saved with the run."""

import re

import jax
import pytest

from pretrain.cli import main
from pretrain.config import bindings
from pretrain.devices import chip_options, compiler
from pretrain.devices.chips import CHIPS
from pretrain.devices.compiler import CompilerConfig, check_compiles, options_for, recorded
from pretrain.devices.mesh import MeshConfig, make_mesh
from pretrain.errors import ConfigError
from pretrain.experiment import saved
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.program import build_program
from pretrain.experiment.resume import differences
from pretrain.run.train import train
from pretrain.tools import plan
from tests.pretrain import tiny

VMEM = 'xla_tpu_scoped_vmem_limit_kib'
WINDOWED = 'xla_jf_spmd_threshold_for_windowed_einsum_mib'
DEFAULTS = {WINDOWED: 1000000, VMEM: 98304}
V5E, V5P = 'TPU v5 lite', 'TPU v5'
FAST = "compiler.options={'xla_cpu_enable_fast_math': True}"


def test_a_config_without_options_is_saved_as_before():
  assert 'compiler' not in bindings.render(tiny.decoder())


def test_t5_has_the_defaults_of_v5e_but_for_vmem():
  """Its config repeats the others, so they must be those of the table."""
  cfg = bindings.load(Experiment, [str(tiny.ROOT / 'configs/t5/small.gin')], [])
  assert dict(cfg.compiler.chip_options) == {'v5e': chip_options.of_chip('v5e', quick=True)}
  assert options_for(cfg.compiler, V5E).keys() == {WINDOWED}


def test_options_are_saved_and_read_back(tmp_path):
  cfg = tiny.decoder(FAST)
  (tmp_path / 'config.gin').write_text(bindings.render(cfg))
  assert "compiler.options = {'xla_cpu_enable_fast_math': True}" in bindings.render(cfg)
  assert bindings.load(Experiment, [str(tmp_path / 'config.gin')]) == cfg
  assert differences(tiny.decoder(), cfg) == [], 'a resumed run may run on another chip'


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ("{'--xla_x': 1}", "compiler.options: '--xla_x' is not the name of a flag; write it without dashes"),
    ("{'xla_x': [1]}", r'compiler.options: xla_x is \[1\], expected a bool, a number or a str.'),
    ('3', 'compiler.options=3 is int, expected a dict'),
  ],
)
def test_what_is_no_option_is_refused_with_the_config(options, message):
  with pytest.raises(ConfigError, match=message):
    tiny.decoder(f'compiler.options={options}')


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ("{'v5x': {}}", "compiler.chip_options: 'v5x': {} is not a chip with its options; write {CHIP: {FLAG: VALUE}} with "
     'a chip of v5e, v5p, v6e, tpu7x, or remove it to have the defaults.'),
    ("{'v5e': 3}", "compiler.chip_options: 'v5e': 3 is not a chip with its options"),
    ("{'v5e': {'--x': 1}}", "compiler.chip_options['v5e']: '--x' is not the name of a flag"),
    ("{'v5e': {'x': None}}", "compiler.chip_options['v5e']: x is None, expected a bool, a number or a str."),
  ],
)  # fmt: skip
def test_wrong_chip_options_are_refused_with_the_config(options, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    tiny.decoder(f'compiler.chip_options={options}')


def test_each_entry_of_the_table_has_chips_a_reason_and_evidence():
  for entry in chip_options.TABLE:
    assert entry.chips
    assert {*entry.chips} <= {*CHIPS}
    assert entry.reason
    compiled = {*re.findall(r'(v5e|v5p|v6e|tpu7x):\d', entry.evidence)}
    assert {*entry.chips} <= compiled, 'a compiled program of each chip'
  for chip in CHIPS:
    names = [name for entry in chip_options.TABLE if chip in entry.chips for name in entry.options]
    assert len(names) == len(set(names))


def test_a_chip_has_its_defaults_and_one_key_leaves_them_out():
  own = options_for(CompilerConfig(), V5E)
  assert own == options_for(CompilerConfig(), 'TPU v6 lite') == DEFAULTS
  assert options_for(CompilerConfig(), V5P) == {WINDOWED: 1000000}
  assert options_for(CompilerConfig(options={WINDOWED: 5, 'x': 1}), V5E) == DEFAULTS | {WINDOWED: 5, 'x': 1}
  assert options_for(compiler.quick(CompilerConfig(), 'v5e'), V5E) == {WINDOWED: 1000000}
  saved_with_all = recorded(CompilerConfig(), V5E)
  assert compiler.quick(saved_with_all, 'v5e') == saved_with_all
  assert options_for(CompilerConfig(chip_defaults=False, options={'x': 1}), V5E) == {'x': 1}
  assert options_for(CompilerConfig(), 'cpu') == options_for(CompilerConfig(), 'NVIDIA H100') == {}


def test_a_run_saves_the_defaults_of_its_chip_and_keeps_them(tmp_path, monkeypatch):
  path = tmp_path / 'config.gin'
  text = bindings.render(saved.with_chip_options(tiny.decoder(f"compiler.options={{'{VMEM}': 65536}}"), path, V5E))
  assert f"compiler.chip_options = {{'v5e': {{'{WINDOWED}': 1000000, '{VMEM}': 98304}}}}" in text
  path.write_text(text)
  again = bindings.load(Experiment, [str(path)])
  monkeypatch.setattr(chip_options, 'TABLE', ())  # a later version
  assert options_for(again.compiler, V5E) == {WINDOWED: 1000000, VMEM: 65536}
  assert options_for(again.compiler, V5P) == {VMEM: 65536}
  assert recorded(again.compiler, V5E) == again.compiler
  resumed = saved.with_chip_options(tiny.decoder(), path, V5E)  # by the command that began it
  assert options_for(resumed.compiler, V5E) == DEFAULTS
  own = saved.with_chip_options(tiny.decoder("compiler.chip_options={'v5e': {}}"), path, V5E)
  assert options_for(own.compiler, V5E) == {}
  off = CompilerConfig(chip_defaults=False)
  assert recorded(off, V5E) == off


def test_a_run_begun_without_defaults_has_none_when_it_resumes(tmp_path, monkeypatch):
  """An earlier version saved no options; one on a chip without an entry in the table saves that."""
  path = tmp_path / 'config.gin'
  path.write_text(bindings.render(tiny.decoder()))
  assert options_for(saved.load_saved(path).compiler, V5E) == {}, 'as replay loads it'
  assert options_for(saved.with_chip_options(tiny.decoder(), path, V5E).compiler, V5E) == {}
  monkeypatch.setattr(chip_options, 'TABLE', ())
  new = saved.with_chip_options(tiny.decoder(), tmp_path / 'none.gin', 'TPU7x')
  assert "compiler.chip_options = {'tpu7x': {}}" in bindings.render(new)
  assert saved.with_chip_options(tiny.decoder(), path, 'cpu') == tiny.decoder()


def test_a_resumed_run_is_compiled_with_the_options_that_it_began_with(tmp_path, monkeypatch):
  """On CPUs that are taken for a chip whose table changes between the two commands."""
  kinds = lambda kind: CHIPS['v5e']
  monkeypatch.setattr(saved, 'of_kind', kinds)
  monkeypatch.setattr(compiler, 'of_kind', kinds)
  entry = lambda fast: chip_options.Entry(
    chips=('v5e',), options={'xla_cpu_enable_fast_math': fast}, reason='', evidence=''
  )
  monkeypatch.setattr(chip_options, 'TABLE', (entry(False),))
  train(tiny.decoder('train.steps=1', 'checkpoint.every=1'), tmp_path)
  monkeypatch.setattr(chip_options, 'TABLE', (entry(True),))
  train(tiny.decoder('train.steps=2', 'checkpoint.every=1'), tmp_path)
  text = (tmp_path / 'config.gin').read_text()
  assert "compiler.chip_options = {'v5e': {'xla_cpu_enable_fast_math': False}}" in text


def test_the_step_of_a_chip_is_compiled_with_its_defaults(monkeypatch):
  """On a CPU that is taken for a chip: its compiler does not know the flags, and the sentence names the key."""
  monkeypatch.setattr(compiler, 'of_kind', lambda kind: CHIPS['v5e'])
  with pytest.raises(ConfigError) as caught:
    build_program(tiny.decoder())
  assert str(caught.value) == (
    f'CONFIG: a default of this chip: the compiler for cpu refuses {WINDOWED}=1000000 (No such compile option: '
    f"'{WINDOWED}'); nothing was changed. Set compiler.chip_defaults=False; flags differ between chips and between "
    'versions of XLA and libtpu.'
  )
  build_program(tiny.decoder('compiler.chip_defaults=False'))


def test_a_refused_flag_of_a_saved_table_is_named_with_its_key(monkeypatch):
  """What a run saved, or a user wrote, for a chip is not called a default of it."""
  monkeypatch.setattr(compiler, 'of_kind', lambda kind: CHIPS['v5e'])
  with pytest.raises(ConfigError) as caught:
    check_compiles(CompilerConfig(chip_options={'v5e': {'xla_x': 1}}), make_mesh(MeshConfig()))
  assert str(caught.value) == (
    "CONFIG: compiler.chip_options['v5e']: the compiler for cpu refuses xla_x=1 (No such compile option: 'xla_x'); "
    'nothing was changed. Remove the option there; flags differ between chips and between versions of XLA and libtpu.'
  )


def test_the_compiler_refuses_an_unknown_flag_by_its_name():
  mesh = make_mesh(MeshConfig())
  options = {'xla_cpu_enable_fast_math': True, VMEM: 65536}
  with pytest.raises(ConfigError) as caught:
    check_compiles(CompilerConfig(options=options), mesh)
  assert str(caught.value) == (
    f"CONFIG: compiler.options: the compiler for cpu refuses {VMEM}=65536 (No such compile option: '{VMEM}'); nothing "
    'was changed. Remove the option; flags differ between chips and between versions of XLA and libtpu.'
  )
  with pytest.raises(ConfigError, match=r"refuses xla_cpu_enable_fast_math='maybe' .*'maybe' is not a valid bool"):
    check_compiles(CompilerConfig(options={'xla_cpu_enable_fast_math': 'maybe'}), mesh)
  check_compiles(CompilerConfig(options={'xla_cpu_enable_fast_math': True}), mesh)


def test_the_step_is_compiled_with_the_options(monkeypatch):
  seen, jit = [], jax.jit
  spy = lambda *args, compiler_options=None, **kwargs: (
    seen.append(compiler_options) or jit(*args, compiler_options=compiler_options, **kwargs)
  )
  monkeypatch.setattr(jax, 'jit', spy)
  build_program(tiny.decoder(FAST))
  assert seen[-1] == {'xla_cpu_enable_fast_math': True}
  assert seen[-2] is None, 'the state is made without them'
  build_program(tiny.decoder())
  assert seen[-1] is None


def test_train_refuses_an_unknown_flag_before_a_file_is_written(tmp_path, capsys):
  flags = [f'--gin_file={tiny.DECODER}', f'--workdir={tmp_path / "run"}', "--gin.compiler.options={'xla_x': 1}"]
  assert main.main(['train', *flags]) == 64
  assert "refuses xla_x=1 (No such compile option: 'xla_x')" in capsys.readouterr().err
  assert not (tmp_path / 'run/config.gin').exists()


@pytest.mark.aot
@pytest.mark.slow  # compiles for two chips
def test_plan_refuses_an_unknown_flag_by_its_name(capsys):
  flags = [f'--gin_file={tiny.DECODER}', '--topology=v5e:2x4', '--gin.mesh.data=8', '--gin.mesh.fsdp=1']
  options = f"--gin.compiler.options={{'{VMEM}': 65536, 'xla_sc_disjoint_spmem': False}}"
  assert main.main(['plan', *flags, options]) == 64
  message = 'the compiler for TPU v5 lite refuses xla_sc_disjoint_spmem=False (No such compile option'
  assert message in capsys.readouterr().err
  assert main.main(['plan', *flags, "--gin.compiler.options={'xla_tpu_overlap_compute_collective_tc': True}"]) == 0
  assert 'MiB per device' in capsys.readouterr().out


@pytest.mark.aot
@pytest.mark.slow  # loads libtpu
@pytest.mark.parametrize('chips', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
def test_libtpu_takes_the_defaults_of_each_chip(chips):
  devices = plan.tpu_devices(chips)
  mesh = make_mesh(MeshConfig(data=len(devices)), devices)
  assert options_for(CompilerConfig(), devices[0].device_kind)
  check_compiles(CompilerConfig(), mesh)
