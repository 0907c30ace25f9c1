"""Secrets: none is saved, shown or compared. A config with one is refused; what is printed has *** in its place."""

import re

NAMES = r'token|secret|passw(?:or)?d|passphrase|(?:api|access|secret)[_-]?key(?:[_-]?id)?|signature|credentials?'
IN_URL = re.compile(r'(\b[A-Za-z][\w+.-]*:/{1,2})[^/\s@\'"?#]+@')
NAMED = re.compile(rf'(?i)(\b(?:[\w-]*[_-])?(?:{NAMES})["\']?\s*[=:]\s*["\']?)(?!\*\*\*)[^\s&"\',;]+')
HIDDEN = '***'


def redact(text: str) -> str:
  """`text` without the user and password of URLs, and without what a name such as token=, password= introduces.

  >>> redact('s3://KEY:SECRET@bucket/a?X-Amz-Signature=3fa1&part=2 tokens=7')
  's3://***@bucket/a?X-Amz-Signature=***&part=2 tokens=7'
  """
  return NAMED.sub(rf'\1{HIDDEN}', IN_URL.sub(rf'\1{HIDDEN}@', text))
