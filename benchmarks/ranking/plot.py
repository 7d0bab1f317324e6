"""The curve of the ranking benchmark: seconds over candidates, a line for each way."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.page import Row, save_plot

TITLES = {
    "hot": "prefix hot",
    "cold": "prefix cold",
    "scratch": "from scratch, in batches",
    "loop": "plain loop",
}


def plot_latency(rows: Sequence[Row], path: Path) -> None:
    """Write a picture with the median time of every row and its range; colours are runtimes and markers are ways."""
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    figure, axis = plt.subplots(figsize=(8, 6), layout="constrained")
    for runtime, way in dict.fromkeys((row["runtime"], row["way"]) for row in rows):
        line = sorted(
            (row for row in rows if (row["runtime"], row["way"]) == (runtime, way)), key=lambda row: row["candidates"]
        )
        medians = [row["median_s"] for row in line]
        below = [row["median_s"] - row["min_s"] for row in line]
        above = [row["max_s"] - row["median_s"] for row in line]
        axis.errorbar(
            [row["candidates"] for row in line],
            medians,
            yerr=[below, above],
            marker="osv^"[list(TITLES).index(way)],
            color=f"C{runtimes.index(runtime)}",
            capsize=3,
            label=f"{runtime}: {TITLES[way]}",
        )
    axis.set(xscale="log", yscale="log", xlabel="candidates", ylabel="seconds for all of them")
    numbers = sorted({row["candidates"] for row in rows})
    axis.set_xticks(numbers, [str(number) for number in numbers])
    axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    save_plot(figure, path)
