"""What a run has learned: python scripts/blanks.py WORKDIR.

Hides words in five held-out sentences and prints the run's three best fillings with their probabilities, beside the
most frequent words of the training text; then compares the run with token counts over 64 sentences. Needs a run on text
that fills blanks (span_corruption, ul2, ul2r, fim).
"""

import pathlib
import sys

from pretrain.devices import mesh


def main(workdir: pathlib.Path) -> None:
  mesh.prepare_platform(mesh.MeshConfig())
  from pretrain.evaluation.blanks import show_blanks

  for line in show_blanks(workdir):
    print(line, flush=True)


if __name__ == '__main__':
  if len(sys.argv) != 2:
    sys.exit('usage: python scripts/blanks.py WORKDIR')
  from pretrain.errors import USER_ERRORS

  try:
    main(pathlib.Path(sys.argv[1]))
  except USER_ERRORS as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
