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

from pretrain.devices.mesh import replicated
from pretrain.errors import ConfigError

NAME = re.compile(r'[a-z]\w*')


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompilerConfig:
  """`options`: flag -> value for the compiler of the train step, without dashes.

  compiler.options = {'xla_tpu_scoped_vmem_limit_kib': 65536}. Not in the saved config where it is empty.
  """

  options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False, metadata={'rendered': 'if set'})


def check_options(cfg: CompilerConfig) -> None:
  """Raises ConfigError where an option is not a name with a value."""
  for name, value in cfg.options.items():
    if not NAME.fullmatch(name):
      raise ConfigError(
        f"compiler.options: {name!r} is not the name of a flag; write it without dashes and '=': "
        "{'xla_tpu_scoped_vmem_limit_kib': 65536}."
      )
    if not isinstance(value, bool | int | float | str):
      raise ConfigError(f'compiler.options: {name} is {value!r}, expected a bool, a number or a str.')


def check_compiles(cfg: CompilerConfig, mesh: Mesh) -> None:
  """Raises ConfigError where the compiler for the devices of `mesh` does not take an option, with its name."""
  if not cfg.options or (reason := refusal(cfg.options, mesh)) is None:
    return
  alone = ((name, refusal({name: value}, mesh)) for name, value in cfg.options.items())
  name, reason = next((found for found in alone if found[1] is not None), (', '.join(cfg.options), reason))
  given = f'{name}={cfg.options[name]!r}' if name in cfg.options else name
  raise ConfigError(
    f'compiler.options: the compiler for {mesh.devices.flat[0].device_kind} refuses {given} ({reason.rstrip(". ")}); '
    'nothing was changed. Remove the option; flags differ between chips and between versions of XLA and libtpu.'
  )


def refusal(options: Mapping[str, Any], mesh: Mesh) -> str | None:
  """Why the compiler refuses these options; None where it takes them."""
  number = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
  try:
    jax.jit(jnp.negative, compiler_options=dict(options)).lower(number).compile()
  except jax.errors.JaxRuntimeError as error:
    return str(error).splitlines()[0].removeprefix('INVALID_ARGUMENT: ')
  return None
