"""Small JSONL files of the built-in corpus for configs/decoder/tiny_chat.gin and tiny_tags.gin (see their headers).

`python scripts/tiny_jsonl.py FOLDER` writes chat.jsonl (conversations about each file of the corpus, whose first
sentences are the answers) and docs.jsonl (the text with the name of its package). A part of each is held out, in
*_heldout.jsonl.
"""

import json
import pathlib
import re
import sys
from typing import Any

from data.prepare.builtin import documents, is_heldout

ANSWERS, SENTENCES = 4, 2  # answers per conversation, sentences per answer


def chat(name: str, text: str) -> dict[str, Any]:
  """A conversation about a file.

  >>> [m['content'] for m in chat('json/tool.py', 'One. Two. Three!')['messages']][1:]
  ['What does json/tool.py do?', 'One. Two.', 'What else?', 'Three!']
  """
  parts = re.split(r'(?<=[.!?]) +', text)[: ANSWERS * SENTENCES]
  messages = [{'role': 'system', 'content': 'Answer in the words of the documentation.'}]
  for i in range(0, len(parts), SENTENCES):
    messages.append({'role': 'user', 'content': 'What else?' if i else f'What does {name} do?'})
    messages.append({'role': 'assistant', 'content': ' '.join(parts[i : i + SENTENCES])})
  return {'messages': messages}


def document(name: str, text: str) -> dict[str, Any]:
  """A text and its tag."""
  return {'text': text, 'package': name.split('/')[0]}


def main(folder: pathlib.Path) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  found = list(documents())
  for kind, make in (('chat', chat), ('docs', document)):
    for suffix, held in (('', False), ('_heldout', True)):
      lines = [json.dumps(make(name, text)) for name, text in found if is_heldout(name) is held]
      (folder / f'{kind}{suffix}.jsonl').write_text('\n'.join(lines) + '\n')
      print(f'{folder / kind}{suffix}.jsonl: {len(lines):,} lines')


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
