"""Memory of CPU runs: the process keeps freed buffers, in huge pages.

XLA allocates the temporaries of a step again at every step. By default glibc returns such blocks to the kernel each
time, and page faults take a quarter of the time (measured in docs/LOG.md). glibc reads the setting only when a process
starts, so the command replaces itself by a process with the setting.
"""

import os
import sys

VARIABLE = 'GLIBC_TUNABLES'
TUNABLES = 'glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:glibc.malloc.hugetlb=1'


def keep_memory() -> None:
  """Replaces this process by the same command with an allocator that keeps memory; once, and only on Linux."""
  if sys.platform == 'linux' and VARIABLE not in os.environ:
    os.environ[VARIABLE] = TUNABLES
    # With the original arguments: with `-m`, packages in the current folder would hide ours.
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
