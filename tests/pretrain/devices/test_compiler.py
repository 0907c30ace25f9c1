"""compiler.options: given to the compiler of the step, refused by name, saved only where they are set."""

import jax
import pytest

from pretrain.cli import main
from pretrain.config import bindings
from pretrain.devices.compiler import CompilerConfig, check_compiles
from pretrain.devices.mesh import MeshConfig, make_mesh
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.program import build_program
from pretrain.experiment.resume import differences
from tests.pretrain import tiny

VMEM = 'xla_tpu_scoped_vmem_limit_kib'
FAST = "compiler.options={'xla_cpu_enable_fast_math': True}"


def test_a_config_without_options_is_saved_as_before():
  assert 'compiler' not in bindings.render(tiny.decoder())


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
