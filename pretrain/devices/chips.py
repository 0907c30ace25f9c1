"""What is known of accelerators: peak FLOPs by kind, and the memory in use."""

import os
from collections.abc import Sequence
from typing import Any

MIB = 2**20
# Dense bfloat16 FLOPs per second of one core of a TPU, or of one GPU. A JAX device of v4 and v5p has two cores, one of
# TPU7x is half a chip. Sources: cloud.google.com/tpu/docs (per chip: v2 45, v3 123, v4 275, v5e 197, v5p 459, v6e 918,
# TPU7x 2,307 TFLOPs) and NVIDIA's data sheets, without sparsity.
PEAK = {
  'TPU v2': 22.5e12, 'TPU v3': 61.5e12, 'TPU v4': 137.5e12, 'TPU v5 lite': 197e12, 'TPU v5': 229.5e12,
  'TPU v6 lite': 918e12, 'TPU7x': 1153.5e12,
  'NVIDIA A100-SXM4-40GB': 312e12, 'NVIDIA A100-SXM4-80GB': 312e12, 'NVIDIA A100-PCIE-40GB': 312e12,
  'NVIDIA A100 80GB PCIe': 312e12, 'NVIDIA L4': 121e12, 'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H200': 989e12, 'NVIDIA B200': 2250e12,
}  # fmt: skip


def peak_flops(devices: Sequence[Any]) -> float | None:
  """The sum of the peaks of `devices`, in FLOPs per second; None where one of their kinds is not known."""
  if not all(device.device_kind in PEAK for device in devices):
    return None
  return sum(PEAK[device.device_kind] * getattr(device, 'num_cores', 1) for device in devices)


def memory(devices: Sequence[Any]) -> dict[str, float]:
  """MiB in use on the fullest of `devices`, and the highest peak since the start; nothing where none says it."""
  found = [stats for device in devices if (stats := statistics(device))]
  used = [stats['bytes_in_use'] / MIB for stats in found if 'bytes_in_use' in stats]
  peaks = [stats['peak_bytes_in_use'] / MIB for stats in found if 'peak_bytes_in_use' in stats]
  return ({'hbm_mib': max(used)} if used else {}) | ({'hbm_peak_mib': max(peaks)} if peaks else {})


def statistics(device: Any) -> dict[str, int]:
  try:
    return device.memory_stats() or {}
  except (RuntimeError, NotImplementedError):  # of a plugin that has no such call; JAX's errors are RuntimeErrors
    return {}


def host_memory() -> dict[str, float]:
  """MiB of this process in the memory of the host; nothing where the system has no /proc."""
  try:
    with open('/proc/self/statm') as file:
      return {'host_mib': int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / MIB}
  except OSError:
    return {}
