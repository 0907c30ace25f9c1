"""Which data a resumed run must find again, and the sentence where it does not."""

import pathlib

import pytest

from pretrain.config import bindings
from pretrain.errors import CheckpointError, ConfigError
from pretrain.experiment.resume import check_same_data, check_same_run
from tests.pretrain import tiny

SAVED = {'stores': ['3fa1' * 16, '90cc' * 16], 'tokenizer': 'beef' * 16}


@pytest.mark.parametrize(
  ('found', 'changed'),
  [
    (SAVED | {'stores': ['3fa1' * 16, 'dada' * 16]}, 'stores[1] was 90cc90cc.., is dadadada..'),
    (SAVED | {'stores': ['3fa1' * 16]}, 'stores[1] was 90cc90cc.., is absent'),
    (
      {'stores': ['3fa1' * 16, 'synthetic-509-0'], 'tokenizer': None},
      'stores[1] was 90cc90cc.., is synthetic-509-0, tokenizer was beefbeef.., is absent',
    ),
  ],
)
def test_only_what_differs_is_shown(found, changed):
  with pytest.raises(CheckpointError) as caught:
    check_same_data(SAVED, found, 4, pathlib.Path('RUN'))
  assert str(caught.value) == (
    f'CKPT-DATA: step 4 in RUN was trained on other data: {changed}. '
    'Nothing was changed; bring the data back, or use another --workdir'
    + ('.' if 'tokenizer' in changed else ', or add --allow_data_change to continue with it from the same position.')
  )
  assert caught.value.exit_code == 66


def test_the_same_data_is_the_same():
  check_same_data(SAVED, SAVED, 4, pathlib.Path('RUN'))


def test_another_tokenizer_is_refused_even_where_data_may_change():
  found = SAVED | {'tokenizer': 'dada' * 16}
  with pytest.raises(CheckpointError, match='tokenizer was beefbeef'):
    check_same_data(SAVED, found, 4, pathlib.Path('RUN'), allow_data_change=True)


BUCKETS = ("data.packing.name='length_buckets'", 'data.packing.min_length=8')


@pytest.mark.parametrize(
  ('before', 'after', 'changed'),
  [
    ((), ('data.sentinels=40',), 'data.sentinels is 64'),
    (BUCKETS, (*BUCKETS, 'data.batch_size=16'), 'data.batch_size is 8'),
    (BUCKETS, (*BUCKETS, 'data.packing.odds=1.0'), 'data.packing.odds is 2.0'),
    ((), BUCKETS, "data.packing.name is 'concat_split'"),
  ],
)
def test_what_other_data_would_not_explain_is_refused_even_where_data_may_change(tmp_path, before, after, changed):
  (tmp_path / 'config.gin').write_text(bindings.render(tiny.decoder('data.sentinels=64', *before)))
  own = [] if 'data.sentinels=40' in after else ['data.sentinels=64']
  with pytest.raises(ConfigError, match=changed) as caught:
    check_same_run(tmp_path / 'config.gin', tiny.decoder(*own, *after), allow_data_change=True)
  assert 'add --allow_data_change' not in str(caught.value)
