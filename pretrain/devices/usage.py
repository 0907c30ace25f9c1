"""What a run uses of its devices: the peak of their FLOPs, and the memory in use."""

import os
from collections.abc import Sequence
from typing import Any

from pretrain.devices.chips import flops_of_kind

MIB = 2**20
# Dense bfloat16 FLOPs per second of devices that are not in the table of chips.py. Sources: NVIDIA's data sheets,
# without sparsity; docs.cloud.google.com/tpu/docs/v4 (JAX's device is a whole chip there).
PEAK = {
  'NVIDIA A100-SXM4-40GB': 312e12, 'NVIDIA A100-SXM4-80GB': 312e12, 'NVIDIA A100-PCIE-40GB': 312e12,
  'NVIDIA A100 80GB PCIe': 312e12, 'NVIDIA L4': 121e12, 'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H200': 989e12, 'NVIDIA B200': 2250e12, 'TPU v4': 275e12,
}  # fmt: skip


def peak_flops(devices: Sequence[Any]) -> float | None:
  """The sum of the peaks of `devices`, in FLOPs per second; None where one of their kinds is not known."""
  peaks = [flops_of_kind(device.device_kind) or PEAK.get(device.device_kind) for device in devices]
  known = [peak for peak in peaks if peak]
  return sum(known) if len(known) == len(peaks) else None


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
