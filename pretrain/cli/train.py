"""`pretrain train`: the platform, the processes, then the loop."""

import argparse

from pretrain.cli import shared


def train_flags(command: argparse.ArgumentParser) -> None:
  shared.config_flags(command)
  command.add_argument(
    '--workdir',
    required=True,
    type=shared.workdir,
    help='the folder of the run, or a URL (gs://, s3://); the same command resumes it',
  )
  command.add_argument(
    '--allow_data_change', action='store_true', help='resume with other data, from the same row of each source'
  )
  shared.cluster_flag(command)


def train_command(options, overrides) -> int:
  """Train a model, or resume a run that was interrupted."""
  from pretrain.devices import mesh
  from pretrain.fleet import launch

  cfg = shared.load(options, overrides)
  shared.check_workdir(options.workdir)
  prepare = lambda hosts: mesh.prepare_platform(cfg.mesh, hosts)
  found = launch.join_cluster(options.cluster, cfg.mesh.replica)
  prepare(launch.num_hosts())
  launch.initialize_from_env(cfg.watchdog.init or launch.MEETING_SECONDS, found)
  from pretrain.devices.compilation_cache import use_compilation_cache
  from pretrain.fleet import surviving
  from pretrain.run import train

  use_compilation_cache()
  start = lambda began: train.train(cfg, options.workdir, allow_data_change=options.allow_data_change, began=began)
  with launch.leaving_at_once():
    return surviving.surviving(cfg.elastic, prepare, start)
