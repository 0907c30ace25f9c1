"""Memory of CPU runs: freed buffers stay with the process, in huge pages.

XLA takes a step's temporaries anew at every step; glibc would hand such blocks back to the kernel each time, and a
quarter of the time would go to page faults (docs/LOG.md has the measurement). The setting is read when a process
starts, so the command starts itself again with it.
"""

import os
import sys

VARIABLE = 'GLIBC_TUNABLES'
TUNABLES = 'glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:glibc.malloc.hugetlb=1'


def keep_memory() -> None:
  """Replaces this process by the same command with the allocator told to keep memory; once, and on Linux alone."""
  if sys.platform == 'linux' and VARIABLE not in os.environ:
    os.environ[VARIABLE] = TUNABLES
    # As it was started: `-m` would let the current folder's packages go before ours.
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
