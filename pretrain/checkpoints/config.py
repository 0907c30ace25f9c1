"""The `checkpoint` section of a config."""

import dataclasses
from typing import Annotated


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """Save every `every` steps; keep the last `keep`, and for ever those at multiples of `keep_every`.

  Of the evaluated steps, the `keep_best` with the best `best_of` (`eval/<set>/loss`, …) are kept as well; a run still
  resumes from the newest step. A save that fails is retried at the next save, `retries` times in a row.

  `initial` = 'RUN/<step>': the run starts with the parameters of another run; step, optimizer and data start anew.
  """

  every: Annotated[int, '>= 1'] = 100
  keep: Annotated[int, '>= 1'] = 3
  keep_every: Annotated[int, '>= 1'] | None = None
  keep_best: Annotated[int, '>= 0'] = 0
  best_of: str | None = None
  retries: Annotated[int, '>= 0'] = 3
  initial: Annotated[str, 'path'] | None = None
