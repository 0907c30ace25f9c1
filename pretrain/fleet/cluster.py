"""Which processes form the run, from the environment of one of them. Pure functions: no JAX, nothing is started.

JAX's own detection takes the first cluster it knows, gives each process of Slurm and Open MPI one GPU, and listens on
all networks. So the address, the number of processes and the number of this one are found here and given to JAX
explicitly.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence

from pretrain.devices.platform import has_tpu, visible_gpus
from pretrain.errors import ConfigError
from pretrain.fleet import metadata

COORDINATOR, NUM_HOSTS, HOST = 'PRETRAIN_COORDINATOR', 'PRETRAIN_NUM_HOSTS', 'PRETRAIN_HOST'
LOCAL_DEVICES = 'JAX_LOCAL_DEVICE_IDS'  # JAX reads it
PORT = 8476  # Google's networks open it between their hosts, and do not open JAX's 8482
NAMES = {
  'pretrain': 'PRETRAIN_* variables',
  'slurm': 'Slurm',
  'gce': 'Cloud TPU metadata',
  'gke': 'GKE TPU',
  'openmpi': 'Open MPI',
  'kubernetes': 'Kubernetes indexed Job',
}
CHOICES = (*NAMES, 'none')
ONE_PROCESS = '--cluster=none trains in one process'
Environ = Mapping[str, str]
Attribute = Callable[[str], str | None]  # of the metadata server


@dataclasses.dataclass(frozen=True)
class Member:
  """This process among the processes of a run."""

  coordinator: str  # HOST:PORT of process 0
  processes: int
  this: int
  how: str = 'pretrain'  # a key of NAMES
  peer: str = ''  # another host, in whose direction process 0 finds its own address
  local: tuple[int, int] = (0, 1)  # (this, all) of the processes on this host
  slices: int = 1  # of TPUs
  problem: str = ''  # why the run cannot start so

  def __str__(self):
    return f'{self.processes} processes by {NAMES[self.how]}; this is {self.this}; coordinator {self.coordinator}'


def find(environ: Environ, choice: str | None = None, *, tpu: bool | None = None, attribute: Attribute | None = None):
  """The Member that this process is; None where it is the only process.

  `choice` (--cluster) is a key of NAMES or 'none'. `tpu`: whether the machine has a TPU; `attribute` asks the metadata
  server. Raises ConfigError where two clusters are found, or one that cannot be used.
  """
  if choice == 'none':
    return None
  look = functions(environ, has_tpu() if tpu is None else tpu, attribute or metadata.asking(environ), choice)
  if choice is not None:
    return usable(look[choice](), environ, f'--cluster={choice}')
  if all(name in environ for name in (COORDINATOR, NUM_HOSTS, HOST)):
    return look['pretrain']()
  members = {how: member for how in NAMES if (member := look[how]()) is not None}
  found = {how: member for how, member in members.items() if member.processes > 1}
  if len(found) > 1:
    raise ConfigError(
      f'the environment names {" and ".join(NAMES[how] for how in found)} ('
      f'{"; ".join(f"{m.processes} processes, this is {m.this}" for m in found.values())}); no process was started. '
      f'Choose with {" or ".join(f"--cluster={how}" for how in found)}; {ONE_PROCESS}.'
    )
  if not found:
    if 'kubernetes' not in members:  # a Job of one pod
      check_whole(environ)
    return None
  return usable(next(iter(found.values())), environ, 'the environment')


def functions(environ: Environ, tpu: bool, attribute: Attribute, choice: str | None) -> dict[str, Callable]:
  """key of NAMES -> the function that looks for it."""
  asked = choice == 'gce' or (tpu and may_be_gce(environ))
  return {
    'pretrain': lambda: ours(environ),
    'slurm': lambda: slurm(environ),
    'gce': lambda: gce(attribute) if asked else None,
    'gke': lambda: gke(environ),
    'openmpi': lambda: open_mpi(environ),
    'kubernetes': lambda: kubernetes(environ),
  }


def usable(member: Member | None, environ: Environ, named: str) -> Member | None:
  """`member` with the coordinator of the environment where that has one; None for a single process.

  Raises ConfigError where it is absent or has a problem.
  """
  if member is None:
    raise ConfigError(f'{named}: the environment has no variables of that cluster; {ONE_PROCESS}.')
  whole = all(name in environ for name in (COORDINATOR, NUM_HOSTS, HOST))  # then another cluster was chosen
  if COORDINATOR in environ and not whole:
    if member.how != 'kubernetes' and (more := [name for name in (NUM_HOSTS, HOST) if name in environ]):
      raise ConfigError(
        f'{" and ".join(more)} and {NAMES[member.how]} both count processes; unset the first, or set all of '
        f'{COORDINATOR}, {NUM_HOSTS}, {HOST}.'
      )
    unknown = not member.coordinator
    member = dataclasses.replace(member, coordinator=environ[COORDINATOR], problem='' if unknown else member.problem)
  if member.problem:
    raise ConfigError(f'{member.problem}; no process was started. {ONE_PROCESS[0].upper()}{ONE_PROCESS[1:]}.')
  if not 0 <= member.this < member.processes:
    raise ConfigError(
      f'{NAMES[member.how]} says that this is process {member.this} of {member.processes}; processes are numbered '
      f'from 0. {ONE_PROCESS[0].upper()}{ONE_PROCESS[1:]}.'
    )
  return member if member.processes > 1 else None


def adopt(member: Member | None, environ: MutableMapping[str, str]) -> None:
  """`environ` names the processes as `pretrain run` does, so that every later reader finds the same ones."""
  if member is None:
    for name in (COORDINATOR, NUM_HOSTS, HOST):
      environ.pop(name, None)
  elif member.how != 'pretrain':
    environ |= {COORDINATOR: member.coordinator, NUM_HOSTS: str(member.processes), HOST: str(member.this)}
    if LOCAL_DEVICES not in environ and (ids := local_gpus(environ, *member.local)):
      environ[LOCAL_DEVICES] = ','.join(map(str, ids))


def check_slices(member: Member | None, replica: int) -> None:
  """Raises ConfigError where the mesh has no axis over the slices of TPUs that this process was started on."""
  slices = 1 if member is None else member.slices
  if replica != -1 and replica % slices:
    raise ConfigError(
      f'the environment has {slices} slices of TPUs (MEGASCALE_NUM_SLICES), and mesh.replica={replica} is not a '
      f'multiple of {slices}; set mesh.replica={slices}, whose axis crosses slices. If the job has one slice, the '
      'variable was left by another job: unset it.'
    )


def check_whole(environ: Environ) -> None:
  """Raises ConfigError where some, but not all, of our variables are set."""
  names = (COORDINATOR, NUM_HOSTS, HOST)
  if (found := [name for name in names if name in environ]) and len(found) < len(names):
    raise ConfigError(f'{" and ".join(found)} set, but not all of {", ".join(names)}; set all or none.')


def number(environ: Environ, name: str, by: str = 'the scheduler') -> int:
  """The value of a variable. Raises ConfigError if it is not a number."""
  try:
    return int(environ[name])
  except ValueError as error:
    raise ConfigError(f'{name}={environ[name]!r} is not a number; {by} sets it.') from error


def ours(environ: Environ) -> Member | None:
  """The processes named by PRETRAIN_COORDINATOR, PRETRAIN_NUM_HOSTS and PRETRAIN_HOST, if all three are set."""
  if not all(name in environ for name in (COORDINATOR, NUM_HOSTS, HOST)):
    return None
  host, processes = number(environ, HOST, '`pretrain run`'), number(environ, NUM_HOSTS, '`pretrain run`')
  if not 0 <= host < processes:
    raise ConfigError(f'{HOST}={host} with {NUM_HOSTS}={processes}; processes are numbered from 0.')
  return Member(environ[COORDINATOR], processes, host)


def slurm(environ: Environ) -> Member | None:
  """The tasks of the step that `srun` started; of a batch script or an `salloc` shell, a Member with a problem."""
  if 'SLURM_JOB_ID' not in environ:
    return None
  nodes = expand(environ.get('SLURM_STEP_NODELIST', ''))
  counts = [name for name in ('SLURM_STEP_NUM_TASKS', 'SLURM_NTASKS', 'SLURM_NNODES') if name in environ]
  tasks = number(environ, counts[0]) if counts else 1
  if not nodes or 'SLURM_PROCID' not in environ:
    text = f"Slurm's job {environ['SLURM_JOB_ID']} has {tasks} tasks, and this process is not one that srun started"
    return Member('', tasks, 0, 'slurm', problem=f'{text}: write srun before the command')
  local = number(environ, 'SLURM_LOCALID') if 'SLURM_LOCALID' in environ else 0
  node = number(environ, 'SLURM_NODEID') if 'SLURM_NODEID' in environ else 0
  on_nodes = tasks_per_node(environ.get('SLURM_STEP_TASKS_PER_NODE', environ.get('SLURM_TASKS_PER_NODE', '1')))
  here = on_nodes[node] if node < len(on_nodes) else 1
  return Member(
    f'{nodes[0]}:{PORT}', tasks, number(environ, 'SLURM_PROCID'), 'slurm', peer=nodes[-1] if nodes[1:] else '',
    local=(local, here),
  )  # fmt: skip


def expand(nodes: str) -> list[str]:
  """The hosts in one of Slurm's lists.

  >>> expand('rack[1-2]n[03-04]'), expand('gpu[03-04,7],login')
  (['rack1n03', 'rack1n04', 'rack2n03', 'rack2n04'], ['gpu03', 'gpu04', 'gpu7', 'login'])
  """
  names = []
  for host in re.findall(r'(?:\[[^\]]*\]|[^,\[])+', nodes):
    parts = [[text] if text else numbers(inside) for text, inside in re.findall(r'([^\[]+)|\[([^\]]*)\]', host)]
    names += map(''.join, itertools.product(*parts))
  return names


def numbers(ranges: str) -> list[str]:
  """The numbers in the brackets of one of Slurm's lists, each as long as the first of its range.

  >>> numbers('08-10,2')
  ['08', '09', '10', '2']
  """
  ends = [part.partition('-')[::2] for part in ranges.split(',')]
  return [str(n).zfill(len(a)) for a, b in ends for n in range(int(a), int(b or a) + 1)]


def tasks_per_node(text: str) -> list[int]:
  """Slurm's tasks on each node of a step.

  >>> tasks_per_node('2(x3),1')
  [2, 2, 2, 1]
  """
  found = re.findall(r'(\d+)(?:\(x(\d+)\))?', text)
  return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def gke(environ: Environ) -> Member | None:
  """The hosts that GKE lists in a pod with TPUs, times the slices that a JobSet with several replicas has."""
  listed = environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES')
  if not listed:
    return None
  slices = number(environ, 'MEGASCALE_NUM_SLICES') if environ.get('MEGASCALE_NUM_SLICES') else 1
  replicas = environ.get('JOBSET_REPLICAS', '')
  if 'TPU_WORKER_ID' not in environ:
    missing = 'TPU_WORKER_HOSTNAMES is set and TPU_WORKER_ID is not: this pod does not know its number'
    return Member('', len(listed.split(',')) * slices, 0, 'gke', problem=missing)
  hosts = [host.rsplit(':', 1)[0] for host in listed.split(',')]
  found = tpu_hosts('gke', hosts, number(environ, 'TPU_WORKER_ID'), lambda name: environ.get(f'MEGASCALE_{name}'))
  if replicas.isdigit() and int(replicas) > 1 and int(replicas) != slices:
    text = f'the JobSet has {replicas} replicas and MEGASCALE_NUM_SLICES is {slices}: each would be a run of its own'
    return dataclasses.replace(found, processes=found.processes * int(replicas), problem=text)
  return found


def tpu_hosts(how: str, hosts: Sequence[str], worker: int, of_slices: Attribute) -> Member:
  """Host `worker` of the `hosts` of a slice. `of_slices` has what Megascale says of all slices."""
  slices, index = int(of_slices('NUM_SLICES') or 1), int(of_slices('SLICE_ID') or 0)
  first = (of_slices('COORDINATOR_ADDRESS') or '').rsplit(':', 1)[0] or hosts[0]
  peer = next((host for host in reversed(hosts) if host != first), '')
  return Member(f'{first}:{PORT}', len(hosts) * slices, index * len(hosts) + worker, how, peer=peer, slices=slices)


def may_be_gce(environ: Environ) -> bool:
  """Whether the environment does not rule out a TPU VM whose metadata server knows the other hosts."""
  named = ('TPU_SKIP_MDS_QUERY', 'TPU_WORKER_HOSTNAMES', 'TPU_PROCESS_ADDRESSES')
  return not any(name in environ for name in named) and 'tpu' in environ.get('JAX_PLATFORMS', 'tpu')


def gce(attribute: Attribute) -> Member | None:
  """The hosts of a TPU slice, from the metadata server of a TPU VM."""
  if (worker := attribute('agent-worker-number')) is None or (listed := attribute('worker-network-endpoints')) is None:
    return None
  hosts = [host.rsplit(':', 1)[-1] for host in listed.strip().split(',')]  # an address, or NAME:ID:ADDRESS
  lines = [line.partition(':') for line in (attribute('tpu-env') or '').splitlines()]
  known = {name.strip(): value.strip().strip('\'"') for name, _, value in lines}
  return tpu_hosts('gce', hosts, int(worker), lambda name: known.get(f'MEGASCALE_{name}'))


def open_mpi(environ: Environ) -> Member | None:
  """The processes that `mpirun` of Open MPI 4 or 5 started."""
  if 'OMPI_COMM_WORLD_SIZE' not in environ or 'OMPI_COMM_WORLD_RANK' not in environ:
    return None
  values = {name: number(environ, name) for name in environ if re.fullmatch('OMPI_COMM_WORLD_[A-Z_]*(SIZE|RANK)', name)}
  of = lambda name, default: values.get(f'OMPI_COMM_WORLD_{name}', default)
  size, here = of('SIZE', 1), of('LOCAL_SIZE', 1)
  address = '127.0.0.1' if here == size else mpi_launcher(environ)
  problem = f'Open MPI does not say on which host process 0 runs: add -x {COORDINATOR}=HOST:{PORT} to mpirun'
  return Member(
    f'{address}:{PORT}' if address else '', size, of('RANK', 0), 'openmpi', local=(of('LOCAL_RANK', 0), here),
    problem='' if address else problem,
  )  # fmt: skip


def mpi_launcher(environ: Environ) -> str:
  """The address of the host of `mpirun`, where process 0 runs; '' if the environment does not have it.

  Version 4 has `JOB;tcp://ADDRESSES:PORT`. Version 5 has the address of the daemon of this host, whose number is 0
  beside `mpirun`: `prterun-HOST-PID@0.0;tcp4://ADDRESS:PORT`.
  """
  uri = environ.get('OMPI_MCA_orte_hnp_uri', '')
  if not uri:
    names = sorted((name for name in environ if re.fullmatch(r'PMIX_SERVER_URI\d*', name)), reverse=True)
    uri = next((environ[name] for name in names if '@0.0;' in environ[name]), '')
  found = re.search(r'tcp4?://([^,:]+)|tcp6://\[?([^,\]]+)', uri)
  return '' if found is None else found[1] or f'[{found[2]}]'


def kubernetes(environ: Environ) -> Member | None:
  """The pods of an indexed Job. Kubernetes says which pod this is; the pod's `env` says how many there are."""
  if 'JOB_COMPLETION_INDEX' not in environ or environ.get('TPU_WORKER_HOSTNAMES') or HOST in environ:
    return None
  index, jobs = number(environ, 'JOB_COMPLETION_INDEX'), environ.get('JOBSET_REPLICAS', '1')
  if NUM_HOSTS not in environ or COORDINATOR not in environ:
    text = f'this is pod {index} of an indexed Job, whose size is not in the environment'
    return Member('', 2, 0, 'kubernetes', problem=f'{text}: set {NUM_HOSTS} and {COORDINATOR} in the env of the pod')
  processes = number(environ, NUM_HOSTS, 'the env of the pod')
  if not jobs.isdigit() or int(jobs) < 1 or processes % int(jobs):
    text = f'{NUM_HOSTS}={processes} pods do not divide into JOBSET_REPLICAS={jobs} equal Jobs'
    return Member(environ[COORDINATOR], processes, 0, 'kubernetes', problem=text)
  job = number(environ, 'JOBSET_JOB_INDEX') if 'JOBSET_JOB_INDEX' in environ else 0
  return Member(environ[COORDINATOR], processes, job * (processes // int(jobs)) + index, 'kubernetes')


def local_gpus(environ: Environ, rank: int, ranks: int, gpus: int | None = None) -> Sequence[int]:
  """The GPUs of process `rank` of the `ranks` on this host, as numbers among those it sees; none: all it sees.

  Where the scheduler already gave each process its own GPUs, it sees no others. Raises ConfigError where the GPUs do
  not divide.
  """
  gpus = visible_gpus(environ) if gpus is None else gpus
  on_host = environ.get('SLURM_GPUS_ON_NODE', '')
  bound = 'SLURM_GPUS_PER_TASK' in environ or (on_host.isdigit() and int(on_host) > gpus)
  if ranks == 1 or gpus <= 1 or bound:
    return ()
  if gpus % ranks:
    raise ConfigError(
      f'{ranks} processes on this host see {gpus} GPUs, which do not divide; start another number of processes on a '
      f'host, or set {LOCAL_DEVICES} for each.'
    )
  each = gpus // ranks
  return range(rank * each, (rank + 1) * each)
