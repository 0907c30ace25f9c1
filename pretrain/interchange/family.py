"""What a family of published models is: how its config.json and the names of its tensors correspond to ours."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from models.build import ModelConfig
from pretrain.interchange.config_json import ConfigJson
from pretrain.interchange.layout import Entry
from pretrain.interchange.safetensors import Tensor

Tensors = Mapping[str, Tensor]
Values = Mapping[str, Any]  # of a config.json


@dataclasses.dataclass(frozen=True)
class Family:
  """`read` makes our config of theirs, and may look at the tensors; `write` makes theirs of ours.

  `entries(cfg, config.json)` has a place for each parameter that a model of the family may have. `aliases` are other
  names for a tensor: an alias has the same values, and stands for the tensor where a file has only the alias. `tied`
  is the head that is an alias of the table in models without a head of their own. `renamed` are patterns of older
  names, with what replaces them. Files may lack `prefix` in every name.

  `others(config.json)` are tensors that files have and that are no parameters, with their shapes: an export writes
  those of the import, or zeros. `carried` are patterns of tensors that an export writes where the import had them;
  `unused` of those that no model reads (masks in old files).
  """

  model_type: str
  architecture: str
  read: Callable[[ConfigJson, Tensors], ModelConfig]
  write: Callable[[Any], dict[str, Any]]
  entries: Callable[[Any, Values], Sequence[Entry]]
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  tied: tuple[str, str] | None = None
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
  others: Callable[[Values], Mapping[str, tuple[int, ...]]] = lambda values: {}
  carried: tuple[str, ...] = ()
  unused: tuple[str, ...] = ()
  prefix: str = ''
  sentencepiece: str = 'tokenizer.model'
