import gc
import sys

import pytest
from orbax.checkpoint._src import asyncio_utils

from pretrain.checkpoints import orbax_files


class Forever:
  def __await__(self):
    while True:
      try:
        yield
      except GeneratorExit:
        raise KeyError('what ended with the work') from None


async def own():
  await Forever()


@pytest.mark.parametrize(('begin', 'shown'), [(lambda: asyncio_utils.cancellable(Forever()), False), (own, True)])
def test_only_what_orbax_leaves_behind_is_not_shown(begin, shown, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'unraisablehook', sys.__unraisablehook__)
  orbax_files.be_quiet()
  assert sys.unraisablehook is orbax_files.without_what_is_left_behind
  work = begin()
  work.send(None)
  del work
  gc.collect()
  assert ('what ended with the work' in capsys.readouterr().err) == shown
