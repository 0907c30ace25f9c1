"""Object stores through TensorStore: endpoints, credentials and retries of gs:// and s3://, for data and for workdirs.

Variables that are read: for s3:// AWS_ENDPOINT_URL, AWS_REGION and AWS's keys; for gs:// those of TensorStore
(TENSORSTORE_GCS_HTTP_URL, GOOGLE_APPLICATION_CREDENTIALS, otherwise the metadata server of the machine).
"""

import os
import pathlib
from typing import Any

# A retry waits up to 32 s: eight survive two minutes without a network, and a wrong address still fails soon.
RETRIES = {'max_retries': 8}
CONTEXT = {'s3_request_retries': RETRIES, 'gcs_request_retries': RETRIES}


def spec_of(url: str) -> str | dict[str, Any]:
  """TensorStore's spec of a URL. AWS_ENDPOINT_URL, AWS_REGION and AWS's keys complete one of s3://."""
  if not url.startswith('s3://'):
    return url
  bucket, _, folder = url.removeprefix('s3://').partition('/')
  spec: dict[str, Any] = {'driver': 's3', 'bucket': bucket, 'path': folder}
  if endpoint := os.environ.get('AWS_ENDPOINT_URL'):
    spec |= {'endpoint': endpoint.rstrip('/'), 'aws_region': os.environ.get('AWS_REGION', 'us-east-1')}
  if 'AWS_ACCESS_KEY_ID' in os.environ:  # otherwise TensorStore searches all of AWS's places, slowly and noisily
    spec['aws_credentials'] = {'type': 'environment'}
  return spec


def endpoint_of(url: str) -> str:
  """Where requests for a URL go, for messages; '' for the provider's own address."""
  return os.environ.get('AWS_ENDPOINT_URL' if url.startswith('s3://') else 'TENSORSTORE_GCS_HTTP_URL', '')


def credentials_of(url: str) -> str:
  """Where the credentials for a URL come from, for messages; never the credentials themselves."""
  if url.startswith('s3://'):
    if 'AWS_ACCESS_KEY_ID' in os.environ:
      return 'AWS_ACCESS_KEY_ID of the environment'
    profile = os.environ.get('AWS_PROFILE')
    return f'the profile {profile} of AWS' if profile else "AWS's configuration of this machine"
  if file := os.environ.get('GOOGLE_APPLICATION_CREDENTIALS'):
    return f'GOOGLE_APPLICATION_CREDENTIALS={file}'
  if 'GOOGLE_AUTH_TOKEN_FOR_TESTING' in os.environ:
    return 'GOOGLE_AUTH_TOKEN_FOR_TESTING of the environment'
  file = pathlib.Path(os.environ.get('CLOUDSDK_CONFIG', '~/.config/gcloud')) / 'application_default_credentials.json'
  return str(file) if file.expanduser().exists() else "the service account of this machine (Google's metadata server)"
