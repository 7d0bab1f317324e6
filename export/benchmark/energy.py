"""Energy from the counters that a machine exposes: RAPL of the CPU packages, NVML of NVIDIA GPUs.

They count for the whole machine, so other programs' work is in the figures, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """A counter of joules.

    Attributes:
        name: Such as `intel-rapl:0` or `nvidia:0`.
        read: Joules since some moment.
        wraps_at: Joules at which it starts again at 0; None: never.
    """

    name: str
    read: Callable[[], float]
    wraps_at: float | None = None


def find_counters(powercap: Path = POWERCAP) -> tuple[list[Counter], str | None]:
    """All counters that can be read here; if there are none, the reason."""
    packages, unreadable = [], []
    for energy in sorted(powercap.glob("intel-rapl:*/energy_uj")):
        if energy.parent.name.count(":") > 1:
            continue  # a part of a package, which counts it already
        try:
            packages.append(_rapl(energy))
        except PermissionError:
            unreadable.append(energy)
    counters = packages + _nvml()
    if counters:
        return counters, None
    if unreadable:
        return [], f"{unreadable[0]} is there but may not be read by this user"
    return [], f"this machine shows no counter (no {powercap}/intel-rapl:*/energy_uj, no NVML)"


class Meter:
    """Joules that all counters together have counted since the last look."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters = counters
        self._last = [counter.read() for counter in counters]

    def joules(self) -> float | None:
        """Since the last call or the start; None without counters."""
        if not self._counters:
            return None
        now = [counter.read() for counter in self._counters]
        steps = [
            new - old if new >= old or counter.wraps_at is None else new - old + counter.wraps_at
            for counter, old, new in zip(self._counters, self._last, now, strict=True)
        ]
        self._last = now
        return sum(steps)


def _rapl(energy: Path) -> Counter:
    def joules(path: Path) -> float:
        return int(path.read_text()) / 1e6

    joules(energy)  # raises here if it may not be read
    return Counter(energy.parent.name, lambda: joules(energy), joules(energy.with_name("max_energy_range_uj")))


def _nvml() -> list[Counter]:
    """Counters of the GPUs, if NVIDIA's Python package, the driver and such a counter are there."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return []
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        for handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return []

    def reader(handle: object) -> Callable[[], float]:
        return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3  # it counts millijoules

    return [Counter(f"nvidia:{index}", reader(handle)) for index, handle in enumerate(handles)]
