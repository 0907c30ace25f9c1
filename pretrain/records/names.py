"""Names of sources and files as text for people: one line of printable characters, never markup."""

import unicodedata

# Control and format characters (they move the cursor, reverse the direction of writing or cannot be seen), halves of
# surrogate pairs, which no encoding can write, and separators of lines.
HIDDEN = ('Cc', 'Cf', 'Cs', 'Zl', 'Zp')


def one_line(text: str) -> str:
  r"""`text` with every character that is no printable one as its escape.

  >>> one_line('a\nb\x1b[31m é \ud83d')
  'a\\nb\\x1b[31m é \\ud83d'
  """
  return ''.join(_escaped(c) if unicodedata.category(c) in HIDDEN else c for c in text)


def shortened(text: str, most: int) -> str:
  """`text`, or its beginning and end where it is longer than `most` characters.

  >>> shortened('a' * 20 + 'b' * 20, 9)
  'aaaa…bbbb'
  """
  head = most // 2
  return text if len(text) <= most else f'{text[:head]}…{text[len(text) - (most - head - 1) :]}'


def _escaped(character: str) -> str:
  return ascii(character)[1:-1]
