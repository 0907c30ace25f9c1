"""Config keys that all models share, and the pieces made from them."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from jax import Array

from models.layers import remat
from models.layers.attention import AttentionConfig, QkNorm
from models.layers.block import BlockConfig, Parallel, Placement, Stack
from models.layers.dropout import Dropout, Sites
from models.layers.embedding import Embedding, Head, Rotation
from models.layers.experts import ExpertsConfig
from models.layers.linear import Bias, Projections
from models.layers.mlp import MlpConfig
from models.layers.norm import NormConfig, RmsNormConfig
from models.layers.pipeline.schedule import Pipeline
from models.layers.positions.biases import Alibi, NoBias, RelativePositionBias
from models.layers.positions.clex import LearnedFrequencies
from models.layers.positions.disentangled import Disentangled
from models.layers.positions.rotary import Clex, NoScaling, Rope, RopeScaling, check_scaling
from models.layers.remat import Name, Policy
from models.rendered import IF_SET
from models.row_order import PLACES
from models.specs import stack

Positions = Literal['relative', 'rotary', 'learned', 'alibi', 'disentangled']
PositionScore = Literal['c2p', 'p2c']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
  """`dtype` is the dtype of activations; parameters, softmax and loss are f32.

  `head` 'tied' makes logits with the embedding table; 'tied_scaled' with table / sqrt(embed), as T5 1.0 (Raffel et al.
  2020; T5X examples/t5/network.py, logits_via_embedding), as does Gemma with its table times sqrt(embed);
  'binary' gives each token one logit: whether it was replaced (ELECTRA's discriminator). `head_bias` adds a bias to the
  logits. `bias` gives a bias to projections, not to norms: to all of them, or to those
  of queries, keys and values ('qkv', Qwen2), of attention, or of MLPs. Earlier versions had True for `bias='all'` and
  `qk_norm='heads'`.
  `init_std` None draws projections by fan-in; `scale_residual_init` scales as GPT-2 does (layers/linear.py). A cap
  replaces x by cap * tanh(x / cap) (Gemma 2, arXiv:2408.00118, §2). A layer of window w sees positions less than w
  away; `windows` gives one to each layer and repeats (None: no window): (4096,) in Mistral, (4096, None) in Gemma 2.
  Through a window the first `sinks` tokens of each document are seen too (LM-Infinite's mask, arXiv:2308.16137, §4.1;
  StreamingLLM, arXiv:2309.17453); `sink_distance` rotates those outside the window as if they were so far away, so that
  no distance is longer than in the first training (its distance ceiling: set it and the window to that length).

  `experts` puts so many MLPs in place of one, of which a router chooses `experts_per_token` for each token (Mixtral);
  `loss.load_balance` and `loss.router_z` keep them all in use. With `expert_capacity` c an expert takes c times its
  equal share of the choices of each row, and drops the others, which keep their residual (GShard, Switch: 1.25);
  None drops nothing. Generation never drops any.

  `embedding_rotation` puts a learned square matrix, orthogonal at first, behind the embedding and another before the
  head (EmbProj of Outlier-Safe Pre-Training, arXiv:2506.19697, with `norm.scale` 'single' and Muon). `kurtosis`
  makes the excess kurtosis of each layer's output a metric.

  `dropout_sites` are the places where `dropout` acts: T5's, BERT's or none (layers/dropout.py).

  `positions` picks which of the keys below it are used; 'disentangled' (DeBERTa) is for encoders alone: it adds
  `position_scores` of content to position and of position to content, and `relative_norm` normalises its table.
  `relative_layers` 'each' gives every layer its own biases (umT5); `rotary_fraction` rotates that share of each head
  (0.25 in GPT-NeoX); `alibi_scaled` multiplies ALiBi's biases by 1/sqrt(head_dim), as scores are (Falcon-RW).
  """

  name: str  # each family sets it
  vocab_size: Annotated[int, '>= 1']
  embed: Annotated[int, '>= 1']
  heads: Annotated[int, '>= 1']
  head_dim: Annotated[int, '>= 1']
  mlp: MlpConfig
  experts: Annotated[int, '>= 2'] | None = None
  experts_per_token: Annotated[int, '>= 1'] = 2
  expert_capacity: Annotated[float, '> 0'] | None = dataclasses.field(default=None, metadata=IF_SET)
  norm: NormConfig = RmsNormConfig()
  norm_placement: Placement = 'pre'
  parallel: Parallel = 'none'
  bias: Annotated[Bias, {False: 'none', True: 'all'}] = 'none'
  qk_norm: Annotated[QkNorm, {False: 'none', True: 'heads'}] = 'none'
  attention_softcap: Annotated[float, '> 0'] | None = None
  logit_softcap: Annotated[float, '> 0'] | None = None
  windows: tuple[Annotated[int, '>= 1'] | None, ...] = ()
  sinks: Annotated[int, '>= 0'] = 0
  sink_distance: Annotated[int, '>= 1'] | None = None
  positions: Positions = 'relative'
  relative_buckets: Annotated[int, '>= 4'] = 32  # an encoder has one near and one far bucket on each side
  relative_max_distance: Annotated[int, '>= 1'] = 128
  relative_layers: Literal['shared', 'each'] = 'shared'
  rope_theta: Annotated[float, '> 0'] = 10_000.0
  rotary_fraction: Annotated[float, '(0, 1]'] = 1.0
  rope_scaling: RopeScaling = NoScaling()
  alibi_scaled: bool = False
  max_positions: Annotated[int, '>= 1'] | None = None  # for learned positions
  position_scores: tuple[PositionScore, ...] = ('c2p', 'p2c')
  relative_norm: bool = False
  head: Literal['untied', 'tied', 'tied_scaled', 'binary'] = 'untied'
  head_bias: bool = False
  embedding_rotation: bool = dataclasses.field(default=False, metadata=IF_SET)
  kurtosis: bool = dataclasses.field(default=False, metadata=IF_SET)
  embedding_init_std: Annotated[float, '>= 0'] = 1.0
  head_init_scale: Annotated[float, '>= 0'] = 1.0
  init_std: Annotated[float, '> 0'] | None = None
  scale_residual_init: bool = False
  dropout: Annotated[float, '[0, 1)'] = 0.0
  dropout_sites: Sites = 't5'
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  remat: Policy = 'none'
  remat_keep: tuple[Name, ...] = dataclasses.field(default=(), metadata=IF_SET)
  remat_offload: tuple[Name, ...] = dataclasses.field(default=(), metadata=IF_SET)
  pipeline_microbatches: Annotated[int, '>= 1'] | None = dataclasses.field(default=None, metadata=IF_SET)
  pipeline_repeats: Annotated[int, '>= 1'] = dataclasses.field(default=1, metadata=IF_SET)


KEYS_OF_POSITIONS: dict[str, tuple[Positions, ...]] = {
  'relative_buckets': ('relative', 'disentangled'),
  'relative_max_distance': ('relative', 'disentangled'),
  'relative_layers': ('relative',),
  'rope_theta': ('rotary',),
  'rotary_fraction': ('rotary',),
  'rope_scaling': ('rotary',),
  'sink_distance': ('rotary',),
  'alibi_scaled': ('alibi',),
  'max_positions': ('learned',),
  'position_scores': ('disentangled',),
  'relative_norm': ('disentangled',),
}


def remat_of(cfg: Parts) -> remat.Remat:
  return remat.Remat(policy=cfg.remat, keep=cfg.remat_keep, offload=cfg.remat_offload)


def check_parts(cfg: Parts) -> None:
  """Raises ValueError for values that do not fit each other, or that would have no effect."""
  remat.check(remat_of(cfg), gated=cfg.mlp.gated)
  defaults = {f.name: f.default for f in dataclasses.fields(cfg)}
  for key, positions in KEYS_OF_POSITIONS.items():
    if cfg.positions not in positions and (given := getattr(cfg, key)) != defaults[key]:
      shown = f'.name={given.name!r}' if key == 'rope_scaling' else f'={given}'
      owners = ' or '.join(map(repr, positions))
      raise ValueError(f"model.{key}{shown} with model.positions='{cfg.positions}'; it belongs to {owners}, remove it.")
  if cfg.head in ('tied', 'tied_scaled') and cfg.head_init_scale != 1.0:
    raise ValueError(
      f"model.head_init_scale={cfg.head_init_scale} with model.head='{cfg.head}', which is the embedding's table; "
      'remove it, or set model.embedding_init_std.'
    )
  if cfg.parallel != 'none' and cfg.norm_placement != 'pre':
    raise ValueError(
      f"model.parallel='{cfg.parallel}' with model.norm_placement='{cfg.norm_placement}'; parallel layers read x "
      "through their norms, use model.norm_placement='pre'."
    )
  if cfg.dropout_sites == 'none' and cfg.dropout:
    raise ValueError(
      f"model.dropout={cfg.dropout} with model.dropout_sites='none', where nothing drops; use model.dropout=0, or "
      "sites 't5' or 'bert'."
    )
  _check_experts(cfg)
  _check_windows(cfg)
  _check_positions(cfg)


def check_no_encoder_parts(cfg: Parts) -> None:
  """Raises ValueError for parts that only an encoder has."""
  for key, value in (('head', 'binary'), ('positions', 'disentangled')):
    if getattr(cfg, key) == value:
      raise ValueError(f"model.{key}='{value}' with model.name='{cfg.name}'; only an encoder has it, choose another.")


def _check_experts(cfg: Parts) -> None:
  if cfg.experts is None and cfg.experts_per_token != Parts.experts_per_token:
    raise ValueError(f'model.experts_per_token={cfg.experts_per_token} without model.experts; set it, or remove this.')
  if cfg.experts is not None and cfg.experts_per_token > cfg.experts:
    raise ValueError(
      f'model.experts_per_token={cfg.experts_per_token} of model.experts={cfg.experts}; a token goes to different '
      f'experts, use at most {cfg.experts}.'
    )
  if cfg.experts is not None and cfg.experts_per_token == 1:
    raise ValueError(
      'model.experts_per_token=1 weighs the one expert of a token by 1, whatever its router says, so that the router '
      'would not learn from the loss; use at least 2.'
    )
  if cfg.expert_capacity is not None:
    _check_capacity(cfg, cfg.expert_capacity)
  if cfg.experts is not None and cfg.bias in ('all', 'mlp'):
    raise ValueError(
      f"model.bias='{cfg.bias}' with model.experts; experts have no biases, use model.bias='attention', 'qkv' or "
      "'none'."
    )


def _check_capacity(cfg: Parts, capacity: float) -> None:
  if cfg.experts is None:
    raise ValueError(f'model.expert_capacity={capacity} without model.experts; set it, or remove this.')
  if capacity >= (most := cfg.experts / cfg.experts_per_token):
    raise ValueError(
      f'model.expert_capacity={capacity} of model.experts={cfg.experts} and model.experts_per_token='
      f'{cfg.experts_per_token}: every expert has a place for each token, so none is ever dropped; use less than '
      f'{most:g}, or remove it.'
    )


def _check_windows(cfg: Parts) -> None:
  if cfg.sinks and not any(cfg.windows):
    raise ValueError(
      f'model.sinks={cfg.sinks} with model.windows={cfg.windows}; without a window every token sees the first ones, so '
      'set model.windows, or remove model.sinks.'
    )
  smallest = min((window for window in cfg.windows if window is not None), default=0)
  if cfg.sink_distance is not None and not cfg.sinks:
    raise ValueError(f'model.sink_distance={cfg.sink_distance} without model.sinks; set model.sinks, or remove this.')
  for key, value in (('sinks', cfg.sinks), ('sink_distance', cfg.sink_distance or 0)):
    if cfg.sink_distance is not None and value > smallest:
      raise ValueError(
        f'model.{key}={value} with model.windows={cfg.windows} and model.sink_distance; only sinks outside a window '
        f'have that distance, so use at most {smallest}, or longer windows.'
      )
  for key in ('layers', 'encoder_layers', 'decoder_layers'):
    if cfg.windows and (layers := getattr(cfg, key, 0)) % len(cfg.windows):
      raise ValueError(
        f'model.windows has {len(cfg.windows)} entries, which do not divide model.{key}={layers}; the pattern repeats '
        'over the layers, so give it a length that divides them.'
      )


def _rotated_dims(cfg: Parts) -> int:
  return round(cfg.head_dim * cfg.rotary_fraction)


def _check_positions(cfg: Parts) -> None:
  if cfg.positions == 'rotary' and cfg.head_dim % 2:
    raise ValueError(f'model.head_dim={cfg.head_dim} is odd; rotary positions rotate pairs, use {cfg.head_dim + 1}.')
  dims = cfg.head_dim * cfg.rotary_fraction
  if cfg.positions == 'rotary' and (dims != (whole := _rotated_dims(cfg)) or whole % 2 or not whole):
    raise ValueError(
      f'model.rotary_fraction={cfg.rotary_fraction} of model.head_dim={cfg.head_dim} is {dims:g} dims, not an even '
      f'number; rotary positions rotate pairs, use {max(2, 2 * round(dims / 2)) / cfg.head_dim}.'
    )
  check_scaling(cfg.rope_scaling)
  if isinstance(cfg.rope_scaling, Clex):
    _check_clex(cfg)
  if cfg.positions == 'learned' and cfg.max_positions is None:
    raise ValueError("model.positions='learned' needs model.max_positions; set it to the longest row or more.")
  _check_disentangled(cfg)
  exact = cfg.relative_buckets // 2  # in a decoder, which sees one side only
  if cfg.positions in KEYS_OF_POSITIONS['relative_buckets'] and cfg.relative_max_distance <= exact:
    raise ValueError(
      f'model.relative_max_distance={cfg.relative_max_distance} with model.relative_buckets={cfg.relative_buckets}, '
      f'whose first {exact} buckets are single distances; set model.relative_max_distance > {exact}.'
    )


def _check_clex(cfg: Parts) -> None:
  if cfg.name != 'decoder':
    raise ValueError(
      f"model.rope_scaling.name='clex' with model.name='{cfg.name}'; only decoders have it, choose another scaling."
    )
  if cfg.sink_distance is not None:
    raise ValueError(
      f"model.rope_scaling.name='clex' with model.sink_distance={cfg.sink_distance}; both keep distances as short as "
      'in the first training, remove one.'
    )
  if _rotated_dims(cfg) == 2:
    raise ValueError(
      "model.rope_scaling.name='clex' with 2 rotated dims; a single frequency cannot be scaled so, use more dims."
    )


def make_frequencies(cfg: Parts) -> LearnedFrequencies | None:
  """What makes the angles of rotary positions where they are learned (CLEX)."""
  return LearnedFrequencies(make_rope(cfg), cfg.rope_scaling) if isinstance(cfg.rope_scaling, Clex) else None


def make_rope(cfg: Parts) -> Rope:
  return Rope(theta=cfg.rope_theta, dims=_rotated_dims(cfg), scaling=cfg.rope_scaling)


def _check_disentangled(cfg: Parts) -> None:
  if cfg.positions != 'disentangled':
    return
  if not cfg.position_scores or len(set(cfg.position_scores)) < len(cfg.position_scores):
    raise ValueError(f"model.position_scores={cfg.position_scores}; name each of 'c2p' and 'p2c' once, or one of them.")
  if cfg.relative_buckets % 2:
    raise ValueError(
      f"model.relative_buckets={cfg.relative_buckets} with model.positions='disentangled', where each side has half of "
      f'them; use {cfg.relative_buckets + 1}.'
    )


def attention_config(cfg: Parts, implementation: str, *, kv_heads: int, t5_scale: bool) -> AttentionConfig:
  return AttentionConfig(
    heads=cfg.heads, kv_heads=kv_heads, head_dim=cfg.head_dim, t5_scale=t5_scale,
    rope=make_rope(cfg) if cfg.positions == 'rotary' else None, qk_norm=cfg.qk_norm,
    qk_norm_eps=cfg.norm.eps, softcap=cfg.attention_softcap, sink_distance=cfg.sink_distance, dropout=dropout_of(cfg),
    implementation=implementation,
  )  # fmt: skip


def make_stack(cfg: Parts, attention: AttentionConfig, layers: int, *, cross: bool, before_head: bool = True) -> Stack:
  additions = layers * (3 if cross else 2)
  residual = additions**-0.5 if cfg.scale_residual_init else 1.0
  block = BlockConfig(
    embed=cfg.embed, attention=attention, mlp=cfg.mlp, norm=cfg.norm, placement=cfg.norm_placement,
    parallel=cfg.parallel, projections=Projections(std=cfg.init_std, residual=residual, bias=cfg.bias), cross=cross,
    dropout=dropout_of(cfg), experts=make_experts(cfg),
  )  # fmt: skip
  each = cfg.positions == 'relative' and cfg.relative_layers == 'each'
  finishing = Rotation(cfg.embed) if cfg.embedding_rotation and before_head else None
  return Stack(
    block, layers, remat=remat_of(cfg), windows=cfg.windows or (None,), sinks=cfg.sinks, own_bias=each,
    finishing=finishing, kurtosis=cfg.kurtosis, pipeline=Pipeline(cfg.pipeline_microbatches, cfg.pipeline_repeats),
  )  # fmt: skip


def dropout_of(cfg: Parts) -> Dropout:
  return Dropout(rate=cfg.dropout, sites=cfg.dropout_sites)


def make_experts(cfg: Parts) -> ExpertsConfig | None:
  if cfg.experts is None:
    return None
  return ExpertsConfig(number=cfg.experts, per_token=cfg.experts_per_token, capacity=cfg.expert_capacity)


def make_bias(cfg: Parts, layers: int, *, bidirectional: bool) -> RelativePositionBias | Alibi | Disentangled | NoBias:
  """What a stack adds to its attention scores; calling it gives arguments of `Visibility`."""
  match cfg.positions:
    case 'relative':
      buckets, distance = cfg.relative_buckets, cfg.relative_max_distance
      bias = RelativePositionBias(cfg.heads, bidirectional=bidirectional, buckets=buckets, max_distance=distance)
      return bias if cfg.relative_layers == 'shared' else stack(bias, layers)
    case 'alibi':
      return Alibi(cfg.heads, cfg.head_dim**-0.5 if cfg.alibi_scaled else 1.0)
    case 'disentangled':
      return Disentangled(
        cfg.embed, buckets=cfg.relative_buckets, max_distance=cfg.relative_max_distance, scores=cfg.position_scores,
        norm=cfg.norm if cfg.relative_norm else None, std=cfg.embedding_init_std,
      )  # fmt: skip
    case 'rotary' | 'learned':
      return NoBias()


def make_embedding(cfg: Parts) -> Embedding:
  return Embedding(
    cfg.vocab_size, cfg.embed, drop=dropout_of(cfg), std=cfg.embedding_init_std, max_positions=cfg.max_positions,
    rotated=cfg.embedding_rotation,
  )  # fmt: skip


def make_head(cfg: Parts) -> Head | None:
  """None where the embedding's table is the head, without a bias."""
  tied = cfg.head in ('tied', 'tied_scaled')
  own = None if tied else Projections(std=cfg.init_std).init('embed', scale=cfg.head_init_scale)
  outputs, axis = (1, 'outputs') if cfg.head == 'binary' else (cfg.vocab_size, 'vocab')
  return Head(cfg.embed, outputs, own, bias=cfg.head_bias, axis=axis) if own or cfg.head_bias else None


def placed(batch: Mapping[str, Array], sinks: int) -> dict[str, Array]:
  """Arguments of `Visibility` for rows that `RowOrder` arranged: the positions of tokens in the rows as they were, or
  with `sinks` in their documents, whose first tokens these are. Rows in order need none.
  """
  if PLACES not in batch:
    return {}
  positions = batch['decoder_positions'] if sinks else batch[PLACES]
  return {'q_positions': positions, 'kv_positions': positions, 'kv_places': batch[PLACES]}
