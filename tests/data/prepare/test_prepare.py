"""`pretrain data prepare` makes a store from text; each mistake gives a one-line error and leaves nothing behind."""

import argparse
import codecs
import json
import pathlib
import re

import numpy as np
import pytest

from data.errors import DataError
from data.prepare.prepare import add_flags, prepare, run, sentences, train_sentencepiece
from data.prepare.text import Reading, read_segments, sample
from data.stores.store import open_store
from data.stores.vocabulary import EOS, PAD, UNKNOWN, Tokenizer

LICENSE = pathlib.Path(__file__).parents[3] / 'LICENSE'
SMALL = {'vocab_size': 500, 'sentinels': 20}


def texts_of(path, sentinels=20) -> list[str]:
  store = open_store(path)
  tokenizer = store.tokenizer(sentinels)
  ranges = [(int(a), int(b - a - 1)) for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]
  return [tokenizer.decode(ids) for ids in store.read(ranges)]


def command_line(*arguments) -> None:
  parser = argparse.ArgumentParser()
  add_flags(parser)
  run(parser.parse_args(list(map(str, arguments))))


def squeezed(text: str) -> str:
  return ' '.join(text.split())


def test_text_is_tokenised_with_a_vocabulary_of_the_requested_size(tmp_path):
  prepare([LICENSE], tmp_path / 's', **SMALL)
  store = open_store(tmp_path / 's')
  assert store.tokenizer(20).vocabulary.size == 500
  assert texts_of(tmp_path / 's') == [squeezed(LICENSE.read_text())]
  assert store.manifest['inputs'] == ['LICENSE']
  assert len(store.manifest['text_sha256']) == 64


def test_the_same_text_makes_the_same_store(tmp_path):
  for name in 'ab':
    prepare([LICENSE], tmp_path / name, **SMALL)
  assert open_store(tmp_path / 'a').fingerprint == open_store(tmp_path / 'b').fingerprint


@pytest.mark.parametrize(
  ('documents', 'wanted'),
  [('file', ['a b c d']), ('paragraph', ['a b', 'c d']), ('line', ['a', 'b', 'c', 'd'])],
)
def test_a_document_is_a_file_a_paragraph_or_a_line(tmp_path, tokenizer_model, documents, wanted):
  (tmp_path / 'm').write_bytes(tokenizer_model)
  (tmp_path / 't.txt').write_text('\na\nb\n\n \n\nc\nd')
  prepare([tmp_path / 't.txt'], tmp_path / 's', tokenizer=tmp_path / 'm', reading=Reading(documents=documents))
  assert texts_of(tmp_path / 's') == wanted


def test_jsonl_has_one_document_per_line_in_any_field(tmp_path, tokenizer_model):
  (tmp_path / 'm').write_bytes(tokenizer_model)
  rows = [{'body': 'the work', 'x': 1}, {'body': 'of\nthe\n\nlicense'}]
  (tmp_path / 't.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n\n')
  prepare([tmp_path / 't.jsonl'], tmp_path / 's', tokenizer=tmp_path / 'm', reading=Reading(field='body'))
  assert texts_of(tmp_path / 's') == ['the work', 'of the license']


def test_a_long_file_is_one_document_read_in_segments(tmp_path, monkeypatch):
  monkeypatch.setattr('data.prepare.text.SEGMENT_BYTES', 100)
  segments = list(read_segments(LICENSE, Reading()))
  assert len(segments) > 50
  assert [s.last for s in segments] == [False] * (len(segments) - 1) + [True]
  assert ''.join(s.text for s in segments) == LICENSE.read_text()
  assert sum(s.num_bytes for s in segments) == LICENSE.stat().st_size


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('t.txt', b'', r't.txt is empty; remove it'),
    ('t.txt', b' \n\n ', r't.txt is empty; remove it'),
    ('t.txt', b'good line\nbad \xff byte', r't.txt is not UTF-8 text \(byte 14\)'),
    ('t.bin', b'\x89PNG\r\n\x1a\n\x00\x00', 't.bin is a picture, sound or video by its first bytes'),
    ('t.bin', b'text\nand\x00more', r't.bin is binary \(a NUL at byte 8\)'),
    ('t.jsonl', b'', r't.jsonl is empty; remove it'),
    ('t.jsonl', b'{"text": "a"}\n{"txt": "b", "z": 1}', r"t.jsonl:2: no text in field 'text' \(found: txt, z\)"),
    ('t.jsonl', b'{"text": 3}', r"t.jsonl:1: no text in field 'text'"),
    ('t.jsonl', b'["text"]', r"t.jsonl:1: no text in field 'text' \(found: list\)"),
    ('t.jsonl', b'{"text": "a"}\n{"text": ', r't.jsonl:2: not JSON'),
    ('t.jsonl', b'{"text": "a\\u0000b"}', r"t.jsonl:1: field 'text' has a NUL \(character 1\)"),
    ('t.jsonl', b'{"text": "a\\ud800"}', r"t.jsonl:1: field 'text' has half of a surrogate pair \(\\ud800\)"),
  ],
)
def test_the_error_names_bad_input_and_nothing_is_left_behind(tmp_path, tokenizer_model, name, content, message):
  (tmp_path / 'm').write_bytes(tokenizer_model)
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError, match='^DATA: .*' + message):
    prepare([tmp_path / name], tmp_path / 'out', tokenizer=tmp_path / 'm')
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted(['m', name])


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('t.txt', b'bad \xff byte', 'is not UTF-8 text'),
    (
      't.jsonl',
      b'{"text": "a"}\n{"text": "b\\ud800"}',
      r"t.jsonl:2: field 'text' has half of a surrogate pair \(\\ud800\)",
    ),
  ],
)
def test_bad_input_is_also_reported_while_the_vocabulary_is_trained(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError, match=message):
    prepare([tmp_path / name], tmp_path / 'out', **SMALL)


FIELDS = ['--inputs_field=q', '--targets_field=a']
PAIRS = Reading(pair=('inputs', 'targets'))


def test_pairs_are_two_documents_each_with_their_eos_and_nothing_is_left_out(tmp_path, tokenizer_model, capsys):
  (tmp_path / 'm').write_bytes(tokenizer_model)
  rows = [{'q': 'the work', 'a': 'of'}, {'q': '', 'a': 'the license'}, {'q': '<extra_id_0> or', 'a': 'terms', 'x': 1}]
  (tmp_path / 't.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
  command_line(tmp_path / 't.jsonl', f'--out={tmp_path}/s', f'--tokenizer={tmp_path}/m', *FIELDS)
  store = open_store(tmp_path / 's')
  assert store.pairs
  assert texts_of(tmp_path / 's') == [text for row in rows for text in (row['q'], row['a'])]
  assert all(store.read([(end - 1, 1)])[0][0] == EOS for end in store.offsets[1:].tolist())
  out = capsys.readouterr().out
  lengths = np.diff(store.offsets).reshape(-1, 2)
  assert f'{store.num_tokens} tokens in 3 pairs' in out
  assert f'targets: half have up to {np.median(lengths[:, 1]):g} tokens, ' in out
  assert f'the longest {lengths[:, 0].max()} (with EOS)' in out


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('t.jsonl', '{"inputs": "a", "targets": "b"}\n{"inputs": "a", "x": 1}',
     r"t.jsonl:2: no text in field 'targets' \(found: inputs, x\); name it with --targets_field=."),
    ('t.jsonl', '{"targets": "b"}', r"t.jsonl:1: no text in field 'inputs' \(found: targets\); .* --inputs_field=."),
    ('t.jsonl', '{"inputs": 3, "targets": "b"}', r"t.jsonl:1: no text in field 'inputs'"),
    ('t.jsonl', '{"inputs": "a", "targets": ["b"]}', r"t.jsonl:1: no text in field 'targets'"),
    ('t.jsonl', '\n{"inputs": "a", "targets": " "}', r"t.jsonl:2: field 'targets' is empty; write the text"),
    ('t.jsonl', '{"inputs": "a", "targets": "b\\ud800"}', r"t.jsonl:1: field 'targets' has half of a surrogate pair"),
    ('t.jsonl', '', r't.jsonl is empty; remove it'),
    ('t.txt', 'a\tb', r"t.txt has no field 'inputs': it is text"),
  ],
)  # fmt: skip
def test_the_error_names_a_bad_pair_and_nothing_is_left_behind(tmp_path, tokenizer_model, name, content, message):
  (tmp_path / 'm').write_bytes(tokenizer_model)
  (tmp_path / name).write_text(content)
  with pytest.raises(DataError, match='^DATA: .*' + message):
    prepare([tmp_path / name], tmp_path / 'out', tokenizer=tmp_path / 'm', reading=PAIRS)
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted(['m', name])


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--inputs_field=q'], '--inputs_field is given without --targets_field; give both'),
    (['--targets_field=a'], '--targets_field is given without --inputs_field; give both'),
    ([*FIELDS, '--field=body'], '--field=body is for text, --inputs_field and --targets_field are for pairs'),
    ([*FIELDS, '--no_eos'], '--no_eos cannot be used with pairs, in which EOS marks the end of an output'),
    ([*FIELDS, '--tag_fields=url'], '--tag_fields, --scores and --score_field are for text, not for pairs'),
    (['--scores=beauty'], '--scores=beauty is not a score; choose from compression, lexical_diversity, readability'),
    (['--scores=readability', '--score_field=readability'], '--score_field=readability is also given in --scores'),
    (['--field=body'], "LICENSE has no field 'body': it is text"),
    (['--score_field=quality'], "LICENSE has no field 'quality': it is text"),
    (['--tag_fields=url,lang'], "LICENSE has no field 'url': it is text"),
    (['--workers=0'], '--workers=0; it must be >= 1'),
    (['--sentinels=-5'], '--sentinels=-5; it must be >= 0'),
  ],
)
def test_invalid_flags_and_combinations_are_refused(tmp_path, flags, message):
  with pytest.raises(DataError, match='^DATA: .*' + message):
    command_line(LICENSE, f'--out={tmp_path}/out', *flags)
  assert not (tmp_path / 'out').exists()


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(DataError, match=r'none\.txt is not a file'):
    prepare([tmp_path / 'none.txt'], tmp_path / 'out', **SMALL)


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path):
  for name, text in {'t.txt': 'the text', 'l.jsonl': '{"text": "the text"}\n'}.items():
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + text.encode())
    assert [found.text.strip() for found in read_segments(tmp_path / name, Reading())] == ['the text']
  (tmp_path / 'bad.txt').write_bytes(codecs.BOM_UTF8 + b'ab\xff')
  with pytest.raises(DataError, match=r'\(byte 5\)'):
    list(read_segments(tmp_path / 'bad.txt', Reading()))


def test_an_existing_store_is_detected_before_the_text_is_read(tmp_path):
  (tmp_path / 'out').mkdir()
  with pytest.raises(DataError, match='already exists'):
    command_line(LICENSE, f'--out={tmp_path}/out', '--vocab_size=100')


def test_an_existing_store_is_not_changed(tmp_path):
  (tmp_path / 'out').mkdir()
  with pytest.raises(DataError, match=r'already exists\. Nothing was changed'):
    prepare([LICENSE], tmp_path / 'out', **SMALL)
  assert list((tmp_path / 'out').iterdir()) == []


def test_a_vocabulary_that_the_text_cannot_fill_is_refused(tmp_path):
  with pytest.raises(DataError, match=r'97 pieces are left for text, but at least 359 are needed; set .* size >= 462'):
    prepare([LICENSE], tmp_path / 'out', vocab_size=200, sentinels=100)
  (tmp_path / 'few.txt').write_text('too few words')
  with pytest.raises(DataError, match=r'no more than \d+, and at least 359 are needed; give more text'):
    prepare([tmp_path / 'few.txt'], tmp_path / 'out', **SMALL)
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  ('text', 'asked', 'sentence'),
  [
    (LICENSE.read_text(), 9900, r'this text has no more than \d+; set the vocabulary size <= (\d+)'),
    (''.join(map(chr, range(0x4E00, 0x5200))), 500, r'the characters of this text need \d+; set .* size >= (\d+)'),
  ],
)
def test_the_suggested_vocabulary_size_works(tmp_path, text, asked, sentence):
  (tmp_path / 't.txt').write_text(text)
  with pytest.raises(DataError, match=sentence) as caught:
    prepare([tmp_path / 't.txt'], tmp_path / 'out', vocab_size=asked, sentinels=20)
  advised = int(re.search(sentence, str(caught.value))[1])
  prepare([tmp_path / 't.txt'], tmp_path / 'out', vocab_size=advised, sentinels=20)
  assert open_store(tmp_path / 'out').tokenizer(20).vocabulary.size == advised


@pytest.mark.parametrize('content', [None, b'not a model'])
def test_an_invalid_tokenizer_file_is_refused(tmp_path, content):
  if content:
    (tmp_path / 'm').write_bytes(content)
  with pytest.raises(DataError, match=r'm (is not a SentencePiece model|cannot be read)'):
    prepare([LICENSE], tmp_path / 'out', tokenizer=tmp_path / 'm')


def test_the_command_line_prepares_a_store(tmp_path, capsys):
  flags = ['--vocab_size=500', '--sentinels=20', '--documents=paragraph', '--no_eos']
  command_line(LICENSE, f'--out={tmp_path}/s', *flags)
  store = open_store(tmp_path / 's')
  assert not store.append_eos
  assert f'{store.num_tokens:,} tokens in {store.num_documents:,} documents' in capsys.readouterr().out


def test_special_ids_equal_t5s_and_unknown_characters_become_bytes():
  tokenizer = Tokenizer(train_sentencepiece([LICENSE.read_text()], 480), 20)
  processor = tokenizer._processor
  assert (processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id()) == (PAD, EOS, UNKNOWN, -1)
  ids = tokenizer.encode('the Licensor 中文 🙂')
  assert UNKNOWN not in ids
  assert tokenizer.decode(ids) == 'the Licensor 中文 🙂'


def test_special_tokens_can_be_rendered_and_written_in_prompts(tokenizer_model):
  tokenizer = Tokenizer(tokenizer_model, 8)
  v = tokenizer.vocabulary
  ids = tokenizer.encode_prompt('[NLU] the work <extra_id_0> of the <extra_id_7>')
  assert ids[0] == v.mode_ids[0]
  assert [i for i in ids if v.pieces <= i < v.mode_ids[0]] == [v.first_sentinel, v.first_sentinel - 7]
  assert tokenizer.render([*ids, EOS]) == '[NLU] the work <extra_id_0> of the <extra_id_7> </s>'
  assert v.mode_ids[0] not in tokenizer.encode('[NLU] the work'), 'plain text has no special tokens'
  with pytest.raises(ValueError, match='<extra_id_8> is beyond the 8 sentinels'):
    tokenizer.encode_prompt('<extra_id_8>')


def test_a_sample_is_spread_evenly_over_the_text():
  texts = [f'{i:04d}' for i in range(1000)]
  read = [(text, (i + 1) / 1000) for i, text in enumerate(texts)]
  chosen = list(sample(read, 400))
  assert 90 <= len(chosen) <= 110
  assert sum(int(t) < 500 for t in chosen) in range(45, 56)
  assert list(sample(read, 10**6)) == texts


def test_long_lines_are_cut_for_the_trainer_and_nothing_is_lost():
  text = 'word ' * 3000 + '\n' + 'x' * 9000
  parts = list(sentences(text))
  assert max(map(len, parts)) <= 4096
  assert ''.join(parts).replace(' ', '') == text.replace(' ', '').replace('\n', '')
