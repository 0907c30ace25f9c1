"""Compiles a step for TPUs without having one, and prints its memory per device. The only user of libtpu topologies."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from data.batches.source import Synthetic, open_data
from data.objectives.objectives import CausalLm, Instruction, Objective, PrefixLm, Supervised
from pretrain.devices.chips import Slice, parse
from pretrain.devices.compilation_cache import cache_dir
from pretrain.devices.mesh import batch_sharding, batch_shards
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.phases import phases_of
from pretrain.experiment.pipelines import schedule_of
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
  peak: int = 0  # arguments, outputs and temporaries where most are in use at once; the rest of `total` is gaps
  host: int = 0  # in the memory of the host, in no other number

  @property
  def total(self) -> int:
    return self.arguments + self.outputs - self.donated + self.temporaries + self.code


def tpu_devices(topology: str, slices: int = 1) -> list[Any]:
  """The devices of TPU slices (v5e:2x4, v5p:4x4x8, v6e:2x4, tpu7x:2x2x1, …) that programs can be compiled for.

  A slice is the torus that it is in a pod; libtpu by itself compiles for one without rings. Raises ConfigError for a
  slice that does not exist, and where libtpu is not the one that JAX is made for. The first call loads libtpu.
  """
  of = parse(topology, slices)
  check_libtpu(topology)
  os.environ.update(ENVIRONMENT)
  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=topology, **_form(of)).devices)
  except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
    reason = str(error).splitlines()[0]
    raise ConfigError(
      f'--topology={topology} is not a TPU slice ({reason}); write e.g. v5e:2x4 or v5p:2x2x1.'
    ) from error


def _form(of: Slice) -> dict[str, Any]:
  """What libtpu has to be told of a slice: which of three sides are rings, and how many slices there are."""
  wrap = {'wrap': (*of.rings, *(False,) * (3 - len(of.rings)))} if any(of.rings) else {}
  return wrap | ({'num_slices': of.slices} if of.slices > 1 else {})


def check_libtpu(topology: str) -> None:
  """Raises ConfigError where libtpu is missing, or is not the one that JAX is made for."""
  if importlib.util.find_spec('libtpu') is None:
    raise ConfigError(f'--topology={topology} needs libtpu, which is not installed; run ./scripts/setup.sh --dev.')
  pins = [re.match(r'libtpu ?==([\d.]+)\*.*extra == .tpu.', line) for line in importlib.metadata.requires('jax') or ()]
  pinned, own = next((pin[1] for pin in pins if pin), ''), importlib.metadata.version('libtpu')
  if not f'{own}.'.startswith(pinned):
    raise ConfigError(
      f'--topology={topology} needs libtpu {pinned}*, which JAX {jax.__version__} is made for; libtpu {own} is '
      'installed, whose programs this JAX cannot read. Run ./scripts/setup.sh --dev.'
    )


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
  host = stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes
  memory = Memory(
    arguments=stats.argument_size_in_bytes, outputs=stats.output_size_in_bytes, donated=stats.alias_size_in_bytes,
    temporaries=stats.temp_size_in_bytes, code=stats.generated_code_size_in_bytes,
    peak=stats.peak_memory_in_bytes - host, host=host,
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


def compile_train_step(cfg: Experiment, topology: str, slices: int = 1) -> tuple[Memory, Any]:
  """`compile_for` of the train step of `cfg`, on slices as large as its mesh."""
  program = build_program(cfg, tpu_devices(topology, slices))
  return compile_for(program.train_step, (program.abstract, abstract_batch(cfg, program)))


def plan(cfg: Experiment, topology: str, slices: int = 1) -> str:
  """What `pretrain plan` prints: the memory of the train step of each phase."""
  lines = []
  for phase in phases_of(cfg):
    program = build_program(phase.cfg, tpu_devices(topology, slices))
    memory, _ = compile_for(program.train_step, (program.abstract, abstract_batch(phase.cfg, program)))
    since = f' from step {phase.start}' if cfg.phases else ''
    lines.append(f'train step on {topology}{since}, MiB per device:')
    for name in ('arguments', 'outputs', 'donated', 'temporaries', 'code', 'total'):
      lines.append(f'  {name:<12}{getattr(memory, name) / MIB:>10,.1f}')
    if memory.host:
      lines.append(f'  {"on the host":<12}{memory.host / MIB:>10,.1f}')
    lines += pipeline(phase.cfg, program.mesh.shape['stage'], batch_shards(program.mesh))
  return '\n'.join(lines)


def pipeline(cfg: Experiment, stages: int, shards: int) -> list[str]:
  """A line about the pipeline of a step, if there is one."""
  if stages == 1:
    return []
  own = schedule_of(cfg, stages, shards)
  return [
    f'pipeline: {stages} stages, {own.microbatches} microbatches, {own.repeats} repeats: {own.ticks} ticks in each '
    f'pass of a stack, of which a stage is idle in {own.bubble:.1%}'
  ]
