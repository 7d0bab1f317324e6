"""On a CPU, memory that is freed is kept for the next step.

glibc maps every large tensor and unmaps it when it is freed, so that each step touches hundreds of megabytes of fresh pages,
which the kernel has to clear first.  On two cores that was a third of an on-policy step.
"""

import ctypes
import gc
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_KEEP = 2**31 - 1
_DEFAULT_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 1024, 65536  # mallopt(3)


def keep_freed_memory() -> None:
    """Ask glibc, for this process, to serve large tensors from a heap that it does not shrink; elsewhere, do nothing."""
    _set(mmap_max=0, threshold=_KEEP)


def give_back_freed_memory() -> None:
    """Undo `keep_freed_memory`, and give the system what is free already."""
    _set(mmap_max=_DEFAULT_MMAP_MAX, threshold=_DEFAULT_THRESHOLD)
    release_memory()


def release_memory() -> None:
    """Free what nothing refers to any more, and give the system what is free: glibc keeps gigabytes of tensors below its threshold."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _set(*, mmap_max: int, threshold: int) -> None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, mmap_max)
        libc.mallopt(_M_TRIM_THRESHOLD, threshold)
