"""Config keys that all models share, and the pieces made from them."""

import dataclasses
from typing import Annotated, Literal

from models.layers.attention import AttentionConfig
from models.layers.block import BlockConfig, Placement, Remat, Stack
from models.layers.embedding import Embedding, Head
from models.layers.linear import Projections
from models.layers.mlp import MlpConfig
from models.layers.norm import NormConfig, RmsNormConfig
from models.layers.positions import Alibi, NoBias, RelativePositionBias

Positions = Literal['relative', 'rotary', 'learned', 'alibi']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
  """`dtype` is the dtype of activations; parameters, softmax and loss are f32.

  `head` 'tied' makes logits with the embedding table; 'tied_scaled' with table / sqrt(embed), as T5 1.0 (Raffel et al.
  2020; T5X examples/t5/network.py, logits_via_embedding). `bias` gives a bias to all projections, not to norms.
  `init_std` None draws projections by fan-in; `scale_residual_init` scales as GPT-2 does (layers/linear.py). A cap
  replaces x by cap * tanh(x / cap) (Gemma 2, arXiv:2408.00118, §2). `positions` picks which of the keys below it are
  used.
  """

  name: str  # each family sets it
  vocab_size: Annotated[int, '>= 1']
  embed: Annotated[int, '>= 1']
  heads: Annotated[int, '>= 1']
  head_dim: Annotated[int, '>= 1']
  mlp: MlpConfig
  norm: NormConfig = RmsNormConfig()
  norm_placement: Placement = 'pre'
  bias: bool = False
  qk_norm: bool = False
  attention_softcap: Annotated[float, '> 0'] | None = None
  logit_softcap: Annotated[float, '> 0'] | None = None
  positions: Positions = 'relative'
  relative_buckets: Annotated[int, '>= 4'] = 32  # an encoder has one near and one far bucket on each side
  relative_max_distance: Annotated[int, '>= 1'] = 128
  rope_theta: Annotated[float, '> 0'] = 10_000.0
  max_positions: Annotated[int, '>= 1'] | None = None  # for learned positions
  head: Literal['untied', 'tied', 'tied_scaled'] = 'untied'
  embedding_init_std: Annotated[float, '>= 0'] = 1.0
  head_init_scale: Annotated[float, '>= 0'] = 1.0
  init_std: Annotated[float, '> 0'] | None = None
  scale_residual_init: bool = False
  dropout: Annotated[float, '[0, 1)'] = 0.0
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  remat: Remat = 'none'


KEYS_OF_POSITIONS: dict[str, Positions] = {
  'relative_buckets': 'relative',
  'relative_max_distance': 'relative',
  'rope_theta': 'rotary',
  'max_positions': 'learned',
}


def check_parts(cfg: Parts) -> None:
  """Raises ValueError for values that do not fit each other, or that would have no effect."""
  defaults = {f.name: f.default for f in dataclasses.fields(cfg)}
  for key, positions in KEYS_OF_POSITIONS.items():
    if cfg.positions != positions and (given := getattr(cfg, key)) != defaults[key]:
      raise ValueError(
        f"model.{key}={given} with model.positions='{cfg.positions}'; it belongs to '{positions}', remove it."
      )
  if cfg.head != 'untied' and cfg.head_init_scale != 1.0:
    raise ValueError(
      f"model.head_init_scale={cfg.head_init_scale} with model.head='{cfg.head}', which is the embedding's table; "
      'remove it, or set model.embedding_init_std.'
    )
  _check_positions(cfg)


def _check_positions(cfg: Parts) -> None:
  if cfg.positions == 'rotary' and cfg.head_dim % 2:
    raise ValueError(f'model.head_dim={cfg.head_dim} is odd; rotary positions rotate pairs, use {cfg.head_dim + 1}.')
  if cfg.positions == 'learned' and cfg.max_positions is None:
    raise ValueError("model.positions='learned' needs model.max_positions; set it to the longest row or more.")
  exact = cfg.relative_buckets // 2  # in a decoder, which sees one side only
  if cfg.positions == 'relative' and cfg.relative_max_distance <= exact:
    raise ValueError(
      f'model.relative_max_distance={cfg.relative_max_distance} with model.relative_buckets={cfg.relative_buckets}, '
      f'whose first {exact} buckets are single distances; set model.relative_max_distance > {exact}.'
    )


def attention_config(cfg: Parts, implementation: str, *, kv_heads: int, t5_scale: bool) -> AttentionConfig:
  return AttentionConfig(
    heads=cfg.heads, kv_heads=kv_heads, head_dim=cfg.head_dim, t5_scale=t5_scale,
    rope_theta=cfg.rope_theta if cfg.positions == 'rotary' else None, qk_norm=cfg.qk_norm,
    qk_norm_eps=cfg.norm.eps, softcap=cfg.attention_softcap, dropout=cfg.dropout, implementation=implementation,
  )  # fmt: skip


def make_stack(cfg: Parts, attention: AttentionConfig, layers: int, *, cross: bool) -> Stack:
  additions = layers * (3 if cross else 2)
  residual = additions**-0.5 if cfg.scale_residual_init else 1.0
  block = BlockConfig(
    embed=cfg.embed, attention=attention, mlp=cfg.mlp, norm=cfg.norm, placement=cfg.norm_placement,
    projections=Projections(std=cfg.init_std, residual=residual, bias=cfg.bias), cross=cross, rate=cfg.dropout,
  )  # fmt: skip
  return Stack(block, layers, remat=cfg.remat)


def make_bias(cfg: Parts, *, bidirectional: bool) -> RelativePositionBias | Alibi | NoBias:
  """What a stack adds to its attention scores; calling it gives arguments of `Visibility`."""
  match cfg.positions:
    case 'relative':
      buckets, distance = cfg.relative_buckets, cfg.relative_max_distance
      return RelativePositionBias(cfg.heads, bidirectional=bidirectional, buckets=buckets, max_distance=distance)
    case 'alibi':
      return Alibi(cfg.heads)
    case 'rotary' | 'learned':
      return NoBias()


def make_embedding(cfg: Parts) -> Embedding:
  return Embedding(
    cfg.vocab_size, cfg.embed, rate=cfg.dropout, std=cfg.embedding_init_std, max_positions=cfg.max_positions
  )


def make_head(cfg: Parts) -> Head | None:
  """None where the embedding's table is the head."""
  own = Projections(std=cfg.init_std).init('embed', scale=cfg.head_init_scale)
  return Head(cfg.embed, cfg.vocab_size, own) if cfg.head == 'untied' else None
