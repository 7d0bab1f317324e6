"""Weights on large pages of memory: a token reads all of them once, and on pages of 4 KiB the processor looks up 500 addresses a MiB.

Linux leaves ordinary memory on small pages unless a program asks (`/sys/kernel/mm/transparent_hugepage/enabled`: madvise), and ONNX
Runtime does not ask.  So what was allocated meanwhile is moved afterwards, by the kernel, at once (MADV_COLLAPSE, Linux 6.1).
Elsewhere nothing happens: addresses and contents stay the same, only speed differs.
"""

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE = 2 << 20  # bytes
_HUGEPAGE, _COLLAPSE = 14, 25  # advice of madvise
_MAPS = Path("/proc/self/maps")
_ANONYMOUS = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-p [0-9a-f]+ 00:00 0 *(?:\[heap\])?$", re.MULTILINE)


@contextmanager
def on_large_pages() -> Iterator[None]:
    """Move what is allocated inside, and still there at the end, onto large pages; large allocations only."""
    before = _allocated()
    yield
    for start, end in _without(_allocated(), before):
        first, last = -(-start // PAGE) * PAGE, end // PAGE * PAGE
        if first < last:
            _advise(first, last - first)


def _allocated() -> list[tuple[int, int]]:
    """Address ranges of memory that is backed by no file, ascending; none where there is no such list."""
    if sys.platform != "linux" or not _MAPS.is_file():
        return []
    return [(int(start, 16), int(end, 16)) for start, end in _ANONYMOUS.findall(_MAPS.read_text())]


def _without(ranges: list[tuple[int, int]], before: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of ascending ranges that lie in none of the ranges before."""
    for start, end in ranges:
        for old_start, old_end in before:
            if old_end <= start or old_start >= end:
                continue
            if start < old_start:
                yield start, old_start
            start = max(start, old_end)
        if start < end:
            yield start, end


def _advise(start: int, length: int) -> None:
    """Ask the kernel to put a range onto large pages; where it does not, the range stays as it is."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for advice in (_HUGEPAGE, _COLLAPSE):
        madvise(start, length, advice)
