"""The families that can be imported and exported, found by config.json or by the parts of a model."""

from models.build import ModelConfig
from pretrain.config import bindings
from pretrain.errors import CheckpointError, ConfigError
from pretrain.interchange.config_json import FILE, ConfigJson
from pretrain.interchange.family import Family
from pretrain.interchange.published.bert import BERT, ELECTRA, ROBERTA
from pretrain.interchange.published.deberta import DEBERTA
from pretrain.interchange.published.gpt import FALCON, GPT2, GPT_NEOX
from pretrain.interchange.published.llama import GEMMA2, LLAMA, MISTRAL, MIXTRAL, OLMO2, QWEN2, QWEN3
from pretrain.interchange.published.t5 import MT5, T5, UMT5
from pretrain.tools.weights import NOT_ARCHITECTURE

# An export takes the first that has all parts of a model.
ALL = (
  T5, UMT5, MT5, LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, OLMO2, GEMMA2, GPT2, GPT_NEOX, FALCON, BERT, ROBERTA, ELECTRA,
  DEBERTA,
)  # fmt: skip
FAMILIES = {family.model_type: family for family in ALL}


def family_of(config: ConfigJson) -> Family:
  """The family that config.json names. Raises CheckpointError for one that is not in FAMILIES."""
  found = config.values.get('model_type')
  if found not in FAMILIES:
    raise CheckpointError(
      'IMPORT',
      f'{config.where} has model_type={found!r}; the families that can be imported are {", ".join(FAMILIES)}. Nothing '
      'was written.',
    )
  return FAMILIES[found]


def family_for(cfg: ModelConfig) -> Family:
  """The first family that can express every part of a model: its config.json gives the same model back.

  Raises ConfigError, with the parts that the nearest family lacks, where there is none.
  """
  missing = {family.model_type: lost(family, cfg) for family in FAMILIES.values()}
  if fitting := [name for name, parts in missing.items() if not parts]:
    return FAMILIES[fitting[0]]
  nearest = min(missing, key=lambda name: len(missing[name]))
  raise ConfigError(
    f'this model cannot be exported: no family of {", ".join(FAMILIES)} has all of its parts; {nearest} lacks '
    f'{", ".join(missing[nearest])}. Nothing was written.'
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
