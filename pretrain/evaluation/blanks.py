"""What a run has learned, for a person: words of held-out sentences hidden, its best fillings beside a unigram's."""

import collections
import dataclasses
import hashlib
import itertools
import math
import pathlib
import re
from collections.abc import Iterable, Iterator

from data.stores.store import Store
from pretrain.errors import ConfigError
from pretrain.evaluation.best import Candidate, log_prob, search
from pretrain.evaluation.prompts import prompt_inputs, room_for
from pretrain.evaluation.texts import fills_middle
from pretrain.evaluation.writer import Writer, open_writer

# A capital, words, commas, a full stop; behind a full stop or at the beginning. No code, no title, no list.
SENTENCE = re.compile(r"(?<![^.!?] )(?<!\S)[A-Z][a-z]*(?: [a-z][a-z'-]*,?)+\.(?!\S)")
WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
SHORTEST, LONGEST, LEAST_WORDS = 40, 120, 8  # characters and words of a sentence
MOST_WORDS = 3  # words hidden
MOST_TOKENS = 16  # tokens of a filling
SEARCHED = 16  # fillings searched for, of which those that are whole words are shown


@dataclasses.dataclass(frozen=True)
class Blank:
  """A sentence, and the characters `start` to `end` of it that are hidden."""

  sentence: str
  start: int
  end: int

  @property
  def truth(self) -> str:
    return self.sentence[self.start : self.end]

  def filled(self, text: str) -> str:
    """The sentence with `text` for its hidden words."""
    return self.sentence[: self.start] + text + self.sentence[self.end :]


def sentences(text: str) -> Iterator[str]:
  """Readable English sentences of `text`: 40 to 120 characters of plain words, eight or more.

  >>> list(sentences('Return x[i]. The object must be a mapping from names to values. See http://a.b for more of it.'))
  ['The object must be a mapping from names to values.']
  """
  for found in SENTENCE.finditer(' '.join(text.split())):
    sentence = found[0]
    if SHORTEST <= len(sentence) <= LONGEST and len(sentence.split()) >= LEAST_WORDS:
      yield sentence


def hide_words(sentence: str) -> Blank | None:
  """One to three neighbouring words inside `sentence`, picked by its hash; None where it has no such place.

  Neither its first nor its last word is hidden, and no punctuation.

  >>> hide_words('The object must be a mapping from names to values.').truth
  'must be'
  """
  words, number = list(WORD.finditer(sentence)), _hash(sentence)
  size = 1 + number % MOST_WORDS
  spans = [(a.start(), b.end()) for a, b in zip(words[1:-1], words[size:-1], strict=False)]
  spans = [(start, end) for start, end in spans if len(WORD.findall(sentence[start:end])) == size]
  spans = [(start, end) for start, end in spans if not re.search(r"[^A-Za-z' -]", sentence[start:end])]
  return Blank(sentence, *spans[number // MOST_WORDS % len(spans)]) if spans else None


def choose(texts: Iterable[str], number: int, seen: str = '') -> list[Blank]:
  """`number` blanks, at most one for each text, those whose sentences have the lowest hashes.

  Sentences that stand in `seen` are left out. Nothing depends on a model: everyone with the same texts has the same.
  """
  best = []
  for text in texts:
    own = [blank for sentence in sentences(text) if sentence not in seen and (blank := hide_words(sentence))]
    best += sorted(own, key=lambda blank: _hash(blank.sentence))[:1]
  return sorted({blank.sentence: blank for blank in best}.values(), key=lambda blank: _hash(blank.sentence))[:number]


def _hash(text: str) -> int:
  return int.from_bytes(hashlib.sha256(text.encode()).digest())


def word_shares(texts: Iterable[str]) -> dict[str, float]:
  """Each word's share of all words of `texts`, the most frequent first: a unigram."""
  counts = collections.Counter(word for text in texts for word in WORD.findall(text))
  total = sum(counts.values())
  return {word: count / total for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}


def texts_of(store: Store) -> list[str]:
  """The documents of a store as text."""
  tokenizer = store.tokenizer(0)
  lengths = (store.offsets[1:] - store.offsets[:-1]).tolist()
  documents = store.read(list(zip(store.offsets[:-1].tolist(), lengths, strict=True)))
  return [tokenizer.decode(ids[(ids > 1) & (ids < tokenizer.vocabulary.pieces)]) for ids in documents]


def show_blanks(workdir: pathlib.Path, number: int = 5, top: int = 3) -> Iterator[str]:
  """Lines: `number` held-out sentences with hidden words, the `top` fillings of the run and those of a unigram.

  Raises ConfigError for a run without held-out text, and the errors of `answers` that concern the run.
  """
  writer = open_writer(workdir)
  heldout = list(writer.data.heldout_stores().values())
  if not heldout or any(store.kind != 'text' for store in heldout):
    raise ConfigError(f'{workdir} has no held-out text to hide words in; set data.heldout to stores of text.')
  seen = [text for rows in writer.data.sources for text in texts_of(rows.store)]
  chosen = choose((text for store in heldout for text in texts_of(store)), number, ' '.join(seen))
  shares = word_shares(seen)
  unigram = [Candidate(word, share, True) for word, share in itertools.islice(shares.items(), top)]
  yield f'{len(chosen)} sentences of held-out documents, picked by their hash. The run was not trained on them:'
  for blank in chosen:
    by_count = math.prod(shares.get(word, 0.0) for word in WORD.findall(blank.truth))
    yield from ('', f'  {blank.filled("_" * 6)}')
    yield f'  true words: {blank.truth} (this run {truth_probability(writer, blank):.2g}, word counts {by_count:.2g})'
    yield from _table(fillings(writer, blank, top), unigram)


def fillings(writer: Writer, blank: Blank, top: int) -> list[Candidate]:
  """The run's best fillings of a blank that are whole words, the most likely first."""
  inputs, forced = _prompt(writer, blank)
  found: dict[str, Candidate] = {}
  for ids, log_prob_of_ids, ended in search(writer, inputs, forced, MOST_TOKENS, SEARCHED):
    text = writer.data.tokenizer.decode_after(writer.data.tokenizer.encode('a'), ids)
    words = text.split()
    if text.startswith(' ') and words and all(map(WORD.fullmatch, words)):  # no ending of the word before the blank
      found.setdefault(text.strip(), Candidate(text.strip(), math.exp(log_prob_of_ids), ended))
  return list(found.values())[:top]


def truth_probability(writer: Writer, blank: Blank) -> float:
  """The probability that the run fills a blank with its true words, in the tokenizer's own spelling."""
  return math.exp(log_prob(writer, *_prompt(writer, blank), writer.data.tokenizer.encode(blank.truth)))


def _prompt(writer: Writer, blank: Blank) -> tuple[list[int], list[int]]:
  """(ids of the sentence with its blank, ids that the decoder reads first)."""
  prompt = blank.filled('<extra_id_0>')
  inputs = prompt_inputs(prompt, writer.cfg, writer.data)
  room_for(prompt, inputs, writer.cfg)  # refuses a sentence that no training row holds
  return inputs, [] if fills_middle(inputs, writer.data.tokenizer) else [writer.data.vocabulary.first_sentinel]


def _table(run: Iterable[Candidate], unigram: Iterable[Candidate]) -> Iterator[str]:
  cells = lambda found: [f'{c.probability:>7.2%}  {c.text or "(nothing)"}' for c in found]
  left, right = cells(run), cells(unigram)
  width = max(36, *map(len, left))
  yield f'    {"best words of this run":<{width}}  most frequent words'
  for k in range(max(len(left), len(right))):
    yield f'    {(left[k : k + 1] or [""])[0]:<{width}}  {(right[k : k + 1] or [""])[0]}'.rstrip()
