"""Which processes form a run, from the environment of one of them."""

import fcntl
import http.server
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from pretrain.cli import main
from pretrain.errors import ConfigError, HostError
from pretrain.fleet import addresses, cluster, launch, metadata
from tests.pretrain import tiny

OURS = {'PRETRAIN_COORDINATOR': '10.0.0.7:9000', 'PRETRAIN_NUM_HOSTS': '4', 'PRETRAIN_HOST': '3'}
SLURM = {
  'SLURM_JOB_ID': '77', 'SLURM_NTASKS': '8', 'SLURM_PROCID': '5', 'SLURM_LOCALID': '1', 'SLURM_NODEID': '2',
  'SLURM_STEP_NODELIST': 'rack[1-2]n[03-04]', 'SLURM_STEP_TASKS_PER_NODE': '2(x4)',
}  # fmt: skip
BATCH = {name: value for name, value in SLURM.items() if not name.startswith('SLURM_STEP_')}
GKE = {'TPU_WORKER_HOSTNAMES': 'a,b,c,d', 'TPU_WORKER_ID': '2'}
TWO_SLICES = {
  'MEGASCALE_NUM_SLICES': '2', 'MEGASCALE_SLICE_ID': '1', 'MEGASCALE_COORDINATOR_ADDRESS': 'z:8080',
}  # fmt: skip
MPI4 = {
  'OMPI_COMM_WORLD_SIZE': '8', 'OMPI_COMM_WORLD_RANK': '3', 'OMPI_COMM_WORLD_LOCAL_RANK': '1',
  'OMPI_COMM_WORLD_LOCAL_SIZE': '2', 'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911',
}  # fmt: skip
MPI5 = {name: value for name, value in MPI4.items() if 'orte' not in name} | {
  'PRTE_LAUNCHED': '1', 'PMIX_SERVER_URI41': 'prterun-node18-12345@0.0;tcp4://10.20.30.40:45678',
}  # fmt: skip
POD = {'JOB_COMPLETION_INDEX': '1', 'PRETRAIN_NUM_HOSTS': '6', 'PRETRAIN_COORDINATOR': 'run-w-0-0.run:8476'}
JOBSET = {'JOBSET_REPLICAS': '2', 'JOBSET_JOB_INDEX': '1'}
V5E_16 = {
  'agent-worker-number': '2',
  'worker-network-endpoints': 'unknown:id:10.0.0.1,unknown:id:10.0.0.2,unknown:id:10.0.0.3,unknown:id:10.0.0.4',
  'tpu-env': "ACCELERATOR_TYPE: 'v5litepod-16'\nWORKER_ID: '2'\n",
}
MEGASCALE_ENV = "MEGASCALE_COORDINATOR_ADDRESS: '10.9.9.9:8080'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"


def find(environ, choice=None, tpu=False, attributes=None):
  return cluster.find(environ, choice, tpu=tpu, attribute=(attributes or {}).get)


@pytest.mark.parametrize(
  ('environ', 'how', 'coordinator', 'processes', 'this'),
  [
    (OURS, 'pretrain', '10.0.0.7:9000', 4, 3),
    (SLURM, 'slurm', 'rack1n03:8476', 8, 5),
    (SLURM | {'SLURM_STEP_NUM_TASKS': '6'}, 'slurm', 'rack1n03:8476', 6, 5),
    (GKE, 'gke', 'a:8476', 4, 2),
    ({'TPU_PROCESS_ADDRESSES': 'a:8471,b:8471', 'TPU_WORKER_ID': '1'}, 'gke', 'a:8476', 2, 1),
    (GKE | TWO_SLICES, 'gke', 'z:8476', 8, 6),
    (GKE | TWO_SLICES | JOBSET, 'gke', 'z:8476', 8, 6),
    (GKE | {'JOB_COMPLETION_INDEX': '2'}, 'gke', 'a:8476', 4, 2),
    (MPI4, 'openmpi', '10.96.0.1:8476', 8, 3),
    (MPI5, 'openmpi', '10.20.30.40:8476', 8, 3),
    (MPI4 | {'OMPI_MCA_orte_hnp_uri': '13.0;tcp6://[fe80::b9b,2620::2]:4'}, 'openmpi', '[fe80::b9b]:8476', 8, 3),
    (MPI5 | {'OMPI_COMM_WORLD_LOCAL_SIZE': '8', 'PMIX_SERVER_URI41': ''}, 'openmpi', '127.0.0.1:8476', 8, 3),
    (POD, 'kubernetes', 'run-w-0-0.run:8476', 6, 1),
    (POD | JOBSET, 'kubernetes', 'run-w-0-0.run:8476', 6, 4),
    (SLURM | {'PRETRAIN_COORDINATOR': '10.1.1.1:9'}, 'slurm', '10.1.1.1:9', 8, 5),
    (BATCH | OURS, 'pretrain', '10.0.0.7:9000', 4, 3),
    (SLURM | GKE | MPI4 | OURS, 'pretrain', '10.0.0.7:9000', 4, 3),
  ],
)  # fmt: skip
def test_the_environment_names_the_processes(environ, how, coordinator, processes, this):
  found = find(environ)
  assert (found.how, found.coordinator, found.processes, found.this) == (how, coordinator, processes, this)


@pytest.mark.parametrize(
  'environ',
  [
    {}, {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '1'}, SLURM | {'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'},
    {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0', 'JOB_COMPLETION_INDEX': '0'},
    {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': 'WARNING: could not determine TPU worker number'},
    {'OMPI_COMM_WORLD_SIZE': '1', 'OMPI_COMM_WORLD_RANK': '0'},
    POD | {'PRETRAIN_NUM_HOSTS': '1', 'JOB_COMPLETION_INDEX': '0'},
  ],
)  # fmt: skip
def test_one_process_is_no_cluster(environ):
  assert find(environ) is None


def test_what_is_found_is_one_line():
  assert str(find(GKE | TWO_SLICES)) == '8 processes by GKE TPU; this is 6; coordinator z:8476'


def test_two_clusters_are_refused_by_name_and_one_is_chosen():
  with pytest.raises(ConfigError) as caught:
    find(SLURM | GKE)
  assert str(caught.value) == (
    'CONFIG: the environment names Slurm and GKE TPU (8 processes, this is 5; 4 processes, this is 2); no process was '
    'started. Choose with --cluster=slurm or --cluster=gke; --cluster=none trains in one process.'
  )
  assert find(SLURM | GKE, 'gke').processes == 4
  assert find(SLURM | GKE, 'slurm').processes == 8
  assert find(SLURM | GKE | OURS, 'gke').how == 'gke'
  assert find(SLURM | GKE, 'none') is None


@pytest.mark.parametrize(
  ('environ', 'choice', 'message'),
  [
    (BATCH, None, "Slurm's job 77 has 8 tasks, and this process is not one that srun started: write srun before the"),
    (BATCH | MPI4, None, 'the environment names Slurm and Open MPI (8 processes, this is 0; 8 processes, this is 3)'),
    (SLURM, 'gke', '--cluster=gke: the environment has no variables of that cluster; --cluster=none trains in one'),
    (SLURM | {'SLURM_PROCID': 'x'}, None, "SLURM_PROCID='x' is not a number; the scheduler sets it."),
    (SLURM | {'SLURM_PROCID': '8'}, None, 'Slurm says that this is process 8 of 8; processes are numbered from 0.'),
    (SLURM | {'PRETRAIN_NUM_HOSTS': '2', 'PRETRAIN_COORDINATOR': 'a:1'}, None,
     'PRETRAIN_NUM_HOSTS and Slurm both count processes; unset the first, or set all of PRETRAIN_COORDINATOR, '),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, None, 'TPU_WORKER_HOSTNAMES is set and TPU_WORKER_ID is not: this pod does not'),
    (GKE | JOBSET, None, 'the JobSet has 2 replicas and MEGASCALE_NUM_SLICES is 1: each would be a run of its own'),
    ({'JOB_COMPLETION_INDEX': '3'}, None,
     'this is pod 3 of an indexed Job, whose size is not in the environment: set PRETRAIN_NUM_HOSTS and '),
    (POD | {'JOBSET_REPLICAS': '4'}, None, 'PRETRAIN_NUM_HOSTS=6 pods do not divide into JOBSET_REPLICAS=4 equal Jobs'),
    (MPI5 | {'PMIX_SERVER_URI41': 'prterun-n-1@0.2;tcp4://10.0.0.9:4'}, None,
     'Open MPI does not say on which host process 0 runs: add -x PRETRAIN_COORDINATOR=HOST:8476 to mpirun'),
    ({'PRETRAIN_HOST': '0'}, None, 'PRETRAIN_HOST set, but not all of PRETRAIN_COORDINATOR, PRETRAIN_NUM_HOSTS, '),
    (OURS | {'PRETRAIN_HOST': '4'}, None, 'PRETRAIN_HOST=4 with PRETRAIN_NUM_HOSTS=4; processes are numbered from 0.'),
  ],
)  # fmt: skip
def test_an_environment_that_does_not_say_enough_is_refused(environ, choice, message):
  with pytest.raises(ConfigError) as caught:
    find(environ, choice)
  assert message in str(caught.value)
  assert str(caught.value).startswith('CONFIG: ')


def test_the_address_of_process_0_may_be_given_to_open_mpi():
  found = find(MPI5 | {'PMIX_SERVER_URI41': '', 'PRETRAIN_COORDINATOR': 'n1:8476'})
  assert (found.coordinator, found.this) == ('n1:8476', 3)


@pytest.fixture
def metadata_server(monkeypatch):
  """A metadata server on loopback: its attributes, and what it was asked."""
  attributes, asked = dict(V5E_16), []

  class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
      pass

    def do_GET(self):
      name = self.path.removeprefix('/computeMetadata/v1/instance/attributes/')
      asked.append((name, self.headers['Metadata-Flavor']))
      value = attributes.get(name)
      self.send_response(value if isinstance(value, int) else 404 if value is None else 200)
      body = value.encode() if isinstance(value, str) else b''
      self.send_header('content-length', str(len(body)))
      self.end_headers()
      self.wfile.write(body)

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  monkeypatch.setattr(metadata, 'PAUSE_SECONDS', 0.0)
  yield {'GCE_METADATA_IP': f'127.0.0.1:{server.server_port}'}, attributes, asked
  server.shutdown()
  server.server_close()
  thread.join()


def test_the_hosts_of_a_tpu_vm_are_asked_from_its_metadata_server(metadata_server, monkeypatch):
  environ, attributes, asked = metadata_server
  monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')  # nothing listens there
  found = cluster.find(environ, tpu=True)
  assert (found.how, found.coordinator, found.processes, found.this) == ('gce', '10.0.0.1:8476', 4, 2)
  assert {flavor for _, flavor in asked} == {'Google'}
  attributes['tpu-env'] += MEGASCALE_ENV
  attributes['worker-network-endpoints'] = '10.0.0.5,10.0.0.6,10.0.0.7,10.0.0.8'
  found = cluster.find(environ, tpu=True)
  assert (found.coordinator, found.processes, found.this, found.slices) == ('10.9.9.9:8476', 8, 6, 2)


@pytest.mark.parametrize('named', [{'TPU_SKIP_MDS_QUERY': '1'}, {'JAX_PLATFORMS': 'cpu'}, GKE, None])
def test_no_metadata_server_is_asked_elsewhere(metadata_server, named):
  environ, _, asked = metadata_server
  cluster.find(environ | (named or {}), tpu=named is not None)
  assert asked == []
  assert cluster.find(environ, 'gce', tpu=False).processes == 4


def test_a_metadata_server_without_a_slice_means_one_process(metadata_server):
  environ, attributes, _ = metadata_server
  attributes.clear()
  assert cluster.find(environ, tpu=True) is None
  with socket.socket() as closed:
    closed.bind(('127.0.0.1', 0))
    nobody = {'GCE_METADATA_IP': f'127.0.0.1:{closed.getsockname()[1]}'}
    assert cluster.find(nobody, tpu=True) is None


def test_a_metadata_server_that_does_not_answer_is_not_one_process(metadata_server, monkeypatch):
  environ, attributes, asked = metadata_server
  attributes['agent-worker-number'] = 503
  with pytest.raises(HostError, match=r'did not say agent-worker-number .*503.*trains on this host alone'):
    cluster.find(environ, tpu=True)
  assert len(asked) == metadata.TRIES
  monkeypatch.setattr(metadata, 'SECONDS', 0.05)
  with socket.socket() as deaf:
    deaf.bind(('127.0.0.1', 0))
    deaf.listen()
    with pytest.raises(HostError, match=r'did not say agent-worker-number \(.*0.05 s|timed out'):
      cluster.find({'GCE_METADATA_IP': f'127.0.0.1:{deaf.getsockname()[1]}'}, tpu=True)


def test_slices_need_an_axis_of_the_mesh():
  found = find(GKE | TWO_SLICES)
  for replica in (2, 4, -1):
    cluster.check_slices(found, replica)
  with pytest.raises(ConfigError, match=r'2 slices of TPUs .*mesh.replica=1 is not a multiple of 2; set mesh.replica'):
    cluster.check_slices(found, 1)
  cluster.check_slices(None, 1)


@pytest.mark.parametrize(
  ('environ', 'rank', 'ranks', 'gpus', 'expected'),
  [
    ({}, 1, 4, 4, [1]),
    ({}, 1, 2, 8, [4, 5, 6, 7]),
    ({}, 0, 1, 8, []),
    ({}, 1, 2, 0, []),
    ({'CUDA_VISIBLE_DEVICES': '3'}, 1, 2, None, []),
    ({'CUDA_VISIBLE_DEVICES': '4,5'}, 1, 2, None, [1]),
    ({'SLURM_GPUS_PER_TASK': '4'}, 1, 2, 4, []),
    ({'SLURM_GPUS_ON_NODE': '8'}, 1, 2, 4, []),
    ({'SLURM_GPUS_ON_NODE': '4'}, 1, 2, 4, [2, 3]),
  ],
)
def test_processes_of_a_host_share_its_gpus_by_rank(environ, rank, ranks, gpus, expected):
  assert list(cluster.local_gpus(environ, rank, ranks, gpus)) == expected


def test_gpus_that_do_not_divide_are_refused():
  with pytest.raises(ConfigError, match='3 processes on this host see 8 GPUs, which do not divide'):
    cluster.local_gpus({}, 0, 3, 8)


def test_later_readers_find_the_processes_in_the_environment():
  environ = SLURM | {'CUDA_VISIBLE_DEVICES': '0,1'}
  cluster.adopt(find(environ), environ)
  assert {name: environ[name] for name in (*OURS, cluster.LOCAL_DEVICES)} == {
    'PRETRAIN_COORDINATOR': 'rack1n03:8476', 'PRETRAIN_NUM_HOSTS': '8', 'PRETRAIN_HOST': '5',
    'JAX_LOCAL_DEVICE_IDS': '1',
  }  # fmt: skip
  cluster.adopt(find(environ, 'none'), environ)
  assert not set(OURS) & set(environ)


def test_process_0_listens_in_the_network_of_the_others():
  """Debian's /etc/hosts gives a host's own name 127.0.1.1; a peer that is elsewhere cannot reach that."""
  member = lambda peer: cluster.Member('localhost:8476', 2, 0, 'slurm', peer=peer)
  assert addresses.bind_address('localhost:8476', member('127.0.0.9'), 1) == '127.0.0.1:8476'
  assert addresses.bind_address('name:8476', cluster.Member('name:8476', 2, 0), 1) == 'name:8476'
  with pytest.raises(ConfigError, match=r'no-such-host.invalid, where process 0 should listen, has no address \('):
    addresses.bind_address('no-such-host.invalid:8476', member('x'), 0.1)


def test_pretrain_run_does_not_take_another_cluster(capsys):
  flags = [f'--gin_file={tiny.ROOT}/configs/ul2/tiny.gin', '--workdir=x', '--cluster=slurm']
  assert main.main(['run', '--hosts=2', '--', 'train', *flags]) == 64
  assert (
    'CONFIG: --cluster=slurm: pretrain run starts the processes itself; leave the flag out.' in capsys.readouterr().err
  )


MEET = """
import os, re, sys
from pretrain.fleet import launch
found = launch.join_cluster(None, 1)
launch.initialize_from_env(60, found)
import jax
tables = open('/proc/self/net/tcp').read() + open('/proc/self/net/tcp6').read()
listening = re.findall(r' ([0-9A-F]+):211C [0-9A-F]+:0000 0A', tables)
visible = jax._src.xla_bridge.CUDA_VISIBLE_DEVICES.value
print('met', jax._src.distributed.global_state.num_processes, visible, sorted(set(listening)))
jax.distributed.shutdown()
"""


@pytest.mark.parametrize(
  ('more', 'visible'),
  [
    ({}, ['all', 'all']),
    pytest.param({'CUDA_VISIBLE_DEVICES': '0,1'}, ['0', '1'], marks=pytest.mark.slow),
    pytest.param({'PRETRAIN_NUM_HOSTS': '2'}, ['all', 'all'], marks=pytest.mark.slow),
  ],
  ids=['slurm', 'slurm_with_gpus', 'our_variables_under_slurm'],
)
def test_tasks_of_slurm_meet_on_the_address_of_the_first_node(port, more, visible):
  """Port 8476 (211C) of the first node's address alone; JAX's own detection would leave each task one GPU of eight."""
  base = {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '2', 'SLURM_STEP_NODELIST': 'localhost', 'JAX_PLATFORMS': 'cpu'} | more
  base |= {'SLURM_STEP_TASKS_PER_NODE': '2', 'SLURM_NODEID': '0', 'PYTHONPATH': str(tiny.ROOT)}
  processes = [start_task(base, rank) for rank in range(2)]
  said = [process.communicate(timeout=120) for process in processes]
  for rank, (out, err) in enumerate(said):
    line = f'2 processes by Slurm; this is {rank}; coordinator localhost:8476'
    assert (line in err) == (cluster.NUM_HOSTS not in more), err
    assert out.startswith(f'met 2 {visible[rank]} '), out + err
    assert re.search(r"\['\w*0100007F'\]$", out.strip()), '127.0.0.1 alone, not all addresses'


def start_task(environ: dict[str, str], rank: int) -> subprocess.Popen:
  own = {'SLURM_PROCID': str(rank), 'SLURM_LOCALID': str(rank)}
  if cluster.NUM_HOSTS in environ:
    own |= {cluster.COORDINATOR: f'localhost:{cluster.PORT}', cluster.HOST: str(rank)}
  return subprocess.Popen(
    [sys.executable, '-c', MEET], env=dict(os.environ) | environ | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip


@pytest.fixture
def port():
  """Port 8476, which one test of this machine uses at a time."""
  with open(pathlib.Path(tempfile.gettempdir()) / 'pretrain-test-port', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    addresses.check_free(('127.0.0.1', cluster.PORT), '')
    yield cluster.PORT


def test_a_process_started_on_one_host_alone_ends_with_a_sentence(port):
  env = dict(os.environ) | GKE | {'TPU_WORKER_HOSTNAMES': 'localhost,localhost', 'TPU_WORKER_ID': '0'}
  code = 'from pretrain.fleet import launch; launch.initialize_from_env(2, launch.join_cluster(None, 1))'
  began = time.monotonic()
  done = subprocess.run([sys.executable, '-c', code], env=env | {'JAX_PLATFORMS': 'cpu'}, cwd=tiny.ROOT,
                        capture_output=True, text=True, check=False)  # fmt: skip
  assert done.returncode == launch.HANG, done.stderr
  assert 'HANG: process 0 of 2 has not connected to the others at' in done.stderr
  assert 'on a cluster the command must run on every host' in done.stderr
  assert time.monotonic() - began < 60
