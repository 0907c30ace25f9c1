"""What processes exchange: the answers of all, or the name of the process without an answer."""

import jax
import pytest

from pretrain.errors import HostError
from pretrain.hosts.coordination import Agreement


class Service:
  """The coordination service's memory."""

  def __init__(self):
    self.values = {}

  def key_value_set(self, key, value):
    assert value, 'no value may be empty'
    assert key not in self.values
    self.values[key] = value

  def blocking_key_value_get(self, key, milliseconds):
    if key not in self.values:
      raise jax.errors.JaxRuntimeError(f'DEADLINE_EXCEEDED: {key} after {milliseconds} ms')
    return self.values[key]

  def key_value_dir_get(self, folder):
    return [(f'{folder}/1', 'save 20')]


@pytest.fixture
def service(monkeypatch):
  service = Service()
  monkeypatch.setattr('pretrain.hosts.coordination.distributed.global_state.client', service)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  return service


def test_one_process_agrees_with_itself():
  assert Agreement('a').gather('yes') == ['yes']


def test_all_answers_come_in_the_order_of_the_processes(service, monkeypatch):
  numbers = []
  set_value = service.key_value_set

  def both(key, value):
    numbers.append(key.split('/')[2])
    set_value(key, value)
    set_value(key[:-1] + '1', '=')

  monkeypatch.setattr(service, 'key_value_set', both)
  assert Agreement('b').gather('x') == ['x', '']
  assert Agreement('b').first('y') == 'y'
  assert numbers == ['0', '1'], 'no question has the key of another, of another object neither'


def test_a_process_that_does_not_answer_is_named(service):
  with pytest.raises(
    HostError, match=r'HANG: process 1 of 2 did not answer within 0.5 s \(pretrain/c/0/1\); .*1: save since step 20'
  ) as caught:
    Agreement('c', seconds=0.5).gather('x')
  assert caught.value.exit_code == 70


def test_a_process_that_gave_up_a_save_takes_part_in_the_next_one(service):
  """This process missed one question of the first save; the second save has questions of its own."""
  keys = []
  service.blocking_key_value_get = lambda key, _: keys.append(key) or '='
  Agreement.about('d').gather('x')
  Agreement.about('d').gather('y')
  assert keys[::2] == ['pretrain/d/0/0/0', 'pretrain/d/1/0/0']
