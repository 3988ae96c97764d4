"""The C library's allocator, told to keep the memory that a training step on a CPU frees."""

import ctypes
import sys

# Parameters of mallopt(3).
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Stop this process from handing freed memory back to the system, where the C library is glibc.

    By default each large tensor is a mapping of its own, which the system fills with zeros, page by page, at every step
    anew. Kept memory is used again as it is. What it saves is in benchmarks/spark_step.md.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)  # take everything from one heap
        mallopt(TRIM_THRESHOLD, -1)  # and never shrink it
        mallopt(ARENA_MAX, 1)  # for the thread that computes gradients too
