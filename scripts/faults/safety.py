"""Code, paths and secrets where there should be data: F18."""

import dataclasses
import json
import pathlib
import pickle
import shutil

from faults.case import CONFIG, Line
from faults.data import make_store, over
from faults.refusals import Trial, copied, line_of, pretrain, training


class Canary:
  """Creates a file when it is unpickled."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def f18(options, alone) -> Line:
  """code instead of data, paths that lead out, secrets: refused, never run, never printed"""
  run, canary = alone(1, 120).workdir, options.workdir / 'canary'
  code = f"__import__('pathlib').Path('{canary}').touch()"
  trials = [*planted(options, run, canary), *led_out(options, run), *secret(options)]
  for name, value in {
    'import': code, 'lambda': f'(lambda: {code})()', 'attribute': "''.__class__",
    'comprehension': f'[{code} for i in ""]',
    'reference': '@os.system()', 'yaml': "!!python/object/apply:os.system ['true']",
  }.items():  # fmt: skip
    act = lambda v=value: training(options.workdir / 'f18_config', seed=v)
    trials.append(Trial(f'config: {name}', act, 64, ['CONFIG: --gin.seed']))
  (options.workdir / 'import.gin').write_text('import os\n')
  load = lambda: pretrain('config', f'--gin_file={CONFIG}', f'--gin_file={options.workdir}/import.gin')
  trials.append(Trial('config: import of a module', load, 64, ['configs hold values, code holds code']))
  line = line_of(trials)
  return dataclasses.replace(line, survived=0, worst='planted code ran') if canary.exists() else line


def planted(options, run: pathlib.Path, canary: pathlib.Path) -> list[Trial]:
  """Pickles in place of files of a checkpoint (with correct hashes), of a kept plan, and of a store."""
  from pretrain.checkpoints import manifest

  trials, code = [], pickle.dumps(Canary(canary))
  for name, pattern in (
    ('arrays', 'state/ocdbt.process_0/d/*'),
    ('tree', 'state/_METADATA'),
    ('position', 'position/*'),
  ):
    path = copied(run, f'f18_{name}', options)
    for step in list((path / 'checkpoints').iterdir()):
      for file in step.glob(pattern):
        file.write_bytes(code)
      written = manifest.read(step)
      files = {found: manifest.hash_file(step / found) for found in written.files}
      manifest.write(step, dataclasses.replace(written, files=files))
    trials.append(Trial(f'a pickle as {name}', lambda p=path: training(p), 66, ['CKPT-CORRUPT'], None))
  store = copied(make_store(options), 'f18_store', options)
  (store / 'tokenizer.model').write_bytes(code)
  trials.append(
    Trial('a pickle as tokenizer', lambda: training(options.workdir / 'f18_t', **over(store)), 65, ['token'])
  )
  trials.append(Trial('a pickle as kept plan', lambda: read_plan(options, code), 65, ['DATA-CORRUPT', 'is damaged']))
  return trials


def read_plan(options, code: bytes) -> tuple[int, str]:
  """Reads a kept plan; numpy can read pickles if it is allowed to."""
  from data.errors import DataError
  from data.packing.kept_plans import _read

  path = options.workdir / 'plan.npz'
  path.write_bytes(code)
  try:
    return 0, str(_read(path))
  except DataError as error:
    return error.exit_code, str(error)


def led_out(options, run: pathlib.Path) -> list[Trial]:
  """Names with ../ and symbolic links: for a file in a manifest, a step, a folder in it, a column of a store."""
  from pretrain.checkpoints import manifest

  def one_step(name: str) -> pathlib.Path:
    path = copied(run, f'f18_{name}', options)
    for step in (p for p in (path / 'checkpoints').iterdir() if p.name != '120'):
      shutil.rmtree(step)
    return path

  path = one_step('outside')
  step = path / 'checkpoints/120'
  written = manifest.read(step)
  outside = options.workdir / 'outside'
  outside.write_text('x')
  manifest.write(
    step, dataclasses.replace(written, files=written.files | {'../../../outside': manifest.hash_file(outside)})
  )
  trials = [Trial('a manifest names ../', lambda p=path: training(p), 66, ['which is not in its folder'], path)]
  for name, part in (('step', '120'), ('folder', '120/state')):
    path = one_step(f'link_{name}')
    place = path / 'checkpoints' / part
    place.rename(options.workdir / f'f18_{name}_elsewhere')
    place.symlink_to(options.workdir / f'f18_{name}_elsewhere')
    trials.append(Trial(f'a {name} is a link', lambda p=path: training(p), 66, ['is a symbolic link'], path))
  store = copied(make_store(options), 'f18_columns', options)
  found = json.loads((store / 'manifest.json').read_text())
  found['columns'] = {'scores/../../outside': 'float32'}
  (store / 'manifest.json').write_text(json.dumps(found))
  act = lambda: training(options.workdir / 'f18_c', **over(store))
  return [*trials, Trial('a column leads out', act, 65, ['DATA-CORRUPT', 'is not a valid name inside'], store)]


def secret(options) -> list[Trial]:
  """Passwords in URLs must not appear in the output or in a file."""
  hidden, workdir = 'hunter2', options.workdir / 'f18_secret'

  def shown(url: str) -> tuple[int, str]:
    code, said = training(workdir, **over(pathlib.Path('x')) | {'data__sources': f"[{{'path': '{url}'}}]"})
    leaked = hidden in said or any(hidden.encode() in p.read_bytes() for p in workdir.rglob('*') if p.is_file())
    return code, f'{said}{" LEAKED" * leaked}' if not leaked else 'it was shown'

  urls = (f's3://me:{hidden}@bucket/store', f'https://host/store?X-Amz-Signature={hidden}', f's3://b/x?token={hidden}')
  return [Trial(url, lambda u=url: shown(u), 64, ['has a password or token in it', '***']) for url in urls]
