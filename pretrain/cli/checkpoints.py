"""`pretrain checkpoints`: its flags, and each action as one call of `pretrain.tools` or `pretrain.growth`."""

import argparse

from pretrain.cli import shared
from pretrain.errors import ConfigError

# The flags that identify the weights which an average was made of.
SOURCE_FLAGS = (
  'workdir',
  'steps',
  'weights',
  'base',
  'input',
  'inputs',
  'coefficients',
  'gin_file',
  'metric',
  'ema',
  'tokenizer',
  'method',
  'seed',
  'first',
  'noise',
)


def checkpoints_flags(command: argparse.ArgumentParser) -> None:
  actions = command.add_subparsers(required=True, metavar='ACTION')
  added = {name: actions.add_parser(name, help=f.__doc__) for name, f in WAYS.items()}
  for name, action in added.items():
    action.set_defaults(command=WAYS[name])
  average, soup, merge, restore = (added[name] for name in ('average', 'soup', 'merge', 'restore-as'))
  shared.config_flags(soup)
  for action in (added['list'], added['verify'], average):
    action.add_argument('--workdir', required=True, type=shared.workdir)
  average.add_argument('--steps', required=True, type=int_list, metavar='100,200')
  average.add_argument('--weights', type=float_list, metavar='1,2', help='one for each step; without them, equal')
  merge.add_argument(
    '--base', required=True, type=shared.location, metavar='RUN[/STEP]', help='what the inputs started from'
  )
  added['verify'].add_argument('--steps', type=int_list, default=[], metavar='100,200', help='without them, all')
  restore.add_argument(
    '--input', required=True, type=shared.location, metavar='RUN[/STEP]', help='RUN: its newest step'
  )
  restore.add_argument('--gin.KEY', metavar='VALUE', dest='_shown_in_help_only', help='a key to change')
  for action in (soup, merge, added['diff']):
    action.add_argument('--inputs', required=True, type=path_list, metavar='RUN[/STEP],…', help='RUN: its newest step')
  merge.add_argument('--coefficients', required=True, type=float_list, metavar='0.5,0.5', help='one for each input')
  soup.add_argument('--metric', required=True, type=shared.text, help='eval/<set>/loss, text_loss or accuracy')
  for action in (average, soup, merge):
    action.add_argument('--ema', action='store_true', help='use the moving averages (averaging.name) of the steps')
  extend_flags(added['extend-vocabulary'])
  warm_start_flags(added['warm-start'])
  grow_flags(added['grow'])
  for action in (average, soup, merge, restore):
    action.add_argument('--output', required=True, type=shared.workdir, help='a new workdir, to generate or start from')


def positive(value: str) -> int:
  """An integer >= 1."""
  return count(value, 1)


def extend_flags(action: argparse.ArgumentParser) -> None:
  action.add_argument('--workdir', required=True, type=shared.location, metavar='RUN[/STEP]', help='RUN: its newest')
  action.add_argument(
    '--tokenizer',
    required=True,
    type=shared.path,
    metavar='F',
    help='a SentencePiece model or tokenizer.json, or the folder of one',
  )
  action.add_argument(
    '--method', choices=('mean', 'multivariate', 'subword', 'ofa'), default='subword', help='how new tokens get a row'
  )
  action.add_argument('--vectors', type=shared.path, metavar='F.vec', help='of ofa: multilingual word vectors as text')
  action.add_argument('--max_words', type=positive, metavar='N', help='of ofa: read the first N vectors')
  action.add_argument('--rank', type=positive, metavar='R', help='of ofa: the rank of the new tables')
  action.add_argument('--seed', type=int, default=0, help='of the draws of multivariate and ofa')
  action.add_argument('--to', required=True, type=shared.workdir, metavar='NEW', help='a new workdir')


def warm_start_flags(action: argparse.ArgumentParser) -> None:
  shared.config_flags(action)
  for part in ('encoder', 'decoder'):
    action.add_argument(f'--{part}', type=shared.location, metavar='RUN[/STEP]', help=f'whose stack is the {part}')
  action.add_argument(
    '--cross', choices=('random', 'self'), default='random', help='cross-attention: drawn, or a copy of self-attention'
  )
  action.add_argument('--to', required=True, type=shared.workdir, metavar='NEW', help='a new workdir')


def grow_flags(action: argparse.ArgumentParser) -> None:
  shared.config_flags(action)
  action.add_argument(
    '--input', required=True, type=shared.location, metavar='RUN[/STEP]', help='the small model; RUN: its newest step'
  )
  action.add_argument(
    '--method',
    required=True,
    choices=('stack', 'interleave', 'upscale', 'upcycle'),
    help='more layers: all again (G_stack), each in its place, or those in the middle (SOLAR, Yi); or experts of MLPs',
  )
  action.add_argument(
    '--first', type=count, metavar='N', help='of upscale: the first layer that comes twice, counted from 0'
  )
  action.add_argument('--noise', type=float, metavar='S', help='of upcycle: added to experts, in std of their matrix')
  action.add_argument('--to', required=True, type=shared.workdir, metavar='NEW', help='a new workdir')


def count(value: str, least: int = 0) -> int:
  """An integer >= `least`."""
  if not value.isdecimal() or int(value) < least:
    raise argparse.ArgumentTypeError(f"'{value}' is not an integer >= {least}")
  return int(value)


def path_list(value: str) -> list[str]:
  return [shared.location(part) for part in value.split(',')]


def int_list(value: str) -> list[int]:
  return number_list(value, int)


def float_list(value: str) -> list[float]:
  return number_list(value, float)


def number_list(value: str, kind: type) -> list:
  try:
    return [kind(part) for part in value.split(',')]
  except ValueError as error:
    numbers = 'whole numbers' if kind is int else 'numbers'
    raise argparse.ArgumentTypeError(f"'{value}' is no list of {numbers}; write e.g. 1,2") from error


def checkpoints_command(options, overrides) -> None:
  """List, verify and compare the checkpoints of runs; average, soup, merge and rewrite them."""
  raise ConfigError(f'pretrain checkpoints needs an action: {", ".join(WAYS)}.')


def list_command(options, overrides) -> None:
  """Print the checkpoints of a run, with size and losses, and its snapshots in the RAM of this host."""
  weights = on_the_host()
  try:
    print(weights.list_steps(options.workdir))
  finally:
    if line := weights.in_memory(options.workdir):
      print(line)


def average_command(options, overrides) -> None:
  """Write the mean of several steps of a run."""
  weights = on_the_host()
  shared.check_workdir(options.output, '--output')
  steps = [weights.find_step(options.workdir, step, ema=options.ema) for step in options.steps]
  weights.average(steps, options.weights, options.output, source_of(options))
  print(options.output)


def soup_command(options, overrides) -> None:
  """Write the mean of the runs that improve it on held-out text (greedy soup)."""
  from pretrain.devices import mesh

  cfg = shared.load(options, overrides)
  shared.check_workdir(options.output, '--output')
  mesh.prepare_platform(cfg.mesh)
  from pretrain.tools import weights

  steps = [weights.find(text, ema=options.ema) for text in options.inputs]
  weights.soup(cfg, steps, options.metric, options.output, source_of(options), print)
  print(options.output)


def merge_command(options, overrides) -> None:
  """Write base + sum of coefficient * (input - base)."""
  weights = on_the_host()
  shared.check_workdir(options.output, '--output')
  base, *inputs = (weights.find(text, ema=options.ema) for text in (options.base, *options.inputs))
  weights.merge(base, inputs, options.coefficients, options.output, source_of(options))
  print(options.output)


def verify_command(options, overrides) -> int:
  """Compare files and arrays with the hashes from when they were saved; exit code 66 if a step is damaged."""
  on_the_host()
  from pretrain.errors import CheckpointError
  from pretrain.tools.verify import verify

  return CheckpointError.exit_code if verify(options.workdir, options.steps, print) else 0


def diff_command(options, overrides) -> None:
  """Print the arrays in which two steps differ, and by how much."""
  weights = on_the_host()
  from pretrain.tools.verify import diff

  if len(options.inputs) != 2:
    raise ConfigError(f'--inputs has {len(options.inputs)} steps; diff compares two, e.g. RUN/100,RUN/200.')
  print(diff(*map(weights.find, options.inputs)))


def restore_as_command(options, overrides) -> None:
  """Write a step from which a run with another optimizer, moving average or mesh can resume."""
  weights = on_the_host()
  shared.check_workdir(options.output, '--output')
  from pretrain.tools.rewrite import restore_as

  flags = ' '.join(f'--gin.{override}' for override in overrides)
  anew = restore_as(weights.find(options.input), overrides, options.output, f'{source_of(options)} {flags}')
  print(options.output, *(f'({part} starts from its initial state)' for part in anew))


def extend_vocabulary_command(options, overrides) -> None:
  """Write the weights of a run for another tokenizer; tokens that both have keep their embeddings."""
  weights = on_the_host()
  shared.check_workdir(options.to, '--to')
  from data.prepare.published import published
  from pretrain.tools.vocabulary import WordVectors, extend_vocabulary

  if options.vectors is None and (options.rank or options.max_words):
    raise ConfigError('--rank and --max_words belong to --method=ofa --vectors=FILE. Nothing was written; add them.')
  vectors = None if options.vectors is None else WordVectors(options.vectors, options.max_words, options.rank)
  step, tokenizer = weights.find(options.workdir), published(options.tokenizer)
  given = step, tokenizer, options.method, options.to, source_of(options)
  done = extend_vocabulary(*given, seed=options.seed, vectors=vectors)
  print(f'{options.to} ({done.kept} tokens kept their rows, {done.new} are new, model.vocab_size={done.rows})')


def warm_start_command(options, overrides) -> None:
  """Write the weights of an encoder-decoder from those of an encoder and of a decoder."""
  weights = on_the_host()
  cfg = shared.load(options, overrides)
  shared.check_workdir(options.to, '--to')
  from pretrain.tools.warm_start import warm_start

  encoder, decoder = (text and weights.find(text) for text in (options.encoder, options.decoder))
  lines = warm_start(cfg, encoder, decoder, options.cross, options.to, source_of(options))
  print(options.to, *(['drawn as in a new model:', *lines] if lines else []), sep='\n  ')


def grow_command(options, overrides) -> None:
  """Write the weights of a larger model, that of --gin_file, from those of a smaller one."""
  weights = on_the_host()
  cfg = shared.load(options, overrides)
  shared.check_workdir(options.to, '--to')
  from pretrain.growth.grow import Growth, grow

  how = Growth(options.method, options.first, options.noise or 0.0)
  print(options.to, *grow(cfg, weights.find(options.input), how, options.to, source_of(options)), sep='\n  ')


WAYS = {
  'list': list_command, 'verify': verify_command, 'diff': diff_command, 'average': average_command,
  'soup': soup_command, 'merge': merge_command, 'restore-as': restore_as_command,
  'extend-vocabulary': extend_vocabulary_command, 'warm-start': warm_start_command, 'grow': grow_command,
}  # fmt: skip


def on_the_host():
  """`pretrain.tools.weights`, with JAX on the CPU: parameters are summed in host RAM, the larger memory."""
  import jax

  jax.config.update('jax_platforms', 'cpu')
  from pretrain.tools import weights

  return weights


def source_of(options) -> str:
  """The command that made a workdir, in one line."""
  name = next(name for name, function in WAYS.items() if function is options.command)
  return f'pretrain checkpoints {name} ' + ' '.join(
    f'--{key}={",".join(map(str, value)) if isinstance(value, list) else value}'
    for key, value in vars(options).items()
    if key in SOURCE_FLAGS and value is not None and value is not False
  )
