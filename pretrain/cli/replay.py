"""`pretrain replay`: a step of a run, computed again."""

import argparse

from pretrain.cli import shared
from pretrain.errors import ConfigError


def replay_flags(command: argparse.ArgumentParser) -> None:
  command.add_argument('--workdir', required=True, type=shared.workdir)
  command.add_argument('--step', required=True, type=int, help='the last step that is computed again')
  command.add_argument(
    '--rtol',
    type=float,
    help='allowed relative difference of losses, e.g. 1e-5 on another mesh (float32); default: bit for bit',
  )
  command.add_argument(
    '--gin.mesh.AXIS', metavar='N', dest='_shown_in_help_only', help='another mesh than that of the run'
  )
  shared.cluster_flag(command)


def replay_command(options, overrides) -> int:
  """Compute a step of a run again and compare it with metrics.jsonl; exit code 66 if it differs. Writes nothing."""
  from pretrain.devices import mesh
  from pretrain.fleet import launch

  saved = options.workdir / 'config.gin'
  if not saved.exists():
    from data.stores.paths import looked_in

    raise ConfigError(
      f'--workdir={options.workdir}{looked_in(str(options.workdir))} is not a run: it has no config.gin; check the '
      'path.'
    )
  if others := [key for key in overrides if not key.startswith('mesh.')]:
    raise ConfigError(f'--gin.{others[0]} would be another run; replay takes mesh.* alone.')
  if overrides and options.rtol is None:
    raise ConfigError(f'--gin.{overrides[0]}: only the mesh of the run gives its bits; give --rtol, e.g. --rtol=1e-5.')
  cfg = shared.load(options, overrides, saved)
  found = launch.join_cluster(options.cluster, cfg.mesh.replica)
  mesh.prepare_platform(cfg.mesh, launch.num_hosts())
  launch.initialize_from_env(found=found)
  from pretrain.devices.compilation_cache import use_compilation_cache
  from pretrain.errors import CheckpointError
  from pretrain.hosts import coordination
  from pretrain.run import replay

  use_compilation_cache()
  tell = print if coordination.host() == 0 else lambda line: None
  with launch.leaving_at_once():
    equal = replay.replay(cfg, options.workdir, options.step, tell, rtol=options.rtol)
  tell('equal' if equal else 'DIFFERS: a device has computed wrongly, then or now; or the run had another number of '
       'processes or devices, another version of jax, another machine.')  # fmt: skip
  return 0 if equal else CheckpointError.exit_code
