"""The ids of a tokenizer that are not text: padding, the ends of documents, what a decoder reads first."""

import dataclasses
from collections.abc import Mapping
from typing import Any

OF_ENCODERS = ('cls', 'mask')
SINGLE = ('pad', 'unknown', 'bos', 'decoder_start', *OF_ENCODERS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialIds:
  """The defaults are T5's, and those of every store whose manifest has no `special_ids`.

  `eos` ends a text: documents end with the first one, generation stops at any of them. A decoder reads `decoder_start`
  before each prompt; where it is None, a prompt begins with its text, as in Qwen. Padding in batches is marked by
  segment ids alone: where `pad` is None, every id may be text. An encoder reads `cls` before each text, BERT's [CLS],
  and `mask` in place of a token that it predicts: where these are None, the text alone, and <extra_id_0>.

  >>> SpecialIds(pad=None, eos=(2,), unknown=0, bos=1, decoder_start=1).not_text
  (1, 2)
  """

  pad: int | None = 0
  eos: tuple[int, ...] = (1,)
  unknown: int | None = 2
  bos: int | None = None
  decoder_start: int | None = 0
  cls: int | None = None
  mask: int | None = None

  @property
  def end(self) -> int:
    """The id that ends each document."""
    return self.eos[0]

  @property
  def first_input(self) -> int:
    """What a decoder reads first in each segment of training; the end of the text before, if there is nothing else.

    >>> SpecialIds().first_input, SpecialIds(decoder_start=None, eos=(7, 9)).first_input
    (0, 7)
    """
    found = self.bos if self.decoder_start is None else self.decoder_start
    return self.end if found is None else found

  @property
  def filler(self) -> int:
    """The id that fills a generated row after its end: the padding id, or EOS if there is no padding id."""
    return self.end if self.pad is None else self.pad

  @property
  def not_text(self) -> tuple[int, ...]:
    """The ids that no text contains, ascending. An unknown piece is text."""
    own = (self.pad, *self.eos, self.bos, self.decoder_start, self.cls, self.mask)
    return tuple(sorted({i for i in own if i is not None}))

  @property
  def used(self) -> Mapping[str, int]:
    """Each id by its name."""
    single = {name: getattr(self, name) for name in SINGLE}
    several = {f'eos[{i}]' if i else 'eos': token for i, token in enumerate(self.eos)}
    return several | {name: token for name, token in single.items() if token is not None}

  def to_json(self) -> dict[str, Any]:
    """An encoder's ids are left out if they are not set, so that older manifests are unchanged."""
    own = {
      name: token for name, token in dataclasses.asdict(self).items() if name not in OF_ENCODERS or token is not None
    }
    return {**own, 'eos': list(self.eos)}

  @classmethod
  def from_json(cls, values: Any) -> 'SpecialIds':
    """The ids that `to_json` wrote. Raises ValueError for anything else."""
    names = {field.name for field in dataclasses.fields(cls)} - {*OF_ENCODERS}
    if not isinstance(values, Mapping) or values.keys() - {*OF_ENCODERS} != names:
      raise ValueError(f'special_ids={values!r} lacks some of the keys {", ".join(sorted(names))}')
    names |= values.keys()
    eos = values['eos']
    one = lambda value: type(value) is int and value >= 0
    if not isinstance(eos, list) or not eos or not all(map(one, eos)):
      raise ValueError(f'special_ids.eos={eos!r} is no list of ids')
    if bad := [name for name in sorted(names - {'eos'}) if values[name] is not None and not one(values[name])]:
      raise ValueError(f'special_ids.{bad[0]}={values[bad[0]]!r} is no id')
    return cls(**{**values, 'eos': tuple(eos)})

  @classmethod
  def of(cls, manifest: Mapping[str, Any]) -> 'SpecialIds':
    """The ids of a store; T5's where its manifest has none. Raises ValueError for damaged ones."""
    return cls.from_json(manifest['special_ids']) if 'special_ids' in manifest else cls()


T5_IDS = SpecialIds()
