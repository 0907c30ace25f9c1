"""The families that can be imported and exported, found by config.json or by the parts of a model."""

from models.build import ModelConfig
from pretrain.config import bindings
from pretrain.errors import CheckpointError, ConfigError
from pretrain.interchange.config_json import FILE, ConfigJson
from pretrain.interchange.family import Family
from pretrain.interchange.published.bert import BERT, DISCRIMINATOR, ELECTRA, ROBERTA
from pretrain.interchange.published.deberta import DEBERTA
from pretrain.interchange.published.gpt import FALCON, GPT2, GPT_NEOX
from pretrain.interchange.published.llama import GEMMA2, LLAMA, MISTRAL, MIXTRAL, OLMO2, QWEN2, QWEN3
from pretrain.interchange.published.t5 import MT5, T5, UMT5
from pretrain.tools.weights import NOT_ARCHITECTURE

# An export takes the first that has all parts of a model.
ALL = (
  T5, UMT5, MT5, LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, OLMO2, GEMMA2, GPT2, GPT_NEOX, FALCON, BERT, ROBERTA, ELECTRA,
  DISCRIMINATOR, DEBERTA,
)  # fmt: skip
TYPES = tuple(dict.fromkeys(family.model_type for family in ALL))


def family_of(config: ConfigJson) -> Family:
  """The family that config.json names: of one with several heads, the one in `architectures`, by default the first.

  Raises CheckpointError for a model_type that is not in TYPES.
  """
  found, named = config.values.get('model_type'), config.values.get('architectures') or ()
  fitting = [family for family in ALL if family.model_type == found]
  if not fitting:
    raise CheckpointError(
      'IMPORT',
      f'{config.where} has model_type={found!r}; the families that can be imported are {", ".join(TYPES)}. Nothing '
      'was written.',
    )
  return next((family for family in fitting if family.architecture in named), fitting[0])


def family_for(cfg: ModelConfig) -> Family:
  """The first family that can express every part of a model: its config.json gives the same model back.

  Raises ConfigError, with the parts that the nearest family lacks, where there is none.
  """
  missing = [lost(family, cfg) for family in ALL]
  if [] in missing:
    return ALL[missing.index([])]
  fewest = min(missing, key=len)
  raise ConfigError(
    f'this model cannot be exported: no family of {", ".join(TYPES)} has all of its parts; '
    f'{ALL[missing.index(fewest)].model_type} lacks {", ".join(fewest)}. Nothing was written.'
  )


def lost(family: Family, cfg: ModelConfig) -> list[str]:
  """The keys of the model that a config.json of the family would not give back."""
  ours = bindings.flatten(cfg, 'model.')
  try:
    config = ConfigJson(family.write(cfg), FILE)
    back = bindings.flatten(family.read(config, _head_only(family, cfg)), 'model.')
  except (AttributeError, KeyError, TypeError):  # another kind of model, which lacks the keys of this family
    return sorted(ours)
  differing = [key for key in ours.keys() | back.keys() if ours.get(key) != back.get(key)]
  return sorted(key for key in differing if key not in NOT_ARCHITECTURE)


def _head_only(family: Family, cfg: ModelConfig) -> dict:
  """Stands for the tensors where only the presence of an own head matters."""
  return {'lm_head.weight': None} if cfg.head == 'untied' else {}
