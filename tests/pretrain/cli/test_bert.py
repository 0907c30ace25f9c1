"""configs/encoder/base.gin has the sizes of BERT-base."""

from models.build import build
from models.specs import count
from pretrain.config import bindings
from pretrain.experiment.checks import check
from pretrain.experiment.experiment import Experiment
from tests.pretrain import tiny


def test_base_has_the_parameters_of_bert_base_but_pooler_and_token_types():
  """The 110M of Devlin et al. 2019, §3, are 109,482,240 in google-research/bert's uncased_L-12_H-768_A-12.

  That is the encoder with its pooler; the transform and the bias of logits of masked language modelling are not in it,
  and not here.
  """
  vocab, positions, token_types, layers, embed, hidden = 30_522, 512, 2, 12, 768, 3072
  norm, pooler = 2 * embed, embed * embed + embed
  attention, mlp = 4 * (embed * embed + embed), 2 * embed * hidden + hidden + embed
  bert = (vocab + positions + token_types) * embed + norm + layers * (attention + mlp + 2 * norm) + pooler
  assert bert == 109_482_240
  cfg = bindings.load(Experiment, [str(tiny.ROOT / 'configs/encoder/base.gin')])
  check(cfg)
  assert count(build(cfg.model).specs) == bert - pooler - token_types * embed == 108_890_112
