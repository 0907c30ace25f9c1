"""`pretrain data inspect`: the manifest of a store, and its first documents in readable form."""

from collections.abc import Iterator

from data.prepare.messages import ROLES as ROLE_NAMES
from data.stores.store import ROLES, TURNS_LEFT, Store, open_store

_SHOWN = 60  # tokens shown of each document
_NOT_SHOWN = {'shards', 'num_tokens', 'num_documents', 'pairs', 'append_eos', 'columns'}  # shown by `_summary`


def inspect(path: str, num_documents: int) -> str:
  """The manifest as a table, then `num_documents` documents with the positions of their tokens."""
  store = open_store(path)
  rows = [*_summary(store).items(), *((k, v) for k, v in store.manifest.items() if k not in _NOT_SHOWN)]
  width = max(len(name) for name, _ in rows) + 2
  lines = [f'{name:{width}}{_value(value)}' for name, value in rows]
  return '\n'.join([*lines, *_documents(store, min(num_documents, store.num_documents))])


def _summary(store: Store) -> dict[str, str]:
  units = f'{store.num_documents // 2:,} pairs' if store.kind == 'pairs' else f'{store.num_documents:,} documents'
  units += ' (turns of conversations)' if store.kind == 'conversations' else ''
  ended = 'each ends with EOS' if store.append_eos else 'without EOS'
  largest = max(len(shard.tokens) for shard in store.shards)
  return {
    'store': store.path,
    'tokens': f'{store.num_tokens:,} in {units}, {ended}; {store.num_tokens / store.num_documents:.1f} per document',
    'shards': f'{len(store.shards):,}, the largest has {largest:,} tokens',
    'columns': ', '.join(f'{name} ({kind})' for name, kind in store.manifest.get('columns', {}).items()) or 'none',
    'fingerprint': store.fingerprint,
  }


def _value(value) -> str:
  if isinstance(value, dict):
    return ', '.join(f'{k} {v}' for k, v in value.items())
  return ', '.join(map(str, value)) if isinstance(value, list) else str(value)


def _documents(store: Store, count: int) -> Iterator[str]:
  """Yields the header and the first _SHOWN tokens of documents of the first shard."""
  if not count:
    return
  tokenizer, offsets, tags = store.tokenizer(0), store.offsets_of(0).tolist(), store.tag_lengths(0).tolist()
  for i in range(min(count, len(tags))):
    begin, size = offsets[i], offsets[i + 1] - offsets[i]
    shown = min(size, _SHOWN)
    (ids,) = store.read([(begin, shown)])
    what = _part(store, i)
    given = [f'{name} {store.scores(name, 0)[i]:.4g}' for name in store.score_names]
    given += [f'{tags[i]} {"role" if store.kind == "conversations" else "tag"} tokens'] * bool(tags[i])
    yield f'\ndocument {i}{what}: tokens {begin} to {begin + size - 1} ({", ".join([str(size), *given])})'
    yield '  ' + tokenizer.render(ids.tolist()) + ' …' * (shown < size)


def _part(store: Store, document: int) -> str:
  """The part of its pair or conversation that a document of the first shard is; '' for text."""
  match store.kind:
    case 'pairs':
      return f' ({("inputs", "targets")[document % 2]} of pair {document // 2})'
    case 'conversations':
      role, left = (int(store.column(name, 0)[document]) for name in (ROLES, TURNS_LEFT))
      return f' ({ROLE_NAMES[role]}, {f"{left} turns follow" if left else "the last turn"})'
    case _:
      return ''
