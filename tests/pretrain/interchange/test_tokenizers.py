"""An imported model with a tokenizer.json: import, prompts, the end of generation, training that goes on."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from data.batches.source import open_data
from data.prepare.published import published, tokenizer_in
from models.build import build
from models.decode.writing import greedy
from pretrain.cli.main import main
from pretrain.config import bindings
from pretrain.evaluation.imported import tokenizer_of
from pretrain.evaluation.prompts import prompt_batch
from pretrain.experiment.experiment import Experiment
from pretrain.interchange.config_json import ConfigJson
from pretrain.interchange.exporting import config_values
from pretrain.interchange.families import FAMILIES
from pretrain.interchange.importing import needed
from pretrain.interchange.safetensors import create
from pretrain.tools.weights import config_of
from tests.pretrain.interchange.goldens import load
from tests.tokenizers_json import publish

SIZES = {
  'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 1, 'num_attention_heads': 2,
  'num_key_value_heads': 2, 'tie_word_embeddings': False,
}  # fmt: skip
LLAMA = {'bos_token_id': 1, 'eos_token_id': 2}
QWEN = {'bos_token_id': 400, 'eos_token_id': 401}
KINDS = {
  'llama': ('byte_fallback', 480, {'config': LLAMA}),
  'qwen': (
    'byte_level', 402,
    {'config': QWEN, 'generation_config': {'eos_token_id': [401, 400]},
     'tokenizer_config': {'bos_token': None, 'eos_token': '<|endoftext|>', 'add_bos_token': False}},
  ),
}  # fmt: skip


def published_model(folder: pathlib.Path, kind: str, rows: int | None = None) -> pathlib.Path:
  """A folder as `save_pretrained` writes it: a Llama of one layer with random weights, and a tokenizer.json."""
  tokenizer, size, files = KINDS[kind]
  config = {'model_type': 'llama', 'vocab_size': rows or size, **SIZES, **files['config']}
  publish(folder, tokenizer, **{**files, 'config': config})
  family = FAMILIES['llama']
  shapes = needed(family, family.read(ConfigJson(config, folder), {}), config)
  rng = np.random.default_rng(1)
  for array in create(folder, {name: ('F32', shape) for name, shape in shapes.items()}).values():
    array[...] = rng.normal(0, 0.3, array.shape)
  return folder


@pytest.fixture(scope='module', params=KINDS)
def imported(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('imported')
  source, run = published_model(folder / request.param, request.param), folder / 'run'
  assert main(['import', f'--from={source}', f'--workdir={run}']) == 0
  return request.param, source, run


def continued(source: pathlib.Path, ids: list[int], count: int) -> list[int]:
  """The greedy continuation, from a whole forward pass for each token."""
  found, params = load(source)
  model = build(found.model)

  @jax.jit
  def logits_at(row, length):
    fields = {
      'decoder_input_tokens': row[None], 'decoder_positions': np.arange(len(row))[None],
      'decoder_segment_ids': np.ones((1, len(row)), np.int32), 'example_index': np.zeros(1, np.int32),
    }  # fmt: skip
    return model.logits(params, model.apply(params, fields)[0])[0, length - 1]

  row, length = np.zeros(len(ids) + count, np.int32), len(ids)
  row[:length] = ids
  for _ in range(count):
    row[length] = int(np.argmax(logits_at(row, length)))
    length += 1
  return row[len(ids) :].tolist()


def generated(run: pathlib.Path, capsys, prompt: str, count: int) -> str:
  assert main(['generate', f'--workdir={run}', f'--text={prompt}', f'--max_tokens={count}']) == 0
  lines = capsys.readouterr().out.splitlines()
  return next(line for line in lines if line.startswith('output')).removeprefix('output').strip()


def test_a_prompt_is_read_as_the_tokenizer_says_and_continued(imported, capsys):
  """With <s> in front of Llama's prompt, with nothing in front of Qwen's."""
  name, source, run = imported
  tokenizer = tokenizer_of(run).open(0)
  ids = [*([1] if name == 'llama' else []), *tokenizer.encode('the work')]
  wanted = continued(source, ids, 6)
  wanted = wanted[: next((i for i, token in enumerate(wanted) if token in tokenizer.vocabulary.ids.eos), 6)]
  assert len(wanted) > 1, 'the random weights end too early for this test'
  assert generated(run, capsys, 'the work', 6) == tokenizer.render(wanted).strip()


@pytest.mark.slow
def test_published_weights_write_what_their_run_does(imported, tmp_path, capsys):
  """So does an export; and what they write in 8 bits is what their packed export does."""
  _, source, run = imported
  for flags in ([], ['--quantize=int8']):
    assert main(['export', f'--workdir={run}', f'--out={tmp_path / str(len(flags))}', *flags]) == 0
  texts = []
  eight = "--gin.precision.recipe='int8_weights'"
  models = ([f'--workdir={run}'], [f'--from={source}'], [f'--from={tmp_path / "0"}'],
            [f'--from={source}', eight], [f'--from={tmp_path / "1"}'])  # fmt: skip
  capsys.readouterr()
  for flags in models:
    assert main(['generate', *flags, '--text=the work', '--max_tokens=6']) == 0
    texts.append(capsys.readouterr().out)
  assert texts[0] == texts[1] == texts[2]
  assert texts[3] == texts[4]


def test_an_export_has_the_ids_of_the_imported_tokenizer(imported, tmp_path):
  """Also where the import had no generation_config.json, and for a model of another family."""
  _, source, run = imported
  assert main(['export', f'--workdir={run}', f'--out={tmp_path / "out"}']) == 0
  ids = published(tokenizer_in(source)).ids
  assert published(tokenizer_in(tmp_path / 'out')).ids == ids
  cfg = config_of(run)
  cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, qk_norm='head'))
  values = config_values(cfg, FAMILIES['qwen3'], run / 'imported')
  assert values['model_type'] == 'qwen3'
  ends = list(ids.eos) if len(ids.eos) > 1 else ids.end
  assert (values['bos_token_id'], values['eos_token_id']) == (ids.first_input, ends)


def test_generation_stops_at_any_end_of_the_tokenizer(imported, tmp_path, capsys):
  """A token that the model writes is declared to be an end, in the files of the run."""
  name, source, run = imported
  tokenizer = tokenizer_of(run).open(0)
  ids = [*([1] if name == 'llama' else []), *tokenizer.encode('the work')]
  written = continued(source, ids, 6)
  at = next(i for i in range(1, 6) if written[i] not in written[:i])
  copy = shutil.copytree(run, tmp_path / 'run')
  (copy / 'imported/generation_config.json').write_text(json.dumps({'eos_token_id': [2, written[at]]}))
  assert generated(copy, capsys, 'the work', 6) == tokenizer.render(written[:at]).strip()


def test_behind_an_end_the_decoder_writes_padding(imported):
  _, source, _ = imported
  found, params = load(source)
  written = continued(source, [300, 301], 6)
  at = next(i for i in range(1, 6) if written[i] not in written[:i])
  batch = {'decoder_input_tokens': np.array([[300, 301]], np.int32)}
  got = greedy(build(found.model), params, batch, 6, eos=(399, written[at]), pad=7, decoder_start=0)
  assert got.tolist() == [[*written[: at + 1], *[7] * (5 - at)]]


def on_a_store(run: pathlib.Path, folder: pathlib.Path) -> Experiment:
  """The config of the run with a store of its tokenizer."""
  (folder / 't.txt').write_text('the work')
  flags = [f'--out={folder}/s', f'--tokenizer={run}/imported', '--workers=1']
  assert main(['data', 'prepare', str(folder / 't.txt'), *flags]) == 0
  over = ["data.name='store'", f"data.sources=[{{'path': '{folder}/s'}}]", 'data.batch_size=1']
  return bindings.load(Experiment, [str(run / 'config.gin')], over)


def test_training_goes_on_with_the_ids_of_the_import(imported, tmp_path):
  """Segments begin with Llama's <s>, or with Qwen's <|endoftext|>, and end with EOS."""
  name, _, run = imported
  cfg = on_a_store(run, tmp_path)
  data = open_data(cfg.data, cfg.objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=tmp_path)
  batch = data.batch(0, slice(0, 1))
  used = batch['decoder_segment_ids'][0] > 0
  first, end = (1, 2) if name == 'llama' else (400, 400)
  assert batch['decoder_input_tokens'][0, 0] == first
  assert batch['decoder_target_tokens'][0][used][-1] == end
  row = prompt_batch([[300]], cfg, 1, data.vocabulary.ids)
  assert row['decoder_input_tokens'].tolist() == [[first, 300]], 'prompts begin as in training'


def test_an_export_of_a_run_that_was_not_imported_has_its_ids(imported, tmp_path):
  name, source, run = imported
  cfg, copy = on_a_store(run, tmp_path), shutil.copytree(run, tmp_path / 'run')
  shutil.rmtree(copy / 'imported')
  (copy / 'config.gin').write_text(bindings.render(cfg))
  assert main(['export', f'--workdir={copy}', f'--out={tmp_path}/out']) == 0
  wanted = {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': None}
  if name == 'qwen':
    wanted = {'bos_token_id': 400, 'eos_token_id': [400, 401], 'pad_token_id': None}
  config, generation = (
    json.loads((tmp_path / 'out' / file).read_text()) for file in ('config.json', 'generation_config.json')
  )
  assert generation == wanted
  assert {key: config[key] for key in wanted} == wanted
  assert (tmp_path / 'out/tokenizer.json').read_bytes() == (source / 'tokenizer.json').read_bytes()


def test_more_pieces_than_rows_are_refused_with_both_numbers(tmp_path, capsys):
  source = published_model(tmp_path / 'm', 'llama', rows=400)
  assert main(['import', f'--from={source}', f'--workdir={tmp_path}/run']) == 66
  err = capsys.readouterr().err
  assert err.count('\n') == 1
  assert 'tokenizer.json has 480 pieces, the embedding in' in err
  assert 'has 400 rows. Nothing was written' in err
  assert not (tmp_path / 'run').exists()


def test_an_export_has_the_tokenizer_of_the_import(imported, tmp_path):
  _, source, run = imported
  assert main(['export', f'--workdir={run}', f'--out={tmp_path}/out']) == 0
  assert (tmp_path / 'out/tokenizer.json').read_bytes() == (source / 'tokenizer.json').read_bytes()


def test_a_part_of_a_tokenizer_reads_no_prompt(imported, tmp_path, capsys):
  copy = shutil.copytree(imported[2], tmp_path / 'run')
  (copy / 'imported/tokenizer.json').rename(copy / 'imported/vocab.json')
  assert main(['generate', f'--workdir={copy}', '--text=the']) == 64
  err = capsys.readouterr().err
  assert 'has only vocab.json, which is a part of a tokenizer (spiece.model, tokenizer.model' in err


def test_an_imported_bert_reads_its_own_tokens_around_a_text(tmp_path):
  """[CLS] text [SEP] and [MASK], in a table that has no row for a sentinel."""
  source, run = tmp_path / 'bert', tmp_path / 'run'
  config = {
    'model_type': 'bert', 'vocab_size': 300, 'max_position_embeddings': 64, 'type_vocab_size': 2,
    **{key: SIZES[key] for key in ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')},
  }  # fmt: skip
  publish(source, 'wordpiece', config=config, tokenizer_config={'do_lower_case': True})
  family = FAMILIES['bert']
  shapes = needed(family, family.read(ConfigJson(config, source), {}), config)
  for array in create(source, {name: ('F32', shape) for name, shape in shapes.items()}).values():
    array[...] = 0.1
  assert main(['import', f'--from={source}', f'--workdir={run}']) == 0
  cfg = on_a_store(run, tmp_path)
  assert cfg.data.sentinels == 1
  data = open_data(cfg.data, cfg.objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=tmp_path)
  batch = data.batch(0, slice(0, 1))
  used = batch['encoder_segment_ids'][0] == 1
  read, answer, weight = (
    batch[name][0][used] for name in ('encoder_input_tokens', 'decoder_target_tokens', 'decoder_loss_weights')
  )
  assert answer.tolist() == [2, *data.tokenizer.encode('the work'), 3]
  assert read[[0, -1]].tolist() == [2, 3]
  assert weight[[0, -1]].tolist() == [0, 0]
  assert weight.sum() == 1
  assert read.max() < 300, 'no sentinel, for which the table has no row'


def test_a_chat_template_comes_back_unchanged(tmp_path):
  """In tokenizer_config.json, where `transformers` had it, and in a file of its own, where it has it now."""
  source = published_model(tmp_path / 'source', 'qwen')
  template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %} — ½"
  config = json.loads((source / 'tokenizer_config.json').read_text()) | {'chat_template': template}
  (source / 'tokenizer_config.json').write_text(json.dumps(config, indent=7, ensure_ascii=False))
  (source / 'chat_template.jinja').write_text(template)
  assert main(['import', f'--from={source}', f'--workdir={tmp_path / "run"}']) == 0
  assert main(['export', f'--workdir={tmp_path / "run"}', f'--out={tmp_path / "out"}']) == 0
  for name in ('tokenizer_config.json', 'chat_template.jinja'):
    assert (tmp_path / 'out' / name).read_bytes() == (source / name).read_bytes()
