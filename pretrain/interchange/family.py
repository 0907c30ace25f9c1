"""What a family of published models is: how its config.json and the names of its tensors correspond to ours."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from models.build import ModelConfig
from pretrain.interchange.config_json import ConfigJson
from pretrain.interchange.layout import Entry
from pretrain.interchange.safetensors import Tensor

Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Family:
  """`read` makes our config of theirs, and may look at the tensors; `write` makes theirs of ours.

  `entries` has a place for each parameter that a model of the family may have. `aliases` are other names for a tensor;
  an alias has the same values, and stands for the tensor where a file has only the alias. `unused` are patterns of
  tensors that no model reads (masks in old files). Files may lack `prefix` in every name.
  """

  model_type: str
  architecture: str
  read: Callable[[ConfigJson, Tensors], ModelConfig]
  write: Callable[[Any], dict[str, Any]]
  entries: Callable[[Any], Sequence[Entry]]
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  unused: tuple[str, ...] = ()
  prefix: str = ''
  sentencepiece: str = 'tokenizer.model'
