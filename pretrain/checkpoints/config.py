"""The `checkpoint` section of a config."""

import dataclasses
from typing import Annotated


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """Save every `every` steps; keep the last `keep`, and for ever those at multiples of `keep_every`.

  Of those that were evaluated, the `keep_best` with the best `best_of` (`eval/<set>/loss`, …) stay as well; a run goes
  on from the newest all the same. A save that fails is tried again at the next one, `retries` times in a row.

  `initial` = 'RUN/<step>': the run begins with the parameters of another one; step, optimizer and data begin anew.
  """

  every: Annotated[int, '>= 1'] = 100
  keep: Annotated[int, '>= 1'] = 3
  keep_every: Annotated[int, '>= 1'] | None = None
  keep_best: Annotated[int, '>= 0'] = 0
  best_of: str | None = None
  retries: Annotated[int, '>= 0'] = 3
  initial: Annotated[str, 'path'] | None = None
