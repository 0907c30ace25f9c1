"""Another tokenizer for the weights of a run: which rows stay, and what the new ones are."""

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
