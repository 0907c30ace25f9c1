"""`pretrain eval`: what a step of a run, or published weights, score on texts and tasks of the user."""

import argparse
import dataclasses
import pathlib

from pretrain.cli import shared
from pretrain.errors import ConfigError


def eval_flags(command: argparse.ArgumentParser) -> None:
  command.add_argument('--workdir', type=shared.workdir, help='a run; results are written to eval.json there')
  command.add_argument('--step', type=int, help='of the run; without it, the newest')
  command.add_argument(
    '--from', type=shared.path, dest='source', metavar='DIR', help='published weights: config.json and *.safetensors'
  )
  command.add_argument('--out', type=shared.path, metavar='FILE.json', help='where the results are written')
  named = {'action': 'append', 'type': named_path, 'default': [], 'metavar': 'NAME=FILE'}
  command.add_argument('--text', **named, help='perplexity and bits per byte of text, JSONL (field text) or a store')
  command.add_argument('--rank', **named, help='choose the best of several answers: JSONL of context, choices, answer')
  command.add_argument('--exact', **named, help='outputs that equal their targets: JSONL of inputs, targets')
  command.add_argument('--infill', **named, help='hidden words of sentences of a text or store that are filled exactly')
  command.add_argument('--context', type=int, help='tokens of a window of --text (default: a training row)')
  command.add_argument('--stride', type=int, help='tokens that are scored in each window (default: half of it)')
  command.add_argument('--text_bytes', type=int, help='of each --text, the first (default: all; 16384 with an encoder)')
  command.add_argument('--sentences', type=int, default=200, help='of --infill, at most')
  command.add_argument('--needle_lengths', type=numbers(int), metavar='128,256', help='ask for a fact in a long text')
  command.add_argument('--needle_depths', type=numbers(float), metavar='0,0.5,1', help='where the fact stands')
  command.add_argument('--needle_trials', type=int, default=8, help='questions for each length and depth')
  command.add_argument(
    '--pathways', type=numbers(int), default=(), metavar='50,100',
    help='how far experts of held-out tokens are chosen as at these steps (of a run with experts)',
  )  # fmt: skip
  command.add_argument('--batch', type=int, default=8, help='rows at once')
  shared.model_flags(command)


def named_path(value: str) -> tuple[str, pathlib.Path]:
  """NAME=FILE, or a FILE that gives its name."""
  name, equals, path = value.partition('=')
  found = shared.path(path if equals else value)
  return (name if equals else found.stem), found


def numbers(kind: type):
  def parse(value: str) -> tuple:
    try:
      return tuple(kind(part) for part in value.split(','))
    except ValueError as error:
      raise argparse.ArgumentTypeError(f"'{value}' is no list of numbers; write e.g. 1,2") from error

  return parse


def eval_command(options, overrides) -> None:
  """Measure a step of a run, or published weights, on texts and tasks."""
  from pretrain.devices import mesh

  if (options.workdir is None) == (options.source is None):
    raise ConfigError('pretrain eval needs a model: --workdir=RUN, or --from=DIR; not both.')
  if options.source is not None and options.step is not None:
    raise ConfigError('--step is a step of a run; leave it out with --from.')
  if options.source is not None and options.pathways:
    raise ConfigError('--pathways are steps of a run; leave them out with --from.')
  (devices, precision), out = shared.model_overrides(overrides, 'eval'), out_of(options)
  mesh.prepare_platform(devices)
  from pretrain.benchmarks.evaluate import check_measurements, evaluate, lines_of, write_results

  wanted = measurements(options)
  check_measurements(wanted)
  writer, source = writer_of(options, devices, precision)
  compare = pathways_of(options, writer, devices)
  results = source | evaluate(writer, wanted) | compare()
  if out is not None:
    write_results(out, results)
  print('\n'.join(lines_of(results)))
  if out is not None:
    print(out)
  if options.workdir is not None and options.out is None:
    from pretrain.tools.report import write_report

    print(write_report(options.workdir))


def out_of(options):
  """Where the results go. Raises ConfigError where they cannot be written."""
  from pretrain.benchmarks.evaluate import FILE

  out = options.out or (options.workdir and options.workdir / FILE)
  if isinstance(out, pathlib.Path) and (options.out is not None or options.workdir.exists()):
    shared.check_file(out, '--out' if options.out else '--workdir')
  return out


def measurements(options):
  from pretrain.benchmarks.evaluate import Measurements
  from pretrain.benchmarks.needles import Haystacks

  needles = None
  if options.needle_lengths is not None:
    depths = {'depths': options.needle_depths} if options.needle_depths is not None else {}
    needles = Haystacks(lengths=options.needle_lengths, trials=options.needle_trials, **depths)
  return Measurements(
    text=tuple(options.text), rank=tuple(options.rank), exact=tuple(options.exact), infill=tuple(options.infill),
    needles=needles, context=options.context, stride=options.stride, sentences=options.sentences, batch=options.batch,
    text_bytes=options.text_bytes, pathways=options.pathways,
  )  # fmt: skip


def pathways_of(options, writer, devices):
  """A function that gives {'pathways': results}, or {} where no steps are given.

  Raises as `open_run` for a step that is not there, and as `check_pathways`, before anything is measured.
  """
  if not options.pathways:
    return dict
  from pretrain.benchmarks.pathways import check_pathways, compare_pathways
  from pretrain.evaluation.writer import open_run

  runs = {step: open_run(options.workdir, step, encoders=True) for step in options.pathways}
  check_pathways(writer)
  params_of = lambda step: runs[step].writer(devices).params
  return lambda: {'pathways': compare_pathways(writer, options.pathways, params_of)}


def writer_of(options, devices, precision):
  """(the model, what the results say about it)."""
  if options.source is not None:
    from pretrain.interchange.importing import open_weights

    opened, named = open_weights(options.source, precision, encoders=True), {'model': str(options.source)}
  else:
    from pretrain.evaluation.writer import open_run

    opened = open_run(options.workdir, options.step, encoders=True, precision=precision)
    named = {'model': str(options.workdir), 'step': opened.step}
  return opened.writer(devices), named | recipe_of(opened.cfg.precision, precision)


def recipe_of(used, given) -> dict:
  """How products were quantized; {} where none were, and nothing was asked for."""
  from models.precision import BF16

  return {} if given is None and used == BF16 else {'precision': dataclasses.asdict(used)}
