"""Compiles a step for TPUs without having one, and prints its memory per device. The only user of libtpu topologies."""

import dataclasses
import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from data.batches.source import Synthetic, open_data
from data.objectives.objectives import CausalLm, Instruction, Objective, PrefixLm, Supervised
from pretrain.devices.compilation_cache import cache_dir
from pretrain.devices.mesh import batch_sharding
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.phases import phases_of
from pretrain.experiment.program import Program, build_program

# Without these libtpu looks for a TPU on this machine, and refuses to be loaded by two processes at a time.
ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Memory:
  """What a compiled program needs on one device, in bytes."""

  arguments: int
  outputs: int
  donated: int  # arguments whose memory the outputs reuse
  temporaries: int
  code: int

  @property
  def total(self) -> int:
    return self.arguments + self.outputs - self.donated + self.temporaries + self.code


def tpu_devices(topology: str) -> list[Any]:
  """The devices of a TPU slice (v5e:2x4, v5p:2x2x1, v6e:2x4, tpu7x:2x2x1, …) that programs can be compiled for.

  Raises ConfigError for a slice that does not exist and where libtpu is not installed. The first call loads libtpu.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ConfigError(f'--topology={topology} needs libtpu, which is not installed; run ./scripts/setup.sh --dev.')
  os.environ.update(ENVIRONMENT)
  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=topology).devices)
  except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
    reason = str(error).splitlines()[0]
    raise ConfigError(f'--topology={topology} is no TPU slice ({reason}); write e.g. v5e:2x4 or v5p:2x2x1.') from error


def compile_for(function, abstract_args) -> tuple[Memory, Any]:
  """(memory, compiled) of a jitted `function` for the devices in the shardings of `abstract_args` (ShapeDtypeStructs).

  Raises ConfigError where the program does not fit their memory.
  """
  try:
    compiled = function.lower(*abstract_args).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    reason = str(error).splitlines()[0]
    raise ConfigError(
      f'{reason} Use more devices, mesh.fsdp, model.remat, a smaller batch or train.accumulate.'
    ) from error
  stats = compiled.memory_analysis()
  memory = Memory(
    arguments=stats.argument_size_in_bytes, outputs=stats.output_size_in_bytes, donated=stats.alias_size_in_bytes,
    temporaries=stats.temp_size_in_bytes, code=stats.generated_code_size_in_bytes,
  )  # fmt: skip
  return memory, compiled


def abstract_batch(cfg: Experiment, program: Program) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and shardings of a global batch of `cfg`, from one synthetic row: no store is opened."""
  data = cfg.data
  synthetic = Synthetic(
    batch_size=data.batch_size, inputs_length=data.inputs_length, targets_length=data.targets_length,
    sentinels=data.sentinels,
  )  # fmt: skip
  source = open_data(synthetic, _of_text(cfg.objective), seed=0, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  row = source.batch(0, slice(0, 1))
  sharding = batch_sharding(program.mesh)
  shape = lambda x: jax.ShapeDtypeStruct((data.batch_size, *x.shape[1:]), x.dtype, sharding=sharding)
  return {name: shape(x) for name, x in row.items()}


def _of_text(objective: Objective) -> Objective:
  """An objective on text whose rows have the same fields; random tokens have no pairs or conversations."""
  match objective:
    case Supervised() | Instruction(prefix_attention=True):
      return PrefixLm()
    case Instruction():
      return CausalLm()
    case _:
      return objective


def compile_train_step(cfg: Experiment, topology: str) -> tuple[Memory, Any]:
  """`compile_for` of the train step of `cfg`, on a slice as large as its mesh."""
  program = build_program(cfg, tpu_devices(topology))
  return compile_for(program.train_step, (program.abstract, abstract_batch(cfg, program)))


def plan(cfg: Experiment, topology: str) -> str:
  """What `pretrain plan` prints: the memory of the train step of each phase."""
  lines = []
  for phase in phases_of(cfg):
    memory, _ = compile_train_step(phase.cfg, topology)
    since = f' from step {phase.start}' if cfg.phases else ''
    lines.append(f'train step on {topology}{since}, MiB per device:')
    for name in ('arguments', 'outputs', 'donated', 'temporaries', 'code', 'total'):
      lines.append(f'  {name:<12}{getattr(memory, name) / MIB:>10,.1f}')
  return '\n'.join(lines)
