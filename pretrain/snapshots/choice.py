"""Which step a run resumes from: the newest snapshot in the host RAM of all hosts, or the newest checkpoint on disk."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.snapshots.slots import Header


@dataclasses.dataclass(frozen=True)
class Report:
  """The snapshots of one host: step -> (header, whether its parity is intact), and why others are not usable."""

  steps: Mapping[int, tuple[Header, bool]]
  reasons: Sequence[str]

  @staticmethod
  def of(steps: Mapping[str, Sequence[Any]], reasons: Sequence[str]) -> 'Report':
    return Report({int(step): (Header(**header), whole) for step, (header, whole) in steps.items()}, reasons)


@dataclasses.dataclass(frozen=True)
class Choice:
  """The newest step in host RAM: its header and the hosts whose share must be rebuilt; or why there is none."""

  step: int | None
  why: str
  header: Header | None = None
  lost: tuple[int, ...] = ()
  parted: Sequence[Sequence[int]] = ()


def choose(reports: Sequence[Report], groups: Sequence[Sequence[int]]) -> Choice:
  """The newest step of which every host has its share; a group may lack one share if its other hosts have parity."""
  steps, why = sorted({step for report in reports for step in report.steps}, reverse=True), ''
  for step in steps:
    headers = [report.steps[step][0] for report in reports if step in report.steps]
    missing = [host for host, report in enumerate(reports) if step not in report.steps]
    if not (reason := unlike(step, headers) or unrecoverable(reports, groups, step, missing)):
      return Choice(step, why, headers[0], tuple(missing), groups)
    why = why or reason
  reasons = [f'process {host}: {report.reasons[0]}' for host, report in enumerate(reports) if report.reasons]
  return Choice(None, why or '; '.join(reasons[:3]))


def unlike(step: int, headers: Sequence[Header]) -> str:
  """Why shares of a step do not belong together: a host that was away may have a share of an earlier attempt."""
  same = all(header.crcs == headers[0].crcs for header in headers)
  return '' if same else f'the shares of step {step} were written in different attempts'


def unrecoverable(reports: Sequence[Report], groups, step: int, missing: Sequence[int]) -> str:
  """Why a step cannot be rebuilt after the hosts `missing` lost their shares; '' if it can."""
  for host in missing:
    group = next((group for group in groups if host in group), (host,))
    lost = [other for other in group if other in missing]
    reason = f' ({reports[host].reasons[0] if reports[host].reasons else "nothing there"})'
    lacking = [other for other in group if other not in missing and not reports[other].steps[step][1]]
    if len(group) == 1:
      return f'step {step} lacks the share of process {host}, and snapshot.group keeps no parity{reason}'
    if len(lost) > 1:
      return f'step {step} lacks the shares of processes {lost} of one group{reason}'
    if lacking:
      return f'step {step} lacks the share of process {host}, and process {lacking[0]} has no parity of it{reason}'
  return ''


def said(choice: Choice, saved: int | None, latest: int | None) -> str:
  """The line that names what a run resumes from, step `saved` on disk if given; '' if there is nothing to say."""
  if saved is not None:
    there = f'host RAM has step {choice.step}' if choice.step is not None else f'host RAM: {choice.why or "nothing"}'
    return f'SNAPSHOT: resuming from step {saved} on disk; {there}.'
  if choice.step is None:
    return f'SNAPSHOT: no usable snapshot in host RAM: {choice.why}.' if choice.why else ''
  than = 'there is no checkpoint' if latest is None else f'the newest checkpoint is step {latest}'
  why = f'; {choice.why}' if choice.why else ''
  return f'SNAPSHOT: resuming from step {choice.step} in host RAM, {than}{rebuilt(choice)}{why}.'


def rebuilt(choice: Choice) -> str:
  """Which shares were lost, as the end of a sentence."""
  return ''.join(
    f'; the share of process {host} is rebuilt from parity on {[other for other in group if other != host]}'
    for group in choice.parted
    for host in group
    if host in choice.lost
  )
