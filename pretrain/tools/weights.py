"""Parameters of finished steps, read from one run and written as another: `pretrain checkpoints`, `checkpoint.initial`.

average, soup and merge write a workdir with a config and one step, 0, which holds parameters alone: `generate` and
evaluation read it, and a run can start from it (`checkpoint.initial`), but no run can resume from it.
"""

import dataclasses
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from data.batches.source import open_data
from data.stores.paths import looked_in
from models.build import build
from models.partition import shardings
from models.specs import is_spec
from pretrain.checkpoints import manifest
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.config import bindings
from pretrain.devices.compilation_cache import cache_dir
from pretrain.devices.mesh import MeshConfig, host_rows
from pretrain.errors import CheckpointError, ConfigError, UserError
from pretrain.evaluation.losses import evaluate_sets
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.phases import phase_at
from pretrain.experiment.program import Program, build_program
from pretrain.experiment.rules.offload import without_offload
from pretrain.experiment.saved import load_saved
from pretrain.experiment.trunk import opened as _opened
from pretrain.experiment.trunk import plain, read_weights
from pretrain.hosts.ownership import owned
from pretrain.optim.averaging import Tasted, greedy_soup, linear_combination, normalized, task_vector_coefficients
from pretrain.records.metrics import read_metrics
from pretrain.snapshots.slots import folder_of, remembered
from pretrain.step.loss import make_eval_step
from pretrain.tools.describe import table
from pretrain.workdirs.folder import Folder, as_folder

# Keys of model.* that change neither the shapes of weights nor what is computed from them.
NOT_ARCHITECTURE = (
  'model.dropout', 'model.dropout_sites', 'model.dtype', 'model.remat', 'model.remat_keep', 'model.remat_offload',
  'model.embedding_init_std', 'model.head_init_scale', 'model.init_std', 'model.scale_residual_init', 'model.kurtosis',
  'model.expert_capacity', 'model.pipeline_microbatches', 'model.pipeline_repeats',
)  # fmt: skip
# Keys that a run that starts from another may change too: the scale of positions, for longer rows,
# and how many tokens ahead training predicts.
MAY_DIFFER = (*NOT_ARCHITECTURE, 'model.rope_theta', 'model.relative_max_distance', 'model.mtp_depth')
# Keys that such a run may set where the other had nothing; to leave out what the other had is a mistake.
MAY_BE_ADDED = ('model.windows', 'model.sinks', 'model.sink_distance')
SCALING = 'model.rope_scaling.'


@dataclasses.dataclass(frozen=True)
class Step:
  """A finished step of a run; with `ema`, the moving average of its parameters."""

  workdir: Folder
  number: int
  ema: bool = False

  def __str__(self) -> str:
    return f'{self.workdir}/{self.number}{" (ema)" * self.ema}'

  def read(self, abstract: Any) -> Any:
    """Its weights, sharded as in `abstract`, with adapters added. Raises CKPT-MISMATCH where the shapes differ."""
    return read_weights(self.workdir, self.number, abstract, ema=self.ema)

  def tokenizer(self) -> str | None:
    """The fingerprint of the tokenizer it was trained with."""
    with _opened(self.workdir) as checkpoints:
      return checkpoints.position(self.number).get('data', {}).get('tokenizer')


def find(text: str, *, ema: bool = False) -> Step:
  """The step that RUN/<step> names; RUN alone names its newest. Raises CKPT-NONE where it does not exist."""
  path = as_folder(text)
  if path.name.isdecimal() and not (path / 'checkpoints').exists():
    return find_step(path.parent, int(path.name), ema=ema)
  return Step(path, _steps(path)[-1], ema)


def find_step(workdir: Folder, number: int, *, ema: bool = False) -> Step:
  """A step of a run. Raises CKPT-NONE, with the list of those that exist, where it has no such step."""
  there = _steps(workdir)
  if number not in there:
    raise CheckpointError(
      'CKPT-NONE',
      f'no step {number} in {workdir}/checkpoints; it has {", ".join(map(str, there))}. Choose one of them.',
    )
  return Step(workdir, number, ema)


def initial_params(initial: str, program: Program, tokenizer: str | None) -> Any:
  """The parameters that `checkpoint.initial` names, sharded for `program`, whose data have `tokenizer`.

  Parameters that are missing in the step are left out: those of a position scaling, and modules of `model.mtp_depth`.

  Raises CKPT-NONE for a step that does not exist, CKPT-MISMATCH for another architecture or tokenizer.
  """
  path = as_folder(initial, 'checkpoint.initial')
  step = find_step(path.parent, int(path.name))
  ours, theirs = bindings.flatten(program.model.cfg, 'model.'), bindings.flatten(config_of(step.workdir))
  plain_rope = theirs.get(f'{SCALING}name') == 'none'
  added = [key for key in MAY_BE_ADDED if not theirs.get(key)]
  added += [key for key in ours.keys() | theirs.keys() if key.startswith(SCALING) and plain_rope]
  if bad := differences(ours, theirs, (*MAY_DIFFER, *added)):
    raise CheckpointError(
      'CKPT-MISMATCH',
      f'{bad[0]} is {theirs.get(bad[0])!r} in {step.workdir}/config.gin, {ours.get(bad[0])!r} in this command (first '
      f'of {len(bad)}); its parameters would be those of another model. Nothing was changed; set it as it is there.',
    )
  params, theirs = _read_common(step, program), step.tokenizer()
  if None not in (theirs, tokenizer) and theirs != tokenizer:
    raise CheckpointError(
      'CKPT-MISMATCH',
      f'{step} was trained with another tokenizer (sha256 {theirs[:8]}.., that of data.* is {tokenizer[:8]}..): '
      'its ids are other text. Nothing was changed; prepare the data with its --tokenizer.',
    )
  return params


def _read_common(step: Step, program: Program) -> Any:
  """The parameters that both `step` and `program` have; a step is read as a whole."""
  own = build(config_of(step.workdir).model).specs
  place = lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)
  more = {name: branch for name, branch in own.items() if name not in program.weights}
  there = jax.tree.map(place, more, shardings(more, program.mesh), is_leaf=is_spec)
  params = step.read({name: x for name, x in program.weights.items() if name in own} | there)
  return {name: x for name, x in params.items() if name in program.weights}


def list_steps(workdir: Folder) -> str:
  """A table of the finished steps of a run: size on disk, and the losses that were logged at each."""
  numbers = _steps(workdir)
  rows = {row['step']: row for row in read_metrics(workdir)}
  losses = sorted({key for n in numbers for key in rows.get(n, {}) if key.endswith('loss') and key != 'z_loss'})
  losses.sort(key=lambda key: key != 'loss')
  lines = []
  for number in numbers:
    size = size_of(workdir / 'checkpoints' / str(number))
    values = [f'{rows[number][key]:.4f}' if key in rows.get(number, {}) else '-' for key in losses]
    lines.append((str(number), f'{size / 2**20:.1f}', *values))
  return table(lines, ('step', 'MiB', *losses))


def size_of(folder: Folder) -> int:
  """Bytes of the files of a step; in a store, those that its manifest lists."""
  if isinstance(folder, pathlib.Path):
    return sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
  return manifest.read(folder).size


def in_memory(workdir: Folder) -> str:
  """One line about the snapshots of a run in this host's RAM; '' where there are none."""
  try:
    return remembered(folder_of(config_of(workdir).snapshot, workdir, 0), time.time())
  except UserError:  # the run has no config, or this machine has no such memory
    return ''


def average(steps: Sequence[Step], weights: Sequence[float] | None, output: Folder, source: str) -> None:
  """Writes the mean of `steps`, uniform or weighted, to a new workdir.

  Needs memory for two copies of the parameters, and a third while a file is read, for any number of steps.
  """
  weights = [1.0] * len(steps) if weights is None else weights
  if len(weights) != len(steps):
    raise ConfigError(f'--weights has {len(weights)} values, --steps {len(steps)}; give one weight to each step.')
  if not all(0 < w < float('inf') for w in weights):
    raise ConfigError(f'--weights={_list(weights)}; each must be a finite number > 0.')
  _combine(steps, normalized(weights), output, source)


def merge(base: Step, inputs: Sequence[Step], coefficients: Sequence[float], output: Folder, source: str) -> None:
  """Writes base + sum c_i (input_i - base) to a new workdir; memory as for `average`."""
  if len(coefficients) != len(inputs):
    raise ConfigError(
      f'--coefficients has {len(coefficients)} values, --inputs {len(inputs)}; give one coefficient to each input.'
    )
  if not all(abs(c) < float('inf') for c in coefficients):
    raise ConfigError(f'--coefficients={_list(coefficients)}; each must be finite.')
  _combine([base, *inputs], task_vector_coefficients(coefficients), output, source)


def _combine(steps: Sequence[Step], coefficients: Sequence[float], output: Folder, source: str) -> None:
  check_new(output)
  cfg = _one_architecture(steps)
  abstract = program_on_one_device(cfg).abstract.params
  terms = ((c, step.read(abstract)) for c, step in zip(coefficients, steps, strict=True))
  _write(output, linear_combination(terms), cfg, steps[0], source)


def soup(cfg: Experiment, steps: Sequence[Step], metric: str, output: Folder, source: str, tell: Callable) -> None:
  """Writes the greedy soup of `steps`, scored by `metric` on the held-out sets of `cfg`, to a new workdir.

  Calls `tell` with a line for each decision. Memory as for `average`; each input is read twice.
  """
  check_new(output)
  saved = _one_architecture(steps)
  _check_model(cfg, '--gin_file', saved, steps[0])
  program, score = _scorer(cfg, metric)
  read = lambda index: steps[index].read(program.abstract.params)
  scores = []
  for i, step in enumerate(steps):
    scores.append(score(read(i)))
    tell(f'{step}  {metric} {_shown(scores[-1], metric)}')
  if not any(map(math.isfinite, scores)):
    raise ConfigError(f'--metric={metric} is not finite for any of --inputs; nothing was written.')
  params = greedy_soup(scores, read, score, lambda tasted: tell(_decision(tasted, steps[tasted.index], metric)))
  _write(output, params, saved, steps[0], source)


def _decision(tasted: Tasted, step: Step, metric: str) -> str:
  verdict = 'kept' if tasted.kept else f'left out, {_shown(tasted.before, metric)} without it'
  return f'+ {step}  {metric} {_shown(tasted.score, metric)}  {verdict}'


def _scorer(cfg: Experiment, metric: str) -> tuple[Program, Callable[[Any], float]]:
  """(program, score(params)): the held-out metric, negated where higher is better."""
  data = open_data(cfg.data, cfg.objective, seed=cfg.seed, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  program = build_program(without_offload(plain(cfg)))
  sets = data.heldout(cfg.evaluation.batches, host_rows(program.mesh, cfg.data.batch_size))
  _check_metric(metric, [f'eval/{name}/{kind}' for name in sets for kind in ('loss', 'text_loss', 'accuracy')])
  name = metric.split('/')[1]
  eval_step = jax.jit(make_eval_step(program.model, cfg.kernels, data.vocabulary.pieces, data.vocabulary.ids.not_text))

  def score(params) -> float:
    value = evaluate_sets(eval_step, params, {name: sets[name]}, program.mesh)[metric]
    return -value if metric.endswith('/accuracy') else value

  return program, score


def _check_metric(metric: str, there: Sequence[str]) -> None:
  if not there:
    raise ConfigError('--gin_file has no held-out set to score a soup on; set data.heldout.')
  if metric not in there:
    raise ConfigError(f"--metric='{metric}' is not one of {', '.join(there)}.")


def _shown(score: float, metric: str) -> str:
  return f'{-score if metric.endswith("/accuracy") else score:.4f}'


def _one_architecture(steps: Sequence[Step]) -> Experiment:
  """The config of the last step, in its phase. Raises CKPT-MISMATCH where models or tokenizers are not the same."""
  cfg, tokenizer = config_of(steps[0].workdir), steps[0].tokenizer()
  for step in steps[1:]:
    _check_model(cfg, f'{steps[0].workdir}/config.gin', config_of(step.workdir), step)
    if step.tokenizer() != tokenizer:
      raise CheckpointError(
        'CKPT-MISMATCH',
        f'{steps[0]} and {step} have different tokenizers: an id is not the same text in both.',
      )
  return phase_at(config_of(steps[-1].workdir), max(steps[-1].number - 1, 0)).cfg


def _check_model(cfg: Experiment, where: str, other: Experiment, step: Step) -> None:
  ours, theirs = bindings.flatten(cfg), bindings.flatten(other)
  if bad := differences(ours, theirs, NOT_ARCHITECTURE, 'data.sentinels'):
    raise CheckpointError(
      'CKPT-MISMATCH',
      f'{bad[0]} is {ours.get(bad[0])!r} in {where}, {theirs.get(bad[0])!r} in {step.workdir}/config.gin '
      f'(first of {len(bad)}); only weights of one architecture can be mixed. Nothing was written.',
    )


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], free: Sequence[str], *others: str) -> list[str]:
  """The keys that differ, among those of the model (without those in `free`) and `others`."""
  keys = [key for key in dict.fromkeys([*ours, *theirs]) if key.startswith('model.') and key not in free]
  return [key for key in [*keys, *others] if ours.get(key) != theirs.get(key)]


def config_of(workdir: Folder) -> Experiment:
  """The config that a run was trained with. Raises CKPT-NONE where there is no run."""
  saved = workdir / 'config.gin'
  if not saved.exists():
    where = f'{workdir}{looked_in(str(workdir))}'
    raise CheckpointError('CKPT-NONE', f'no run in {where}: config.gin is missing; check the path.')
  return load_saved(saved)


def check_space(output: Folder, size: float, flag: str) -> None:
  """Raises ConfigError where the disk of a new folder has less than `size` bytes free; a store is not asked."""
  if not isinstance(output, pathlib.Path):
    return
  existing = next(path for path in output.absolute().parents if path.exists())
  free = shutil.disk_usage(existing).free
  if free < size:
    raise ConfigError(
      f'{flag}={output} needs {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free on {existing}. Nothing was written; '
      'free space or choose another disk.'
    )


def check_new(output: Folder, flag: str = '--output') -> None:
  if output.exists():
    raise ConfigError(f'{flag}={output} exists; nothing is overwritten. Choose another folder.')


def program_on_one_device(cfg: Experiment) -> Program:
  """The program of a run whose arrays are whole on the first device, without the adapters' config."""
  return build_program(dataclasses.replace(without_offload(plain(cfg)), mesh=MeshConfig()), jax.devices()[:1])


def _steps(workdir: Folder) -> list[int]:
  """The finished steps of a run, at least one."""
  if (workdir / 'checkpoints').is_dir():
    with _opened(workdir) as checkpoints:
      if there := checkpoints.finished():
        return there
  where = f'{workdir}/checkpoints{looked_in(str(workdir))}'
  fix = 'let the run reach checkpoint.every' if (workdir / 'config.gin').exists() else 'check the path'
  raise CheckpointError('CKPT-NONE', f'no finished checkpoint in {where}; {fix}.')


def _write(output: Folder, params: Any, cfg: Experiment, first: Step, source: str) -> None:
  write_run(output, params, plain(cfg), first.tokenizer(), source, '--output')


def write_run(
  output: Folder, params: Any, cfg: Experiment, tokenizer: str | None, source: str, flag: str = '--to'
) -> None:
  """Makes `output`, which `flag` named, a run with one step, 0, of parameters alone, whose text `tokenizer` made."""
  text = f'# Parameters made by: {source}\n{bindings.render(cfg)}'
  with owned(output, flag):
    checkpoints = Checkpoints(output, CheckpointConfig())
    checkpoints.save_params(0, params, {'source': source, 'data': {'tokenizer': tokenizer}}, text)
    checkpoints.close()
    (output / 'config.gin').write_text(text)  # last: a folder without it is not a run


def without_initial(cfg: Experiment) -> Experiment:
  """`cfg` of a run that holds weights itself, and starts from no other."""
  return dataclasses.replace(cfg, checkpoint=dataclasses.replace(cfg.checkpoint, initial=None))


def _list(values: Sequence[float]) -> str:
  return ','.join(f'{v:g}' for v in values)
