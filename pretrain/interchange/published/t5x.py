"""Encoder-decoders of T5X, whose checkpoints have no config: sizes come from the shapes of the arrays.

Sources: github.com/google-research/t5x, t5x/examples/t5 (an array for each layer, heads joined), t5x/examples/
scalable_t5 (`scan_layers`: one array for all layers, which are its axis 1; heads apart; relative biases in each layer),
and Flaxformer's T5, which UL2 has, with the same names. `transformers` reads them alike: models/t5 and models/umt5,
convert_*_checkpoint_to_pytorch.py.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

from models.families.encoder_decoder import EncoderDecoderConfig
from models.layers.mlp import MlpConfig
from pretrain.interchange.layout import Entry

TABLE, HEAD = 'target.token_embedder.embedding', 'target.decoder.logits_dense.kernel'
SELF = {'encoder': 'attention', 'decoder': 'self_attention'}
BIAS = 'relpos_bias.rel_embedding'
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Form:
  """How a checkpoint holds a model: `scanned` layers in one array, `joined` heads in one axis; biases of each layer."""

  scanned: bool
  joined: bool
  each: bool

  def layer(self, stack: str, number: object = 0) -> str:
    return f'target.{stack}.{stack}' if self.scanned else f'target.{stack}.layers_{number}'

  def bias(self, stack: str, number: object = 0) -> str:
    return f'{self.layer(stack, number) if self.each else f"target.{stack}"}.{BIAS}'


@dataclasses.dataclass(frozen=True)
class Read:
  """A model by its shapes; `shown_by` names the array that shows the value of a key; `problems` are what is wrong.

  Its activation, its norms' eps and its distances are not in a shape, and are those of the classes. Without `complete`,
  an array that shows a size is missing or has another number of axes, and the size is 1.
  """

  model: EncoderDecoderConfig
  form: Form
  shown_by: Mapping[str, str]
  problems: Sequence[str]
  complete: bool


class Sizes:
  """Sizes by name and axis, and what kept them from being read."""

  def __init__(self, shapes: Shapes):
    self.shapes = shapes
    self.problems: list[str] = []
    self.lacking = False

  def size(self, name: str, rank: int, axis: int) -> int:
    """The size of an axis of an array, which has `rank` axes; 1 where it is missing or has another number of axes."""
    found = self.shapes.get(name)
    if found is not None and len(found) == rank:
      return found[axis]
    self.lacking = True
    if found is not None:
      self.problems.append(f'{name} is {list(found)}, and has {rank} axes in T5X')
    return 1


def read(shapes: Shapes) -> Read:
  """The model whose parameters have these shapes."""
  form, sizes, problems = _form(shapes), Sizes(shapes), []
  size, stacked = sizes.size, int(form.scanned)
  gate, up, query = (f'{form.layer("encoder")}.{part}.kernel' for part in ('mlp.wi_0', 'mlp.wi', 'attention.query'))
  gated, bias = gate in shapes, form.bias('encoder')
  hidden = gate if gated else up
  heads = size(bias, 2 + stacked * form.each, 0)
  width = size(query, (2 if form.joined else 3) + stacked, -1)
  if form.joined and query in shapes and width % heads:
    problems.append(f'{query} is {list(shapes[query])}, whose last axis {heads} heads (of {bias}) do not divide')
  depth = {stack: _depth(form, sizes, stack) for stack in SELF}
  model = EncoderDecoderConfig(
    vocab_size=size(TABLE, 2, 0), embed=size(TABLE, 2, 1), heads=heads,
    head_dim=max(1, width // heads) if form.joined else width, encoder_layers=depth['encoder'],
    decoder_layers=depth['decoder'], mlp=MlpConfig(hidden=size(hidden, 2 + stacked, -1), gated=gated),
    relative_buckets=size(bias, 2 + stacked * form.each, -1), head='untied' if HEAD in shapes else 'tied_scaled',
    relative_layers='each' if form.each else 'shared',
  )  # fmt: skip
  shown_by = {
    'vocab_size': TABLE, 'embed': TABLE, 'heads': bias, 'head_dim': query, 'relative_buckets': bias,
    'mlp.hidden': hidden, 'mlp.gated': hidden, 'relative_layers': bias, 'head': HEAD if HEAD in shapes else TABLE,
    'encoder_layers': _norm(form, 'encoder'), 'decoder_layers': _norm(form, 'decoder'),
  }  # fmt: skip
  problems += sizes.problems
  keys = {f'model.{key}': name for key, name in shown_by.items()}
  return Read(model, form, keys, list(dict.fromkeys(problems)), not sizes.lacking)


def _form(shapes: Shapes) -> Form:
  scanned = any(name.startswith('target.encoder.encoder.') for name in shapes)
  each = any(re.match(rf'target\.encoder\.(encoder|layers_\d+)\.{BIAS}', name) for name in shapes)
  form = Form(scanned, joined=True, each=each)
  query = shapes.get(f'{form.layer("encoder")}.attention.query.kernel', ())
  return dataclasses.replace(form, joined=len(query) != 3 + scanned)


def _norm(form: Form, stack: str) -> str:
  return f'{form.layer(stack)}.pre_{SELF[stack]}_layer_norm.scale'


def _depth(form: Form, sizes: Sizes, stack: str) -> int:
  if form.scanned:
    return sizes.size(_norm(form, stack), 2, 1)
  found = (re.match(rf'target\.{stack}\.layers_(\d+)\.', name) for name in sizes.shapes)
  return max(1, len({match[1] for match in found if match}))


def entries(model: EncoderDecoderConfig, form: Form) -> list[Entry]:
  """A place for each parameter that a model may have."""
  return [
    Entry('embedding/table', TABLE, 'vocab embed'), Entry('head/kernel', HEAD, 'embed vocab'),
    *_stack('encoder', model, form), *_stack('decoder', model, form),
  ]  # fmt: skip


def _stack(stack: str, model: EncoderDecoderConfig, form: Form) -> Iterator[Entry]:
  layer, blocks = form.layer(stack, '{0}'), f'{stack}/blocks'
  attentions = {'self': SELF[stack]} | ({'cross': 'encoder_decoder_attention'} if stack == 'decoder' else {})
  norms = {'self': SELF[stack], 'cross': 'cross_attention', 'mlp': 'mlp'}
  yield Entry(f'{stack}_bias/table', form.bias(stack, '{0}'), _layout('heads', 'buckets', scanned=_scans(form)))
  yield Entry(f'{stack}/norm/scale', f'target.{stack}.{stack}_norm.scale', 'embed')
  for ours in (*attentions, 'mlp'):
    name = f'{layer}.pre_{norms[ours]}_layer_norm.scale'
    yield Entry(f'{blocks}/{ours}_norm/scale', name, _layout('embed', scanned=form.scanned))
  for ours, theirs in attentions.items():
    for part, heads in {'query': 'heads', 'key': 'kv_heads', 'value': 'kv_heads'}.items():
      layout = _layout('embed', *_heads(heads, form), scanned=form.scanned)
      yield Entry(f'{blocks}/{ours}_attention/{part}', f'{layer}.{theirs}.{part}.kernel', layout)
    layout = _layout(*_heads('heads', form), 'embed', scanned=form.scanned)
    yield Entry(f'{blocks}/{ours}_attention/out', f'{layer}.{theirs}.out.kernel', layout)
  for ours, theirs in {'gate': 'wi_0', 'up': 'wi_1'}.items() if model.mlp.gated else [('up', 'wi')]:
    yield Entry(f'{blocks}/mlp/{ours}', f'{layer}.mlp.{theirs}.kernel', _layout('embed', 'mlp', scanned=form.scanned))
  yield Entry(f'{blocks}/mlp/down', f'{layer}.mlp.wo.kernel', _layout('mlp', 'embed', scanned=form.scanned))


def _scans(form: Form) -> bool:
  return form.scanned and form.each


def _heads(heads: str, form: Form) -> tuple[str, ...]:
  return (f'({heads} head_dim)',) if form.joined else (heads, 'head_dim')


def _layout(*axes: str, scanned: bool) -> str:
  """Scanned layers are axis 1 (`param_scan_axis` of scalable_t5).

  >>> _layout('embed', 'mlp', scanned=True)
  'embed layers mlp'
  """
  return ' '.join([axes[0], *(['layers'] if scanned else []), *axes[1:]])
