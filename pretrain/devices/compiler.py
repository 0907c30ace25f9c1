"""Options of the XLA compiler for the train step: part of the config, so that they are saved with the run.

The same names in LIBTPU_INIT_ARGS or XLA_FLAGS would end the process where they are unknown. As options of one compiled
program they are refused with a sentence.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from models.rendered import IF_SET
from pretrain.devices import chip_options
from pretrain.devices.chips import CHIPS, of_kind
from pretrain.devices.mesh import replicated
from pretrain.errors import ConfigError

NAME = re.compile(r'[a-z]\w*')


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompilerConfig:
  """`options`: flag -> value for the compiler of the train step, without dashes.

  compiler.options = {'xla_tpu_scoped_vmem_limit_kib': 65536}. Not in the saved config where it is empty.

  A chip has defaults beside them (chip_options.py), which `options` may change one by one and `chip_defaults=False`
  leaves out. A run saves the defaults of its chip as `chip_options`, {chip: its options}. A resumed run keeps them,
  whatever the table of a later version says.
  """

  options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False, metadata=IF_SET)
  chip_defaults: bool = dataclasses.field(default=True, metadata=IF_SET)
  chip_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False, metadata=IF_SET)


def defaults_for(cfg: CompilerConfig, device_kind: str) -> dict[str, Any]:
  """The options that the chip of these devices has by default; none for a CPU or a GPU."""
  chip = of_kind(device_kind)
  if chip is None or not cfg.chip_defaults:
    return {}
  return dict(cfg.chip_options.get(chip.name, chip_options.of_chip(chip.name)))


def quick(cfg: CompilerConfig, chip: str) -> CompilerConfig:
  """The same, without the defaults of this chip that make compiling slow; options that the config has are kept."""
  if not cfg.chip_defaults or chip in cfg.chip_options:
    return cfg
  return dataclasses.replace(cfg, chip_options={**cfg.chip_options, chip: chip_options.of_chip(chip, quick=True)})


def options_for(cfg: CompilerConfig, device_kind: str) -> dict[str, Any]:
  """All options of the train step on such devices."""
  return defaults_for(cfg, device_kind) | dict(cfg.options)


def recorded(cfg: CompilerConfig, device_kind: str) -> CompilerConfig:
  """The same, with the defaults of this chip as values: what a run saves, {} where it has none."""
  chip = of_kind(device_kind)
  if chip is None or not cfg.chip_defaults:
    return cfg
  return dataclasses.replace(cfg, chip_options={**cfg.chip_options, chip.name: defaults_for(cfg, device_kind)})


def check_options(cfg: CompilerConfig) -> None:
  """Raises ConfigError where an option is not a name with a value, or `chip_options` not those of chips."""
  _check_named('compiler.options', cfg.options)
  for chip, options in cfg.chip_options.items():
    if chip not in CHIPS or not isinstance(options, Mapping):
      raise ConfigError(
        f'compiler.chip_options: {chip!r}: {options!r} is not a chip with its options; write {{CHIP: {{FLAG: VALUE}}}} '
        f'with a chip of {", ".join(CHIPS)}, or remove it to have the defaults.'
      )
    _check_named(f'compiler.chip_options[{chip!r}]', options)


def _check_named(where: str, options: Mapping[str, Any]) -> None:
  for name, value in options.items():
    if not isinstance(name, str) or not NAME.fullmatch(name):
      raise ConfigError(
        f"{where}: {name!r} is not the name of a flag; write it without dashes and '=': "
        "{'xla_tpu_scoped_vmem_limit_kib': 65536}."
      )
    if not isinstance(value, bool | int | float | str):
      raise ConfigError(f'{where}: {name} is {value!r}, expected a bool, a number or a str.')


def check_compiles(cfg: CompilerConfig, mesh: Mesh) -> None:
  """Raises ConfigError where the compiler for the devices of `mesh` does not take an option, with its name."""
  kind = mesh.devices.flat[0].device_kind
  options = options_for(cfg, kind)
  if not options or (reason := refusal(options, mesh)) is None:
    return
  alone = ((name, refusal({name: value}, mesh)) for name, value in options.items())
  name, reason = next((found for found in alone if found[1] is not None), (', '.join(options), reason))
  given = f'{name}={options[name]!r}' if name in options else name
  where, fix = _origin(cfg, kind, name)
  raise ConfigError(
    f'{where}: the compiler for {kind} refuses {given} ({reason.rstrip(". ")}); '
    f'nothing was changed. {fix}; flags differ between chips and between versions of XLA and libtpu.'
  )


def _origin(cfg: CompilerConfig, kind: str, name: str) -> tuple[str, str]:
  """(where an option for devices of this kind comes from, how it is removed)."""
  chip = of_kind(kind)
  if chip is None or name not in defaults_for(cfg, kind) or name in cfg.options:
    return 'compiler.options', 'Remove the option'
  if chip.name in cfg.chip_options:
    return f'compiler.chip_options[{chip.name!r}]', 'Remove the option there'
  return 'a default of this chip', 'Set compiler.chip_defaults=False'


def refusal(options: Mapping[str, Any], mesh: Mesh) -> str | None:
  """Why the compiler refuses these options; None where it takes them."""
  number = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
  try:
    jax.jit(jnp.negative, compiler_options=dict(options)).lower(number).compile()
  except jax.errors.JaxRuntimeError as error:
    return str(error).splitlines()[0].removeprefix('INVALID_ARGUMENT: ')
  return None
