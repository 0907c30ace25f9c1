"""Google Cloud Storage's JSON API on loopback, in memory: what TensorStore asks of it, with conditions and with faults.

Conditions (ifGenerationMatch) are enforced. A fault answers requests whose method and path match a pattern with a
status, before or after the request was carried out: {'match': 'PUT .*MANIFEST', 'status': 503, 'times': 3, 'after': 0,
'done': False}. `done`: the store does what was asked, and the answer is lost.

As a program: `python fake_gcs.py PORT BUCKET…`; faults are posted to /fault.
"""

import collections
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any, ClassVar

# "POST /upload/storage/v1/b/B/o?name=N", "GET /storage/v1/b/B/o/N?alt=media", "DELETE …", "GET /storage/v1/b/B/o?…"
UPLOAD = re.compile(r'/upload/storage/v1/b/([^/]+)/o')
BUCKET = re.compile(r'/storage/v1/b/([^/]+)/o')
OBJECT = re.compile(r'(?:/download)?/storage/v1/b/([^/]+)/o/(.+)')


class Store:
  """The objects of all buckets: (bucket, name) -> (contents, generation), and the faults that are to come."""

  def __init__(self, *buckets: str):
    self.buckets, self.lock = set(buckets), threading.Lock()
    self.objects: dict[tuple[str, str], tuple[bytes, int]] = {}
    self.numbers = itertools.count(1000)
    self.page = 1000  # objects in an answer to a list, at most
    self.faults: list[dict[str, Any]] = []
    self.log: collections.Counter[str] = collections.Counter()
    self.uploads: dict[str, tuple[str, str, dict[str, str], bytes]] = {}

  def names(self, bucket: str) -> list[str]:
    return sorted(name for where, name in self.objects if where == bucket)

  def fault(
    self, match: str, status: int = 503, times: int = 1, after: int = 0, done: bool = False,
    act: Callable[[], None] = lambda: None,
  ) -> dict[str, Any]:  # fmt: skip
    """The requests that match, but for the first `after`, get this status, `times` times; `act` is called before."""
    self.faults.append({'match': match, 'status': status, 'times': times, 'after': after, 'done': done, 'act': act})
    return self.faults[-1]

  def due(self, request: str) -> dict[str, Any] | None:
    for fault in self.faults:
      if fault['times'] > 0 and re.search(fault['match'], request):
        if fault['after'] > 0:
          fault['after'] -= 1
          continue
        fault['times'] -= 1
        fault['act']()
        return fault
    return None


class Answer(Exception):
  """Ends a request: status, body, headers."""

  def __init__(self, status: int, body: bytes | dict = b'', headers: dict[str, Any] | None = None):
    self.status, self.headers = status, headers or {}
    self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version, disable_nagle_algorithm, wbufsize = 'HTTP/1.1', True, 2**16
  store: ClassVar[Store]

  def log_message(self, *args: Any) -> None:
    pass

  def handle_any(self) -> None:
    size = int(self.headers.get('content-length') or 0)
    body = self.rfile.read(size) if size else self.chunks()
    url = urllib.parse.urlsplit(self.path)
    asked = {key: values[-1] for key, values in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
    request = f'{self.command} {urllib.parse.unquote(self.path)}'
    with self.store.lock:
      self.store.log[f'{self.command} {re.sub("/o/.*", "/o/NAME", url.path)}'] += 1
      try:
        if url.path == '/fault':
          self.store.fault(**json.loads(body))
          raise Answer(200)
        fault = self.store.due(request)
        if fault and not fault['done']:
          raise Answer(fault['status'], {'error': {'code': fault['status'], 'message': 'fault'}})
        self.act(url.path, asked, body, fault['status'] if fault else 0)
      except Answer as answer:
        self.reply(answer)

  def act(self, path: str, asked: dict[str, str], body: bytes, lost: int) -> None:
    try:
      self.route(path, asked, body)
    except Answer as answer:
      if lost and answer.status < 300:
        raise Answer(lost, b'the answer was lost') from None
      raise
    raise Answer(404, {'error': {'code': 404, 'message': f'{path} is not a path of this server'}})

  def reply(self, answer: Answer) -> None:
    self.send_response(answer.status)
    for key, value in answer.headers.items():
      self.send_header(key, str(value))
    self.send_header('content-length', str(len(answer.body)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(answer.body)

  def chunks(self) -> bytes:
    if self.headers.get('transfer-encoding') != 'chunked':
      return b''
    parts = []
    while size := int(self.rfile.readline().split(b';')[0], 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b''.join(parts)

  def route(self, path: str, asked: dict[str, str], body: bytes) -> None:
    if found := UPLOAD.fullmatch(path):
      self.upload(self.bucket(found[1]), asked, body)
    if found := BUCKET.fullmatch(path):
      self.list(self.bucket(found[1]), asked)
    if found := OBJECT.fullmatch(path):
      self.one(self.bucket(found[1]), urllib.parse.unquote(found[2]), asked)

  def bucket(self, name: str) -> str:
    if name not in self.store.buckets:
      raise Answer(404, {'error': {'code': 404, 'message': 'The specified bucket does not exist.'}})
    return name

  def upload(self, bucket: str, asked: dict[str, str], body: bytes) -> None:
    if asked.get('uploadType') != 'resumable':
      self.put(bucket, asked['name'], asked, body)
    if self.command == 'POST':
      key = str(next(self.store.numbers))
      self.store.uploads[key] = bucket, asked.get('name') or json.loads(body)['name'], asked, b''
      place = f'http://{self.headers["host"]}{self.path.partition("?")[0]}?uploadType=resumable&upload_id={key}'
      raise Answer(200, headers={'location': place})
    where, name, first, before = self.store.uploads[asked['upload_id']]
    self.store.uploads[asked['upload_id']] = where, name, first, before + body
    if re.match(r'bytes .*/\*', self.headers.get('content-range', '')):
      raise Answer(308, headers={'range': f'bytes=0-{len(before + body) - 1}'})
    self.put(where, name, first, before + body)

  def put(self, bucket: str, name: str, asked: dict[str, str], data: bytes) -> None:
    self.check(self.store.objects.get((bucket, name)), asked)
    self.store.objects[bucket, name] = bytes(data), next(self.store.numbers)
    raise Answer(200, self.resource(bucket, name))

  def check(self, there: tuple[bytes, int] | None, asked: dict[str, str], changed: int = 412) -> None:
    now = there[1] if there else 0
    if 'ifGenerationMatch' in asked and int(asked['ifGenerationMatch']) != now:
      raise Answer(412, {'error': {'code': 412, 'message': 'conditionNotMet'}})
    if 'ifGenerationNotMatch' in asked and int(asked['ifGenerationNotMatch']) == now:
      raise Answer(changed)

  def resource(self, bucket: str, name: str) -> dict[str, str]:
    data, generation = self.store.objects[bucket, name]
    return {
      'kind': 'storage#object', 'bucket': bucket, 'name': name, 'id': f'{bucket}/{name}/{generation}',
      'size': str(len(data)), 'generation': str(generation), 'metageneration': '1', 'etag': f'"{generation}"',
      'timeCreated': '2026-01-01T00:00:00.000Z', 'updated': '2026-01-01T00:00:00.000Z',
    }  # fmt: skip

  def one(self, bucket: str, name: str, asked: dict[str, str]) -> None:
    there = self.store.objects.get((bucket, name))
    if there is None:
      raise Answer(404, {'error': {'code': 404, 'message': 'No such object'}})
    if self.command == 'DELETE':
      self.check(there, asked)
      del self.store.objects[bucket, name]
      raise Answer(204)
    self.check(there, asked, changed=304)
    if asked.get('alt') != 'media':
      raise Answer(200, self.resource(bucket, name))
    self.data(*there)

  def data(self, data: bytes, generation: int) -> None:
    headers = {'x-goog-generation': generation, 'x-goog-metageneration': 1, 'etag': f'"{generation}"'}
    found = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('range', ''))
    if found is None:
      raise Answer(200, data, headers)
    start = int(found[1]) if found[1] else len(data) - int(found[2])
    end = min(int(found[2]) + 1, len(data)) if found[1] and found[2] else len(data)
    if start >= len(data):
      raise Answer(416, headers={'content-range': f'bytes */{len(data)}'})
    raise Answer(206, data[start:end], headers | {'content-range': f'bytes {start}-{end - 1}/{len(data)}'})

  def list(self, bucket: str, asked: dict[str, str]) -> None:
    prefix, start, end = (asked.get(key, '') for key in ('prefix', 'startOffset', 'endOffset'))
    names = [n for n in self.store.names(bucket) if n.startswith(prefix) and n >= start and (not end or n < end)]
    first, count = int(asked.get('pageToken') or 0), min(int(asked.get('maxResults') or 1000), self.store.page)
    page = names[first : first + count]
    answer: dict[str, Any] = {'kind': 'storage#objects', 'items': [self.resource(bucket, name) for name in page]}
    more = {'nextPageToken': str(first + count)} if first + count < len(names) else {}
    raise Answer(200, answer | more)

  do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any


class Server(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 128  # TensorStore opens 32 connections at once; those beyond the queue wait for seconds

  def handle_error(self, request: Any, client_address: Any) -> None:
    """A client that was killed is no error of the server."""
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)


def serve(*buckets: str, port: int = 0) -> Server:
  """A server on 127.0.0.1, in a thread; its store is `server.RequestHandlerClass.store`."""
  handler = type('Requests', (Handler,), {'store': Store(*buckets)})
  server = Server(('127.0.0.1', port), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  return server


if __name__ == '__main__':
  print(serve(*sys.argv[2:], port=int(sys.argv[1])).server_address, flush=True)
  threading.Event().wait()
