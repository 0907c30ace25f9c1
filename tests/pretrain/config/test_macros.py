"""Macros that no key uses are refused, and names of other stacks get the key to use."""

import pytest

from pretrain.config import bindings
from pretrain.config.other_stacks import KEYS, OTHERWISE
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from tests.pretrain import tiny

FILE = str(tiny.DECODER)


def refusal(*files, overrides=()):
  with pytest.raises(ConfigError) as caught:
    bindings.load(Experiment, files, overrides)
  return str(caught.value)


@pytest.fixture
def write(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)

  def write(text, name='x.gin'):
    (tmp_path / name).write_text(f"include '{FILE}'\n{text}" if name == 'x.gin' else text)
    return name

  return write


def test_a_macro_that_no_key_uses_is_refused_with_its_line_and_the_nearest_one(write):
  file = write('WIDTH = 64\nmodel.embed = %WIDTH\nWIDHT = 256\n')
  assert refusal(file) == 'CONFIG: x.gin:4: no key uses the macro WIDHT; did you mean WIDTH?'
  assert refusal(write('WIDHT = 256\nmodel.embed = %WIDTH')) == (
    'CONFIG: x.gin:2: no key uses the macro WIDHT; did you mean WIDTH?'
  )
  assert refusal(write('FOO = 1')) == 'CONFIG: x.gin:2: no key uses the macro FOO; remove it, or use it: KEY = %FOO.'
  assert refusal(FILE, overrides=['FOO=1']).startswith('CONFIG: --gin.FOO: no key uses the macro FOO; remove it')


def test_a_macro_used_only_by_unused_macros_or_itself_is_unused(write):
  assert 'x.gin:2: no key uses the macro A;' in refusal(write('A = %B\nB = 1'))
  assert 'x.gin:2: no key uses the macro A;' in refusal(write('A = %A'))
  assert 'x.gin:2: no key uses the macro A;' in refusal(write('A = %B\nB = %A'))


def test_a_macro_is_used_through_others_in_any_file_and_in_a_value_that_is_replaced(write):
  write('WIDTH = 64\nHALF = 32\n', 'sizes.gin')
  file = write("include 'sizes.gin'\nTWICE = %WIDTH\nmodel.embed = %TWICE\nphases = [{'start_step': 1, 'set': "
               "{'schedule.peak': %HALF}}]")  # fmt: skip
  assert bindings.load(Experiment, [file]).model.embed == 64
  replaced = bindings.load(Experiment, [file], ['model.embed=96', 'phases=[]'])
  assert (replaced.model.embed, replaced.phases) == (96, ())
  used_later = write("include 'sizes.gin'\nmodel.embed = %WIDTH")
  assert bindings.load(Experiment, [used_later], ['model.head_dim=%HALF']).model.head_dim == 32
  assert refusal(used_later) == 'CONFIG: sizes.gin:2: no key uses the macro HALF; remove it, or use it: KEY = %HALF.'


@pytest.mark.parametrize(
  ('macro', 'instead'),
  [
    ('TRAIN_STEPS=100', 'write train.steps = ….'),
    ('BATCH_SIZE=8', 'write data.batch_size = ….'),
    ("TASK_FEATURE_LENGTHS={'inputs': 512}", 'write data.inputs_length = … and data.targets_length = ….'),
    ("MIXTURE_OR_TASK_NAME='c4'", 'write data.sources = ….'),
    ('DROPOUT_RATE=0.1', 'write model.dropout = ….'),
    ('USE_CACHED_TASKS=False', 'remove it: data is always prepared ahead, by pretrain data prepare.'),
    ('LOSS_NORMALIZING_FACTOR=1', 'remove it: the loss of a step is the mean over its target tokens.'),
    ("MODEL_DIR='x'", 'the flag is --workdir.'),
  ],
)
def test_a_macro_of_t5x_gets_the_key_to_use(macro, instead):
  name = macro.split('=')[0]
  assert refusal(FILE, overrides=[macro]) == f'CONFIG: --gin.{name}: no key uses the macro {name}; {instead}'


def test_a_macro_with_such_a_name_may_be_used():
  assert bindings.load(Experiment, [FILE], ['TRAIN_STEPS=7', 'train.steps=%TRAIN_STEPS']).train.steps == 7


def test_a_key_of_maxtext_gets_the_key_to_use():
  assert refusal(FILE, overrides=['per_device_batch_size=8']) == (
    'CONFIG: --gin.per_device_batch_size: unknown key per_device_batch_size; write data.batch_size = ….'
  )


STORE = ["data.name='store'", "data.sources=[{'path': 'a'}]"]


def test_the_keys_to_use_exist():
  known = set()
  for file, overrides in ((FILE, []), (str(tiny.UL2), []), (FILE, STORE)):
    known |= set(bindings.flatten(bindings.load(Experiment, [file], overrides)))
  assert not {key for keys in KEYS.values() for key in keys.split(' and ')} - known
  assert not set(KEYS) & set(OTHERWISE)
