"""Fixtures for all tests. Tests run on eight simulated CPU devices, and warnings are errors (setup.cfg)."""

import gc
import importlib.metadata
import os
import pathlib
import sys
import tempfile

# Without bytecode files, each of the many processes that tests start would spend seconds compiling JAX's source. If
# they are disabled, they are written to a folder beside the packages, not into the source tree.
if sys.dont_write_bytecode:
  sys.dont_write_bytecode = False
  sys.pycache_prefix = os.environ['PYTHONPYCACHEPREFIX'] = str(pathlib.Path(sys.prefix) / 'pycache')
  os.environ.pop('PYTHONDONTWRITEBYTECODE', None)

# These must be set before JAX is imported, because it counts its devices then. Child processes inherit them.
os.environ['JAX_PLATFORMS'] = 'cpu'
# Most of the suite's time is compilation. All flags except the first reduce it, together to less than half (generating
# code in one part instead of 32 saves a fifth).
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
)
if importlib.metadata.version('jaxlib').startswith('0.10.'):  # later versions removed these flags
  os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
os.environ['NPROC'] = '16'  # pretrain/devices/platform.py:set_threads
# Many tests compile the same small programs. The cache compiles each once for all tests and workers.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  COMPILED = tempfile.TemporaryDirectory(prefix='pretrain-tests-')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = COMPILED.name
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'

import io

import jax
import numpy as np
import pytest
import sentencepiece
from _pytest.doctest import DoctestModule

from data.prepare.messages import ROLES, marker
from data.stores.store import StoreWriter
from data.stores.vocabulary import Tokenizer
from tests.pretrain.stores import bucket, fake_server, gcs, moto_server, s3  # noqa: F401 - fixtures of all tests

ROOT = pathlib.Path(__file__).parents[1]
COLUMNS = {'tag_lengths': 'int32', 'roles': 'int8', 'turns_left': 'int32'}  # of a store of conversations
PIECES = 448  # 256 bytes, 3 special pieces, and pieces of the text


def pytest_collection_finish() -> None:
  """What is imported by now stays: collections, which pass over all of it, take a twentieth of the suite's time."""
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(wrapper=True)
def pytest_collect_file():
  """Modules of tests have no examples: to look for them takes a tenth of the collection."""
  return [found for found in (yield) if not isinstance(found, DoctestModule)]


@pytest.fixture(autouse=True)
def strict_dtypes(request):
  """Implicit dtype promotion is an error in tests of models and kernels. Elsewhere optax relies on it."""
  strict = {'models', 'pallas_kernels'} & set(request.path.parts)
  with jax.numpy_dtype_promotion('strict' if strict else 'standard'):
    yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory):
  """No test reads or writes the user's cache."""
  with pytest.MonkeyPatch.context() as patch:  # the fixture would make every test one that has changed something
    patch.setenv('PRETRAIN_CACHE', str(tmp_path_factory.getbasetemp() / 'cache'))
    yield


@pytest.fixture(scope='session')
def tokenizer_model() -> bytes:
  """A SentencePiece model of `PIECES` pieces, trained on the license of this repository; id 0 pads, 1 is EOS."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(paragraphs()), model_writer=model, vocab_size=PIECES, byte_fallback=True,
    pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
  )  # fmt: skip
  return model.getvalue()


@pytest.fixture(scope='session')
def text_store(tokenizer_model, tmp_path_factory) -> pathlib.Path:
  """A token store of English text, about 4,000 tokens in 50 documents: the license of this repository."""
  path = tmp_path_factory.mktemp('stores') / 'license'
  tokenizer = Tokenizer(tokenizer_model, sentinels=32)
  with StoreWriter(path, tokenizer) as writer:
    writer.add([tokenizer.encode(text) for text in paragraphs()])
    writer.finish(source='LICENSE')
  return path


@pytest.fixture(scope='session')
def pair_store(tokenizer_model, tmp_path_factory) -> pathlib.Path:
  """Pairs made from the license: inputs of one to nine words, and as targets the next one to twelve words."""
  path, words = tmp_path_factory.mktemp('stores') / 'pairs', ' '.join(paragraphs()).split()
  tokenizer, texts = Tokenizer(tokenizer_model, sentinels=32), []
  while len(words) > 20:
    for size in ((1, 2, 1, 3, 9)[len(texts) // 2 % 5], (2, 1, 1, 12)[len(texts) // 2 % 4]):
      texts.append(' '.join(words[:size]))
      words = words[size:]
  with StoreWriter(path, tokenizer, pairs=True) as writer:
    writer.add([tokenizer.encode(text) for text in texts])
    writer.finish(source='LICENSE')
  return path


def paragraphs() -> list[str]:
  text = (ROOT / 'LICENSE').read_text()
  return [' '.join(part.split()) for part in text.split('\n\n') if part.strip()]


@pytest.fixture(scope='session')
def chat_store(tokenizer_model, tmp_path_factory) -> pathlib.Path:
  """Conversations made from the license: user and assistant in turn, 1 to 14 words each; some with a system turn."""
  path, words, found = tmp_path_factory.mktemp('stores') / 'chats', ' '.join(paragraphs()).split(), []
  while len(words) > 60:
    number, turns = len(found), []
    for i in range((2, 4, 3, 6)[number % 4]):  # with three turns the last one is the user's
      size = (3, 1, 7, 14, 2)[(number + i) % 5]
      turns.append((('user', 'assistant')[i % 2], ' '.join(words[:size])))
      words = words[size:]
    found.append([('system', 'the terms')] * (number % 3 == 0) + turns)
  write_chat(path, Tokenizer(tokenizer_model, sentinels=32), found)
  return path


def write_chat(path: pathlib.Path, tokenizer: Tokenizer, chats: list[list[tuple[str, str]]], **options) -> None:
  """Writes a store of conversations, given as lists of (role, text)."""
  marks = {role: tokenizer.encode(marker(role)) for role in ROLES}
  turns = [(role, text, len(chat) - 1 - i) for chat in chats for i, (role, text) in enumerate(chat)]
  columns = {
    'tag_lengths': np.array([len(marks[role]) for role, _, _ in turns], np.int32),
    'roles': np.array([ROLES.index(role) for role, _, _ in turns], np.int8),
    'turns_left': np.array([left for _, _, left in turns], np.int32),
  }
  with StoreWriter(path, tokenizer, columns=COLUMNS, **options) as writer:
    writer.add([[*marks[role], *tokenizer.encode(text)] for role, text, _ in turns], columns=columns)
    writer.finish(source='LICENSE')


@pytest.fixture(scope='session')
def tag_store(tokenizer_model, tmp_path_factory) -> pathlib.Path:
  """The documents of `text_store`, most of them after a tag with the document's number."""
  path, tokenizer = tmp_path_factory.mktemp('stores') / 'tagged', Tokenizer(tokenizer_model, sentinels=32)
  tags = [tokenizer.encode(f'part: {i}') if i % 5 else [] for i in range(len(paragraphs()))]
  columns = {'tag_lengths': np.array([len(tag) for tag in tags], np.int32)}
  with StoreWriter(path, tokenizer, columns={'tag_lengths': 'int32'}, shard_tokens=2000) as writer:
    writer.add([tag + tokenizer.encode(text) for tag, text in zip(tags, paragraphs(), strict=True)], columns=columns)
    writer.finish(source='LICENSE')
  return path
