"""Runs in an object store: hosts that die, errors, lost answers, other writers, damage, refusals: F22 to F30."""

import collections
import random
import re
import time

from faults.case import Line, count
from faults.stores.case import SECONDS, StoreCase, amazon, environment, first_wrong, google, silent, store_of, unused
from pretrain.workdirs.store_path import StorePath

STEPS = 30
SECONDS_OF_A_REFUSAL = 60.0


def f22(options, alone) -> Line:
  """a host of a run in a store is killed at random and lost: another one resumes"""
  trials, draw = count(options, 4, 20), random.Random(options.seed + 22 + options.part)
  found, hit = [], collections.Counter()
  for i in range(options.part, options.part + trials * options.parts, options.parts):
    kind, hosts, at = ('gs', 's3')[i % 2], 1 + i // 2 % 2, draw.randrange(1, STEPS - 2)
    with store_of(f'{kind}://'):
      problem = lost_at(StoreCase(f'f22_{i}', options, f'{kind}://runs/f22/{i}', STEPS, hosts), at, draw, alone)
    found.append(problem and f'{kind}://, killed at row {at} with {hosts} processes: {problem}')
    hit[f'{kind}:// with {hosts} processes'] += not problem
    print(f'trial {i}, {kind}:// with {hosts} processes, killed at row {at}: {problem or "survived"}', flush=True)
  return Line(trials, sum(not line for line in found), first_wrong(found), hit=dict(hit))


def lost_at(case: StoreCase, at: int, draw: random.Random, alone) -> str:
  """'' if a run whose host is killed soon after row `at` resumes on another one as if it had not been."""
  case.start()
  problem = case.kill_when(lambda: case.rows() >= at and (time.sleep(draw.uniform(0, 0.05)) or True))
  code, said = case.run()
  return problem or (f'exit code {code}: {said[-300:]}' if code else case.differs(alone(case.hosts, STEPS)))


def f23(options, alone) -> Line:
  """a store answers 503 three times and 429 twice: the run waits and continues"""
  faults = [dict(match='POST .*MANIFEST', status=503, times=3), dict(match='POST .*state/d', status=429, times=2),
            dict(match='GET .*/o[?]', status=503, times=2)]  # fmt: skip
  return unbroken(options, alone, 'f23', faults)


def f24(options, alone) -> Line:
  """the answer to the write of a manifest, or of the owner, is lost: the step exists, once"""
  faults = [dict(match='POST .*10/MANIFEST', status=503, done=True), dict(match='POST .*OWNER', status=503, done=True),
            dict(match='POST .*20/MANIFEST', status=503, done=True)]  # fmt: skip
  return unbroken(options, alone, 'f24', faults)


def unbroken(options, alone, name: str, faults: list[dict]) -> Line:
  """A run that ends as if nothing had happened; each of `faults` was met."""
  with google() as store:
    case = StoreCase(name, options, f'gs://runs/{name}', STEPS)
    for fault in faults:
      store.fault(**fault)
    code, said = case.run()
    met = sum(fault['times'] == 0 for fault in store.faults)
    problem = f'exit code {code}: {said[-300:]}' if code else case.differs(alone(1, STEPS))
    problem = problem or ('' if case.finished() == [20, 30] else f'steps {case.finished()}')
  return Line(len(faults), 0 if problem else met, problem)


def f25(options, alone) -> Line:
  """a manifest of another writer is there: it is not replaced, that save fails and the next one is made"""
  with google() as store:
    case, foreign = StoreCase('f25', options, 'gs://runs/f25', STEPS), ('runs', 'f25/checkpoints/10/MANIFEST.json')
    put = lambda: store.objects.__setitem__(foreign, (b'of another run', next(store.numbers)))
    store.fault('GET .*10/MANIFEST', status=404, act=put)  # between the look and the write
    code, said = case.run()
    own = case.differs(alone(1, STEPS)) if code == 0 else f'exit code {code}: {said[-300:]}'
    kept = store.objects.get(foreign, (b'',))[0] == b'of another run' or 'another writer' in said
    problem = own or ('' if kept else 'it was replaced') or ('' if 'another writer' in said else 'it was not reported')
  return Line(1, int(not problem), problem)


def f26(options, alone) -> Line:
  """a byte of a step in a store changes: the step is set aside, the run resumes from the one before"""
  trials, draw, lines = count(options, 1, 10), random.Random(options.seed + 26 + options.part), []
  for i in range(trials):
    with google() as store:
      case = StoreCase(f'f26_{i}', options, f'gs://runs/f26/{i}', STEPS)
      case.start('--gin.checkpoint.keep=3')
      early = case.kill_when(lambda c=case: 20 in c.finished())
      if early:
        lines.append(early)
        continue
      names = [key for key, (data, _) in store.objects.items() if f'/{i}/checkpoints/20/' in key[1] and len(data)]
      key = draw.choice([key for key in names if not key[1].endswith('commit_success.txt')])
      data = bytearray(store.objects[key][0])
      data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
      store.objects[key] = bytes(data), next(store.numbers)
      code, said = case.run()
      problem = f'exit code {code}: {said[-300:]}' if code else case.differs(alone(1, STEPS))
      problem = problem or ('' if re.search(r'Quarantined as 20.corrupt; resuming from step 10', said) else said[-300:])
      lines.append(problem and f'{key[1]}: {problem}')
  return Line(trials, sum(not line for line in lines), first_wrong(lines))


# A request during which the process is killed: in a save, in the removal of an old step, in a quarantine.
CUTS = ('POST .*10/state', 'POST .*20/commit', 'POST .*20/MANIFEST', 'POST .*deleting', 'DELETE .*/10/MANIFEST',
        'DELETE .*/10/state')  # fmt: skip
CUTS_OF_A_MOVE = ('POST .*20.moving', 'POST .*20.corrupt/state', 'DELETE .*/20/MANIFEST', 'DELETE .*/20/state')


def f27(options, alone) -> Line:
  """kill -9 within a save, a removal or a quarantine in a store: the next start ends or undoes it"""
  cuts = [*CUTS[options.part :: options.parts], *CUTS_OF_A_MOVE[options.part :: options.parts]]
  if not options.full:
    cuts = [CUTS[2], CUTS[4], CUTS_OF_A_MOVE[1]]
  lines = [cut_off(options, alone, i, cut) for i, cut in enumerate(cuts)]
  return Line(len(cuts), sum(not line for line in lines), first_wrong(lines))


def cut_off(options, alone, i: int, cut: str) -> str:
  """'' if a run that is killed during the request `cut` resumes as if it had not been."""
  with google() as store:
    case = StoreCase(f'f27_{i}', options, f'gs://runs/f27/{i}', STEPS)
    if cut in CUTS_OF_A_MOVE:
      case.start('--gin.checkpoint.keep=3')
      if early := case.kill_when(lambda: 20 in case.finished()):
        return early
      path = StorePath(case.url) / 'checkpoints/20/position/metadata'
      path.write_bytes(path.read_bytes()[:-1] + b'?')
    fault = store.fault(cut, act=case.kill)
    code, said = case.run()
    if fault['times']:
      return f'{cut}: it was not met; exit code {code}: {said[-300:]}'
    case.lose_host()
    code, said = case.run()
    problem = f'exit code {code}: {said[-300:]}' if code else case.differs(alone(1, STEPS))
  return problem and f'{cut}: {problem}'


def f28(options, alone) -> Line:
  """a second run on the workdir: it is refused, the first one is not disturbed"""
  with google() as store:
    case = StoreCase('f28', options, 'gs://runs/f28', STEPS)
    held = store.fault('POST .*10/MANIFEST', times=10**6)  # the first one waits in its first save meanwhile
    case.start()
    case.wait_for_rows(1)
    second = StoreCase('f28_second', options, case.url, STEPS)
    refused, said = second.run()
    held['times'] = 0
    code = case.process.wait(SECONDS)
    problem = (
      '' if refused == 64 and 'which has not ended' in said else f'the second: exit code {refused}, {said[-300:]}'
    )
    problem = problem or (f'exit code {code}' if code else case.differs(alone(1, STEPS)))
  return Line(1, int(not problem), problem)


def f29(options, alone) -> Line:
  """credentials that may not read, write or list: one line with bucket and credentials, before anything is compiled"""
  lines = []
  for i, match in enumerate(('GET', 'POST', 'GET .*/o[?]')):
    with google() as store:
      store.fault(match, status=403, times=10**6)
      lines.append(refusal(StoreCase(f'f29_{i}', options, 'gs://runs/f29', STEPS), 'gs://runs/f29.*credentials from'))
  return Line(len(lines), sum(not line for line in lines), first_wrong(lines))


def f30(options, alone) -> Line:
  """a wrong bucket, a wrong address, credentials in the URL: one line within a minute"""
  none, deaf = 'there is no such bucket .*bucket none-such.*credentials from', 'it did not answer .*credentials from'
  with google(), amazon(), silent() as port:
    answers = [f30_case(options, i, *case) for i, case in enumerate((
      ('gs://none-such/run', none, None), ('s3://none-such/run', none, None),
      ('s3://KEY:SECRET@runs/run', r's3://\*\*\*@runs/run has credentials in it', None),
      ('hdfs://runs/run', 'is not the URL of a folder in a store', None),
      ('gs://runs/run', deaf, port), ('s3://runs/run', deaf, port), ('gs://runs/run', deaf, unused()),
      ('s3://runs/run', deaf, unused()),
    ))]  # fmt: skip
  found, seconds = zip(*answers, strict=True)
  longest = f'at most {max(seconds):.0f} s'
  return Line(len(found), sum(not problem for problem in found), first_wrong(found) or longest)


def f30_case(options, i: int, url: str, said: str, port: int | None) -> tuple[str, float]:
  """('' or what is wrong, seconds) of a start at `url`; `port`: where the store's address is wrong."""
  address = {name: f'http://127.0.0.1:{port}' for name in ('TENSORSTORE_GCS_HTTP_URL', 'AWS_ENDPOINT_URL') if port}
  start = time.monotonic()
  with environment(address):
    return refusal(StoreCase(f'f30_{i}', options, url, STEPS), said), time.monotonic() - start


def refusal(case: StoreCase, wanted: str) -> str:
  """'' if the run ends at once with one line that matches."""
  start = time.monotonic()
  code, said = case.run()
  seconds, lines = time.monotonic() - start, [line for line in said.splitlines() if not re.match(r'[IWE]\d{4} ', line)]
  if code != 64 or len(lines) != 1 or not re.search(wanted, lines[0]) or seconds > SECONDS_OF_A_REFUSAL:
    return f'{case.url}: exit code {code} after {seconds:.0f} s: {said[-300:]}'
  return 'a secret was printed' if 'SECRET' in said else ''
