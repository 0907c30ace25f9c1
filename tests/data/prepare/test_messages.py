"""Conversations in files: what is read from them, and a one-line error for an invalid one."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data.errors import DataError
from data.prepare.inspect import inspect
from data.prepare.prepare import prepare
from data.prepare.text import Reading
from data.stores.store import open_store
from data.stores.vocabulary import EOS
from tests.data.prepare.test_prepare import LICENSE, command_line

CHAT = [
  {'role': 'system', 'content': 'the terms'},
  {'role': 'user', 'content': 'of the work'},
  {'role': 'assistant', 'content': 'or any'},
  {'role': 'user', 'content': ''},
  {'role': 'assistant', 'content': 'assistant: you', 'weight': 1},
]
OTHER = [{'role': 'user', 'content': 'and'}, {'role': 'assistant', 'content': 'license'}]
SHAREGPT = {'system': 'system', 'user': 'human', 'assistant': 'gpt'}
READING = Reading(messages='messages')


def jsonl(path, chats, field='messages'):
  path.write_text('\n'.join(json.dumps({field: chat, 'id': 3}) for chat in chats))
  return path


def sharegpt(chat):
  return [{'from': SHAREGPT[m['role']], 'value': m['content']} for m in chat]


def test_each_turn_becomes_a_document_after_its_role_in_either_spelling(tmp_path, tokenizer_model, capsys):
  (tmp_path / 'm').write_bytes(tokenizer_model)
  jsonl(tmp_path / 'a.jsonl', [CHAT, OTHER])
  jsonl(tmp_path / 'b.jsonl', [sharegpt(CHAT), sharegpt(OTHER)], 'conversations')
  plain = [[{'role': m['role'], 'content': m['content']} for m in chat] for chat in (CHAT, OTHER)]
  table = pyarrow.Table.from_pylist([{'messages': chat} for chat in plain])
  pyarrow.parquet.write_table(table, tmp_path / 'c.parquet')
  for name, field in (('a.jsonl', 'messages'), ('b.jsonl', 'conversations'), ('c.parquet', 'messages')):
    out = f'--out={tmp_path}/{name[0]}'
    command_line(tmp_path / name, out, f'--tokenizer={tmp_path}/m', f'--messages_field={field}')
  stores = [open_store(tmp_path / name) for name in 'abc']
  assert stores[0].fingerprint == stores[1].fingerprint == stores[2].fingerprint
  store, tokenizer = stores[0], stores[0].tokenizer(0)
  texts = [ids.tolist() for ids in store.read(list(zip(store.offsets[:-1], np.diff(store.offsets), strict=True)))]
  turns = [m for chat in (CHAT, OTHER) for m in chat]
  encode = tokenizer.encode
  assert texts == [[*encode(f'{m["role"]}:'), *encode(m['content']), EOS] for m in turns]
  assert store.column('tag_lengths', 0).tolist() == [len(encode(f'{m["role"]}:')) for m in turns]
  assert store.column('roles', 0).tolist() == [0, 1, 2, 1, 2, 1, 2]
  assert store.column('turns_left', 0).tolist() == [4, 3, 2, 1, 0, 1, 0]
  assert (store.kind, store.manifest['fields']) == ('conversations', ['messages'])
  said = capsys.readouterr().out
  assert f'{store.num_tokens} tokens in 2 conversations of 7 turns\n  conversations: half have up to' in said
  assert f'the longest {store.offsets[5]} (with EOS)' in said
  shown = inspect(str(tmp_path / 'a'), 7)
  assert f'document 1 (user, 3 turns follow): tokens {store.offsets[1]} to' in shown
  assert 'document 4 (assistant, the last turn)' in shown


def test_a_trained_vocabulary_contains_the_roles(tmp_path):
  chats = [
    [{'role': 'user', 'content': text}, {'role': 'assistant', 'content': text[::-1]}]
    for text in ('the sum of 33 and 9', *LICENSE.read_text().split('\n'))
    if text
  ]
  prepare([jsonl(tmp_path / 'a.jsonl', chats)], tmp_path / 's', vocab_size=500, sentinels=8, reading=READING)
  assert max(open_store(tmp_path / 's').column('tag_lengths', 0)) <= 4, 'not ten letters'


def without(role):
  return [m for m in CHAT if m['role'] != role]


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    ({'text': 'a'}, r"no list of messages in field 'messages' \(found: text\); name it with --messages_field=."),
    ({'messages': 'a'}, r"no list of messages in field 'messages' \(found: messages\)"),
    ([1], r"no list of messages in field 'messages' \(found: list\)"),
    ({'messages': []}, r"field 'messages' is empty, so nothing would be learnt from it; leave out the record"),
    ({'messages': without('assistant')}, r"field 'messages' has no turn of the assistant, so nothing would be"),
    ({'messages': [*CHAT, 'hi']}, r"messages\[5\] has no 'role' and 'content', nor .* \(found: str\)"),
    ({'messages': [*CHAT, {'text': 'a'}]}, r"messages\[5\] has no 'role' and 'content', nor .* \(found: text\)"),
    (
      {'messages': [{'role': 'bot', 'content': 'a'}]},
      r"messages\[0\].role is 'bot'; rename it: roles are system, user",
    ),
    ({'messages': [{'from': 'bing', 'value': 'a'}]}, r"messages\[0\].from is 'bing'; rename it: .* \(or human, gpt\)"),
    ({'messages': [{'role': ['a'], 'content': 'a'}]}, r"messages\[0\].role is \['a'\]; rename it"),
    ({'messages': [{'role': 'user', 'content': ['a']}]}, r'messages\[0\].content is not text \(list\); make it a'),
    ({'messages': [{'role': 'assistant'}]}, r'messages\[0\].content is not text \(NoneType\)'),
    ({'messages': [*CHAT, {'role': 'assistant', 'content': ' '}]}, r'messages\[5\].content is empty; write the text'),
    ({'messages': [{'role': 'user', 'content': 'a\0'}]}, r'messages\[0\].content has a NUL \(character 1\)'),
    ({'messages': [{'role': 'user', 'content': 'a\ud800'}]}, r'messages\[0\].content has half of a surrogate pair'),
  ],
)
def test_the_error_names_an_invalid_conversation_and_nothing_is_left_behind(tmp_path, tokenizer_model, record, message):
  (tmp_path / 'm').write_bytes(tokenizer_model)
  (tmp_path / 't.jsonl').write_text(f'{json.dumps({"messages": OTHER})}\n{json.dumps(record)}\n')
  with pytest.raises(DataError, match=r'^DATA: .*t.jsonl:2: ' + message):
    prepare([tmp_path / 't.jsonl'], tmp_path / 'out', tokenizer=tmp_path / 'm', reading=READING)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['m', 't.jsonl']


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--inputs_field=q', '--targets_field=a'], '--inputs_field and --targets_field make pairs, --messages_field make'),
    (['--field=body'], '--field=body is for text, --messages_field is for conversations; give one kind'),
    (['--no_eos'], '--no_eos cannot be used with conversations, in which EOS marks the end'),
    (['--tag_fields=url'], '--tag_fields, --scores and --score_field are for text, not for conversations'),
  ],
)
def test_flags_that_cannot_be_used_with_conversations_are_refused(tmp_path, flags, message):
  with pytest.raises(DataError, match='^DATA: ' + message):
    command_line(jsonl(tmp_path / 'a.jsonl', [CHAT]), f'--out={tmp_path}/out', '--messages_field=messages', *flags)


def test_a_text_file_has_no_field_of_messages(tmp_path):
  (tmp_path / 't.txt').write_text('a')
  with pytest.raises(DataError, match=r"t.txt has no field 'messages': it is text"):
    prepare([tmp_path / 't.txt'], tmp_path / 'out', vocab_size=500, sentinels=20, reading=READING)
