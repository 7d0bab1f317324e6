"""The section on recovery by distillation of the pruning study's page, from the rows of `benchmarks/pruning/recovery.py`."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.distillation.page import METRICS, Expectation, verdict
from benchmarks.pruning.recovery import ARMS
from benchmarks.study import Row, Rows, cell, markdown_table, plot_dots, save_plot

SHOWN = ("kl", "top1_agreement", "own_kl", "task_score")
EXPECTATIONS = (
    *(
        Expectation("gradual", "one_shot", metric, "A gradual cut recovers better")
        for metric in ("kl", "own_kl", "task_score")
    ),
    *(
        Expectation("gradual_on_policy", "one_shot_on_policy", metric, "the same on its own answers")
        for metric in ("kl", "own_kl", "task_score")
    ),
    Expectation("gradual_on_policy", "gradual", "own_kl", "GKD, 2306.13649: it trains on what the student does"),
    Expectation("gradual_on_policy", "gradual", "task_score", "GKD, 2306.13649"),
)


def recovery_section(out: Path) -> str:
    """Text with tables, and a plot in the folder; nothing where no run has finished.

    Args:
        out: Folder of the pruning study; the rows are in its recovery.jsonl.
    """
    rows = [row for _, row in sorted(Rows(out / "recovery.jsonl").all().items())]
    runs = [row for row in rows if "history" in row]
    if not runs:
        return ""
    _plot(runs, out / "recovery.png")
    return "\n".join(
        [
            "## Recovery by distillation\n",
            _setting(runs),
            _table(rows, runs),
            _expectations(runs),
            f"![Figures of every run]({out.name}/recovery.png)\n\nDots are seeds, diamonds their mean with its standard deviation.\n",
        ]
    )


def _setting(runs: Sequence[Row]) -> str:
    first = runs[0]
    data, seeds = first["settings"]["data"], sorted({row["seed"] for row in runs})
    arms = "\n".join(f"- `{name}`: {arm.title}" for name, arm in ARMS.items())
    return (
        f"`python -m benchmarks.pruning.recovery` distils the studies' teacher into a copy of itself that loses "
        f"{first['settings']['mlp_sparsity']:.1%} of its MLP neurons and {first['settings']['kv_group_sparsity']:.1%} of its key/value groups, "
        f"by OSSCAR with sequential repair, equal layers; {first['steps']} steps of {data['batch_size']} samples, seeds "
        f"{', '.join(map(str, seeds))}:\n\n{arms}\n\nThe arms of a seed see the same questions in the same order, so `one_shot` and `gradual` see "
        f"the same tokens.  Figures are mean ± standard deviation over seeds on {data['test_size']} held-out questions; divergences in nats "
        "per answer token.  The first column is the KL on a few training batches right after the last repair.\n"
    )


def _table(rows: Sequence[Row], runs: Sequence[Row]) -> str:
    lines = [
        ["teacher", "", *[f"{row[name]:.3f}" for name in SHOWN], ""] for row in rows if row.get("name") == "teacher"
    ]
    for arm in ARMS:
        of_arm = _of(runs, arm)
        if of_arm:
            cut = [_after_last_event(row) for row in of_arm]
            figures = [cell([row[name] for row in of_arm], 3) for name in SHOWN]
            lines.append([arm, cell(cut, 3), *figures, cell([row["seconds"] for row in of_arm], 0)])
    return markdown_table(["", "KL after the last cut", *(METRICS[name] for name in SHOWN), "training seconds"], lines)


def _expectations(runs: Sequence[Row]) -> str:
    lines = []
    for expected in EXPECTATIONS:
        ours, theirs = ([row[expected.metric] for row in _of(runs, arm)] for arm in (expected.arm, expected.other))
        if ours and len(ours) == len(theirs):
            name = f"{METRICS[expected.metric]}: {expected.arm} against {expected.other}"
            lines.append([name, expected.source, *verdict(expected, ours, theirs)])
    if not lines:
        return ""
    return markdown_table(
        ["comparison", "expectation", "difference (95 % interval)", "verdict"], lines, text_columns=2
    ) + (
        "\nDifferences are taken seed by seed; the interval is Student's t over seeds; where it includes 0 the verdict is open.\n"
    )


def _plot(runs: Sequence[Row], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), sharey=True, layout="constrained")
    for axis, metric in zip(axes, ("kl", "own_kl", "task_score"), strict=True):
        plot_dots(axis, {"": {arm: [row[metric] for row in _of(runs, arm)] for arm in ARMS}}, METRICS[metric])
    save_plot(figure, path)


def _of(runs: Sequence[Row], arm: str) -> list[Row]:
    return sorted((row for row in runs if row["name"] == arm), key=lambda row: row["seed"])


def _after_last_event(row: Row) -> float:
    last = row["history"][-1]
    return min(value for key, value in last.items() if key in ("kl_after_cut", "kl_after_repair"))
