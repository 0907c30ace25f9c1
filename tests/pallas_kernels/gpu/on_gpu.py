"""The kernels for GPUs on the GPU of this machine, against the definition: a line of JSON for each case.

  python -m tests.pallas_kernels.gpu.on_gpu

Each line has the implementation, the case, its dtype, and `errors`: by name of an array, the relative L2 error. In
bfloat16 an error is divided by that of the definition in bfloat16. The definition in float32 has products in float32.
"""

import concurrent.futures
import json
import traceback

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import reference
from pallas_kernels.attention.api import IMPLEMENTATIONS
from tests.pallas_kernels.attention_cases import draw, normal, relative, results
from tests.pallas_kernels.gpu.test_gpu import EVERYTHING
from tests.pallas_kernels.test_flash import CASES, MORE

EVERY = CASES | MORE | {'every feature': EVERYTHING}
PLAIN = {
  'causal': ((512,), {'heads': 4, 'kv_heads': 2}, {'causal': True}),
  'full': ((512, 256), {'heads': 4, 'kv_heads': 2}, {'causal': False}),
  'causal, many': ((4096,), {'batch': 3, 'heads': 4, 'kv_heads': 1}, {'causal': True}),
}  # fmt: skip
HEAD_DIMS = (64, 128, 256)
HALF = jnp.bfloat16


def found(name: str, arrays, options: dict, weights):
  """`results` in float32 products for the definition."""
  if name != 'reference':
    return results(IMPLEMENTATIONS[name], arrays, options, weights)
  with jax.default_matmul_precision('highest'):
    return results(reference.attention, arrays, options, weights)


def errors(name: str, case, dtype) -> dict[str, float]:
  """In bfloat16 both are compared with the definition in float32 of the same rounded arrays."""
  lengths, sizes, options = case
  arrays = draw(*lengths, **sizes, dtype=dtype)
  weights = [normal(arrays[0].shape, 3), normal(arrays[0].shape[:3], 4)]
  truth = found('reference', tuple(x.astype(jnp.float32) for x in arrays), options, weights)
  got = found(name, arrays, options, weights)
  np.testing.assert_array_equal(got.pop('seen'), truth.pop('seen'))
  own = {x: relative(got[x], truth[x]) for x in truth}
  if dtype == jnp.float32:
    return own
  definition = found('reference', arrays, options, weights)
  assert all(np.isfinite(definition[x]).all() for x in truth)
  return {x: own[x] / max(relative(definition[x], truth[x]), 1e-3) for x in truth}


def lines():
  for name, case in EVERY.items():
    for head_dim in (16, 80, 128):
      for dtype in (jnp.float32, HALF):
        yield 'triton', f'{name}, {head_dim}', dtype, (case[0], case[1] | {'head_dim': head_dim}, case[2])
  for head_dim in HEAD_DIMS:
    for name, case in PLAIN.items():
      yield 'mosaic_gpu', f'{name}, {head_dim}', HALF, (case[0], case[1] | {'head_dim': head_dim}, case[2])


def line(implementation: str, name: str, dtype, case) -> str:
  row = {'implementation': implementation, 'case': name, 'dtype': jnp.dtype(dtype).name}
  try:
    own = errors(implementation, case, dtype)
    return json.dumps(row | {'errors': {x: float(f'{y:.3g}') for x, y in own.items()}})
  except Exception as error:  # the other cases still run
    return json.dumps(row | {'failed': ''.join(traceback.format_exception_only(error)).strip()[:400]})


def main() -> None:
  with concurrent.futures.ThreadPoolExecutor() as pool:  # most of the time is compilation
    for text in pool.map(lambda each: line(*each), lines()):
      print(text, flush=True)


if __name__ == '__main__':
  main()
