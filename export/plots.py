"""The report's pictures: training over steps, size and speed before and after."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

History = dict[str, list[tuple[int, float]]]


def plot_training(
    history: History, phases: list[dict[str, Any]], pruning: list[dict[str, Any]], folder: Path
) -> list[Path]:
    """Loss, KL and size of the student over optimizer steps, with pruning events and the ends of the phases marked."""
    losses = {name: points for name, points in history.items() if name in ("train/loss", "val/kl")}
    if not losses:
        return []
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for name, points in losses.items():
        above.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 20 else None, markersize=3)
    judged = [phase for phase in phases if "kl" in phase]
    if judged:
        above.scatter(
            [phase["step"] for phase in judged],
            [phase["kl"] for phase in judged],
            label="KL on held-out answers",
            color="black",
            zorder=3,
        )
    _plot_events(above, pruning)
    above.set(ylabel="nats per token", yscale="log")
    above.legend()
    _plot_size(below, history, phases)
    return [_save(figure, folder / "training.png")]


def _plot_events(axes: Axes, pruning: list[dict[str, Any]]) -> None:
    """How far each cut throws the student back, and what its repair recovers."""
    for moment, marker, color in (("cut", "^", "tab:red"), ("repair", "v", "tab:green")):
        for measure, name in (("kl", "KL"), ("loss", "loss")):
            key = f"{measure}_after_{moment}"
            events = [event for event in pruning if key in event]
            if events:
                axes.scatter(
                    [event["step"] for event in events],
                    [event[key] for event in events],
                    label=f"{name} after a {moment}",
                    marker=marker,
                    color=color,
                    s=20,
                    zorder=2.5,
                )


def _plot_size(axes: Axes, history: History, phases: list[dict[str, Any]]) -> None:
    """Parameters (a staircase) and where the precision changes."""
    points = history.get("pruning/parameters", [])
    if points:
        steps, sizes = zip(*points, strict=True)
        axes.step(steps, [size / 1e6 for size in sizes], where="post", label="parameters")
    for previous, phase in zip([None, *phases], phases, strict=False):
        if phase["name"] == "quantized" and previous:
            axes.axvspan(previous["step"], phase["step"], alpha=0.15, label="FP8 fake quantization")
        axes.axvline(phase["step"], color="grey", linestyle=":", linewidth=1)
        axes.annotate(phase["name"], (phase["step"], 0.02), xycoords=("data", "axes fraction"), rotation=90, ha="right")
    axes.set(xlabel="optimizer step", ylabel="million parameters", ylim=(0, None))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left")


def plot_artefacts(report: dict[str, Any], folder: Path) -> list[Path]:
    """Size of every artefact, and tokens per second and time to first token of every benchmarked graph."""
    artefacts, benchmark = report.get("artefacts", []), report.get("benchmark", [])
    if not artefacts:
        return []
    heights = [len(artefacts), len(benchmark), len(benchmark)] if benchmark else [len(artefacts)]
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(8, 0.4 * sum(heights) + 0.8 * len(heights)), height_ratios=heights, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    panels = axes[:, 0]
    _bars(panels[0], [a["kind"].split(" (")[0] for a in artefacts], [a["bytes"] / 1e6 for a in artefacts], "MB")
    if benchmark:
        names = [row["name"] for row in benchmark]
        _bars(panels[1], names, [row["tokens_per_second"] for row in benchmark], "tokens/s in ONNX Runtime")
        first = [row["time_to_first_token_ms"] for row in benchmark]
        _bars(panels[2], names, first, "ms to the first token in ONNX Runtime")
    return [_save(figure, folder / "artefacts.png")]


def _bars(axes: Axes, names: list[str], values: list[float], label: str) -> None:
    bars = axes.barh(names, values)
    axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.set(xlabel=label)
    axes.invert_yaxis()
    axes.margins(x=0.15)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
