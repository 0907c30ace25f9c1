"""What a run has learned, for a person: words of held-out sentences hidden, its best fillings beside a unigram's."""

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator

from data.stores.store import Store
from pretrain.errors import ConfigError
from pretrain.evaluation.best import Candidate, log_prob, search
from pretrain.evaluation.prompts import prompt_inputs, room_for
from pretrain.evaluation.texts import fills_middle
from pretrain.evaluation.unigram import Unigram, count, read_documents
from pretrain.evaluation.writer import Writer, open_writer
from pretrain.workdirs.folder import Folder

# A capital, words, commas, a full stop; behind a full stop or at the beginning. No code, no title, no list.
SENTENCE = re.compile(r"(?<![^.!?] )(?<!\S)[A-Z][a-z]*(?: [a-z][a-z'-]*,?)+\.(?!\S)")
WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
SHORTEST, LONGEST, LEAST_WORDS = 40, 120, 8  # characters and words of a sentence
MOST_WORDS = 3  # words hidden
MOST_TOKENS = 16  # tokens of a filling
SEARCHED = 16  # fillings searched for; only fillings of whole words are shown


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


def texts_of(store: Store) -> list[str]:
  """The documents of a store as text."""
  return read_documents(store).texts()


def show_blanks(workdir: Folder, number: int = 5, top: int = 3, measured: int = 64) -> Iterator[str]:
  """Lines: `number` held-out sentences with hidden words, the `top` fillings of the run and those of a unigram; then
  how likely the true words are to both, over `measured` sentences.

  The unigram counts the training tokens, and its fillings are as long as the true words on average. Both
  probabilities include that of ending after the filling.
  Raises ConfigError for a run without held-out text, and the errors of `answers` that concern the run.
  """
  writer = open_writer(workdir)
  heldout = list(writer.data.heldout_stores().values())
  if not heldout or any(store.kind != 'text' for store in heldout):
    raise ConfigError(f'{workdir} has no held-out text to hide words in; set data.heldout to stores of text.')
  trained = [read_documents(rows.store) for rows in writer.data.sources]  # read once, for the search and the counts
  seen = ' '.join(text for documents in trained for text in documents.texts())
  chosen = choose((text for store in heldout for text in texts_of(store)), max(number, measured), seen)
  encode = writer.data.tokenizer.encode
  unigram = count(trained, (encode(blank.truth) for blank in chosen))
  frequent = list(itertools.islice(_frequent_words(unigram, writer), top))
  pairs = []
  shown = len(chosen[:number])
  yield f'{shown} sentences of held-out documents, picked by their hash. The run was not trained on them:'
  for k, blank in enumerate(chosen):
    pairs.append((truth_log_prob(writer, blank), unigram.log_prob(encode(blank.truth))))
    if k < number:
      by_run, by_count = map(math.exp, pairs[-1])
      yield from ('', f'  {blank.filled("_" * 6)}')
      yield f'  true words: {blank.truth} (this run {by_run:.2g}, token counts {by_count:.2g})'
      yield from _table(fillings(writer, blank, top), frequent)
  if pairs:
    yield from ('', _compared(pairs))


def _compared(pairs: list[tuple[float, float]]) -> str:
  """How likely the true words are to the run and to the unigram: `pairs` of natural logs of both probabilities."""
  better, ratio = sum(a > b for a, b in pairs), math.exp(sum(a - b for a, b in pairs) / len(pairs))
  return (
    f'The true words of {len(pairs)} such sentences: {ratio:.3g} times as likely to this run as to token counts '
    f'(geometric mean), more likely in {better} of them.'
  )


def _frequent_words(unigram: Unigram, writer: Writer) -> Iterator[Candidate]:
  """Whole words of one token, the most frequent first, with the probability that a filling is this word alone."""
  tokenizer = writer.data.tokenizer
  for token in unigram.most_frequent():
    if word := _whole_words(tokenizer.decode_after(tokenizer.encode('a'), [token])):
      yield Candidate(word, math.exp(unigram.log_prob([token])), True)


def fillings(writer: Writer, blank: Blank, top: int) -> list[Candidate]:
  """The run's best fillings of a blank that are whole words, the most likely first."""
  inputs, forced = _prompt(writer, blank)
  found: dict[str, Candidate] = {}
  for ids, log_prob_of_ids, ended in search(writer, inputs, forced, MOST_TOKENS, SEARCHED):
    text = writer.data.tokenizer.decode_after(writer.data.tokenizer.encode('a'), ids)
    if words := _whole_words(text):
      found.setdefault(words, Candidate(words, math.exp(log_prob_of_ids), ended))
  return list(found.values())[:top]


def _whole_words(text: str) -> str | None:
  """`text`, which follows the word before a blank, without its first space; None where it continues that word."""
  words = text.split()
  return text.strip() if text.startswith(' ') and words and all(map(WORD.fullmatch, words)) else None


def truth_log_prob(writer: Writer, blank: Blank) -> float:
  """Natural log of the probability that the run fills a blank with its true words, as the tokenizer splits them."""
  return log_prob(writer, *_prompt(writer, blank), writer.data.tokenizer.encode(blank.truth))


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
