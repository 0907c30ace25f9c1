"""What chance may exceed, it exceeds less than once in a million pieces."""

import math

import numpy as np
import pytest
from scipy import stats

from data.objectives.infilling import poisson
from data.objectives.objectives import Bart, IidDenoising, tasks_of


@pytest.mark.parametrize('density', [0.01, 0.15, 0.5, 0.9])
def test_iid_noise_hides_more_than_its_bound_less_than_once_in_a_million_times(density):
  (task,) = tasks_of(IidDenoising(noise_density=density))
  lengths = np.arange(1, 3000)
  assert stats.binom.sf(task.most_hidden(lengths), lengths, density).max() < 1e-6
  assert (np.diff(task.most_hidden(lengths)) >= 0).all()


@pytest.mark.parametrize('mean', [1.0, 3.0, 3.5, 16.0])
def test_more_masks_are_inserted_than_the_bound_less_than_once_in_a_million_times(mean):
  """The law of the number of empty spans before a budget is reached, step by step."""
  rate, most = 0.3, 200
  (task,) = tasks_of(Bart(noise_density=rate, mean_noise_span_length=mean))
  chances = np.diff(poisson(mean), prepend=0)
  law = np.zeros((most + 1, 60))  # [budget left, empty spans so far drawn]: their chance, from no budget up
  law[0, 0] = 1.0
  for left in range(1, most + 1):
    some = sum(p * law[max(left - k, 0)] for k, p in enumerate(chances) if k)
    for empty in range(60):  # an empty span leaves the budget and adds one
      law[left, empty] = some[empty] + (chances[0] * law[left, empty - 1] if empty else 0)
  for length in (1, 2, 5, 10, 50, 100, 300, 600):
    bound = int(task.most_inserted(np.array([length]))[0])
    assert law[math.ceil(length * rate), bound + 1 :].sum() < 1e-6
