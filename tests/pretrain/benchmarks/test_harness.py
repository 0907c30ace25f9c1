"""The model class for lm-evaluation-harness, asked as the harness asks (scripts/check_lm_eval.py asks with it)."""

import sys
import types

import numpy as np
import pytest

from data.objectives.features import decoder_features
from data.ragged import join
from models.decode.sampling import Sampling
from pretrain.benchmarks import harness
from pretrain.benchmarks.harness import Answers, harness_model, options_of
from pretrain.benchmarks.scoring import Scored
from pretrain.errors import ConfigError
from pretrain.evaluation.outputs import Decoding, outputs
from pretrain.evaluation.prompts import packed_batch
from tests.pretrain.benchmarks.test_scores import log_probs, of_row, writer_on


@pytest.fixture(scope='module')
def writer(text_store):
  return writer_on(text_store, 'causal_lm')


def ask(*requests: tuple):
  return [types.SimpleNamespace(args=args) for args in requests]


def without_start(writer, ids: list[int]) -> np.ndarray:
  """log P(token i + 1 | tokens 0 to i): the row is the tokens themselves."""
  row = decoder_features(None, join([np.int32(ids[1:])]), np.zeros(1, int), 1, 64)
  row['decoder_input_tokens'][0, 0] = ids[0]
  return of_row(writer, row)[: len(ids) - 1]


@pytest.mark.parametrize('starts', [True, False])
def test_log_probabilities_of_continuations(writer, starts):
  model, encode = Answers(writer, batch=2, starts=starts), writer.data.tokenizer.encode
  pairs = [('the License', ' of the Work'), ('any ', 'person'), ('', 'You may'), ('the Work ' * 30, ' shall')]
  for (context, continuation), (found, greedy) in zip(pairs, model.loglikelihood(ask(*pairs)), strict=True):
    before, whole = len(encode(context.rstrip())), encode(context + continuation)
    if starts or not context:
      cut = max(len(whole) - 64, 0)
      row, targets = log_probs(writer, whole[cut:])[before - cut :], whole[before:]
    else:
      cut = max(len(whole) - 65, 0)
      row, targets = without_start(writer, whole[cut:])[before - cut - 1 :], whole[before:]
    assert found == pytest.approx(row[np.arange(len(targets)), targets].sum(), abs=1e-3)
    assert greedy == (row.argmax(-1) == targets).all()


@pytest.mark.parametrize('starts', [True, False])
def test_a_continuation_longer_than_rows_keeps_its_last_tokens(writer, starts):
  """Both lose their beginning: the context all of it, the continuation what is beyond `max_length` tokens."""
  model, text = (
    Answers(writer, batch=2, max_length=16, starts=starts),
    'You may reproduce and distribute copies of it. ' * 2,
  )
  whole, before = writer.data.tokenizer.encode('any ' + text), len(writer.data.tokenizer.encode('any'))
  assert len(whole) - before > 20
  ((found, _),) = model.loglikelihood(ask(('any', ' ' + text)))
  ids = whole[-16:]
  assert found == pytest.approx(log_probs(writer, ids)[np.arange(16), ids].sum(), abs=1e-3)


def test_a_continuation_is_greedy_if_each_of_its_tokens_is(writer):
  model = Answers(writer)
  kinds = ([True, True], [True, False], [False, True], [False, False])
  model.scorer = lambda pieces: [Scored(np.zeros(2), np.array(kind)) for kind in kinds]
  found = model.loglikelihood(ask(*[('the', ' Work')] * 4))
  assert [greedy for _, greedy in found] == [True, False, False, False]


def test_a_context_beyond_rows_is_generated_from_its_last_tokens(writer, monkeypatch):
  asked = []
  monkeypatch.setattr(harness, 'outputs', lambda writer, prompts, *rest, **how: asked.extend(prompts) or iter(()))
  context = 'You may reproduce and distribute copies of the Work'
  Answers(writer, max_length=20).generate_until(ask((context, {'max_gen_toks': 8})))
  assert asked == [writer.data.tokenizer.encode(context)[-12:]]


def test_packed_prompts_without_a_start_are_those_of_rows_without_one(writer):
  """Greedy tokens of the full forward pass over the tokens alone, and other ones with the start in front."""
  ids = writer.data.tokenizer.encode('You may reproduce and distribute copies of the Work')
  prompts = [ids[:3], ids[:9], ids[2:7], ids[5:11]]
  assert packed_batch(prompts, writer.cfg, 32, writer.data.vocabulary.ids, starts=False) is not None
  run = lambda **how: dict(outputs(writer, prompts, [5] * 4, Decoding(batch=4), **how))
  found = run(starts=False)
  assert found != run()
  for number, prompt in enumerate(prompts):
    written: list[int] = []
    while len(written) < len(found[number]):
      known = without_start(writer, [*prompt, *written, 3])[-1, : writer.data.vocabulary.size]
      written.append(int(known.argmax()))
    assert found[number] == written


def test_rolling_windows_have_each_token_once(writer):
  """As in the documentation of the harness: the last window is full too, and only its last tokens are scored."""
  model, text = Answers(writer, batch=2, max_length=16), 'You may reproduce and distribute copies of the Work. ' * 3
  ids = writer.data.tokenizer.encode(text)
  assert len(ids) > 33
  expected = log_probs(writer, ids[:16])[np.arange(16), ids[:16]].sum()
  for begin in range(16, len(ids), 16):
    end = min(begin + 16, len(ids))
    row = without_start(writer, ids[end - 17 : end])
    expected += sum(row[i - (end - 16), ids[i]] for i in range(begin, end))
  assert model.loglikelihood_rolling(ask((text,), ('any',)))[0] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize('starts', [True, False])
def test_texts_end_before_the_first_stop(writer, starts):
  """Greedy tokens of the full forward pass, cut at a stop; requests with other options are answered too."""
  model, encode = Answers(writer, batch=2, starts=starts), writer.data.tokenizer.encode
  ids = encode('the License')
  written = []
  for _ in range(8):
    row = [*ids, *written, 3]  # the last token is not read
    known = (log_probs if starts else without_start)(writer, row)[-1, : writer.data.vocabulary.size]
    written.append(int(known.argmax()))
  written = [token for token in written if writer.data.vocabulary.special(token) is None]  # a sentinel is no text
  text = writer.data.tokenizer.decode_after(ids, written)
  short, long = {'until': [], 'max_gen_toks': 8}, {'until': [text[2:4]], 'max_gen_toks': 8}
  found = model.generate_until(ask(('the License', long), ('the License', short), ('', short)))
  assert found[1] == text
  assert found[0] == text.split(text[2:4])[0] != text
  assert isinstance(found[2], str)


def test_options_of_a_task():
  assert options_of({'until': 'x', 'max_gen_toks': 3}) == (3, ['x'], Sampling())
  assert options_of({'do_sample': True, 'temperature': 0.5, 'top_p': 0.9})[2] == Sampling(temperature=0.5, top_p=0.9)
  assert options_of({'do_sample': False, 'temperature': 0.5})[2] == Sampling()
  with pytest.raises(ConfigError, match='num_beams: generation options that are not supported'):
    options_of({'num_beams': 3})


def test_models_and_requests_that_cannot_be_are_refused(writer, text_store, monkeypatch):
  with pytest.raises(ConfigError, match='continues text from left to right; a run with model'):
    Answers(writer_on(text_store, 'prefix_lm'))
  with pytest.raises(ConfigError, match='max_gen_toks=64 leaves no room in rows of 64 tokens'):
    Answers(writer).generate_until(ask(('a', {'max_gen_toks': 64})))
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  with pytest.raises(ConfigError, match='lm-evaluation-harness is not installed; pip install'):
    harness_model(writer)


def test_the_class_extends_that_of_the_harness(writer, monkeypatch):
  """The harness looks for an instance of its own base class, whose constructor sets what it reads."""

  class LM:
    def __init__(self):
      self._rank = 0

  names = ('lm_eval', 'lm_eval.api', 'lm_eval.api.model')
  for name in names:
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(LM=LM, __path__=[]))
  model = harness_model(writer, batch=4, max_length=32)
  assert isinstance(model, LM)
  assert (model._rank, model.max_length, model.batch, model.eot_token_id) == (0, 32, 4, 1)
