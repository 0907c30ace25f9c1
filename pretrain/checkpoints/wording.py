"""Parts of messages about a checkpoint."""

from collections.abc import Sequence


def first_of(sentences: Sequence[str]) -> str:
  """The first sentence, and how many there are; '' if there are none."""
  more = f' (first of {len(sentences)})' if len(sentences) > 1 else ''
  return sentences[0] + more if sentences else ''


def among(paths: Sequence[str]) -> str:
  """
  >>> among(['a']), among(list('abcdef'))
  ('first of 1', 'first of 6: a, b, c, d, e, ..')
  """
  listed = [*paths[:5], *['..'] * (len(paths) > 5)]
  return f'first of {len(paths)}' + (f': {", ".join(listed)}' if len(paths) > 1 else '')


def shown(leaf) -> str:
  return 'absent' if leaf is None else f'{leaf[1]}{list(leaf[0])}'
