"""`pretrain generate`: text of a trained run."""

import argparse

from pretrain.cli import shared


def generate_flags(command: argparse.ArgumentParser) -> None:
  command.add_argument('--workdir', required=True, type=shared.path)
  command.add_argument(
    '--text',
    action='append',
    type=str,  # `evaluation.generate.answers` refuses bytes that are not UTF-8: they must not cost the other prompts
    required=True,
    help='a prompt: <extra_id_0>, <extra_id_1>, … mark blanks; without them it is continued',
  )
  command.add_argument(
    '--max_tokens', type=int, default=64, help='at most; an output also ends where a training row did'
  )
  command.add_argument('--top', type=int, help='list the best N fillings of each blank, or outputs, with probabilities')


def generate_command(options, overrides) -> int:
  """Fill blanks, or continue text, with a trained run."""
  from pretrain.devices import mesh

  mesh.prepare_platform(mesh.MeshConfig())
  from pretrain.evaluation.generate import show_generated

  return show_generated(options.workdir, options.text, options.max_tokens, options.top)
