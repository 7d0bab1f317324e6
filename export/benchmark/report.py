"""Output of `python -m export.benchmark`: tables on the screen, a picture, and the machine it was measured on."""

import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import psutil
import torch
from matplotlib.axes import Axes

Row = dict[str, Any]
_PACKAGES = ("torch", "transformers", "onnxruntime", "tensorrt", "tensorrt_rtx")


def machine() -> dict[str, Any]:
    """Processor, cores, main memory in bytes, GPU (None without one) and operating system."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
    }


def versions() -> dict[str, str]:
    """Of Python and of the runtimes that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def text(result: dict[str, Any]) -> str:
    """Tables for a terminal: sizes, measurements, and what is missing with its reason."""
    sizes = [[artefact["name"], f"{artefact['bytes'] / 1e6:.1f}"] for artefact in result["artefacts"]]
    measured = [row for row in result["rows"] if "reason" not in row]
    header = ["artefact", "batch", "prompt", "first token (ms)", "ms/token", "tokens/s"]
    header += ["memory (MB)", "GPU (MB)", "J/1,000"]
    lines = _columns([["artefact", "on disk (MB)"], *sizes])
    lines += ["", *_columns([header, *(_cells(row) for row in measured)])]
    settings, computer = result["settings"], result["machine"]
    lines += [
        "",
        f"Medians (smallest to largest) of {settings['repetitions']} repetitions in turns, {settings['new_tokens']} new tokens; "
        "tokens/s over all conversations, after the first token.",
        "Memory is that of the whole process at most, which keeps what earlier measurements took.",
        f"{computer['processor']}, {computer['cores']} cores, threads: {settings['threads'] or 'as each runtime chooses'}; "
        f"{computer['gpu'] or 'no GPU'}; "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items()),
    ]
    missing = result["skipped"] + [
        {"name": f"{row['name']} (batch {row['batch']}, prompt {row['prompt_tokens']})", "reason": row["reason"]}
        for row in result["rows"]
        if "reason" in row
    ]
    if "reason" in result["energy"]:
        missing.append({"name": "energy", "reason": result["energy"]["reason"]})
    return "\n".join(lines + [f"not measured: {row['name']}: {row['reason']}" for row in missing])


def plot(result: dict[str, Any], path: Path) -> None:
    """Time to first token over prompt lengths, time a token and throughput over batch sizes, memory and size."""
    rows = [row for row in result["rows"] if "reason" not in row]
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    smallest, shortest = min(row["batch"] for row in rows), min(row["prompt_tokens"] for row in rows)
    lengths = [row for row in rows if row["batch"] == smallest]
    sizes = [row for row in rows if row["prompt_tokens"] == shortest]
    _lines(axes[0, 0], lengths, "prompt_tokens", "time_to_first_token_ms", "prompt (tokens)", "ms to the first token")
    _lines(axes[0, 1], sizes, "batch", "tokens_per_second", "conversations at a time", "tokens/s")
    _lines(axes[1, 0], sizes, "batch", "time_per_output_token_ms", "conversations at a time", "ms a token")
    _memory(axes[1, 1], result["artefacts"], sizes)
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lines(axes: Axes, rows: Sequence[Row], across: str, value: str, xlabel: str, ylabel: str) -> None:
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        middle = [row[value] for row in own]
        below = [row[value] - row[f"{value}_min"] for row in own]
        above = [row[f"{value}_max"] - row[value] for row in own]
        axes.errorbar([row[across] for row in own], middle, [below, above], marker="o", capsize=3, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None), xticks=sorted({row[across] for row in rows}))


def _memory(axes: Axes, artefacts: Sequence[Row], rows: Sequence[Row]) -> None:
    """Size on disk, and the most memory at the largest batch."""
    largest = {row["name"]: row for row in rows}  # rows come in the order of their batch
    names = [artefact["name"] for artefact in artefacts]
    columns = {"on disk": [artefact["bytes"] for artefact in artefacts]}
    for label, key in (("memory of the process", "peak_bytes"), ("GPU memory", "device_bytes")):
        values = [largest.get(name, {}).get(key) or 0 for name in names]
        if any(values):
            columns[label] = values
    height = 0.8 / len(columns)
    for index, (label, values) in enumerate(columns.items()):
        places = [place + index * height for place in range(len(names))]
        axes.barh(places, [value / 1e6 for value in values], height, label=label)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names, fontsize="small")
    axes.set(xlabel="MB, at the largest batch")
    axes.invert_yaxis()
    axes.legend(fontsize="small")


def _cells(row: Row) -> list[str]:
    energy = row["joules_per_1000_tokens"]
    spread = ("time_to_first_token_ms", "time_per_output_token_ms", "tokens_per_second")
    return [
        *(row["name"], str(row["batch"]), str(row["prompt_tokens"])),
        *(_with_spread(row, key) for key in spread),
        *("-" if row[key] is None else f"{row[key] / 1e6:.0f}" for key in ("peak_bytes", "device_bytes")),
        "-" if energy is None else f"{energy:.1f}",
    ]


def _with_spread(row: Row, name: str) -> str:
    return f"{row[name]:.1f} ({row[f'{name}_min']:.1f} to {row[f'{name}_max']:.1f})"


def _columns(lines: Iterable[Sequence[str]]) -> list[str]:
    """Cells in columns as wide as their widest: the first to the left, numbers to the right."""
    rows = list(lines)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
