"""Conversations: each whole, once per epoch, one segment; loss only on the words and EOS of the configured roles."""

import itertools

import numpy as np
import pytest

from data.batches.show import explain_row, show_row
from data.errors import DataError
from data.objectives.objectives import CausalLm, Instruction, Supervised
from data.packing.packing import BestFit, ConcatSplit
from data.stores.store import StoreWriter, open_store
from data.stores.verify import verify
from data.stores.vocabulary import EOS, Tokenizer
from tests.conftest import COLUMNS, write_chat
from tests.data.batches.test_source import SENTINELS, opened
from tests.data.examples.test_pairs import rows_of_epoch

USER, ASSISTANT, SYSTEM = 3, 4, 5  # the ids of their role markers
ROLES = {SYSTEM: 0, USER: 1, ASSISTANT: 2}
A = [[USER, 10, 11], [ASSISTANT, 12, 13, 14]]
B = [[SYSTEM, 20], [USER, 21], [ASSISTANT, 22], [USER, 23], [ASSISTANT, 24, 25]]
LATE = [[USER, *range(30, 60)], [ASSISTANT, 60]]
TRAILING = [[USER, 70], [ASSISTANT, 71], [USER, 72, 73]]


def by_hand(path, tokenizer_model, chats):
  """A store of turns with the given ids, each after a role marker of one token."""
  turns = [(turn, len(chat) - 1 - i) for chat in chats for i, turn in enumerate(chat)]
  columns = {
    'tag_lengths': np.ones(len(turns), np.int32),
    'roles': np.array([ROLES[turn[0]] for turn, _ in turns], np.int8),
    'turns_left': np.array([left for _, left in turns], np.int32),
  }
  with StoreWriter(path, Tokenizer(tokenizer_model, SENTINELS), columns=COLUMNS) as writer:
    writer.add([turn for turn, _ in turns], columns=columns)
    writer.finish()
  return path


def test_a_packed_row_equals_one_made_by_hand(tokenizer_model, tmp_path):
  store = by_hand(tmp_path / 's', tokenizer_model, [A, B])
  rows = {
    name: rows_of_epoch(opened(store, Instruction(**options), 0, 26, batch_size=1))[0]
    for name, options in (
      ('causal', {}), ('prefix', {'prefix_attention': True}), ('both', {'loss_on': ('user', 'assistant')}),
      ('users', {'loss_on': ('user',), 'prefix_attention': True}),
    )
  }  # fmt: skip
  a, b = [3, 10, 11, 1, 4, 12, 13, 14, 1], [5, 20, 1, 3, 21, 1, 4, 22, 1, 3, 23, 1, 4, 24, 25, 1]
  wanted = {
    'decoder_target_tokens': a + b + [0],
    'decoder_input_tokens': [0, *a[:-1], 0, *b[:-1], 0],
    'decoder_segment_ids': [1] * 9 + [2] * 16 + [0],
    'decoder_positions': [*range(9), *range(16), 0],
  }
  for row in rows.values():
    assert {name: row[name].tolist() for name in wanted} == wanted
  weights = {name: row['decoder_loss_weights'].astype(int).tolist() for name, row in rows.items()}
  assert weights['causal'] == weights['prefix'] == [0] * 5 + [1] * 4 + [0] * 7 + [1, 1, 0, 0, 0, 0, 1, 1, 1, 0]
  assert weights['both'] == [0, 1, 1, 1, 0, 1, 1, 1, 1, *[0, 0, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1], 0]
  assert weights['users'] == [0, 1, 1, 1, *[0] * 5, *[0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0], 0]
  # The marker of the first answer is the last token of the prefix; in the shifted inputs it is one position later.
  assert rows['prefix']['decoder_prefix_end'].tolist() == [6] * 9 + [8] * 16 + [0]
  assert rows['users']['decoder_prefix_end'].tolist() == [2] * 9 + [5] * 16 + [0]
  assert 'decoder_prefix_end' not in rows['causal']


def test_conversations_that_are_too_long_are_cut_or_left_out_and_counted(tokenizer_model, tmp_path):
  store = by_hand(tmp_path / 's', tokenizer_model, [A, LATE, B, TRAILING])
  source = opened(store, Instruction(), 0, 12, batch_size=1)
  rows = rows_of_epoch(source)
  targets = [rows[r]['decoder_target_tokens'].tolist() for r in sorted(rows)]
  assert targets == [
    [3, 10, 11, 1, 4, 12, 13, 14, 1, 0, 0, 0],
    [5, 20, 1, 3, 21, 1, 4, 22, 1, 3, 23, 1],  # the second answer does not fit
    [3, 70, 1, 4, 71, 1, 3, 72, 73, 1, 0, 0],
  ]
  assert rows[1]['decoder_loss_weights'].tolist() == [0] * 7 + [1, 1, 0, 0, 0]
  said = 'of its 4 conversations, 1 are cut to 12 tokens and 1 are left out (no token with loss among the first 12)'
  assert source.losses() == [f'{store}: {said}']
  assert said in show_row(source, 0, 0)
  assert opened(store, Instruction(), 0, 40).losses() == []
  with pytest.raises(
    DataError, match=r'of its 4 conversations, 0 are cut to 4 tokens and 4 are left out .* nothing is left'
  ):
    opened(store, Instruction(), 0, 4)
  with pytest.raises(
    DataError, match=r"to learn from objective.loss_on=\['tool'\]; choose other roles, or longer rows"
  ):
    opened(store, Instruction(loss_on=('tool',)), 0, 40)


def turns_of(row) -> list[tuple[int, list[int], list[float]]]:
  """(segment, tokens, weights) of each turn of a row: up to its EOS, or to its cut."""
  found, start, tokens = [], 0, row['decoder_target_tokens'].tolist()
  segments = row['decoder_segment_ids'].tolist()
  for i, token in enumerate(tokens):
    if token == EOS or (i + 1 == len(tokens) or segments[i + 1] != segments[i]):
      found.append((segments[i], tokens[start : i + 1], row['decoder_loss_weights'][start : i + 1].tolist()))
      start = i + 1
  return [turn for turn in found if turn[0]]


@pytest.mark.parametrize('shard_tokens', [300, 2**28])
def test_every_conversation_comes_once_per_epoch_with_loss_on_the_assistants_words(
  chat_store, tokenizer_model, tmp_path, shard_tokens
):
  """Checked from the text alone: a turn is a marker, words and EOS."""
  store, tokenizer = open_store(chat_store), Tokenizer(tokenizer_model, SENTINELS)
  chats, chat = [], []
  texts = [ids.tolist() for ids in store.read(list(zip(store.offsets[:-1], np.diff(store.offsets), strict=True)))]
  for ids, left in zip(texts, store.column('turns_left', 0), strict=True):
    role, _, text = tokenizer.decode(ids[:-1]).partition(':')
    chat.append((role, text))
    if not left:
      chats.append(chat)
      chat = []
  write_chat(tmp_path / 's', tokenizer, chats, shard_tokens=shard_tokens)
  assert list(verify(str(tmp_path / 's'))) == []
  source = opened(tmp_path / 's', Instruction(), 0, 64, batch_size=1)
  assert (len(source.sources[0].store.shards) > 3) == (shard_tokens == 300)
  got, lost, left_out, mark = [], 0, 0, tokenizer.encode('assistant:')
  for _, row in sorted(numbered(source)):
    number = 0
    for segment, tokens, weights in turns_of(row):
      if segment > number:
        got.append([])
        number = segment
      silent = len(mark) if tokenizer.decode(tokens).startswith('assistant:') else len(tokens)
      assert weights == ([0.0] * silent + [1.0] * (len(tokens) - silent))[: len(tokens)]
      got[-1] += tokens
  bounds = np.concatenate([[0], np.cumsum([len(own) for own in chats])])
  for whole in ([t for ids in texts[a:b] for t in ids] for a, b in itertools.pairwise(bounds)):
    first = next(i for i in range(len(whole)) if whole[i : i + len(mark)] == mark) + len(mark)
    if first >= 64:
      left_out += 1
      continue
    assert got[0] == whole[:64]
    lost += len(got.pop(0)) < len(whole)
  assert got == []
  losses = source.sources[0].losses
  assert (losses.cut, losses.left_out) == (lost, left_out)
  assert min(lost, left_out) > 0


def numbered(source):
  """((shard, row of its plan), fields) of each row of epoch 0."""
  position = 0
  while (origin := source.describe_row(position)).epoch == 0:
    yield (origin.shard, origin.row), {name: values[0] for name, values in source.global_rows(position, 1).items()}
    position += 1


@pytest.mark.parametrize(
  ('kind', 'objective', 'inputs', 'targets'),
  [('chat', Instruction(), 0, 96), ('pair', Supervised(inputs_length=24), 0, 64), ('pair', Supervised(), 32, 32)],
)
def test_best_fit_has_the_same_units_in_fewer_rows(chat_store, pair_store, kind, objective, inputs, targets):
  store = chat_store if kind == 'chat' else pair_store
  found, rows = [], []
  for packing in (ConcatSplit(), BestFit()):
    source = opened(store, objective, inputs, targets, packing=packing, batch_size=1)
    (own,) = source.sources
    rows.append(own.num_rows(0))
    origins = [source.describe_row(position) for position in range(rows[-1])]
    units = [
      tuple(piece for piece, segment in zip(origin.pieces, origin.segments, strict=True) if segment == k)
      for origin in origins
      for k in range(1, max(origin.segments) + 1)
    ]
    found.append(sorted(units))
    own.batch(0, np.arange(rows[-1]))  # raises an error if a unit is too long for its row
  assert found[0] == found[1]
  assert rows[1] < rows[0]


def test_shards_contain_whole_conversations_for_any_number_of_calls(tokenizer_model, tmp_path):
  rng, stores = np.random.default_rng(0), []
  chats = [rng.integers(1, 40, rng.integers(1, 9)).tolist() for _ in range(40)]
  lengths = [n for chat in chats for n in chat]
  left = np.concatenate([np.arange(len(chat))[::-1] for chat in chats]).astype(np.int32)
  for calls in (1, 7, len(lengths)):
    path = tmp_path / str(calls)
    with StoreWriter(path, Tokenizer(tokenizer_model, 8), columns={'turns_left': 'int32'}, shard_tokens=500) as writer:
      for part in np.array_split(np.arange(len(lengths)), calls):
        writer.add([[7] * lengths[i] for i in part], columns={'turns_left': left[part]})
      writer.finish()
    stores.append(open_store(path))
  assert stores[0].manifest == stores[1].manifest == stores[2].manifest
  shards = stores[0].shards
  assert len(shards) > 5
  assert all(left[shard.documents.stop - 1] == 0 and len(shard.tokens) <= 500 for shard in shards)
  sizes = [sum(chat) + len(chat) for chat in chats]
  ends = np.cumsum(sizes)
  for a, b in itertools.pairwise(shards):
    following = sizes[int(np.searchsorted(ends, a.tokens.stop, 'right'))]
    assert len(a.tokens) + following > 500, 'a shard is full'
    assert b.tokens.start == a.tokens.stop


def test_the_error_for_a_store_of_the_wrong_kind_says_what_to_do(text_store, pair_store, chat_store):
  with pytest.raises(
    DataError, match=r"license holds text, but objective.name='instruction' learns from conversations; make a store .*"
    r'with: pretrain data prepare --messages_field=messages',
  ):  # fmt: skip
    opened(text_store, Instruction(), 0, 64)
  with pytest.raises(
    DataError, match=r"chats holds conv.* learns from text; set objective.name='instruction', or make"
  ):
    opened(chat_store, CausalLm(), 0, 64)
  with pytest.raises(
    DataError, match=r"chats holds conv.* learns from pairs; set objective.name='instruction', or make"
  ):
    opened(chat_store, Supervised(), 64, 64)
  with pytest.raises(
    DataError, match=r"pairs holds pairs, .* learns from conversations; set objective.name='supervised'"
  ):
    opened(pair_store, Instruction(), 0, 64)


def test_shown_rows_name_roles_and_the_tokens_with_loss(tokenizer_model, tmp_path):
  path, tokenizer = tmp_path / 's', Tokenizer(tokenizer_model, SENTINELS)
  write_chat(path, tokenizer, [[('user', 'the work'), ('assistant', 'of'), ('user', 'or'), ('assistant', 'terms')]])
  source = opened(path, Instruction(), 0, 64, batch_size=1)
  ids = {text: len(tokenizer.encode(text)) for text in ('user:', 'assistant:', 'the work', 'of', 'or', 'terms')}
  read = [ids['user:'] + ids[text] + 1 + ids['assistant:'] for text in ('the work', 'or')]
  shown = show_row(source, 0, 0).splitlines()
  assert f'segment 1: turns 0 to 3, tokens 0 to {open_store(path).num_tokens - 1} of the store' in shown
  assert shown[shown.index('') + 2 : -3] == [
    f'  read ({read[0]}): user: the work </s> assistant:',
    f'  with loss ({ids["of"] + 1}): of </s>',
    f'  read ({read[1]}): user: or </s> assistant:',
    f'  with loss ({ids["terms"] + 1}): terms </s>',
  ]
  table = [line.split() for line in explain_row(source, 0, 0).splitlines()[3:]]
  assert [(line[0], line[1], line[-2], line[-1]) for line in table] == [
    ('1', '0', '0', 'user'), ('1', '1', str(ids['of'] + 1), 'assistant'),
    ('1', '2', '0', 'user'), ('1', '3', str(ids['terms'] + 1), 'assistant'),
  ]  # fmt: skip
