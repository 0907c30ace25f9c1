"""Runs of a study: many small trainings in parallel, one core each. Finished runs are kept, so a study can resume."""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULT = 'result.json'


@dataclasses.dataclass(frozen=True)
class Trial:
  """One training: a config, `key=value` overrides, and a name that is unique in the study."""

  name: str
  gin_file: str
  overrides: tuple[str, ...]


def run_all(trials: Sequence[Trial], folder: pathlib.Path, measure: Callable) -> dict[str, dict[str, float]]:
  """`measure(cfg, workdir)` of each trial after its training: name -> numbers. Finished trials are not run again."""
  cores = sorted(os.sched_getaffinity(0))
  context = multiprocessing.get_context('spawn')
  free = context.SimpleQueue()
  for core in cores:
    free.put(core)
  jobs = [(trial, folder / trial.name, measure) for trial in trials]
  with concurrent.futures.ProcessPoolExecutor(len(cores), context, _pin, (free,)) as pool:
    done = {}
    for trial, result in zip(trials, pool.map(_run, jobs), strict=True):
      done[trial.name] = result
      _show(trial.name, result, len(done), len(trials))
  return done


def _show(name: str, result: Mapping[str, float], number: int, of: int) -> None:
  shown = '  '.join(f'{key} {value:.3f}' for key, value in result.items())
  print(f'{number:>3} of {of}  {name:<40}{shown}', flush=True)


def _pin(free) -> None:
  """Pins each process to one core: two trainings on one core would slow each other down."""
  os.sched_setaffinity(0, {free.get()})
  os.environ['JAX_PLATFORMS'] = 'cpu'


def _run(job) -> dict[str, float]:
  trial, workdir, measure = job
  result = workdir / RESULT
  if result.exists():
    return json.loads(result.read_text())
  from pretrain.config import bindings
  from pretrain.devices.compilation_cache import use_compilation_cache
  from pretrain.experiment import checks, experiment
  from pretrain.run import train

  cfg = bindings.load(experiment.Experiment, [str(ROOT / trial.gin_file)], trial.overrides)
  checks.check(cfg)
  use_compilation_cache()
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / 'log.txt').open('a') as log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
    if train.train(cfg, workdir) != train.DONE:
      raise RuntimeError(f'{trial.name} was stopped before its last step; start the command again to continue it.')
    values = measure(cfg, workdir)
  result.write_text(json.dumps(values))
  return values


def summary(values: Iterable[float]) -> str:
  """Mean and spread over seeds: `4.321 ± 0.012` is mean ± half the range."""
  values = list(values)
  half = (max(values) - min(values)) / 2
  return f'{statistics.mean(values):.3f}' + (f' ± {half:.3f}' if len(values) > 1 else '')


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table in Markdown."""
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def group(results: Mapping[str, Mapping[str, float]], prefix: str, key: str) -> list[float]:
  """The values of `key` of the trials `prefix/…`, one for each seed."""
  return [result[key] for name, result in results.items() if name.rpartition('/')[0] == prefix and key in result]
