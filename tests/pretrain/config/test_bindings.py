"""Config files: what they may say, and the sentence for everything else."""

import dataclasses
import os
from typing import Annotated, Literal

import pytest

from pretrain.config import bindings
from pretrain.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mlp:
  hidden: int = 64
  activation: Literal['gelu', 'silu'] = 'gelu'
  scale: Annotated[float, '[0, 1)'] = 0.5
  sinks: Annotated[int, '>= 1'] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
  name: Literal['decoder'] = 'decoder'
  embed: int
  num_layers: int = 2
  dropout: float = 0.0
  tied: bool = False
  mlp: Mlp = Mlp(hidden=128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
  name: Literal['encoder'] = 'encoder'
  embed: int
  buckets: int = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  path: str
  weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  sources: tuple[Source, ...] = ()
  window: tuple[int, int] | None = None
  ema: Mlp | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Root:
  model: Decoder | Encoder
  data: Data = Data()
  seed: int = 0


BASE = "model.name = 'decoder'\nmodel.embed = 8\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
  """Writes a file into the current folder, a fresh one."""
  monkeypatch.chdir(tmp_path)

  def write(text, name='x.gin'):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return name

  return write


def load(*files, overrides=()):
  return bindings.load(Root, files, overrides)


def message(*files, overrides=()):
  with pytest.raises(ConfigError) as caught:
    load(*files, overrides=overrides)
  return str(caught.value)


def test_values_become_frozen_dataclasses(write):
  cfg = load(write(BASE + "model.dropout = 1\nmodel.mlp.activation = 'silu'\ndata.window = [1, 2]\nseed = 7"))
  assert cfg == Root(
    model=Decoder(embed=8, dropout=1.0, mlp=Mlp(hidden=128, activation='silu')), data=Data(window=(1, 2)), seed=7
  )
  assert type(cfg.model.dropout) is float
  with pytest.raises(dataclasses.FrozenInstanceError):
    cfg.seed = 8


def test_one_key_of_a_section_leaves_its_other_defaults(write):
  """The default of `model.mlp` is not the default of its class."""
  assert load(write(BASE + "model.mlp.activation = 'silu'")).model.mlp.hidden == 128


def test_the_last_binding_wins_and_overrides_come_last(write):
  first, second = write(BASE + 'seed = 1\nseed = 2', 'a.gin'), write('seed = 3', 'b.gin')
  assert load(first).seed == 2
  assert load(first, second).seed == 3
  assert load(first, second, overrides=['seed=4', 'seed=5']).seed == 5


def test_includes_are_relative_to_the_file_that_includes(write):
  write(BASE + 'seed = 1', 'lib/base.gin')
  write("include 'base.gin'\nmodel.num_layers = 3", 'lib/deep.gin')
  cfg = load(write("include 'lib/deep.gin'\nseed = 2", 'x.gin'))
  assert (cfg.seed, cfg.model.num_layers, cfg.model.embed) == (2, 3, 8)


def test_another_choice_leaves_behind_what_only_the_first_one_had(write):
  write(BASE + 'model.num_layers = 3\nmodel.mlp.hidden = 5', 'base.gin')
  assert load(write("include 'base.gin'\nmodel.name = 'encoder'")).model == Encoder(embed=8)
  wrong = write("include 'base.gin'\nmodel.name = 'encoder'\nmodel.num_layers = 4")
  assert 'x.gin:3: unknown key model.num_layers' in message(wrong), 'written for the new choice: a mistake'
  assert 'unknown key model.buckets' in message(write("include 'base.gin'\nmodel.buckets = 4\nmodel.name = 'decoder'"))


def test_macros_are_replaced_also_inside_lists_and_may_be_overridden(write):
  file = write(
    f"{BASE}WIDTH = 8\nTWICE = %WIDTH\nmodel.embed = %TWICE\ndata.sources = [{{'path': 'a', 'weight': %WIDTH}}]"
  )
  assert (load(file).model.embed, load(file).data.sources[0].weight) == (8, 8.0)
  assert load(file, overrides=['TWICE=16']).model.embed == 16


def test_a_list_of_dicts_becomes_a_tuple_of_dataclasses(write):
  cfg = load(write(BASE + "data.sources = [{'path': 'a'}, {'path': 'b', 'weight': 2}]"))
  assert cfg.data.sources == (Source(path='a'), Source(path='b', weight=2.0))


def test_an_optional_section_is_none_or_has_keys(write):
  assert load(write(BASE)).data.ema is None
  assert load(write(BASE + 'data.ema.hidden = 3')).data.ema == Mlp(hidden=3)
  assert load(write(BASE + 'data.ema = None')).data.ema is None


@pytest.mark.parametrize(
  'cfg',
  [
    Root(model=Decoder(embed=8)),
    Root(model=Encoder(embed=1, buckets=3), seed=-1),
    Root(model=Decoder(embed=8, dropout=0.1 + 0.2, tied=True, mlp=Mlp(activation='silu')), data=Data(ema=Mlp())),
    Root(model=Decoder(embed=8), data=Data(sources=(Source(path='a # "b" \'c\'\n\\ é'),), window=(3, 4))),
  ],
)
def test_the_resolved_text_reads_back_to_the_same_config(write, cfg):
  assert load(write(bindings.render(cfg))) == cfg


def test_the_resolved_text_is_one_line_a_key_grouped_by_section():
  cfg = Root(model=Encoder(embed=8), data=Data(sources=(Source(path='a'),)))
  assert bindings.render(cfg) == (
    "model.name = 'encoder'\nmodel.embed = 8\nmodel.buckets = 32\n\n"
    "data.sources = [{'path': 'a', 'weight': 1.0}]\ndata.window = None\ndata.ema = None\n\nseed = 0\n"
  )


@pytest.mark.parametrize(
  ('text', 'sentence'),
  [
    ('model.num_layer = 3', 'x.gin:3: unknown key model.num_layer; did you mean model.num_layers?'),
    ('modle.embed = 3', 'x.gin:3: unknown key modle; did you mean model?'),
    ('model.mlp.width = 3', 'x.gin:3: unknown key model.mlp.width; the keys are hidden, activation, scale, sinks.'),
    (
      'model.buckets = 3',
      "x.gin:3: unknown key model.buckets; with model.name='decoder' the keys are name, embed, num_layers, dropout, "
      "tied, mlp (it is a key of 'encoder').",
    ),
    (
      "data.sources = [{'path': 'a'}, {'path': 'b', 'wieght': 2}]",
      'x.gin:3: unknown key data.sources[1].wieght; did you mean data.sources[1].weight?',
    ),
    ("data.sources = [{'path': 'a', 1: 'x'}]", 'x.gin:3: unknown key data.sources[0].1; the keys are path, weight.'),
    ('model.mlp.scale = 1', 'x.gin:3: model.mlp.scale=1; it must be in [0, 1).'),
    ('model.mlp.scale = -0.5', 'x.gin:3: model.mlp.scale=-0.5; it must be in [0, 1).'),
    ('model.mlp.sinks = 0', 'x.gin:3: model.mlp.sinks=0; it must be >= 1.'),
    (
      'model.mlp.sinks = 2147483648',
      'x.gin:3: model.mlp.sinks=2147483648 does not fit in 32 bits; the largest is 2147483647.',
    ),
    ('seed = -2147483649', 'x.gin:3: seed=-2147483649 does not fit in 32 bits; the largest is 2147483647.'),
    ("model.mlp.sinks = 'a'", "x.gin:3: model.mlp.sinks='a' is str, expected int."),
    (
      "data.sources = [{'weight': 2}]",
      'data.sources[0].path is required and not set; add it to data.sources at x.gin:3.',
    ),
    ("data.sources = 'a'", "x.gin:3: data.sources='a' is str, expected a list."),
    ('data.sources = [3]', 'x.gin:3: data.sources[0]=3 is int, expected a dict with the keys path, weight.'),
    ("model.embed = '8'", "x.gin:3: model.embed='8' is str, expected int."),
    ('model.embed = 8.0', 'x.gin:3: model.embed=8.0 is float, expected int.'),
    ('model.embed = True', 'x.gin:3: model.embed=True is bool, expected int.'),
    ('model.embed = None', 'x.gin:3: model.embed=None is NoneType, expected int.'),
    ('model.tied = 1', 'x.gin:3: model.tied=1 is int, expected bool.'),
    ("model.dropout = 'high'", "x.gin:3: model.dropout='high' is str, expected float."),
    ('model.dropout = 1e999', 'x.gin:3: model.dropout is inf, expected a finite number.'),
    ('model.mlp = 3', 'x.gin:3: model.mlp=3 is int, expected keys of its own: model.mlp.hidden = …'),
    ('model.embed.size = 3', 'x.gin:3: model.embed.size: model.embed already has a value (x.gin:2).'),
    ('data.window = (1, 2, 3)', 'x.gin:3: data.window has 3 values, expected 2.'),
    ("data.window = (1, 'b')", "x.gin:3: data.window[1]='b' is str, expected int."),
    (
      "model.mlp.activation = 'slu'",
      "x.gin:3: model.mlp.activation='slu' is not one of 'gelu', 'silu'; did you mean 'silu'?",
    ),
    (
      "model.name = 'decodr'",
      "x.gin:3: model.name='decodr' is not one of 'decoder', 'encoder'; did you mean 'decoder'?",
    ),
    ('seed = %WIDTH', 'x.gin:3: %WIDTH is not defined; add WIDTH = … (macros are written in capitals).'),
    (
      'seed = @adam()',
      "x.gin:3: @adam is a reference; configs hold values. Name the choice: optimizer.name = 'adamw'.",
    ),
    (
      "data.sources = [{'path': @adam}]",
      "x.gin:3: @adam is a reference; configs hold values. Name the choice: optimizer.name = 'adamw'.",
    ),
    ('import os', 'x.gin:3: import os: configs hold values, code holds code. Remove the line.'),
    ('eval/model.embed = 3', 'x.gin:3: eval/ is a scope; give each section its own key, e.g. model.embed = …'),
    (
      "include 'no.gin'",
      'x.gin:3: no.gin (looked for in CWD) cannot be read (No such file or directory); check the path.',
    ),
    ("include 'x.gin'", 'x.gin:3: x.gin includes itself; remove one of the includes.'),
    ('seed = 3 4', 'x.gin:3: syntax error; write one `key = value` to a line, strings in quotes.'),
    ('seed = [3', 'x.gin:3: syntax error; write one `key = value` to a line, strings in quotes.'),
    ('model.dtype = bfloat16', 'x.gin:3: syntax error; write one `key = value` to a line, strings in quotes.'),
    ('what is this', 'x.gin:3: syntax error; write one `key = value` to a line, strings in quotes.'),
    ('seed = "3', 'x.gin:3: syntax error; write one `key = value` to a line, strings in quotes.'),
  ],
)
def test_a_mistake_in_a_file_names_its_line(write, text, sentence):
  assert message(write(BASE + text)) == f'CONFIG: {sentence}'.replace('CWD', os.getcwd())


@pytest.mark.parametrize(
  ('override', 'sentence'),
  [
    ('model.num_layer=3', '--gin.model.num_layer: unknown key model.num_layer; did you mean model.num_layers?'),
    ('model.embed=big', '--gin.model.embed: syntax error; write one `key = value` to a line, strings in quotes.'),
    ("model.embed='8'", "--gin.model.embed: model.embed='8' is str, expected int."),
    ('seed=%WIDTH', '--gin.seed: %WIDTH is not defined; add WIDTH = … (macros are written in capitals).'),
  ],
)
def test_a_mistake_in_an_override_names_the_flag(write, override, sentence):
  assert message(write(BASE), overrides=[override]) == f'CONFIG: {sentence}'


def test_a_missing_key_names_the_file_to_add_it_to(write):
  assert message(write("model.name = 'decoder'")) == (
    'CONFIG: model.embed is required and not set; add model.embed = … to x.gin.'
  )
  assert message(write('seed = 1')) == (
    "CONFIG: model.name is required and not set; add model.name = … to x.gin, one of 'decoder', 'encoder'."
  )


def test_a_mistake_in_an_included_file_names_that_file(write):
  write('\n\nmodel.embde = 3', 'lib/base.gin')
  assert message(write(f"{BASE}include 'lib/base.gin'")) == (
    'CONFIG: lib/base.gin:3: unknown key model.embde; did you mean model.embed?'
  )


def test_a_file_that_is_not_there_or_not_text_is_named(write):
  where = f'no.gin (looked for in {os.getcwd()})'
  assert message('no.gin') == f'CONFIG: --gin_file={where} cannot be read (No such file or directory); check the path.'
  with open('bytes.gin', 'wb') as file:
    file.write(b'seed = 1\n\xff\xfe')
  assert message('bytes.gin') == 'CONFIG: --gin_file=bytes.gin is not UTF-8 text (byte 9); is it a gin file?'
