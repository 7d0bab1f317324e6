"""The page of the ranking study, written from its rows: what every student loses against its teacher, and how sure that is.

`<out>/notes.md`, where there is one, is taken over into the page: words that no program can write, safe from the next run.
"""

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

from benchmarks.distillation.page import T_QUANTILES
from benchmarks.study import Row, cell, markdown_table, mean_and_deviation, plot_dots, save_plot, write_study_page

FIGURES = {"auroc": "AUROC", "user_auroc": "AUROC per member", "log_loss": "log loss", "ece": "calibration error"}
ARMS = {
    "before": "as it is cut",
    "labels": "labels alone",
    "distilled": "distilled",
    "distilled_fp8": "distilled, FP8",
}
_HALF = 0.5  # of what labels alone lose, at most, is what distillation should lose


def write_page(rows: Sequence[Row], out: Path, command: str) -> Path:
    """Write `<out>.md` and a plot in `<out>/`.

    Args:
        rows: Of `benchmarks/ranking/study.py`; the first is the teacher's.
        out: Folder of rows and plot; the page lies beside it.
        command: What made it.

    Returns:
        The page's path.
    """
    parts = [
        _setting(rows),
        _table(rows),
        _verdicts(rows),
        _plot(rows, out),
    ]
    return write_study_page(out, "What does a small ranker lose?", command, parts, rows)


def _setting(rows: Sequence[Row]) -> str:
    data = rows[0]["settings"]["data"]
    steps = sorted({row["steps"] for row in rows if "steps" in row})
    return (
        f"MovieLens 100K, split by time; a prompt has a member's profile and {data['history']} latest ratings.  The teacher was fine-tuned on "
        f"the labels; every student learns for {' or '.join(map(str, steps)) or 'no'} steps of {data['batch_size']} pairs.  Figures are "
        "mean ± standard deviation over seeds on the test split.  *Lost* is the teacher's AUROC less the student's, in hundredths, with the "
        "mean ends of 95 % bootstrap intervals over members.  *Time* is that of a prefill in torch on the CPU over the teacher's.\n"
    )


def _table(rows: Sequence[Row]) -> str:
    teacher = rows[0]
    header = ["", "training", "million parameters", "time", *FIGURES.values(), "AUROC lost"]
    lines = [_line("teacher", "labels", teacher, [teacher], "")]
    for name in dict.fromkeys(row["student"] for row in rows[1:]):
        before = _of(rows, name, "before")
        for arm, title in ARMS.items():
            found = _of(rows, name, arm)
            if found:
                lines.append(_line(name, title, before[0], found, _lost(found)))
    return markdown_table(header, lines, text_columns=2)


def _line(name: str, title: str, sizes: Row, rows: Sequence[Row], lost: str) -> list[str]:
    figures = [cell([row[figure] for row in rows], 4) for figure in FIGURES]
    return [name, title, f"{sizes['parameters'] / 1e6:.1f}", f"{sizes['time']:.2f}", *figures, lost]


def _lost(rows: Sequence[Row]) -> str:
    """Mean and mean interval of the teacher's AUROC less the student's, in hundredths; few members have no interval."""
    mean = f"{-100 * fmean(row['auroc_difference'] for row in rows):.2f}"
    if any("auroc_difference_low" not in row for row in rows):
        return mean
    low, high = (-100 * fmean(row[f"auroc_difference_{end}"] for row in rows) for end in ("high", "low"))
    return f"{mean} ({low:.2f} to {high:.2f})"


def _verdicts(rows: Sequence[Row]) -> str:
    """Whether distillation loses at most half of what labels alone lose, student by student."""
    lines = []
    for name in dict.fromkeys(row["student"] for row in rows[1:]):
        arms = [
            {row["seed"]: -row["auroc_difference"] for row in _of(rows, name, arm)} for arm in ("labels", "distilled")
        ]
        seeds = sorted(arms[0].keys() & arms[1].keys())
        if seeds:
            labels, distilled = ([lost[seed] for seed in seeds] for lost in arms)
            lines.append([name, *_verdict(labels, distilled)])
    if not lines:
        return ""
    header = ["", "distilled less half of labels alone, hundredths of AUROC (95 % interval)", "at most half is lost"]
    return (
        markdown_table(header, lines)
        + "\nDifferences are taken seed by seed; the interval is Student's t over seeds.\n"
    )


def _verdict(labels: Sequence[float], distilled: Sequence[float]) -> tuple[str, str]:
    mean, deviation = mean_and_deviation([100 * (d - _HALF * one) for one, d in zip(labels, distilled, strict=True)])
    if len(labels) < 2:
        return f"{mean:+.2f}", "open: one seed"
    half = T_QUANTILES.get(len(labels) - 1, 2.26) * deviation / sqrt(len(labels))
    answer = "open" if abs(mean) <= half else "yes" if mean < 0 else "**no**"
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})", answer


def _plot(rows: Sequence[Row], out: Path) -> str:
    names = list(dict.fromkeys(row["student"] for row in rows[1:]))
    series = {
        title: {name: [row["auroc"] for row in _of(rows, name, arm)] for name in names} for arm, title in ARMS.items()
    }
    figure, axis = plt.subplots(figsize=(8, 1.6 + len(names)), layout="constrained")
    plot_dots(axis, {title: values for title, values in series.items() if any(values.values())}, "AUROC")
    axis.axvline(rows[0]["auroc"], color="black", linewidth=1, label="teacher")
    axis.legend(fontsize="small")
    save_plot(figure, out / "auroc.png")
    return f"![AUROC of every student]({out.name}/auroc.png)\n\nDots are seeds, diamonds their mean with its standard deviation.\n"


def _of(rows: Sequence[Row], name: str, arm: str) -> list[Row]:
    return sorted(
        (row for row in rows if (row["student"], row["arm"]) == (name, arm)), key=lambda row: row.get("seed", 0)
    )
