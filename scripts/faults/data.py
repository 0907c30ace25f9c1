"""Damaged stores and text, and runs that are told to resume with other data: F12, F13, F14."""

import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Sequence

from faults.case import CONFIG, ROOT, TINY, Line, call
from faults.refusals import FAST, Trial, copied, flip, line_of, pretrain, training


def make_store(options, name: str = 'store', text: str = 'words', vocab_size: int = 400) -> pathlib.Path:
  """A store of a few documents, with a tokenizer of its own."""
  path = options.workdir / name
  if not path.exists():
    license_text = (ROOT / 'LICENSE').read_text()
    (options.workdir / f'{name}.txt').write_text(license_text.replace('work', text) * 3)
    code, said = pretrain('data', 'prepare', str(options.workdir / f'{name}.txt'), f'--out={path}', '--sentinels=8',
                          f'--vocab_size={vocab_size}', '--documents=paragraph', '--workers=1')  # fmt: skip
    assert code == 0, said
  return path


def over(store: pathlib.Path) -> dict:
  return {'data__name': "'store'", 'data__sources': f"[{{'path': '{store}'}}]", 'data__sentinels': 8, 'train__steps': 3}


def f12(options, alone) -> Line:
  """a store is cut off, flipped, empty, lacks a file, has a wrong manifest: code 65, the file or documents are named"""
  store = make_store(options)
  ways: dict[str, tuple[str, Callable[[pathlib.Path], object], str]] = {
    'cut off': ('tokens/c/0', lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), 'tokens/c/0'),
    'flipped': ('tokens/c/0', flip_chunk, 'tokens/c/0'),
    'empty': ('tokens/c/0', lambda p: p.write_bytes(b''), 'tokens/c/0'),
    'missing': ('tokens/c/0', pathlib.Path.unlink, 'tokens'),
    'offsets flipped': ('document_offsets/c/0', flip_chunk, 'document_offsets'),
    'offsets missing': ('document_offsets/c/0', pathlib.Path.unlink, 'document_offsets'),
    'manifest cut off': ('manifest.json', lambda p: p.write_bytes(p.read_bytes()[:-20]), 'manifest.json'),
    'a longer document': ('manifest.json', longer_document, 'its manifest.json says'),
    'tokenizer flipped': ('tokenizer.model', flip, 'tokenizer.model'),
  }
  trials = []
  for name, (file, damage, word) in ways.items():
    path = copied(store, f'f12_{name.replace(" ", "_")}', options)
    damage(path / file)
    workdir = options.workdir / f'{path.name}_run'
    trials.append(Trial(name, lambda p=path, w=workdir: training(w, **over(p)), 65, ['DATA-CORRUPT', word], path))
    trials.append(Trial(f'{name}, verify', lambda p=path: pretrain('data', 'verify', str(p)), 65, [word], path))
  fine = Trial('whole', lambda: training(options.workdir / 'f12_whole', **over(store)), 0, [], store)
  return line_of([fine, *trials, *array_record_trials(options)])


def flip_chunk(path: pathlib.Path) -> None:
  """Flips a bit near the start of a file of chunks, where the values are, not the index of empty chunks."""
  data = bytearray(path.read_bytes())
  data[min(40, len(data) // 4)] ^= 4
  path.write_bytes(data)


def longer_document(path: pathlib.Path) -> None:
  found = json.loads(path.read_text())
  found['shards'][0]['tokens'] += 10**12
  path.write_text(json.dumps(found))


def array_record_trials(options) -> list[Trial]:
  """Record files for `pretrain data prepare`: cut off, with a flipped bit, empty, missing, or of another kind."""
  from array_record.python.array_record_module import ArrayRecordWriter

  whole = options.workdir / 'r.arrayrecord'
  writer = ArrayRecordWriter(str(whole), 'group_size:1')
  for i in range(2000):
    writer.write(f'the text of document {i}'.encode() * 20)
  writer.close()
  tokenizer = make_store(options) / 'tokenizer.model'
  ways: dict[str, Callable[[pathlib.Path], object]] = {
    'cut off': lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), 'flipped': flip,
    'empty': lambda p: p.write_bytes(b''), 'missing': pathlib.Path.unlink, 'text': lambda p: p.write_text('text' * 99),
  }  # fmt: skip
  trials = []
  for name, damage in ways.items():
    path, out = options.workdir / f'{name.replace(" ", "_")}.arrayrecord', options.workdir / f'{name}.store'
    shutil.copy(whole, path)
    damage(path)
    act = lambda p=path, o=out: pretrain(
      'data', 'prepare', str(p), f'--out={o}', f'--tokenizer={tokenizer}', '--sentinels=8', '--workers=1'
    )
    trials.append(Trial(f'records {name}', act, 65, [path.name], None))
  return trials


def f13(options, alone) -> Line:
  """input that is not text: the byte is named; an empty document is left out; a line of 10 MB is a document"""
  tokenizer = make_store(options) / 'tokenizer.model'

  def trial(name: str, file: str, content: bytes, code: int, words: Sequence[str], *flags: str) -> Trial:
    path, out = options.workdir / file, options.workdir / f'{file}.store'
    path.write_bytes(content)
    shutil.rmtree(out, ignore_errors=True)
    more = ['--documents=line'] if file.endswith('.txt') else []
    act = lambda: pretrain('data', 'prepare', str(path), f'--out={out}', f'--tokenizer={tokenizer}', '--sentinels=8',
                           '--workers=1', *more)  # fmt: skip
    return Trial(name, act, code, words)

  line = b'word ' * 2_000_000 + b'\n'
  return line_of([
    trial('a bad byte', 'a.txt', b'good\nbad \xff byte', 65, ['is not UTF-8 text (byte 9)']),
    trial('a bad byte after 10 MB', 'b.txt', line + b'\xc3(', 65, [f'is not UTF-8 text (byte {len(line)})']),
    trial('a bad byte in a record', 'c.jsonl', b'{"text": "a"}\n{"text": "b\xff"}', 65, ['byte']),
    trial('half a surrogate pair', 'd.jsonl', b'{"text": "b\\ud800"}', 65, ['d.jsonl:1', 'surrogate']),
    trial('a NUL', 'e.txt', b'te\0xt', 65, ['is binary (a NUL at byte 2)']),
    trial('nothing', 'f.txt', b' \n\n', 65, ['is empty']),
    trial('an empty document', 'g.jsonl', b'{"text": "a"}\n{"text": ""}\n{"text": "b"}', 0, ['in 2 documents']),
    trial('a line of 10 MB', 'h.txt', line, 0, ['in 1 documents']),
    trial('a record of 10 MB', 'i.jsonl', json.dumps({'text': 'word ' * 2_000_000}).encode(), 0, ['in 1 documents']),
  ])  # fmt: skip


def f14(options, alone) -> Line:
  """a run is told to resume with another tokenizer, mixture, seed, length, objective: both values, and what to do"""
  run, store = options.workdir / 'f14', make_store(options)
  second = copied(store, 'second', options)
  sources = lambda *weights: [
    {'path': str(path), 'weight': weight} for path, weight in zip((store, second), weights, strict=False)
  ]
  keys = over(store) | {'data__sources': sources(1.0, 2.0), 'train__steps': 20}
  code, said = training(run, **keys)
  assert code == 0, said
  longer = keys | {'train__steps': 30}
  other = make_store(options, 'other', 'labour')
  change = lambda *words, flags=(), code=64, **changed: Trial(
    next(iter(changed)), lambda: training(run, *flags, **longer | changed), code, ['othing was changed', *words], run
  )

  def of_another_tokenizer() -> tuple[int, str]:
    """Puts other stores at the same paths."""
    for path in (store, second):
      shutil.rmtree(path)
      shutil.copytree(other, path)
    return training(run, '--allow_data_change', **longer)

  other_data = 'add --allow_data_change'
  return line_of([
    change("'weight': 2.0", "'weight': 5.0", other_data, data__sources=sources(1.0, 5.0)),
    change('data.targets_length is 32', '64 in this command', other_data, data__targets_length=64),
    change('data.batch_size is 12', '24 in this command', other_data, data__batch_size=24),
    change('seed is 0', '1 in this command', 'use another --workdir', seed=1),
    change("objective.name is 'causal_lm'", "'prefix_lm' in this command", objective__name="'prefix_lm'"),
    change('model.mlp.hidden is 64', '128 in this command', model__mlp__hidden=128),
    change('schedule.peak is 0.001', '0.01 in this command', schedule__peak=0.01),
    Trial('tokenizer', of_another_tokenizer, 66, ['CKPT-DATA', 'tokenizer was', 'is '], run),
    *prng_trials(options, alone),
  ])  # fmt: skip


def prng_trials(options, alone) -> list[Trial]:
  """The environment does not change the random numbers of a resumed run."""

  def another() -> tuple[int, str]:
    run = copied(alone(1, 120).workdir, 'f14_prng', options)
    for step in (p for p in (run / 'checkpoints').iterdir() if int(p.name) > 20):
      shutil.rmtree(step)
    flags = [f'--gin.{k}={v}' for k, v in (TINY | FAST | {'train.steps': 30}).items()]
    command = [sys.executable, '-m', 'pretrain', 'train', f'--gin_file={CONFIG}', f'--workdir={run}', *flags]
    done = call(command, JAX_DEFAULT_PRNG_IMPL='rbg', JAX_THREEFRY_PARTITIONABLE='0')
    own, whole = (json.loads((r / 'metrics.jsonl').read_text().splitlines()[-1 if r == run else 29])
                  for r in (run, alone(1, 120).workdir))  # fmt: skip
    same = all(own[key] == whole[key] for key in ('step', 'loss', 'grad_norm', 'batch_checksum'))
    return done.returncode, f'{"equal" if same else "another loss"} {done.stderr[-300:]}'

  return [Trial('another PRNG in the environment', another, 0, ['equal'])]
