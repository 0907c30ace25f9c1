"""`pretrain generate`: text of a trained run, or of published weights."""

import argparse

from pretrain.cli import shared
from pretrain.errors import ConfigError


def generate_flags(command: argparse.ArgumentParser) -> None:
  command.add_argument('--workdir', type=shared.workdir, help='a run')
  command.add_argument(
    '--from', type=shared.path, dest='source', metavar='DIR', help='published weights: config.json and *.safetensors'
  )
  command.add_argument(
    '--text',
    action='append',
    type=str,  # `evaluation.generate.answers` refuses bytes that are not UTF-8: they must not cost the other prompts
    help='a prompt: <extra_id_0>, <extra_id_1>, … mark blanks; without them it is continued',
  )
  command.add_argument(
    '--prompts', type=shared.path, metavar='FILE', help='prompts: JSONL with a field "text", or one prompt a line'
  )
  command.add_argument(
    '--special', action='append', default=[], metavar='NAME',
    help="read this special token in prompts, e.g. '<|im_start|>' (repeatable; 'all' for each of the tokenizer's); "
    'without it such text is text',
  )  # fmt: skip
  command.add_argument('--out', type=shared.path, metavar='FILE.jsonl', help='write the answers here, not to stdout')
  command.add_argument(
    '--max_tokens', type=int, default=64, help='at most; an output also ends where a training row did'
  )
  command.add_argument('--top', type=int, help='list the best N fillings of each blank, or outputs, with probabilities')
  command.add_argument('--temperature', type=float, help='draw tokens at random; without it, take the most likely')
  command.add_argument('--top_k', type=int, help='draw from the K most likely tokens')
  command.add_argument('--top_p', type=float, help='draw from the fewest tokens whose probabilities sum to P')
  command.add_argument('--repetition_penalty', type=float, default=1.0, help='more than 1 makes repetition less likely')
  command.add_argument('--seed', type=int, default=0, help='of what is drawn; the same seed gives the same text')
  command.add_argument('--beams', type=int, help='beam search of this width, scores divided by length')
  command.add_argument('--batch', type=int, help='prompts at once (default: 1; with --prompts, 16)')
  shared.model_flags(command)


def generate_command(options, overrides) -> int:
  """Fill blanks, or continue text, with a trained run or published weights."""
  from pretrain.devices import mesh

  if (options.workdir is None) == (options.source is None):
    raise ConfigError('pretrain generate needs a model: --workdir=RUN, or --from=DIR; not both.')
  if (options.text is None) == (options.prompts is None):
    raise ConfigError('pretrain generate needs prompts: --text=… (repeatable), or --prompts=FILE; not both.')
  devices, precision = shared.model_overrides(overrides, 'generate')
  if options.out is not None:
    shared.check_file(options.out, '--out')
  mesh.prepare_platform(devices)
  from models.decode.sampling import Sampling
  from pretrain.evaluation.generate import show_generated
  from pretrain.evaluation.outputs import Decoding
  from pretrain.evaluation.prompt_files import read_prompts

  given = read_prompts(options.prompts) if options.prompts else [('--text=', text) for text in options.text]
  places = [f'{place}: ' for place, _ in given] if options.prompts else []
  sampling = Sampling(
    temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
    repetition_penalty=options.repetition_penalty,
  )  # fmt: skip
  batch = options.batch if options.batch is not None else 16 if options.prompts and options.top is None else 1
  how = Decoding(sampling=sampling, beams=options.beams, seed=options.seed, batch=batch)
  return show_generated(
    model_of(options, precision), [text for _, text in given], options.max_tokens, options.top, how,
    mesh=devices, places=places, out=options.out, special=options.special,
  )  # fmt: skip


def model_of(options, precision):
  """What opens the model, after the prompts have been read."""
  if options.source is not None:
    from pretrain.interchange.importing import open_weights

    return lambda: open_weights(options.source, precision)
  from pretrain.evaluation.writer import open_run

  return lambda: open_run(options.workdir, precision=precision)
