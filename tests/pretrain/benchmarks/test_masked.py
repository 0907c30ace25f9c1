"""Pseudo-log-likelihoods of encoders: those of `transformers`, and by hand in numpy; what an encoder is not asked."""

import json
import math
import types

import jax
import numpy as np
import pytest

from data.stores.special_ids import SpecialIds
from data.stores.vocabulary import Tokenizer, Vocabulary
from models.build import KernelsConfig, build
from models.specs import initialize
from pretrain.benchmarks.masked import MaskedScorer
from pretrain.benchmarks.pseudo import fill_masked, rank_pseudo, score_pseudo, words_hidden
from pretrain.benchmarks.scoring import Scored
from pretrain.cli.main import main
from pretrain.devices.mesh import MeshConfig, make_mesh
from pretrain.errors import ConfigError
from pretrain.evaluation.blanks import hide_words
from pretrain.evaluation.writer import Writer
from pretrain.experiment.program import build_program
from pretrain.interchange.config_json import ConfigJson
from pretrain.interchange.families import FAMILIES
from pretrain.interchange.importing import needed
from pretrain.interchange.safetensors import create
from pretrain.run.train import train
from tests.pretrain import tiny
from tests.pretrain.benchmarks.test_scores import of_row
from tests.pretrain.evaluation.test_generate import opened
from tests.pretrain.interchange.goldens import GOLDENS, read, slow
from tests.tokenizers_json import content, publish

SENTENCE = 'The grant of a license is free for all of the people.'


@pytest.mark.parametrize('name', ['bert', *map(slow, ('roberta', 'electra_generator', 'deberta_v2', 'deberta_v3'))])
def test_pseudo_likelihoods_are_those_of_transformers(name):
  """One token hidden at a time, alone in its row there, and packed here, with segments of another text in between."""
  source, params = read(name)
  vocabulary = Vocabulary(95, 1, SpecialIds(cls=3, eos=(4,), mask=5, unknown=None, decoder_start=None))
  cfg = types.SimpleNamespace(
    model=source.model, kernels=KernelsConfig(), data=types.SimpleNamespace(targets_length=128, name='store')
  )
  model = build(source.model, mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
  scorer = MaskedScorer(Writer(cfg, types.SimpleNamespace(vocabulary=vocabulary), model, params), batch=4, context=40)
  with np.load(GOLDENS / 'masked.npz') as found, np.load(GOLDENS / name / 'expected.npz') as documents:
    expected, text, other = found[name], documents['short'], documents['long']
  wanted = scorer.alone(text[: len(expected)])
  scored = scorer([*wanted[::2], *scorer.alone(other[:9]), *wanted[1::2]])
  nats = np.concatenate([own.nats for own in (*scored[:12], *scored[-12:])])
  np.testing.assert_allclose(nats, -np.concatenate([expected[::2], expected[1::2]]), atol=2e-5)


@pytest.fixture(scope='module')
def writer(text_store):
  cfg = tiny.encoder(text_store)
  program = build_program(cfg, jax.devices()[:1])
  params = initialize(program.model.specs, jax.random.key(1))
  return Writer(cfg, opened(cfg), program.model, jax.tree.map(lambda x: 2 * x, params))


@pytest.fixture(scope='module')
def scorer(writer):
  """Rows of 32 positions, of which 15 tokens of a text are in one segment, and its end."""
  return MaskedScorer(writer, batch=2, context=16)


def by_hand(writer: Writer, ids: list[int], at: int) -> np.ndarray:
  """float64[vocab]: the logarithms of the probabilities at one place of a row, which is read as the mask token."""
  read = np.array([[*ids, writer.data.vocabulary.ids.end]], np.int32)
  read[0, at] = writer.data.vocabulary.first_sentinel
  row = np.pad(read, ((0, 0), (0, 32 - read.shape[1])))
  used = np.arange(32)[None] < read.shape[1]
  places = np.where(used, np.arange(32)[None], 0).astype(np.int32)
  segments = used.astype(np.int32)
  return of_row(writer, {'encoder_input_tokens': row, 'encoder_positions': places, 'encoder_segment_ids': segments})[at]


def test_each_token_is_hidden_once_in_the_window_around_it(writer, scorer):
  """Sums, shares and bits of two texts, of which one is longer than a segment."""
  texts = ['The Licensor grants a License.', 'You may reproduce copies of the Work — ½ of it, naïvely.']
  nats, hits, tokens = 0.0, 0, 0
  for text in texts:
    ids = writer.data.tokenizer.encode(text)
    for i in range(len(ids)):
      windows = [(b, ids[b : b + 15]) for b in range(max(len(ids) - 15, 0) + 1) if b <= i < b + 15]
      begin, window = min(windows, key=lambda found: abs(i - found[0] - 7))
      expected = by_hand(writer, window, i - begin)
      nats, hits, tokens = nats - expected[ids[i]], hits + (expected.argmax() == ids[i]), tokens + 1
  assert tokens > 30
  size = sum(len(text.encode()) for text in texts)
  found = score_pseudo(scorer, texts)
  assert (found['documents'], found['tokens'], found['bytes'], found['context']) == (2, tokens, size, 16)
  assert found['pseudo_nats'] == pytest.approx(nats, rel=1e-5)
  assert found['pseudo_perplexity'] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
  assert found['pseudo_bits_per_byte'] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
  assert found['masked_accuracy'] == pytest.approx(hits / tokens)
  assert not {'perplexity', 'bits_per_byte', 'nats', 'accuracy'} & found.keys()


def test_a_choice_is_hidden_behind_its_context(writer, scorer, tmp_path):
  """The choice with the highest sum wins; its context is seen and not scored."""
  encode, choices = writer.data.tokenizer.encode, [' a License', ' the Work', ' of any']
  totals = []
  for choice in choices:
    before, ids = encode('You may reproduce'), encode('You may reproduce' + choice)
    totals.append(sum(by_hand(writer, ids, i)[ids[i]] for i in range(len(before), len(ids))))
  questions = tmp_path / 'q.jsonl'
  line = lambda answer: json.dumps({'context': 'You may reproduce ', 'choices': choices, 'answer': answer}) + '\n'
  questions.write_text(line(int(np.argmax(totals))) * 3 + line(int(np.argmin(totals))))
  found = rank_pseudo(scorer, questions)
  assert (found['examples'], found['pseudo_accuracy']) == (4, 0.75)
  assert found.keys() == {'examples', 'pseudo_accuracy', 'pseudo_accuracy_per_byte'}


def test_the_tokens_of_hidden_words_are_hidden(writer):
  ids = SpecialIds(pad=0, eos=(3,), unknown=1, decoder_start=None, cls=2, mask=4)
  for tokenizer in (writer.data.tokenizer, Tokenizer(content('wordpiece'), 1, ids)):
    blank = hide_words(SENTENCE)
    hidden = words_hidden(blank, tokenizer)
    own = [int(hidden.ids[i]) for i in hidden.places]
    assert hidden.ids.tolist() == tokenizer.encode(SENTENCE)
    assert hidden.places == list(range(hidden.places[0], hidden.places[-1] + 1))
    assert tokenizer.decode(own).strip() == blank.truth, (blank.truth, own)


def test_shares_of_masked_tokens_and_sentences(writer, scorer):
  """Tokens are right in every second place; a sentence counts where all are. One that no segment holds is left out."""
  long = 'The owner grants each of these very persons a license to all of those good words of theirs here.'
  texts = [SENTENCE, 'Any of the words in this text may be taken away now.', long]
  given = types.SimpleNamespace(writer=writer, room=len(writer.data.tokenizer.encode(long)) - 1)

  class Half:
    writer, room = given.writer, given.room

    def __call__(self, wanted, said):
      self.wanted = wanted
      return [Scored(np.zeros(len(h.places)), np.arange(len(h.places)) % 2 == 0) for h in wanted]

  half = Half()
  found = fill_masked(half, texts, 5)
  sizes = [len(hidden.places) for hidden in half.wanted]
  assert (found['sentences'], found['too_long'], found['tokens']) == (2, 1, sum(sizes))
  assert found['masked_accuracy'] == sum((size + 1) // 2 for size in sizes) / sum(sizes)
  assert found['masked_exact_match'] == sum(size == 1 for size in sizes) / 2


def published_encoder(folder, architecture: str = 'BertForMaskedLM', **more) -> None:
  """A BERT or ELECTRA of constant weights with a tokenizer of 300 pieces."""
  kind = 'electra' if architecture.startswith('Electra') else 'bert'
  config = {
    'model_type': kind, 'architectures': [architecture], 'vocab_size': 300, 'max_position_embeddings': 64,
    'type_vocab_size': 2, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 1, 'num_attention_heads': 4,
    **({'embedding_size': 32} if kind == 'electra' else {}), **more,
  }  # fmt: skip
  publish(folder, 'wordpiece', config=config, tokenizer_config={'do_lower_case': True})
  family = FAMILIES[kind]
  shapes = needed(family, family.read(ConfigJson(config, folder), {}), config)
  for array in create(folder, {name: ('F32', shape) for name, shape in shapes.items()}).values():
    array[...] = 0.0


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
  """An imported BERT of zeros: every token is equally probable."""
  folder = tmp_path_factory.mktemp('runs')
  published_encoder(folder / 'bert')
  assert main(['import', f'--from={folder}/bert', f'--workdir={folder}/run']) == 0
  return folder / 'run'


@pytest.fixture
def files(tmp_path):
  (tmp_path / 'notes.txt').write_text(f'{SENTENCE} The Licensor grants a License.\n')
  question = {'context': '', 'choices': ['the Work', 'Work the'], 'answer': 0}
  (tmp_path / 'quiz.jsonl').write_text(json.dumps(question) + '\n')
  return [f'--text={tmp_path}/notes.txt', f'--rank={tmp_path}/quiz.jsonl', f'--infill={tmp_path}/notes.txt']


def test_results_are_in_a_file_and_in_the_report(run_dir, files, capsys):
  """The pseudo-perplexity of a uniform model is the size of its vocabulary."""
  assert main(['eval', f'--workdir={run_dir}', *files]) == 0
  found = json.loads((run_dir / 'eval.json').read_text())
  assert found['text']['notes']['pseudo_perplexity'] == pytest.approx(300, rel=1e-5)
  assert (found['text']['notes']['bytes'], found['text']['notes']['context']) == (85, 64)
  assert capsys.readouterr().out.startswith('text/notes  documents=1')
  report = (run_dir / 'report.html').read_text()
  for row in ('notes: pseudo-perplexity', 'quiz: accuracy by pseudo-likelihood', 'notes: masked tokens right'):
    assert row in report
  assert 'notes: perplexity' not in report


@pytest.mark.slow
def test_a_trained_run_has_the_same_results_on_a_mesh(text_store, files, tmp_path):
  """The first bytes of a text count alone where they are asked for."""
  found = {}
  train(tiny.encoder(text_store, 'train.steps=1', 'checkpoint.every=1'), tmp_path / 'run')
  for name, flags in {'one': [], 'two': ['--gin.mesh.data=2', '--gin.mesh.tensor=2', '--text_bytes=60']}.items():
    assert main(['eval', f'--workdir={tmp_path}/run', *files, *flags, f'--out={tmp_path}/{name}.json']) == 0
    found[name] = json.loads((tmp_path / f'{name}.json').read_text())
  one, two = found.values()
  assert one['rank'] == two['rank']
  assert one['infill'] == two['infill']
  assert one['text']['notes']['pseudo_nats_per_token'] == pytest.approx(math.log(512), rel=0.1)
  assert (one['text']['notes']['bytes'], two['text']['notes']['bytes']) == (85, 57)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--exact=QUIZ'], 'CONFIG: --exact: an encoder writes no text; leave it out, and use --rank for choices or --inf'),
    (['--needle_lengths=64'], 'CONFIG: --needle_lengths: an encoder writes no text; leave it out, and use --rank for'),
    (['--text=QUIZ', '--stride=4'], 'CONFIG: --stride=4: an encoder sees both sides of a token, so each has a window'),
    (['--text=QUIZ', '--context=2'], 'CONFIG: --context=2; it must be at least 3 tokens: one, and those around a text'),
    (['--text=QUIZ', '--context=65'], 'CONFIG: --context=65 is beyond model.max_positions=64; use at most that.'),
    (['--text=QUIZ', '--text_bytes=0'], 'CONFIG: --text_bytes=0; it must be at least 1.'),
    (
      ['--infill=QUIZ'],
      'DATA: --infill: the text has no sentence of plain English words in which words can',
    ),
  ],
)
def test_what_has_no_meaning_for_an_encoder_is_one_line(run_dir, tmp_path, capsys, flags, message):
  (tmp_path / 'quiz.jsonl').write_text('{"text": "a", "inputs": "a", "targets": "b"}\n')
  flags = [flag.replace('QUIZ', f'{tmp_path}/quiz.jsonl') for flag in flags]
  assert main(['eval', f'--workdir={run_dir}', f'--out={tmp_path}/new.json', *flags]) != 0
  err = capsys.readouterr().err
  assert err.startswith(message), err
  assert len(err.splitlines()) == 1
  assert not (tmp_path / 'new.json').exists()


def test_a_discriminator_has_no_probabilities_of_tokens(files, tmp_path, capsys):
  published_encoder(tmp_path / 'electra', 'ElectraForPreTraining')
  assert main(['eval', f'--from={tmp_path}/electra', files[0]]) == 64
  assert capsys.readouterr().err.startswith("CONFIG: model.head='binary' (ELECTRA's discriminator) only knows whether")


def test_a_tokenizer_without_a_mask_hides_nothing(writer):
  cfg = types.SimpleNamespace(model=writer.cfg.model, data=types.SimpleNamespace(name='synthetic'))
  with pytest.raises(ConfigError, match='the tokenizer of these weights has no mask token'):
    MaskedScorer(Writer(cfg, writer.data, writer.model, writer.params))
