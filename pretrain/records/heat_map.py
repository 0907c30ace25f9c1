"""The share of right answers by the length of a text and the depth of a fact in it, as a picture."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pretrain.records.plots import LOOK, figure, pyplot


def draw_needles(found: Mapping[str, Any], path: pathlib.Path) -> None:
  """Writes `path`: a cell for each depth (down) and length (across), red at 0% and green at 100%."""
  plt, shares = pyplot(), np.array(found['accuracy'], np.float64).T * 100
  look = LOOK | {'axes.grid': False, 'axes.spines.left': False, 'axes.spines.bottom': False}
  size = 2.4 + 0.75 * shares.shape[1], 1.4 + 0.42 * shares.shape[0]
  path.parent.mkdir(parents=True, exist_ok=True)
  with plt.rc_context(look), figure(plt, path, (max(size[0], 4.8), max(size[1], 2.4))) as axes:
    image = axes.imshow(shares, cmap='RdYlGn', vmin=0, vmax=100, aspect='auto')
    axes.set(title='Needles found', xlabel='tokens', ylabel='depth of the needle, %')
    axes.set_xticks(range(shares.shape[1]), [f'{length:,}' for length in found['lengths']])
    axes.set_yticks(range(shares.shape[0]), [f'{100 * depth:g}' for depth in found['depths']])
    for (row, column), share in np.ndenumerate(shares):
      axes.text(column, row, f'{share:.0f}', ha='center', va='center', fontsize=9, color='#222')
    axes.figure.colorbar(image, label='% of answers')
