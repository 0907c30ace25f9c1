"""`pretrain import` and `pretrain export`: weights in the layout of Hugging Face `transformers`, in and out; T5X in."""

import argparse

from pretrain.cli import shared
from pretrain.errors import ConfigError


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
  command.add_argument('--adapter', action='store_true', help="the adapters of a run with lora alone, in peft's layout")


def export_command(options, overrides) -> None:
  """Write a step of a run as files that Hugging Face transformers loads."""
  import jax

  jax.config.update('jax_platforms', 'cpu')
  shared.check_writable(options.out, '--out')
  from pretrain.interchange.adapters import export_adapter
  from pretrain.interchange.exporting import export
  from pretrain.tools.weights import find, find_step

  number = options.step
  step = find(str(options.workdir)) if number is None else find_step(options.workdir, number)
  if options.adapter:
    print(f'{options.out} ({export_adapter(step, options.out)} adapters)')
    return
  family = export(step, options.out)
  print(f'{options.out} ({family.architecture})')
