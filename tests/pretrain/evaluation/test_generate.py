"""Prompts are read as training rows are, and a mistake is a one-line error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.batches.source import open_data
from data.objectives.denoise import Recipes
from data.objectives.fim import fim_ids
from data.objectives.objectives import tasks_of
from data.ragged import join
from data.stores.special_ids import T5_IDS
from data.stores.store import open_store
from data.stores.vocabulary import EOS, Vocabulary
from models.build import build
from models.decode.cached import teacher_forced
from models.decode.writing import greedy
from models.specs import initialize
from pretrain.cli.main import main
from pretrain.devices.compilation_cache import cache_dir
from pretrain.errors import ConfigError
from pretrain.evaluation.generate import _result
from pretrain.evaluation.prompts import (
  ALL,
  prompt_batch,
  prompt_inputs,
  reading_special,
  room_for,
  sees_itself,
  special_ids,
)
from pretrain.evaluation.texts import filled
from pretrain.run.train import train
from tests.pretrain import tiny


def config_of(store, objective: str, *overrides: str):
  """A tiny run of any objective: a decoder, or an encoder-decoder where the name ends in +encoder."""
  name, _, encoder = objective.partition('+')
  if encoder:
    return tiny.ul2(store, *(() if name == 'ul2' else (f"objective.name='{name}'",)), *overrides)
  rows = (*tiny.over(store), 'data.sentinels=32', 'data.targets_length=64')
  rows += ('objective.inputs_length=24',) if name == 'supervised' else ()
  rows += ('objective.prefix_attention=True',) if name == 'instruction' else ()
  return tiny.decoder(f"objective.name='{name}'", *rows, *overrides)


@pytest.fixture
def store_for(text_store, pair_store, chat_store):
  """objective -> the store that it learns from."""
  special = {'supervised': pair_store, 'instruction': chat_store}
  return lambda objective: special.get(objective.partition('+')[0], text_store)


def opened(cfg):
  return open_data(cfg.data, cfg.objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())


def first_segments(cfg, data, count: int):
  """(row, inputs, targets, places) of the first segments of training rows; `places` are theirs in the decoder."""
  for row in range(count):
    batch = data.global_rows(row, 1)
    mine = batch['decoder_segment_ids'] == 1
    tokens = batch['decoder_target_tokens'][mine]
    if cfg.data.inputs_length:
      yield batch, batch['encoder_input_tokens'][batch['encoder_segment_ids'] == 1], tokens, mine
    else:
      cut = (batch['decoder_prefix_end'][0, 0] - 1) if 'decoder_prefix_end' in batch else len(tokens) // 2
      yield batch, tokens[:cut], tokens[cut:], mine


OBJECTIVES = ['causal_lm', 'prefix_lm', 'ul2r', 'ul2', 'span_corruption', 'ul2+encoder', 'prefix_lm+encoder']


@pytest.mark.parametrize(
  'objective',
  [
    'supervised',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ('causal_lm', 'ul2+encoder', 'prefix_lm', 'ul2r', 'instruction')
    ),
  ],
)
def test_cached_decoding_has_the_logits_of_the_training_row(store_for, objective):
  """Decoding from the inputs of a packed training row computes the logits of its targets."""
  cfg = config_of(store_for(objective), objective)
  model = build(cfg.model)
  params, data = initialize(model.specs, jax.random.key(0)), opened(cfg)
  apply = jax.jit(model.apply)
  for batch, inputs, targets, mine in first_segments(cfg, data, 2):
    full = np.asarray(model.logits(params, apply(params, batch)[0]))[mine]
    prompt = prompt_batch([inputs.tolist()], cfg, len(inputs), T5_IDS)
    read = prompt['decoder_input_tokens'].shape[1]
    tokens = np.concatenate([prompt['decoder_input_tokens'][0], targets[:-1]])[None]
    cached = np.asarray(teacher_forced(model, params, prompt, jnp.asarray(tokens), at_once=read))[0]
    np.testing.assert_allclose(cached[read - 1 :], full[read - 1 :], atol=4e-5)
    chosen = np.asarray(greedy(model, params, prompt, 1, cfg.model.vocab_size, **special_ids(data)._asdict()))[0, 0]
    assert chosen == full[read - 1].argmax()


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_prompts_are_framed_as_the_inputs_of_training(text_store, objective):
  """`prompt_inputs` gives the ids that `Recipes` gives, for the prompt that a task leaves of a text."""
  cfg = config_of(text_store, objective)
  data, text = opened(cfg), 'the Work and the Derivative Works of any Contribution are in the License'
  encode, v = data.tokenizer.encode, data.vocabulary
  if objective == 'causal_lm':
    assert prompt_inputs(text, cfg, data) == encode(text)
    return
  ids, tasks, found = encode(text), tasks_of(cfg.objective), set()
  for i, task in enumerate(tasks):
    bits = np.random.default_rng(i).integers(0, 2**64, len(ids) + 1, np.uint64)
    trained = Recipes(tasks, len(ids), v).apply(join([np.int32(ids)]), np.array([i]), bits)[0].values.tolist()
    if task.kind != 'spans':
      kept = len(trained) - 1 - (task.mode is not None)
      prompt = data.tokenizer.decode(ids[:kept])
      expected = [*trained[: len(trained) - 1 - kept], *encode(prompt), EOS]
      assert prompt_inputs(prompt, cfg, data) == expected
    else:
      got = prompt_inputs('the <extra_id_0> of', cfg, data)
      middle = [*encode('the'), v.first_sentinel, *encode('of'), EOS]
      assert (got[1:], got[-1]) == (middle, EOS) if task.mode is not None else got == middle
      found.add((got[0], trained[0]))
  if tasks[-1].mode is not None:
    assert (v.mode_ids[0], v.mode_ids[0]) in found, 'an R denoiser'
    assert prompt_inputs('[NLG] the <extra_id_0>', cfg, data)[:2] == [v.mode_ids[1], encode('the')[0]], 'one is enough'


@pytest.mark.parametrize('objective', ['supervised', 'supervised+encoder'])
def test_a_prompt_of_a_run_on_pairs_is_its_inputs_and_the_output_is_the_text(pair_store, objective):
  """A prompt has the ids that its text has in the store; no token in it is special."""
  cfg = config_of(pair_store, objective)
  data, store = opened(cfg), open_store(pair_store)
  for k in range(5):
    (inputs,) = store.read([(int(store.offsets[2 * k]), int(store.offsets[2 * k + 1] - store.offsets[2 * k]))])
    assert prompt_inputs(data.tokenizer.decode(inputs[:-1]), cfg, data) == inputs.tolist()
  special = '[NLU] a <extra_id_0>'
  assert prompt_inputs(special, cfg, data) == [*data.tokenizer.encode(special), EOS]
  answer = data.tokenizer.encode('of the License')
  assert _result('the Work', prompt_inputs('the Work', cfg, data), answer, cfg, data).text == 'of the License'


@pytest.mark.parametrize('prefix', [True, False])
def test_a_prompt_of_a_chat_run_is_the_message_of_a_user(chat_store, prefix):
  """A conversation begins with the ids of its prompt, and the prompt is as visible as in training."""
  cfg = config_of(chat_store, 'instruction', f'objective.prefix_attention={prefix}')
  data, store = opened(cfg), open_store(chat_store)
  first = next(
    i for i, role in enumerate(store.column('roles', 0)) if role == 1 and store.column('turns_left', 0)[i] == 1
  )
  begin, mark = int(store.offsets[first]), int(store.tag_lengths(0)[first])
  (said,) = store.read([(begin + mark, int(store.offsets[first + 1]) - begin - mark - 1)])
  got = prompt_inputs(data.tokenizer.decode(said), cfg, data)
  assert got == store.read([(begin, len(got))])[0].tolist()
  assert data.tokenizer.decode(got[-(int(store.tag_lengths(0)[first + 1])) :]) == 'assistant:'
  batch = prompt_batch([got], cfg, len(got), T5_IDS)
  assert batch.get('decoder_prefix_end', np.zeros((1, 1)))[0, 0] == (len(got) + 1) * prefix
  assert _result('the Work', got, said.tolist(), cfg, data).text == data.tokenizer.decode(said)


def test_blanks_of_a_mixture_without_r_are_filled_by_x(text_store):
  x = "{'kind': 'X', 'mean_noise_span_length': 8.0, 'noise_density': 0.5}"
  cfg = config_of(text_store, 'ul2', f"objective.denoisers=[{{'kind': 'S'}}, {x}]")
  assert prompt_inputs('a <extra_id_0>', cfg, opened(cfg))[0] == opened(cfg).vocabulary.mode_ids[1]
  off = config_of(text_store, 'ul2', 'objective.mode_tokens=False')
  assert prompt_inputs('the', off, opened(off)) == [*opened(off).tokenizer.encode('the'), EOS]


def test_text_around_a_sentinel_has_the_pieces_of_training(text_store, tokenizer_model):
  """Any one piece of a text hidden, as in training: what is written around the blank has the same spelling."""
  data = opened(config_of(text_store, 'ul2'))
  tokenizer, first = data.tokenizer, data.vocabulary.first_sentinel
  spell = tokenizer.piece
  text = 'subject to the terms, each Contributor hereby grants redistributions (perpetual).'
  ids = tokenizer.encode(text)
  for hidden in range(len(ids)):
    before, after = (''.join(map(spell, part)) for part in (ids[:hidden], ids[hidden + 1 :]))
    space = ' ' if spell(ids[hidden]).startswith('▁') else ''
    before = before.removesuffix('▁')  # a piece of its own: in a prompt it belongs to the blank
    prompt = f'{before}{space}<extra_id_0>{after}'.replace('▁', ' ').removeprefix(' ')
    got = tokenizer.encode_prompt(prompt)
    at = got.index(first)
    assert [''.join(map(spell, part)) for part in (got[:at], got[at + 1 :])] == [before, after], prompt
  assert tokenizer.encode_prompt('[S2S] the work') == [data.vocabulary.mode_ids[2], *tokenizer.encode('the work')]


def test_filled_and_continued_text_has_the_spaces_of_the_text(text_store):
  tokenizer = opened(config_of(text_store, 'ul2')).tokenizer
  v = tokenizer.vocabulary
  read = lambda prompt, *output: filled(
    prompt, [v.mode_ids[0], *tokenizer.encode_prompt(prompt), EOS], list(output), tokenizer
  )
  work, tion = tokenizer.encode('work'), tokenizer.encode_prompt('<extra_id_0>tion')[1:]
  assert read('the', *work) == 'the work'
  assert read('the contribu', *tion) == 'the contribution'
  s = v.sentinel
  assert read('the <extra_id_0> of <extra_id_1>s', s(0), *work, s(1), *work, s(0)) == 'the work of works'
  assert read('contribu<extra_id_0>s', s(0), *tion) == 'contributions'
  assert read('the <extra_id_3> of', s(0), *work) == 'the <extra_id_3> of', 'without an answer'


MIXTURE = "objective.parts=[{'objective': {'name': 'causal_lm'}}, {'objective': {'name': 'ul2r'}}]"


def test_a_prompt_of_a_mixture_is_that_of_the_first_part_that_answers_it(text_store):
  cfg, alone = config_of(text_store, 'mixture', MIXTURE), config_of(text_store, 'ul2r')
  data = opened(cfg)
  went_on, blank = prompt_inputs('the Work', cfg, data), prompt_inputs('the <extra_id_0>', cfg, data)
  assert went_on == data.tokenizer.encode('the Work')
  assert 'decoder_prefix_end' not in prompt_batch([went_on], cfg, 9, T5_IDS), 'read from left to right'
  assert blank == prompt_inputs('the <extra_id_0>', alone, data)
  assert prompt_batch([blank], cfg, len(blank), T5_IDS)['decoder_prefix_end'].max() == len(blank) + 1


def test_one_blank_is_filled_in_the_middle_and_the_text_is_whole(text_store):
  cfg = config_of(text_store, 'fim')
  data = opened(cfg)
  tokenizer, (pre, suf, mid) = data.tokenizer, fim_ids(data.vocabulary)
  prompt = 'the contribu<extra_id_0> of the Work'
  inputs = prompt_inputs(prompt, cfg, data)
  before, after = tokenizer.encode('the contribu'), tokenizer.encode('of the Work')
  assert inputs == [pre, *before, suf, *after, mid]
  tions = tokenizer.encode_prompt('<extra_id_0>tions')[1:]
  assert _result(prompt, inputs, tions, cfg, data).text == 'the contributions of the Work'
  assert prompt_inputs('the Work', cfg, data) == tokenizer.encode('the Work')
  with pytest.raises(ConfigError, match=r"objective.name='fim' is not trained to fill blanks"):
    prompt_inputs('<extra_id_0> and <extra_id_1>', cfg, data)


def test_the_output_of_a_full_target_objective_is_the_text(text_store):
  cfg = config_of(text_store, 'bart+encoder')
  data = opened(cfg)
  inputs = prompt_inputs('the <extra_id_0> Work', cfg, data)
  assert _result('', inputs, data.tokenizer.encode('the whole Work'), cfg, data).text == 'the whole Work'


def test_random_tokens_have_no_prompts(tmp_path, capsys):
  train(tiny.decoder('train.steps=1', 'checkpoint.every=1'), tmp_path)
  capsys.readouterr()
  assert main(['generate', f'--workdir={tmp_path}', '--text=a']) == 64
  err = capsys.readouterr().err
  assert "data.name='synthetic' is random tokens" in err
  assert len(err.splitlines()) == 1


def test_an_encoder_writes_no_text(text_store, tmp_path, capsys):
  train(tiny.encoder(text_store, 'train.steps=1', 'checkpoint.every=1'), tmp_path)
  capsys.readouterr()
  assert main(['generate', f'--workdir={tmp_path}', '--text=the <extra_id_0>']) == 64
  err = capsys.readouterr().err
  assert "model.name='encoder' writes no text; generate from a run with model.name='encoder_decoder' or" in err
  assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
  ('objective', 'prompt', 'message'),
  [
    ('causal_lm', 'the <extra_id_0>', "objective.name='causal_lm' is not trained to fill blanks; leave out"),
    ('prefix_lm', 'the <extra_id_0>', "objective.name='prefix_lm' is not trained to fill blanks; leave out"),
    ('span_corruption', 'the', 'is not trained to do anything but fill blanks; mark one'),
  ],
)
def test_a_task_that_was_not_trained_is_refused(text_store, objective, prompt, message):
  cfg = config_of(text_store, objective)
  with pytest.raises(ConfigError, match=message):
    prompt_inputs(prompt, cfg, opened(cfg))


def test_the_longest_prompt_leaves_the_room_that_training_had(store_for):
  cases = (('prefix_lm', 63, 1), ('causal_lm', 63, 1), ('ul2+encoder', 64, 64), ('supervised', 24, 40))
  for objective, longest, room in cases:
    cfg = config_of(store_for(objective), objective)
    assert room_for('', [3] * longest, cfg) == room
    with pytest.raises(ConfigError, match=f'is {longest + 1} tokens, at most {longest} fit'):
      room_for('', [3] * (longest + 1), cfg)


def test_a_vocabulary_finds_its_sentinels():
  v = Vocabulary(100, 4)
  assert [t for t in range(v.size) if v.is_sentinel(t)] == [100, 101, 102, 103]


@pytest.mark.parametrize('objective', ['causal_lm', 'supervised', 'ul2+encoder'])
def test_special_tokens_of_prompts_are_text_unless_they_are_asked_for(store_for, objective):
  """</s> has id 1, which no text has; at the end of a prompt it makes no visible prefix of a causal one."""
  cfg = config_of(store_for(objective), objective)
  data = opened(cfg)
  text = 'the Work</s>of'
  plain, named, every = (
    prompt_inputs(text, cfg, reading_special(data, names)) for names in ((), ('</s>',), ('<pad>', ALL))
  )
  encode = data.tokenizer.encode
  assert EOS not in plain[:-1]
  assert (
    named
    == every
    == [*plain[: plain.index(encode('the Work')[0])], *encode('the Work'), EOS, *named[named.index(EOS) + 1 :]]
  )
  assert data.tokenizer.decode(named[named.index(EOS) + 1 :]) == 'of'
  ended = prompt_inputs('the Work</s>', cfg, reading_special(data, ('</s>',)))
  assert sees_itself(ended, cfg, EOS) == (objective != 'causal_lm')


def test_special_tokens_that_do_not_exist_are_listed(text_store, tmp_path, capsys):
  train(config_of(text_store, 'causal_lm', 'train.steps=1', 'checkpoint.every=1'), tmp_path)
  flags = ['generate', f'--workdir={tmp_path}', '--max_tokens=2']
  capsys.readouterr()
  assert main([*flags, '--text=a', '--special=<|im_start|>']) == 64
  assert capsys.readouterr().err == (
    "CONFIG: --special: '<|im_start|>' is not a special token of this tokenizer; it has <pad>, </s>.\n"
  )
  assert main([*flags, '--text=a <|im_start|>user', '--text=the Work', '--special=all']) == 65
  said = capsys.readouterr()
  assert said.err.startswith("DATA: '<|im_start|>' is not a special token of this tokenizer; it has <pad>, </s>.")
  assert said.out.startswith('prompt  the Work\n')
  assert main([*flags, '--text=a <|im_start|>user', '--special=</s>']) == 0, 'text'
