"""The page of the distillation study, written from its rows: what the papers expect against what came out, tables and plots.

`<out>/notes.md`, where there is one, is taken over into the page: words that no program can write, safe from the next run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

from benchmarks.judge import OWN_STRIDE
from benchmarks.study import Row, cell, markdown_table, mean_and_deviation, plot_dots, save_plot, write_text

Values = dict[str, dict[str, list[float]]]  # arm -> metric -> one value per seed, in the seeds' order

METRICS = {  # name in the rows -> title
    "task_score": "exact match",
    "own_kl": "KL, own answers",
    "own_reverse_kl": "reverse KL, own answers",
    "kl": "KL, gold answers",
    "top1_agreement": "top-1 agreement",
    "perplexity": "perplexity, gold answers",
}
# Student's t at 97.5 % by degrees of freedom, so that a mean over seeds has a 95 % interval.
T_QUANTILES = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


@dataclass(frozen=True)
class Expectation:
    """What a paper leads one to expect: that `arm` beats `other` in a metric.

    Args:
        arm: The one that should be better.
        other: What it is compared with.
        metric: Name in the rows.
        source: Who says so; with `open`, who says that it depends.
        open: No side is expected to be better.
    """

    arm: str
    other: str
    metric: str
    source: str
    open: bool = False


EXPECTATIONS = (
    Expectation("stage1", "sft", "task_score", "Hinton, 1503.02531: soft targets say more than labels"),
    Expectation("on_policy", "stage1", "own_kl", "GKD, 2306.13649: it trains on what the student does"),
    Expectation("on_policy", "stage1", "task_score", "GKD, 2306.13649"),
    Expectation("two_stage", "stage1", "own_kl", "2502.14305: two stages beat one"),
    Expectation("two_stage", "stage1", "task_score", "2502.14305: two stages beat one"),
    Expectation("two_stage", "on_policy", "task_score", "2502.14305: two stages beat one"),
    Expectation("two_stage_reverse_kl", "two_stage", "task_score", "MiniLLM, 2306.08543: reverse KL suits generation"),
    Expectation("two_stage_reverse_kl", "two_stage", "own_reverse_kl", "MiniLLM, 2306.08543: it is what is trained"),
    Expectation("two_stage_jsd", "two_stage", "task_score", "GKD, 2306.13649: depends on the task", open=True),
)
TIME_NOTE = """\
The steps of each arm were set in advance from the wall-clock seconds per step of the first seed, so that it trains about as long as
`two_stage` does for its steps, and its learning rate falls to 0 just then.  The last column is the time that it took in fact;
evaluation is not in it.  Two-stage rows are those of the table above: the divergence hardly changes what a step costs.
"""
HIGHER_IS_BETTER = ("task_score", "top1_agreement")


def write_page(rows: Sequence[Row], titles: Mapping[str, str], out: Path, command: str) -> Path:
    """Write `<out>.md` and the plots in `<out>/`.

    Args:
        rows: The teacher's, the untrained student's, and those of all runs.
        titles: What each arm is, in the order of the tables.
        out: Folder of rows and plots; the page lies beside it.
        command: What made it.

    Returns:
        The page's path.
    """
    runs = [row for row in rows if "budget" in row]
    budgets = {"steps": [row for row in runs if row["budget"] == "steps"]}
    if any(row["budget"] == "time" for row in runs):
        in_time = {row["name"] for row in runs if row["budget"] == "time"}
        budgets["time"] = [row for row in runs if row["budget"] == "time" or row["name"] not in in_time]
    values = {budget: _values(of_budget, titles) for budget, of_budget in budgets.items()}
    _plot_figures(values, rows, out / "figures.png")
    _plot_curves(rows, titles, out / "curves.png")
    notes = out / "notes.md"
    parts = [
        "# Which distillation?\n",
        _setting(rows, titles, command),
        notes.read_text(encoding="utf-8") if notes.is_file() else "",
        "## What the papers expect, and what came out\n",
        _expectations(values),
        "## Equal optimizer steps\n",
        _table(values["steps"], rows),
    ]
    if "time" in values:
        parts += ["## Equal wall-clock\n", TIME_NOTE, _table(values["time"], rows)]
    parts += ["## Plots\n", _plots(out), "## How it was measured\n", _method(rows)]
    page = out.with_suffix(".md")
    write_text(page, "\n".join(part for part in parts if part))
    return page


def _values(rows: Sequence[Row], arms: Mapping[str, str]) -> Values:
    metrics = (*METRICS, "steps", "seconds", "cpu_seconds")
    of_arm = {arm: sorted((row for row in rows if row["name"] == arm), key=lambda row: row["seed"]) for arm in arms}
    return {arm: {name: [row[name] for row in found] for name in metrics} for arm, found in of_arm.items() if found}


def _setting(rows: Sequence[Row], titles: Mapping[str, str], command: str) -> str:
    runs = [row for row in rows if "budget" in row]
    seeds = sorted({row["seed"] for row in runs})
    steps = next(row["steps"] for row in runs if row["budget"] == "steps")
    data = runs[0]["settings"]["data"]
    arms = "\n".join(f"- `{arm}`: {title}" for arm, title in titles.items())
    return (
        f"The student has every second layer of the fine-tuned teacher.  It trains for {steps} steps of "
        f"{data['batch_size']} samples on {', '.join(data['tasks'])}, with {len(seeds)} seeds, in one of these ways:\n\n"
        f"{arms}\n\nEverything on this page but the notes is written by\n\n```bash\n{command}\n```\n\n"
        f"Figures are mean ± standard deviation over the seeds {', '.join(map(str, seeds))}, on {data['test_size']} held-out "
        "questions; divergences are in nats per answer token.\n"
    )


def _expectations(values: Mapping[str, Values]) -> str:
    lines = []
    for budget, arms in values.items():
        for expected in EXPECTATIONS:
            both_two_stage = expected.arm.startswith("two_stage") and expected.other.startswith("two_stage")
            if {expected.arm, expected.other} <= arms.keys() and not (budget == "time" and both_two_stage):
                ours, theirs = arms[expected.arm][expected.metric], arms[expected.other][expected.metric]
                lines.append(
                    [
                        f"{METRICS[expected.metric]}: {expected.arm} against {expected.other}",
                        f"equal {budget}",
                        expected.source,
                        *verdict(expected, ours, theirs),
                    ]
                )
    header = ["comparison", "at", "expected by", "difference (95 % interval)", "verdict"]
    table = markdown_table(header, lines, text_columns=3)
    return table + (
        "\nDifferences are taken seed by seed: both sides see the same batches in the same order.  The interval is Student's t over "
        "seeds; where it includes 0 the verdict is open.\n"
    )


def verdict(expected: Expectation, ours: Sequence[float], theirs: Sequence[float]) -> tuple[str, str]:
    """The paired difference with its interval, and whether it is as expected."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, deviation = mean_and_deviation(differences)
    if len(differences) < 2:
        return f"{mean:+.3f}", "open: one seed"
    half = T_QUANTILES.get(len(differences) - 1, 2.26) * deviation / sqrt(len(differences))
    shown = f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"
    if abs(mean) <= half:
        return shown, "open"
    better = (mean > 0) == (expected.metric in HIGHER_IS_BETTER)
    if expected.open:
        return shown, "better" if better else "worse"
    return shown, "as expected" if better else "**contradicts**"


def _table(values: Values, rows: Sequence[Row]) -> str:
    header = ["", *METRICS.values(), "steps", "training seconds"]
    lines = []
    for name, row in ((row["name"], row) for row in rows if "budget" not in row):
        lines.append([name, *[f"{row[metric]:.3f}" for metric in METRICS], "", ""])
    for arm, of_arm in values.items():
        figures = [cell(of_arm[metric], 3) for metric in METRICS]
        lines.append([arm, *figures, f"{of_arm['steps'][0]:.0f}", cell(of_arm["seconds"], 1)])
    return markdown_table(header, lines)


def _plots(out: Path) -> str:
    return (
        f"![Figures of every arm]({out.name}/figures.png)\n\nDots are seeds, diamonds their mean with its standard deviation.\n\n"
        f"![Learning curves]({out.name}/curves.png)\n\nKL to the teacher on gold answers of validation questions over seconds of "
        "training, at equal steps; thin lines are seeds.\n"
    )


def _method(rows: Sequence[Row]) -> str:
    machines = sorted({", ".join(f"{key} {value}" for key, value in row["machine"].items()) for row in rows})
    size = rows[0]["settings"]["data"]["test_size"]
    return (
        "- Training goes through the real modules and `lightning.Trainer`; optimizer, precision, data and warm-up are the recipe's, "
        "all arms start from the same student and share one learning rate.\n"
        "- A seed decides the order of the training questions and what the student samples; questions, held-out questions and "
        "the student's start are the same for all, so the spread does not contain their chance.  With "
        f"{size} questions an exact match alone is uncertain by up to ±{0.5 / sqrt(size):.3f} (one standard error).\n"
        "- KL is KL(teacher || student), reverse KL is KL(student || teacher).  Own answers are sampled at temperature 1, with the same "
        f"random numbers for all students, to every {OWN_STRIDE}nd question; exact match is that of greedy answers.\n"
        "- Seconds are wall-clock seconds of training alone; each row also has the CPU seconds of all threads.\n"
        + "".join(f"- Machine: {line}.\n" for line in machines)
    )


def _plot_figures(values: Mapping[str, Values], rows: Sequence[Row], path: Path) -> None:
    metrics = ("task_score", "own_kl", "kl")
    arms = list(values["steps"])
    figure, axes = plt.subplots(1, 3, figsize=(13, 0.5 * len(arms) + 1.6), sharey=True, layout="constrained")
    for axis, metric in zip(axes, metrics, strict=True):
        series = {f"equal {budget}": {arm: of[arm][metric] for arm in arms} for budget, of in values.items()}
        plot_dots(axis, series, METRICS[metric])
        for row in rows:
            if row["name"] == "teacher" and metric == "task_score":
                axis.axvline(row[metric], color="grey", linestyle=":", label="teacher")
    axes[0].legend()
    save_plot(figure, path)


def _plot_curves(rows: Sequence[Row], arms: Mapping[str, str], path: Path) -> None:
    start = [{"seconds": 0.0, "val_kl": row["val_kl"]} for row in rows if row["name"] == "untrained"]
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, arm in enumerate(arms):
        curves = [start + row["curve"] for row in rows if row["name"] == arm and row["budget"] == "steps"]
        for curve in curves:
            axis.plot(*_points(curve), color=f"C{number}", alpha=0.25, linewidth=0.8)
        mean = [{key: fmean(p[key] for p in at) for key in start[0]} for at in zip(*curves, strict=True)]
        axis.plot(*_points(mean), color=f"C{number}", marker="o", markersize=3, label=arm)
    axis.set(xlabel="seconds of training", ylabel="KL on gold answers, nats per token", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    save_plot(figure, path)


def _points(curve: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    return [point["seconds"] for point in curve], [point["val_kl"] for point in curve]
