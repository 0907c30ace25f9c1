"""The owner of a workdir in a store: one at a time, also where the owner has died, paused or gone to another host."""

import json
import os
import subprocess
import sys

import pytest

from pretrain.errors import ConfigError
from pretrain.hosts import lease
from pretrain.hosts.ownership import owned, owned_by_run
from pretrain.workdirs.store_path import StorePath

RUN = StorePath('gs://runs/some/run')
OWNER = RUN / 'OWNER'
ELSEWHERE = {
  'id': 'other',
  'host': 'pod-7',
  'pid': 12,
  'began': '1',
  'machine': 'x',
  'since': '2026-11-29T10:00:00+00:00',
}


@pytest.fixture
def quick(monkeypatch):
  """Leases end soon."""
  monkeypatch.setattr(lease, 'RENEW_SECONDS', 0.03)
  monkeypatch.setattr(lease, 'LEASE_SECONDS', 0.4)
  monkeypatch.setattr(lease, 'POLL_SECONDS', 0.01)


def test_a_second_owner_is_refused_with_the_host_and_process_of_the_first(bucket, quick):
  run = StorePath(bucket.url)
  with owned(run) as first:
    assert json.loads(bucket.contents()['OWNER'])['id'] == first.owner
    said = rf'belongs to the run of process {os.getpid()} on .* \(since .*not ended'
    with pytest.raises(ConfigError, match=said), owned(run):
      pass
    first.check()
  assert bucket.contents() == {}
  with owned(run) as second:
    assert second.before is None
    assert second.owner != first.owner


def test_an_owner_of_this_machine_that_has_ended_is_replaced_at_once(gcs, monkeypatch):
  code = (
    'import os, signal\n'
    'from pretrain.hosts.lease import leased\n'
    'from pretrain.workdirs.store_path import StorePath\n'
    f"with leased(StorePath('{RUN}'), '--workdir') as found:\n"
    '  print(found.owner, flush=True)\n'
    '  os.kill(os.getpid(), signal.SIGKILL)\n'
  )
  dead = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert dead.returncode == -9, dead.stderr
  monkeypatch.setattr(lease, 'POLL_SECONDS', 'no time to wait')
  with owned(RUN) as found:
    assert found.before == dead.stdout.strip()


def test_an_owner_of_another_host_is_replaced_when_it_was_silent_for_long_enough(gcs, quick, capsys):
  OWNER.write_text(json.dumps(ELSEWHERE))
  with owned(RUN) as found:
    assert found.before == 'other'
  text = 'belonged to the run of process 12 on pod-7 (since 2026-11-29T10:00:00+00:00): waiting up to 0 s for a sign'
  assert capsys.readouterr().err.count(text) == 1


def test_a_file_that_says_nothing_is_an_owner_too(gcs, quick):
  OWNER.write_bytes(b'\xff{')
  with owned(RUN) as found:
    assert found.before is None
  assert not lease.has_ended({})
  assert not lease.has_ended({'machine': lease.machine(), 'pid': 1, 'began': lease.began(1)})


def test_a_run_that_has_lost_its_workdir_is_told_before_it_commits(gcs, quick):
  with owned(RUN) as found:
    OWNER.write_text(json.dumps(ELSEWHERE))
    with pytest.raises(ConfigError, match=r'--workdir=gs://runs/some/run belongs to the run of process 12 on pod-7 '):
      found.check()
  assert json.loads(OWNER.read_text()) == ELSEWHERE  # it is not ours to remove


def test_processes_that_the_owner_starts_have_its_lease(gcs, monkeypatch):
  with owned(RUN) as found:
    monkeypatch.setenv(lease.INHERITED, found.owner)
    with owned_by_run(RUN) as inherited:
      assert inherited.owner == inherited.before == found.owner
      inherited.check()
    found.check()
    monkeypatch.setenv(lease.INHERITED, 'that of another workdir')
    assert lease.inherited(RUN) is None


@pytest.mark.parametrize('status', [401, 403])
def test_a_bucket_without_permission_to_write_is_one_line(gcs, status):
  gcs.fault('POST', status, times=99)
  said = rf'^CONFIG: --workdir={RUN} cannot be used: these credentials .*HTTP {status}'
  with pytest.raises(ConfigError, match=said) as e, owned(RUN):
    pass
  assert 'bucket runs' in str(e.value)
  assert 'credentials from GOOGLE_AUTH' in str(e.value)
  assert '\n' not in str(e.value)


def test_a_missing_bucket_is_one_line(gcs, s3):
  for scheme in ('gs', 's3'):
    said = r'cannot be used: there is no such bucket .*bucket none-such'
    with pytest.raises(ConfigError, match=said), owned(StorePath(f'{scheme}://none-such/run')):
      pass


def test_credentials_that_may_not_list_are_refused(gcs):
  gcs.fault('GET .*/o[?]', 403, times=99)
  with pytest.raises(ConfigError, match=r'the store does not list it .*give them permission to list'), owned(RUN):
    pass
  assert gcs.names('runs') == []


def test_a_store_that_is_away_for_a_while_ends_no_lease(gcs, quick):
  with owned(RUN) as found:
    gcs.fault('POST', 403, times=3)
    while gcs.faults[0]['times']:
      pass
    renewed = json.loads(OWNER.read_text())['renewed']
    while json.loads(OWNER.read_text())['renewed'] == renewed:
      pass
    found.check()
