"""The losses of n-gram models on the held-out text of a run: python scripts/baselines.py WORKDIR.

Counts a unigram, a Kneser-Ney bigram and trigram on the run's training store, prints their losses beside the model's
`text_loss` (all in nats per text token) and writes them to WORKDIR/baselines.json, for `pretrain report`. N-grams
predict every text token of the held-out store; a run predicts the targets of its objective in the first
`evaluation.batches` batches. The output gives both numbers.
"""

import dataclasses
import json
import pathlib
import sys

from data.batches.source import Builtin, Data, StoreData
from data.prepare.builtin import builtin_store
from data.stores.ngrams import ngram_loss
from data.stores.paths import looked_in
from data.stores.store import open_store
from pretrain.config import bindings
from pretrain.devices.compilation_cache import cache_dir
from pretrain.errors import USER_ERRORS, CheckpointError, ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.records.metrics import read_metrics


def stores(data: Data, vocab_size: int) -> tuple[str, str]:
  """The paths of the training and of the held-out store; there must be one of each."""
  match data:
    case Builtin():
      train, heldout = builtin_store(cache_dir(), vocab_size, data.sentinels)
      return str(train), str(heldout)
    case StoreData(sources=(train,), heldout=(heldout,)):
      return train.path, heldout.path
  raise ConfigError(f'baselines need one training store and one held-out store; data.name={data.name!r} has others.')


def last_text_loss(workdir: pathlib.Path) -> tuple[float, int] | None:
  """(the model's newest held-out loss on text, targets it was evaluated on), if it was evaluated."""
  found = [(row, key) for row in read_metrics(workdir) for key in row if key.endswith('/text_loss')]
  if not found:
    return None
  row, key = found[-1]
  return row[key], int(row[key.removesuffix('text_loss') + 'targets'])


def main(workdir: pathlib.Path) -> None:
  file = workdir / 'config.gin'
  if not file.exists():
    raise CheckpointError('CKPT-NONE', f'no run in {workdir}{looked_in(workdir)}; nothing was written. Check the path.')
  cfg = bindings.load(Experiment, [str(file)])
  train, heldout = stores(cfg.data, cfg.model.vocab_size)
  losses = dataclasses.asdict(ngram_loss(open_store(train), open_store(heldout)))
  num_tokens = losses.pop('num_tokens')
  (workdir / 'baselines.json').write_text(json.dumps(losses, indent=2) + '\n')
  print(f'Held-out text, nats per text token. N-grams predict all {num_tokens:,} of the held-out store:')
  for name, loss in losses.items():
    print(f'  {name:<18}{loss:.3f}')
  if evaluated := last_text_loss(workdir):
    loss, targets = evaluated
    batches = f'evaluation.batches={cfg.evaluation.batches}'
    print(f'The run was asked for {targets:,} targets ({batches}); its loss is of those that are text:')
    print(f'  {"this run":<18}{loss:.3f}   {losses["unigram"] - loss:+.3f} below the unigram')


if __name__ == '__main__':
  if len(sys.argv) != 2:
    sys.exit('usage: python scripts/baselines.py WORKDIR')
  try:
    main(pathlib.Path(sys.argv[1]))
  except USER_ERRORS as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
