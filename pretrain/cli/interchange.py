"""`pretrain import` and `pretrain export`: weights in the layout of Hugging Face `transformers`, in and out; T5X in."""

import argparse
import pathlib
import re
from typing import TYPE_CHECKING

from pretrain.cli import shared
from pretrain.errors import ConfigError

if TYPE_CHECKING:  # it imports `data`, which may be another package until `main` has looked
  from pretrain.workdirs.folder import Folder


def import_flags(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    '--from', required=True, type=shared.path, dest='source', metavar='DIR',
    help='config.json and *.safetensors, or a checkpoint of T5X',
  )  # fmt: skip
  command.add_argument('--workdir', required=True, type=shared.workdir, help='a new workdir, to generate or start from')
  command.add_argument(
    '--adapter', type=shared.path, metavar='DIR', help='adapter_config.json and adapter_model.safetensors of peft'
  )
  command.add_argument(
    '--tokenizer', type=shared.path, metavar='FILE', help='SentencePiece model or tokenizer.json of a T5X checkpoint'
  )
  shared.config_flags(command, required=False)


def import_command(options, overrides) -> None:
  """Make a run of published weights in the layout of Hugging Face transformers, or of T5X."""
  from pretrain.devices import mesh
  from pretrain.interchange import adapters, importing, t5x
  from pretrain.tools.weights import check_new

  shared.check_workdir(options.workdir)
  check_new(options.workdir, '--workdir')
  files = options.gin_file or []
  if t5x.is_t5x(options.source):
    _refuse_adapter(options)
    source = t5x.open_source(options.source, options.tokenizer)
    cfg, adapter, keep = t5x.experiment(source, files, overrides), None, t5x.keep_files
    if source.others:
      print(f'{source.folder}: {", ".join(source.others)} left out; a run starts with a new optimizer')
  else:
    _refuse_tokenizer(options)
    source = importing.open_source(options.source)
    adapter = None if options.adapter is None else adapters.open_adapter(options.adapter)
    if adapter is not None:
      adapters.check_modules(adapter, source)
    cfg, keep = importing.experiment(source, files, overrides), importing.keep_files
  mesh.prepare_platform(cfg.mesh)
  given = [*(f'--gin_file={file}' for file in files), *(f'--gin.{override}' for override in overrides)]
  given += [f'--adapter={options.adapter}'] * (adapter is not None)
  given += [f'--tokenizer={options.tokenizer}'] * (options.tokenizer is not None)
  change = lambda params: params if adapter is None else adapters.add_adapter(params, adapter, source)
  command = ' '.join([f'pretrain import --from={options.source}', *given])
  importing.import_run(source, cfg, options.workdir, command, change, keep)
  print(f'{options.workdir} ({cfg.model.name}, step 0)')


def size(value: str) -> int:
  """Bytes of 500MB, 5GB or 5GiB."""
  found = re.fullmatch(r'(\d+)([KMG])(i?)B', value)
  if found is None or int(found[1]) == 0:
    raise argparse.ArgumentTypeError(f"'{value}' is not a size; write e.g. 500MB or 5GB")
  return int(found[1]) * (1024 if found[3] else 1000) ** ' KMG'.index(found[2])


def check_outside(output: pathlib.Path, workdir: 'Folder') -> None:
  """Raises ConfigError for an output inside of the run."""
  if isinstance(workdir, pathlib.Path) and output.resolve().is_relative_to(workdir.resolve()):
    raise ConfigError(f'--out={output} is inside of --workdir={workdir}. Nothing was written; choose another folder.')


def _refuse_adapter(options) -> None:
  if options.adapter is not None:
    raise ConfigError(
      f'--adapter={options.adapter} with {options.source}, a checkpoint of T5X: an adapter of peft names tensors of '
      'transformers. Nothing was written; import without it, export, and import the export with it.'
    )


def _refuse_tokenizer(options) -> None:
  if options.tokenizer is not None:
    raise ConfigError(
      f'--tokenizer={options.tokenizer} is for checkpoints of T5X; weights of transformers have theirs in '
      f'{options.source}. Nothing was written; put the file there.'
    )


def export_flags(command: argparse.ArgumentParser) -> None:
  command.add_argument('--workdir', required=True, type=shared.workdir)
  command.add_argument('--step', type=int, help='without it, the newest')
  command.add_argument('--out', required=True, type=shared.path, metavar='DIR', help='a new folder')
  command.add_argument('--dtype', choices=['float32', 'bfloat16'], help='without it, the types of the import')
  command.add_argument('--max_shard_size', type=size, default='5GB', metavar='SIZE', help='of a file, e.g. 500MB')
  command.add_argument('--quantize', choices=['int8', 'int4'], help='the weights of products in blocks, for serving')
  command.add_argument(
    '--group_size', type=int, metavar='N', help='inputs that share a scale (default: 128 of int4, all of int8); 0: all'
  )
  command.add_argument('--adapter', action='store_true', help="the adapters of a run with lora alone, in peft's layout")


def export_command(options, overrides) -> None:
  """Write a step of a run as files that Hugging Face transformers loads."""
  import jax

  jax.config.update('jax_platforms', 'cpu')
  shared.check_writable(options.out, '--out')
  from pretrain.interchange.adapters import export_adapter
  from pretrain.interchange.exporting import export
  from pretrain.interchange.packed.writing import export_packed
  from pretrain.tools.weights import find, find_step

  if options.adapter and (options.dtype or options.quantize):
    flag = '--dtype' if options.dtype else '--quantize'
    raise ConfigError(f'--adapter writes float32 alone. Nothing was written; leave {flag} out.')
  if options.group_size is not None and options.quantize is None:
    raise ConfigError(
      f'--group_size={options.group_size} needs --quantize. Nothing was written; add --quantize=int4 or int8.'
    )
  number = options.step
  step = find(str(options.workdir)) if number is None else find_step(options.workdir, number)
  check_outside(options.out, step.workdir)
  if options.adapter:
    print(f'{options.out} ({export_adapter(step, options.out)} adapters)')
    return
  how = {'dtype': options.dtype, 'shard_bytes': options.max_shard_size}
  if options.quantize:
    family = export_packed(step, options.out, options.quantize, group=options.group_size, **how)
  else:
    family = export(step, options.out, **how)
  print(f'{options.out} ({family.architecture})')
