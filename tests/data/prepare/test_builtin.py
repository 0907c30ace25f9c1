"""The built-in corpus: made once, the same for the same files, with separate held-out text."""

import multiprocessing

import pytest

from data.errors import DataError
from data.prepare import builtin
from data.prepare.docstrings import extract, prose
from data.stores.store import open_store

SOURCE = '''
"""The module counts apples and pears in many different baskets."""
x = 1
class Basket:
  """A basket of apples, which may be empty but never has holes.

  >>> Basket().apples
  3

  .. versionadded:: 3.4

  It is made of willow.
  """
  if True:
    def weigh(self):
      """Returns the weight of the basket in kilograms, with its apples."""
  def short(self):
    """Too short."""
  def numbers(self):
    """1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20"""
'''


def test_docstrings_are_extracted_as_prose_in_source_order():
  assert extract(SOURCE) == [
    'The module counts apples and pears in many different baskets.',
    'A basket of apples, which may be empty but never has holes. It is made of willow.',
    'Returns the weight of the basket in kilograms, with its apples.',
  ]


def test_rulers_and_extra_white_space_are_removed():
  assert prose('Title\n=====\n\n  Text\n    goes on.\n') == 'Title Text goes on.'


@pytest.fixture
def few_files(monkeypatch):
  """Limits the corpus to about a hundred files of the standard library, so that tests are fast."""
  chosen = [f for f in builtin.files() if f[0].startswith('python/')][:110]
  monkeypatch.setattr(builtin, 'files', lambda: chosen)


def test_a_corpus_is_made_once_and_has_separate_held_out_text(few_files, tmp_path, monkeypatch):
  train, heldout = builtin.builtin_store(tmp_path, 700, 40)
  stores = open_store(train), open_store(heldout)
  assert stores[0].manifest['pieces'] == 700 - 40 - 3
  assert stores[0].manifest['packages']['python']
  assert stores[0].fingerprint != stores[1].fingerprint
  assert 0.01 < stores[1].num_documents / stores[0].num_documents < 0.2
  monkeypatch.setattr(builtin, '_build', lambda *_: pytest.fail('built twice'))
  assert builtin.builtin_store(tmp_path, 700, 40) == (train, heldout)


@pytest.mark.slow
def test_the_same_files_make_the_same_corpus(few_files, tmp_path):
  stores = [builtin.builtin_store(tmp_path / name, 700, 40) for name in 'ab']
  for a, b in zip(*stores, strict=True):
    assert open_store(a).fingerprint == open_store(b).fingerprint


@pytest.mark.slow
def test_an_interrupted_build_is_completed(few_files, tmp_path, monkeypatch):
  real, written = builtin._write, []

  def cut_off(path, texts, tokenizer):
    if written:
      raise KeyboardInterrupt
    written.append(path)
    real(path, texts, tokenizer)

  monkeypatch.setattr(builtin, '_write', cut_off)
  with pytest.raises(KeyboardInterrupt):
    builtin.builtin_store(tmp_path, 700, 40)
  monkeypatch.setattr(builtin, '_write', real)
  train, heldout = builtin.builtin_store(tmp_path, 700, 40)
  assert train == written[0]
  assert open_store(heldout).num_documents > 0


def test_no_docstring_occurs_twice(few_files):
  texts = list(builtin._extract_all([str(path) for _, path in builtin.files()[:60]] * 2))
  assert texts[:60] == texts[60:], 'workers answer in order'
  documents = dict(builtin.documents())
  assert len(set(documents.values())) == len(documents) > 20


def test_other_processes_wait_for_the_one_that_builds(tmp_path):
  with builtin._exclusive(tmp_path / 'lock'):
    other = multiprocessing.get_context('spawn').Process(target=_enter, args=(tmp_path / 'lock', tmp_path / 'entered'))
    other.start()
    other.join(timeout=1.5)
    assert not (tmp_path / 'entered').exists()
  other.join(timeout=20)
  assert (tmp_path / 'entered').exists()


def _enter(lock, mark):
  with builtin._exclusive(lock):
    mark.touch()


def test_a_vocabulary_without_room_for_text_is_refused(few_files, tmp_path):
  with pytest.raises(DataError, match='97 pieces are left for text'):
    builtin.builtin_store(tmp_path, 200, 100)
