"""Another tokenizer for the weights of a run: which rows stay, and what the new ones are."""

import re

import numpy as np
import pytest
import sentencepiece

from data.prepare.prepare import train_sentencepiece
from data.stores.vocabulary import Tokenizer
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.cli.main import main
from pretrain.config import bindings
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.program import build_program
from pretrain.tools.vocabulary import drawn, old_ids, padded, spellings, written
from pretrain.tools.word_vectors import Nearest, words
from tests.pretrain import tiny

LICENSE = (tiny.ROOT / 'LICENSE').read_text().splitlines()
OTHER = (tiny.ROOT / 'CONTRIBUTING.md').read_text().splitlines()
OLD_SIZE, NEW_SIZE, SENTINELS = 500, 700, 4


def processor(tokenizer: Tokenizer) -> sentencepiece.SentencePieceProcessor:
  return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """`old`: weights with a SentencePiece model beside them, as after an import; `new.model`: another one."""
  folder = tmp_path_factory.mktemp('vocabulary')
  cfg = tiny.decoder('model.vocab_size=512', f'data.sentinels={SENTINELS}', "model.head='untied'")
  params = build_program(cfg).init().params
  checkpoints = Checkpoints(folder / 'old', CheckpointConfig())
  checkpoints.save_params(0, params, {'data': {'tokenizer': None}}, '')
  checkpoints.close()
  (folder / 'old/config.gin').write_text(bindings.render(cfg))
  (folder / 'old/imported').mkdir()
  (folder / 'old/imported/tokenizer.model').write_bytes(train_sentencepiece(LICENSE, OLD_SIZE))
  (folder / 'new.model').write_bytes(train_sentencepiece([*LICENSE, *OTHER], NEW_SIZE))
  return folder


def tokenizers(folder) -> tuple[Tokenizer, Tokenizer]:
  return tuple(
    Tokenizer((folder / name).read_bytes(), SENTINELS) for name in ('old/imported/tokenizer.model', 'new.model')
  )


def extend(folder, method: str, to) -> dict[str, np.ndarray]:
  flags = [f'--workdir={folder}/old', f'--tokenizer={folder}/new.model', f'--method={method}', f'--to={to}']
  assert main(['checkpoints', 'extend-vocabulary', *flags]) == 0
  return tables(to)


def tables(run) -> dict[str, np.ndarray]:
  """The rows of the embedding and of the head."""
  checkpoints = Checkpoints(run, CheckpointConfig(), read_only=True)
  found = checkpoints.arrays(0, ['params/embedding/table', 'params/head/kernel'])
  checkpoints.close()
  return {'table': np.asarray(found['params/embedding/table']), 'head': np.asarray(found['params/head/kernel']).T}


@pytest.mark.parametrize('method', ['mean', 'multivariate', 'subword'])
def test_tokens_of_both_keep_their_rows_to_the_bit(folder, tmp_path, method, capsys):
  before, after = tables(folder / 'old'), extend(folder, method, tmp_path / 'new')
  old, new = tokenizers(folder)
  names = {name: i for i, name in enumerate(processor(old).id_to_piece(list(range(old.vocabulary.pieces))))}
  same = [(i, names[name]) for i in range(new.vocabulary.pieces) if (name := processor(new).id_to_piece(i)) in names]
  same += [(new.vocabulary.sentinel(k), old.vocabulary.sentinel(k)) for k in range(SENTINELS)]
  same += list(zip(new.vocabulary.mode_ids, old.vocabulary.mode_ids, strict=True))
  ours, theirs = (list(ids) for ids in zip(*same, strict=True))
  fresh = sorted({*range(new.vocabulary.size)} - {*ours})
  assert 300 < len(ours) < new.vocabulary.size - 50
  assert f'({len(ours)} tokens kept their rows, {len(fresh)} are new, model.vocab_size=768)' in capsys.readouterr().out
  for name, table in after.items():
    assert table[ours].tobytes() == before[name][theirs].tobytes()
    known = before[name][: old.vocabulary.size].astype(np.float64)
    assert np.isfinite(table).all()
    if method == 'mean':
      np.testing.assert_allclose(table[fresh], np.tile(known.mean(0), (len(fresh), 1)), atol=1e-6)
    if method == 'subword':
      words = [
        i for i in fresh if i < NEW_SIZE and (piece := processor(new).id_to_piece(i))[:1] == '▁' and piece[1:].isalpha()
      ]
      assert len(words) > 20
      for word in words:  # SentencePiece puts a space before a text of its own accord
        pieces = processor(old).encode(processor(new).id_to_piece(word)[1:])
        assert len(pieces) > 1
        np.testing.assert_allclose(table[word], known[pieces].mean(0), atol=1e-6)


@pytest.fixture(scope='module')
def vectors(folder):
  """Vectors of words of both texts in the format of fastText."""
  text = ' '.join([*LICENSE, *OTHER])
  words = sorted({word.lower() for word in re.findall(r'[A-Za-z]{3,}', text)})
  rng = np.random.default_rng(3)
  lines = [f'{len(words)} 12', *(f'{word} ' + ' '.join(f'{x:.5f}' for x in rng.normal(size=12)) for word in words)]
  (folder / 'words.vec').write_text('\n'.join(lines) + '\n')
  return folder / 'words.vec'


def places_of(path, model: sentencepiece.SentencePieceProcessor) -> np.ndarray:
  """Each piece in the space of the words, as ofa/utils.py get_subword_embeddings_in_word_embedding_space."""
  found = {i: [] for i in range(len(model))}
  for line in path.read_text().splitlines()[1:]:
    word, *numbers = line.split(' ')
    for text in (word, ' ' + word, ' ' + word[0].upper() + word[1:]):
      for piece in set(model.encode(text)):
        found[piece].append(np.array(numbers, float))
  return np.array([np.mean(own, 0) if own else np.zeros(12) for own in found.values()])


def by_the_paper(path, old, new, table: np.ndarray, token: int) -> np.ndarray:
  """The row of a new token, as ofa/utils.py create_target_embeddings."""
  theirs, wanted = places_of(path, old), places_of(path, new)[token]
  similar = [x @ wanted / (np.linalg.norm(x) * np.linalg.norm(wanted)) if x.any() else 0.0 for x in theirs]
  best = sorted(range(len(similar)), key=lambda i: -similar[i])[:10]
  weights = np.exp(np.array([similar[i] for i in best]) / 0.1)
  return sum(weight * table[i] for i, weight in zip(best, weights / weights.sum(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize('rank', [pytest.param(None, marks=pytest.mark.slow), 7])
def test_ofa_equals_the_paper(folder, vectors, tmp_path, rank, capsys):
  flags = [f'--workdir={folder}/old', f'--tokenizer={folder}/new.model', '--method=ofa', f'--vectors={vectors}']
  assert (
    main(['checkpoints', 'extend-vocabulary', *flags, f'--to={tmp_path}/new', *[f'--rank={rank}'] * bool(rank)]) == 0
  )
  old, new = tokenizers(folder)
  places = old_ids(old, new)
  places_new = places_of(vectors, processor(new))
  fresh = [i for i in np.flatnonzero(places < 0) if i < NEW_SIZE and places_new[i].any()][::9]
  assert len(fresh) > 5
  kept = np.flatnonzero(places >= 0)
  for name, table in tables(tmp_path / 'new').items():
    known = tables(folder / 'old')[name][: old.vocabulary.size].astype(np.float64)
    if rank:
      left, values, right = np.linalg.svd(known)
      known = left[:, :rank] @ np.diag(values[:rank]) @ right[:rank]
      assert np.linalg.matrix_rank(table.astype(np.float64), tol=1e-5) == rank
    np.testing.assert_allclose(table[kept], known[places[kept]], atol=1e-6)
    for token in fresh:
      wanted = by_the_paper(vectors, processor(old), processor(new), known, token)
      np.testing.assert_allclose(table[token], wanted, atol=2e-6)


def test_tokens_of_no_word_are_drawn_around_the_old_rows():
  old = np.random.default_rng(0).normal([1, -2], [0.5, 3], (4000, 2))
  near = Nearest(np.zeros((3000, 1), int), np.ones((3000, 1)), np.arange(3000) == 0)
  rows = near.rows(old, 1)
  np.testing.assert_array_equal(rows[0], old[0])
  np.testing.assert_allclose(rows[1:].mean(0), [1, -2], atol=0.2)
  np.testing.assert_allclose(rows[1:].std(0), [0.5, 3], rtol=0.1)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('2 3\na 1 2 3\nb 1 2\n', ':3 is not a word and 3 numbers'),
    ('a 1 x\n', ':1 is not a word and 2 numbers'),
    ('a 1 nan\n', ':1 is not a word and 2 numbers'),
    ('3 2\n', 'has no words'),
    ('ÿ 1 2\n', 'no word is spelled with any of the'),
    (None, 'cannot be read'),
  ],
)
def test_vectors_that_cannot_be_read(folder, tmp_path, capsys, text, message):
  if text is not None:
    (tmp_path / 'x.vec').write_text(text)
  flags = [f'--workdir={folder}/old', f'--tokenizer={folder}/new.model', '--method=ofa', f'--vectors={tmp_path}/x.vec']
  assert main(['checkpoints', 'extend-vocabulary', *flags, f'--to={tmp_path}/new']) == 65
  err = capsys.readouterr().err
  assert message in err
  assert 'Nothing was written' in err
  assert err.count('\n') == 1
  assert not (tmp_path / 'new').exists()


def test_words_without_a_first_line_may_have_spaces(tmp_path):
  (tmp_path / 'x.vec').write_text('new 1 2\nnew york 3 4\nthe 5 6\n')
  found = list(words(tmp_path / 'x.vec', most=2))
  assert [word for word, _ in found] == ['new', 'new york']
  np.testing.assert_array_equal([vector for _, vector in found], [[1, 2], [3, 4]])


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ('--method=ofa', '--method=ofa and --vectors=FILE belong together'),
    ('--vectors={vectors}', '--method=ofa and --vectors=FILE belong together'),
    ('--rank=3', '--rank and --max_words belong to --method=ofa'),
    ('--method=ofa --vectors={vectors} --rank=900', '--rank=900 is above'),
  ],
)
def test_flags_of_ofa(folder, vectors, tmp_path, capsys, flags, message):
  command = ['checkpoints', 'extend-vocabulary', f'--workdir={folder}/old', f'--tokenizer={folder}/new.model']
  assert main([*command, *flags.format(vectors=vectors).split(), f'--to={tmp_path}/new']) == 64
  err = capsys.readouterr().err
  assert message in err
  assert 'Nothing was written' in err
  assert err.count('\n') == 1
  assert not (tmp_path / 'new').exists()


def test_a_draw_has_the_mean_and_covariance_of_the_old_rows():
  rng = np.random.default_rng(0)
  old = rng.normal(size=(500, 3)) @ np.array([[2, 0, 0], [1, 0.5, 0], [0, 0, 0.1]]) + [1, -2, 3]
  new = drawn(old, 200_000, 1)
  np.testing.assert_allclose(new.mean(0), old.mean(0), atol=0.02)
  np.testing.assert_allclose(np.cov(new.T), np.cov(old.T, bias=True), atol=0.05)
  assert abs(np.cov(new.T)[0, 1]) > 0.3, 'not the variances alone'
  np.testing.assert_array_equal(drawn(old, 5, 1), drawn(old, 5, 1))
  assert (drawn(old, 5, 1) != drawn(old, 5, 2)).all()


def test_fewer_rows_than_features_still_have_a_distribution():
  old = np.random.default_rng(0).normal(size=(3, 8))
  plane = old - old.mean(0)
  for row in drawn(old, 10, 0) - old.mean(0):  # rows lie in the plane of the old ones
    np.testing.assert_allclose(np.linalg.lstsq(plane.T, row, rcond=None)[0] @ plane, row, atol=1e-6)


def test_pieces_inside_of_words_are_spelled_without_a_space(folder):
  old, new = tokenizers(folder)
  places = old_ids(old, new)
  spelled = dict(zip(np.flatnonzero(places < 0), spellings(old, new, places), strict=True))
  tokens = written(new)
  names = lambda ids: ''.join(processor(old).id_to_piece(ids))
  checked = [(tokens[i][1], names(ids)) for i, ids in spelled.items() if ids]
  assert len(checked) > 5
  whole = [pair for pair in checked if len(pair[0]) == len(pair[1])]
  assert whole
  assert all(a == b for a, b in whole)
  assert any(not a.startswith('▁') for a, _ in whole)


def test_the_new_run_reads_its_tokenizer(folder, tmp_path):
  extend(folder, 'mean', tmp_path / 'new')
  cfg = bindings.load(Experiment, [str(tmp_path / 'new/config.gin')])
  assert (cfg.model.vocab_size, cfg.data.name) == (768, 'synthetic')
  assert (tmp_path / 'new/imported/tokenizer.model').read_bytes() == (folder / 'new.model').read_bytes()
  assert main(['generate', f'--workdir={tmp_path}/new', '--text=the license', '--max_tokens=2']) == 0


def test_rows_stay_divisible():
  assert padded(32_103, 32_128) == 32_128
  assert padded(32_200, 32_128) == 32_256
  assert padded(101, 100) == 104
  assert padded(101, 99) == 101


@pytest.mark.parametrize(
  ('flags', 'code', 'message'),
  [
    ('--tokenizer={old}/imported/tokenizer.model --to={new}', 64, 'is already the tokenizer of'),
    ('--tokenizer={new}.model --to={old}', 64, 'exists; nothing is overwritten'),
    ('--tokenizer={old}/nothing.model --to={new}', 65, 'nothing.model'),
  ],
)
def test_a_mistake_is_one_line(folder, tmp_path, capsys, flags, code, message):
  paths = {'old': folder / 'old', 'new': folder / 'new'}
  command = ['checkpoints', 'extend-vocabulary', f'--workdir={folder}/old', *flags.format(**paths).split()]
  assert main(command) == code
  err = capsys.readouterr().err
  assert message in err
  assert err.count('\n') == 1
  assert not (folder / 'new').exists()


def test_a_run_on_random_tokens_has_no_rows_to_keep(folder, tmp_path, capsys):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run/config.gin').write_text((folder / 'old/config.gin').read_text())
  (tmp_path / 'run/checkpoints').symlink_to(folder / 'old/checkpoints')
  flags = [f'--workdir={tmp_path}/run', f'--tokenizer={folder}/new.model', f'--to={tmp_path}/new']
  assert main(['checkpoints', 'extend-vocabulary', *flags]) == 64
  assert 'has no tokenizer' in capsys.readouterr().err
