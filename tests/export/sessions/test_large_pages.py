"""What is allocated meanwhile moves to large pages; addresses and contents stay."""

import ctypes
import mmap
from pathlib import Path

import pytest

from export.sessions.large_pages import PAGE, _without, on_large_pages

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize(
    ("before", "left"),
    [
        ([], [(10, 20), (30, 40)]),
        ([(0, 5), (22, 28)], [(10, 20), (30, 40)]),
        ([(10, 20)], [(30, 40)]),
        ([(8, 12), (18, 33)], [(12, 18), (33, 40)]),
        ([(12, 14), (16, 18), (30, 50)], [(10, 12), (14, 16), (18, 20)]),
    ],
)
def test_only_what_is_new_counts(before: list[tuple[int, int]], left: list[tuple[int, int]]) -> None:
    assert list(_without([(10, 20), (30, 40)], before)) == left


@pytest.mark.skipif(not SWITCH.is_file() or "[never]" in SWITCH.read_text(), reason="the kernel has no large pages")
def test_new_memory_lies_on_large_pages_and_keeps_its_contents() -> None:
    with on_large_pages():
        memory = mmap.mmap(-1, 8 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.write(bytes(range(256)) * (8 * PAGE // 256))
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert memory[:] == bytes(range(256)) * (8 * PAGE // 256)
    assert large_kilobytes_around(address) >= 7 * PAGE // 1024


def large_kilobytes_around(address: int) -> int:
    """What the kernel says of the mapping that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head:
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= address < end
        elif inside and head == "AnonHugePages:":
            return int(line.split()[1])
    return 0


def test_old_memory_stays_where_it_is() -> None:
    memory = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"x" * (4 * PAGE))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    before = large_kilobytes_around(address)
    with on_large_pages():
        pass
    assert large_kilobytes_around(address) == before
