"""`pretrain import` and `pretrain export`: weights in the layout of Hugging Face `transformers`, in and out."""

import argparse
import pathlib
import re

from pretrain.cli import shared
from pretrain.errors import ConfigError


def import_flags(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    '--from', required=True, type=shared.path, dest='source', metavar='DIR', help='config.json and *.safetensors'
  )
  command.add_argument('--workdir', required=True, type=shared.path, help='a new workdir, to generate or start from')
  command.add_argument(
    '--adapter', type=shared.path, metavar='DIR', help='adapter_config.json and adapter_model.safetensors of peft'
  )
  shared.config_flags(command, required=False)


def import_command(options, overrides) -> None:
  """Make a run of published weights in the layout of Hugging Face transformers."""
  from pretrain.devices import mesh
  from pretrain.interchange import adapters
  from pretrain.interchange.importing import experiment, import_run, open_source
  from pretrain.tools.weights import check_new

  shared.check_workdir(options.workdir)
  check_new(options.workdir, '--workdir')
  files, source = options.gin_file or [], open_source(options.source)
  adapter = None if options.adapter is None else adapters.open_adapter(options.adapter)
  if adapter is not None:
    adapters.check_modules(adapter, source)
  cfg = experiment(source, files, overrides)
  mesh.prepare_platform(cfg.mesh)
  given = [*(f'--gin_file={file}' for file in files), *(f'--gin.{override}' for override in overrides)]
  given += [f'--adapter={options.adapter}'] * (adapter is not None)
  change = lambda params: params if adapter is None else adapters.add_adapter(params, adapter, source)
  import_run(source, cfg, options.workdir, ' '.join([f'pretrain import --from={options.source}', *given]), change)
  print(f'{options.workdir} ({cfg.model.name}, step 0)')


def size(value: str) -> int:
  """Bytes of 500MB, 5GB or 5GiB."""
  found = re.fullmatch(r'(\d+)([KMG])(i?)B', value)
  if found is None or int(found[1]) == 0:
    raise argparse.ArgumentTypeError(f"'{value}' is no size; write e.g. 500MB or 5GB")
  return int(found[1]) * (1024 if found[3] else 1000) ** ' KMG'.index(found[2])


def check_outside(output: pathlib.Path, workdir: pathlib.Path) -> None:
  """Raises ConfigError for an output inside of the run."""
  if output.resolve().is_relative_to(workdir.resolve()):
    raise ConfigError(f'--out={output} is inside of --workdir={workdir}. Nothing was written; choose another folder.')


def export_flags(command: argparse.ArgumentParser) -> None:
  command.add_argument('--workdir', required=True, type=shared.path)
  command.add_argument('--step', type=int, help='without it, the newest')
  command.add_argument('--out', required=True, type=shared.path, metavar='DIR', help='a new folder')
  command.add_argument('--dtype', choices=['float32', 'bfloat16'], help='without it, the types of the import')
  command.add_argument('--max_shard_size', type=size, default='5GB', metavar='SIZE', help='of a file, e.g. 500MB')
  command.add_argument('--adapter', action='store_true', help="the adapters of a run with lora alone, in peft's layout")


def export_command(options, overrides) -> None:
  """Write a step of a run as files that Hugging Face transformers loads."""
  import jax

  jax.config.update('jax_platforms', 'cpu')
  shared.check_writable(options.out, '--out')
  from pretrain.interchange.adapters import export_adapter
  from pretrain.interchange.exporting import export
  from pretrain.tools.weights import find, find_step

  if options.adapter and options.dtype:
    raise ConfigError('--adapter writes float32 alone. Nothing was written; leave --dtype out.')
  number = options.step
  step = find(str(options.workdir)) if number is None else find_step(options.workdir, number)
  check_outside(options.out, step.workdir)
  if options.adapter:
    print(f'{options.out} ({export_adapter(step, options.out)} adapters)')
    return
  family = export(step, options.out, dtype=options.dtype, shard_bytes=options.max_shard_size)
  print(f'{options.out} ({family.architecture})')
