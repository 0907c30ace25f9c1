"""Reading a config.json: every key is read, known to have no effect on logits, or listed in one error."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from data.stores.paths import looked_in
from pretrain.errors import CheckpointError

FILE = 'config.json'
# Keys that all families may have, and that change neither the shapes of weights nor logits.
NO_EFFECT = frozenset((
  'architectures', 'model_type', 'dtype', 'torch_dtype', 'transformers_version', '_name_or_path', '_commit_hash',
  'use_cache', 'bos_token_id', 'eos_token_id', 'pad_token_id', 'decoder_start_token_id', 'sep_token_id',
  'is_encoder_decoder', 'is_decoder', 'initializer_range', 'initializer_factor', 'attention_dropout', 'hidden_dropout',
  'dropout_rate', 'classifier_dropout', 'output_past', 'task_specific_params', 'n_positions', 'max_position_embeddings',
  'gradient_checkpointing', 'id2label', 'label2id', 'problem_type', 'return_dict', 'output_attentions',
  'output_hidden_states', 'attn_implementation', '_attn_implementation', '_attn_implementation_autoset',
  'use_return_dict', 'max_length', 'chunk_size_feed_forward', 'finetuning_task', 'tokenizer_class',
))  # fmt: skip
REQUIRED = object()


class ConfigJson:
  """The values of a config.json, and what is wrong with them. `finish` raises everything at once."""

  def __init__(self, values: Mapping[str, Any], where: object):
    self.values, self.where = values, where
    self.problems: list[str] = []
    self._known = set(NO_EFFECT)

  def take(self, key: str, default: Any = REQUIRED, kind: type = int, *, optional: bool = False, least: int = 1) -> Any:
    """The value of `key`, or `default` where it is absent; None only if that is the default, or it is `optional`.

    An int is a size of at least `least`.
    """
    self._known.add(key)
    found = self.values.get(key, default)
    if found is REQUIRED:
      self.problems.append(f'{key} is missing')
      return kind(1) if kind is not list else []
    if found is None or (isinstance(found, bool) and kind is not bool):
      fits = found is None and (optional or default is None)
    else:
      fits = isinstance(found, (int, float) if kind is float else kind)
    small = kind is int and fits and found is not None and found < least
    if not fits or small:
      self.problems.append(f'{key}={found!r} is {f"below {least}" if small else f"no {kind.__name__}"}')
      return kind(1) if kind is not list else []
    return found if found is None else kind(found)

  def expect(self, key: str, *allowed: Any) -> None:
    """Notes a problem unless `key` is absent or has one of the values that Pretrain's models compute."""
    self._known.add(key)
    if (found := self.values.get(key, allowed[0])) not in allowed:
      self.problems.append(f'{key}={found!r} (supported: {" or ".join(map(repr, allowed))})')

  def ignore(self, *keys: str) -> None:
    """These keys have no effect on logits in this family."""
    self._known.update(keys)

  def choose(self, key: str, options: Mapping[str, Any], default: str) -> Any:
    """The option that `key` names."""
    found = self.take(key, default, str)
    if found not in options:
      self.problems.append(f'{key}={found!r} (supported: {" or ".join(map(repr, options))})')
    return options.get(found, options[default])

  def finish(self) -> None:
    """Raises CheckpointError with every problem and every key that was not read."""
    unknown = sorted(key for key in self.values.keys() - self._known if self.values[key] is not None)
    listed = [*self.problems, *([f'unknown keys: {", ".join(unknown)}'] if unknown else [])]
    if listed:
      raise CheckpointError(
        'IMPORT',
        f'{self.where} describes another model than Pretrain can build: {"; ".join(listed)}. Nothing was written; '
        'choose a model without them, or remove keys that have no effect on its logits.',
      )


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """The object in DIR/config.json. Raises CheckpointError where there is none."""
  path = folder / FILE
  if not path.is_file():
    raise CheckpointError(
      'IMPORT',
      f'{folder}{looked_in(folder)} has no {FILE}. Nothing was written; --from is a folder that save_pretrained wrote.',
    )
  try:
    values = json.loads(path.read_text())
  except (ValueError, OSError) as error:
    raise CheckpointError('IMPORT', f'{path} is not readable ({error}). Nothing was written; copy it again.') from error
  if not isinstance(values, dict):
    raise CheckpointError('IMPORT', f'{path} holds no object. Nothing was written; copy it again.')
  return values
