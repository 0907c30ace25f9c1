"""Text without tokens, such as zero-width spaces, counts as empty: it is refused or left out wherever '' is."""

import json
import shutil

import pytest

from data.errors import DataError
from data.prepare.prepare import prepare, train_sentencepiece
from data.prepare.text import Reading
from data.stores.store import open_store
from data.stores.vocabulary import Tokenizer
from tests.conftest import paragraphs

PAIR, CHAT = Reading(pair=('inputs', 'targets')), Reading(messages='messages')
# T5's NFKC normalisation removes these characters or makes them spaces, so nothing is left.
NOTHING = ['', ' ', '\n', '\u200b', '\ufeff', '\u200b \u200b\n', '\x01', '\u3000', '\xa0', '\u200e\u200f']


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp('model') / 'm'
  path.write_bytes(train_sentencepiece(paragraphs(), 400))
  return path


def made(tmp_path, model, lines, reading, **options):
  (tmp_path / 't.jsonl').write_text('\n'.join(json.dumps(line) for line in lines))
  prepare([tmp_path / 't.jsonl'], tmp_path / 'out', tokenizer=model, reading=reading, **options)
  return open_store(tmp_path / 'out')


def chat(answer: str) -> dict:
  return {'messages': [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': answer}]}


@pytest.mark.parametrize('text', NOTHING)
def test_sentencepiece_gives_no_tokens_for_these(model, text):
  assert Tokenizer(model.read_bytes(), 0).encode(text) == []


@pytest.mark.parametrize('workers', [1, 2])
@pytest.mark.parametrize('text', NOTHING[:4])
def test_targets_without_tokens_are_refused(tmp_path, model, text, workers):
  lines = [{'inputs': 'a', 'targets': 'b'}, {'inputs': 'a', 'targets': text}]
  with pytest.raises(DataError, match=r"t.jsonl:2: field 'targets'.* is empty; write the text to be learnt, or"):
    made(tmp_path, model, lines, PAIR, workers=workers)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['t.jsonl']


@pytest.mark.parametrize('text', NOTHING)
def test_an_answer_without_tokens_is_refused(tmp_path, model, text):
  with pytest.raises(DataError, match=r't.jsonl:2: messages\[1\].* is empty; write the text to be learnt, or'):
    made(tmp_path, model, [chat('yes'), chat(text)], CHAT)


@pytest.mark.parametrize('text', NOTHING)
def test_inputs_and_questions_without_tokens_equal_those_of_an_empty_string(tmp_path, model, text):
  for reading, lines in (
    (PAIR, [{'inputs': text, 'targets': 'b'}]),
    (CHAT, [{'messages': [{'role': 'user', 'content': text}, {'role': 'assistant', 'content': 'b'}]}]),
  ):
    (tmp_path / 'x').mkdir(exist_ok=True)
    store = made(tmp_path / 'x', model, lines, reading)
    wanted = Tokenizer(model.read_bytes(), 0).encode('b')
    assert store.read([(int(store.offsets[1]), 99)])[0].tolist()[-len(wanted) - 1 :] == [*wanted, 1]
    assert int(store.offsets[1]) == (
      1 if reading is PAIR else len(Tokenizer(model.read_bytes(), 0).encode('user:')) + 1
    )
    shutil.rmtree(tmp_path / 'x')


@pytest.mark.parametrize('text', NOTHING)
def test_a_document_without_tokens_is_left_out(tmp_path, model, text):
  store = made(tmp_path, model, [{'text': 'a', 'url': 'x'}, {'text': text, 'url': 'x'}], Reading(tag_fields=('url',)))
  assert store.num_documents == 1


@pytest.mark.parametrize('name', ['t.txt', 't.jsonl'])
@pytest.mark.parametrize('text', NOTHING)
def test_a_file_without_tokens_counts_as_empty(tmp_path, model, text, name):
  (tmp_path / 'a.txt').write_text('some text')
  (tmp_path / name).write_text(json.dumps({'text': text}) if name == 't.jsonl' else text)
  with pytest.raises(DataError, match=f'{name} is empty; remove it from the inputs'):
    prepare([tmp_path / 'a.txt', tmp_path / name], tmp_path / 'out', tokenizer=model)
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('text', ['\u2060', '☃', '\u0301', '.'])
def test_any_text_with_tokens_is_kept(tmp_path, model, text):
  """Byte pieces can spell every character that normalisation keeps."""
  assert Tokenizer(model.read_bytes(), 0).encode(text)
  assert made(tmp_path, model, [{'inputs': '', 'targets': text}], PAIR).num_documents == 2
