"""A Slurm of two nodes, n1 and n2, on loopback, from Debian's packages `slurm-wlm` and `munge`. Needs root.

It runs in a mount namespace of its own, whose /etc/hosts has the names of the nodes.
"""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

from pretrain.fleet.launch import free_port

CONF = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
RebootProgram=/bin/true
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:8 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
DAEMONS = """
mount --bind {folder}/hosts /etc/hosts
munged --foreground --force --key-file={folder}/key --socket={folder}/munge.socket --pid-file={folder}/munge.pid \
  --log-file={folder}/munge.log --seed-file={folder}/seed &
for i in $(seq 100); do [ -S {folder}/munge.socket ] && break; sleep 0.1; done
slurmctld -D -i -f {folder}/slurm.conf &
slurmd -D -f {folder}/slurm.conf -N n1 &
slurmd -D -f {folder}/slurm.conf -N n2 &
wait
"""


@contextlib.contextmanager
def two_nodes(folder: pathlib.Path) -> Iterator[dict[str, str]]:
  """Inside the block the Slurm runs; yields the variables for its commands."""
  for name in ('state', 'spool-n1', 'spool-n2'):
    (folder / name).mkdir(parents=True)
  (folder / 'key').write_bytes(os.urandom(1024))
  (folder / 'key').chmod(0o400)
  (folder / 'hosts').write_text(pathlib.Path('/etc/hosts').read_text() + '\n127.0.0.1 n1 n2\n')
  for gpu in range(8):  # files in place of devices: Slurm counts them, and gives their numbers to the tasks
    (folder / f'gpu{gpu}').touch()
  (folder / 'gres.conf').write_text(f'NodeName=n1,n2 Name=gpu File={folder}/gpu[0-7]\n')
  ports = [free_port() for _ in range(3)]
  host = socket.gethostname().split('.')[0]
  (folder / 'slurm.conf').write_text(CONF.format(folder=folder, host=host, ports=ports))
  command = ['unshare', '--mount', '--propagation=private', 'bash', '-c', DAEMONS.format(folder=folder)]
  environ = {'SLURM_CONF': str(folder / 'slurm.conf')}
  with (folder / 'daemons.log').open('w') as log:
    daemons = subprocess.Popen(command, env=os.environ | environ, stdout=log, stderr=log, start_new_session=True)
  try:
    wait_for(lambda: output(['sinfo', '-h', '-o', '%D %t'], environ) == '2 idle', 60, folder)
    yield environ
  finally:
    output(['scancel', '--full', '--user=root'], environ)
    time.sleep(1)
    os.killpg(daemons.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
      daemons.wait(20)
    with contextlib.suppress(ProcessLookupError):
      os.killpg(daemons.pid, signal.SIGKILL)
    daemons.wait(20)


def output(command: list[str], environ: dict[str, str]) -> str:
  """What one of Slurm's commands prints; '' where it fails."""
  done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, check=False)
  return done.stdout.strip() if done.returncode == 0 else ''


def wait_for(condition, seconds: float, folder: pathlib.Path) -> None:
  """Returns when `condition()` is true. Raises AssertionError with the ends of the logs if it is not in time."""
  deadline = time.monotonic() + seconds
  while not condition():
    if time.monotonic() > deadline:
      logs = [f'{path.name}: {path.read_text()[-2000:]}' for path in sorted(folder.glob('*.log'))]
      raise AssertionError('\n'.join([f'not within {seconds:.0f} s', *logs]))
    time.sleep(0.2)
