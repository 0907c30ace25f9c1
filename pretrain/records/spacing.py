"""Places of labels that would otherwise lie on each other."""

from collections.abc import Sequence


def apart(places: Sequence[float], least: float) -> list[float]:
  """Ascending places, moved up or down together until neighbours are at least `least` apart.

  >>> [round(x, 2) for x in apart([0.1, 0.5, 0.5, 0.52], 0.1)]
  [0.1, 0.41, 0.51, 0.61]
  """
  groups: list[list[float]] = []
  for place in places:
    groups.append([place])
    while len(groups) > 1 and bottom(groups[-1], least) - top(groups[-2], least) < least:
      groups[-2:] = [groups[-2] + groups[-1]]
  return [bottom(group, least) + k * least for group in groups for k in range(len(group))]


def bottom(group: Sequence[float], least: float) -> float:
  """The lowest place of a group whose places stand `least` apart around their mean."""
  return sum(group) / len(group) - (len(group) - 1) / 2 * least


def top(group: Sequence[float], least: float) -> float:
  return bottom(group, least) + (len(group) - 1) * least
