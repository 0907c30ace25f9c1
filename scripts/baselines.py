"""What n-grams reach on the held-out text of a run: python scripts/baselines.py WORKDIR.

Counts a unigram, a Kneser-Ney bigram and trigram on the run's training store, prints their losses beside the model's
`text_loss` (all in nats per text token) and leaves them in WORKDIR/baselines.json, for `pretrain report`.
"""

import dataclasses
import json
import pathlib
import sys

from data.builtin import builtin_store
from data.ngrams import ngram_loss
from data.source import Builtin, Data, StoreData
from data.store import open_store
from pretrain import config
from pretrain.errors import USER_ERRORS, CheckpointError, ConfigError
from pretrain.experiment import Experiment
from pretrain.metrics import read_metrics
from pretrain.runtime import cache_dir


def stores(data: Data, vocab_size: int) -> tuple[str, str]:
  """The paths of the training and of the held-out store; there must be one of each."""
  match data:
    case Builtin():
      train, heldout = builtin_store(cache_dir(), vocab_size, data.sentinels)
      return str(train), str(heldout)
    case StoreData(sources=(train,), heldout=(heldout,)):
      return train.path, heldout.path
  raise ConfigError(f'baselines need one training store and one held-out store; data.name={data.name!r} has others.')


def last_text_loss(workdir: pathlib.Path) -> float | None:
  """The model's newest held-out loss on text, if it was evaluated."""
  found = [row[key] for row in read_metrics(workdir) for key in row if key.endswith('/text_loss')]
  return found[-1] if found else None


def main(workdir: pathlib.Path) -> None:
  file = workdir / 'config.gin'
  if not file.exists():
    raise CheckpointError('CKPT-NONE', f'no run in {workdir}; nothing was written. Check the path.')
  cfg = config.load(Experiment, [str(file)])
  train, heldout = stores(cfg.data, cfg.model.vocab_size)
  losses = dataclasses.asdict(ngram_loss(open_store(train), open_store(heldout)))
  num_tokens = losses.pop('num_tokens')
  (workdir / 'baselines.json').write_text(json.dumps(losses, indent=2) + '\n')
  print(f'Held-out text, nats per token ({num_tokens:,} tokens):')
  for name, loss in losses.items():
    print(f'  {name:<18}{loss:.3f}')
  if (loss := last_text_loss(workdir)) is not None:
    print(f'  {"this run":<18}{loss:.3f}   {losses["unigram"] - loss:+.3f} below the unigram')


if __name__ == '__main__':
  if len(sys.argv) != 2:
    sys.exit('usage: python scripts/baselines.py WORKDIR')
  try:
    main(pathlib.Path(sys.argv[1]))
  except USER_ERRORS as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
