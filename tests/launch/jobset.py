"""A strict check of JobSet files: the fields that ours use, their types and values, and rules between them.

Source: the API of JobSet v1alpha2 (https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2), of Kubernetes batch/v1
Job and core/v1 Pod. An unknown field is a mistake here, and is dropped in silence by a server.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

NAME = re.compile(r'[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?')
QUANTITY = re.compile(r'\d+(\.\d+)?([EPTGMk]i?|m)?')
STRINGS = {str: str}  # any keys
CODES = range(1, 256)
ENV = {'name*': str, 'value': str, 'valueFrom': {'fieldRef*': {'fieldPath*': str}}}
CONTAINER = {
  'name*': NAME, 'image*': str, 'command': [str], 'args': [str], 'env': [ENV],
  'ports': [{'containerPort*': range(1, 65536), 'name': NAME, 'protocol': {'TCP', 'UDP'}}],
  'resources': {'requests': {str: QUANTITY}, 'limits': {str: QUANTITY}},
  'volumeMounts': [{'name*': NAME, 'mountPath*': str, 'readOnly': bool}],
}  # fmt: skip
POD = {
  'restartPolicy*': {'Never', 'OnFailure'}, 'terminationGracePeriodSeconds': range(86_400), 'nodeSelector': STRINGS,
  'containers*': [CONTAINER], 'hostNetwork': bool, 'dnsPolicy': {'ClusterFirst', 'ClusterFirstWithHostNet'},
  'volumes': [{'name*': NAME, 'emptyDir': {'medium': {'Memory', ''}, 'sizeLimit': QUANTITY}}], 'subdomain': NAME,
}  # fmt: skip
EXIT_CODES = {'containerName': NAME, 'operator*': {'In', 'NotIn'}, 'values*': [CODES]}
JOB = {
  'parallelism*': range(1, 10_000), 'completions*': range(1, 10_000), 'completionMode*': {'Indexed', 'NonIndexed'},
  'backoffLimit*': range(100),
  'podFailurePolicy': {
    'rules*': [{'action*': {'FailJob', 'FailIndex', 'Ignore', 'Count'}, 'onExitCodes': EXIT_CODES}],
  },
  'template*': {'metadata': {'labels': STRINGS, 'annotations': STRINGS}, 'spec*': POD},
}  # fmt: skip
JOBSET = {
  'apiVersion*': {'jobset.x-k8s.io/v1alpha2'},
  'kind*': {'JobSet'},
  'metadata*': {'name*': NAME, 'namespace': NAME, 'labels': STRINGS, 'annotations': STRINGS},
  'spec*': {
    'network': {'enableDNSHostnames': bool, 'publishNotReadyAddresses': bool, 'subdomain': NAME},
    'failurePolicy': {
      'maxRestarts': range(10_000), 'restartStrategy': {'Recreate', 'BlockingRecreate', 'InPlaceRestart'},
      'rules': [{
        'name*': str, 'action*': {'FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts'},
        'onJobFailureReasons': [{
          'BackoffLimitExceeded', 'DeadlineExceeded', 'FailedIndexes', 'MaxFailedIndexesExceeded', 'PodFailurePolicy',
        }],
        'targetReplicatedJobs': [NAME],
      }],
    },
    'replicatedJobs*': [{'name*': NAME, 'replicas': range(1, 10_000), 'template*': {'spec*': JOB}}],
  },
}  # fmt: skip


def mistakes(document: Any) -> list[str]:
  """What is wrong with a JobSet; nothing where it is valid."""
  found = list(against(JOBSET, document, ''))
  return found or [line for job in document['spec']['replicatedJobs'] for line in of_job(job)]


def against(schema: Any, value: Any, where: str) -> Iterator[str]:
  """Where `value` is not what the schema says: a dict of fields ('name*' is required), a list, a set of values, …"""
  match schema:
    case dict() | list():
      yield from of_type(type(schema), value, where) or of_parts(schema, value, where)
    case set() if value not in schema:
      yield f'{where} is {value!r}, not one of {sorted(schema)}'
    case range() if type(value) is not int or value not in schema:
      yield f'{where} is {value!r}, not a number from {schema.start} to {schema.stop - 1}'
    case re.Pattern() if not isinstance(value, str) or not schema.fullmatch(value):
      yield f'{where} is {value!r}, which does not match {schema.pattern}'
    case type():
      yield from of_type(schema, value, where)


def of_parts(schema: Any, value: Any, where: str) -> Iterator[str]:
  if isinstance(schema, list):
    yield from () if value else (f'{where} is empty',)
    parts = [(f'{where}/{i}', schema[0], item) for i, item in enumerate(value)]
  elif str in schema:
    parts = [(f'{where}/{key}', schema[str], item) for key, item in value.items()]
  else:
    yield from of_fields(schema, value, where)
    return
  for name, part, item in parts:
    yield from against(part, item, name)


def of_type(kind: type, value: Any, where: str) -> list[str]:
  return [] if type(value) is kind else [f'{where} is {value!r}, not a {kind.__name__}']


def of_fields(schema: Mapping[str, Any], value: Mapping[str, Any], where: str) -> Iterator[str]:
  fields = {name.rstrip('*'): part for name, part in schema.items()}
  yield from (f'{where}/{name} is missing' for name in fields if f'{name}*' in schema and name not in value)
  for name, item in value.items():
    if name in fields:
      yield from against(fields[name], item, f'{where}/{name}')
    else:
      yield f'{where}/{name} is no field; the fields are {", ".join(fields)}'


def of_job(job: Mapping[str, Any]) -> Iterator[str]:
  """Rules between fields, which no schema has."""
  spec, pod = job['template']['spec'], job['template']['spec']['template']['spec']
  containers = {container['name']: container for container in pod['containers']}
  rules = spec.get('podFailurePolicy', {}).get('rules', [])
  if rules and pod['restartPolicy'] != 'Never':
    yield f'{job["name"]}: podFailurePolicy needs restartPolicy: Never'
  if spec['completionMode'] == 'Indexed' and spec['parallelism'] != spec['completions']:
    yield f'{job["name"]}: parallelism {spec["parallelism"]} is not completions {spec["completions"]}: pods would wait'
  for rule in rules:
    if (name := rule.get('onExitCodes', {}).get('containerName')) not in (None, *containers):
      yield f'{job["name"]}: onExitCodes names a container {name}; there are {", ".join(containers)}'
  volumes = {volume['name'] for volume in pod.get('volumes', [])}
  for container in containers.values():
    yield from (
      f'{job["name"]}: volumeMounts names {mount["name"]}, which is no volume'
      for mount in container.get('volumeMounts', []) if mount['name'] not in volumes
    )  # fmt: skip
    resources = container.get('resources', {})
    yield from (
      f'{job["name"]}: {name} has a request of {amount} and a limit of {resources["limits"].get(name)}'
      for name, amount in resources.get('requests', {}).items() if amount != resources.get('limits', {}).get(name)
    )  # fmt: skip
