"""Every test sees eight simulated CPU devices, and warnings are errors (setup.cfg)."""

import importlib.metadata
import os
import tempfile

# Before JAX is imported: afterwards it has counted its devices. Processes that tests start inherit these.
os.environ['JAX_PLATFORMS'] = 'cpu'
# Most of the time of the suite is compiling: all but the first flag more than halve it.
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
)
if importlib.metadata.version('jaxlib').startswith('0.10.'):  # gone later
  os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'
os.environ['NPROC'] = '16'  # pretrain/platform.py:set_threads
# Many tests compile the same small programs: once for all of them, and for all workers.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  COMPILED = tempfile.TemporaryDirectory(prefix='pretrain-tests-')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = COMPILED.name
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'

import io
import pathlib

import jax
import pytest
import sentencepiece

from data.store import StoreWriter
from data.vocabulary import Tokenizer

ROOT = pathlib.Path(__file__).parents[1]
PIECES = 448  # 256 bytes, 3 special pieces, and what the text is made of


@pytest.fixture(autouse=True)
def strict_dtypes(request):
  """In models and kernels no dtype is promoted silently (optax is not clean enough for the rest)."""
  strict = {'models', 'pallas_kernels'} & set(request.path.parts)
  with jax.numpy_dtype_promotion('strict' if strict else 'standard'):
    yield


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
  """No test reads or writes the user's cache."""
  monkeypatch.setenv('PRETRAIN_CACHE', str(tmp_path_factory.getbasetemp() / 'cache'))


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
  """A token store of English, about 4,000 tokens in 50 documents: the license of this repository."""
  path = tmp_path_factory.mktemp('stores') / 'license'
  tokenizer = Tokenizer(tokenizer_model, sentinels=32)
  with StoreWriter(path, tokenizer) as writer:
    writer.add([tokenizer.encode(text) for text in paragraphs()])
    writer.finish(source='LICENSE')
  return path


@pytest.fixture(scope='session')
def pair_store(tokenizer_model, tmp_path_factory) -> pathlib.Path:
  """Pairs of the license: one to nine words, and the one to twelve that follow them."""
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
