"""The page of the pruning study, written from its rows: what each score leaves, how fast the students are, and what recovery regains.

`<out>/notes.md`, where there is one, is taken over into the page: words that no program can write, safe from the next run.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.pruning.arms import ARMS, CUTS
from benchmarks.pruning.recovery_page import recovery_section
from benchmarks.study import Row, markdown_table, save_plot, write_study_page

NEURONS = {"mlp 25 %": 25.0, "mlp 37.5 %": 37.5, "mlp 50 %": 50.0}  # cut -> share of the neurons


def write_page(rows: Sequence[Row], out: Path, command: str) -> Path:
    """Write `<out>.md` and the plots in `<out>/`.

    Args:
        rows: Of students (`arm`) and of their speed (`speed_of`).
        out: Folder of rows and plots; the page lies beside it.
        command: What made it.

    Returns:
        The page's path.
    """
    students = [row for row in rows if "arm" in row]
    timed = [row for row in rows if "speed_of" in row]
    parts = [
        "## Before any training\n",
        _method(students),
        *(_table(cut, students) for cut in CUTS),
        _curves(students, out),
        "## Speed\n",
        _speed(timed),
        recovery_section(out),
    ]
    return write_study_page(out, "What does pruning leave?", command, parts, rows)


def _method(students: Sequence[Row]) -> str:
    return (
        f"Students of `{students[0]['settings']['model']}`, cut on 128 of its own answers to instructions, judged on its own answers to the "
        "80 questions of MT-Bench: KL(dense || student) in nats per answer token, share of tokens with the same most probable "
        "token, perplexity of the answers.  Uniform: all layers keep as many units; per_layer: units go where they cost least.  "
        "Torch-Pruning chooses the same number of units, which are then cut by the same surgery.  Seconds are those of ranking, cutting "
        "and repairing.\n"
    )


def _table(cut: str, students: Sequence[Row]) -> str:
    order = [arm.name for arm in ARMS[cut]]
    found = sorted((row for row in students if row["cut"] == cut), key=lambda row: row["kl"])
    if not found:
        return ""
    lines = [
        [
            row["arm"],
            f"{row['kl']:.3f}",
            f"{row['top1_agreement']:.3f}",
            f"{row['perplexity']:.3g}",
            f"{row['seconds']:.0f}",
        ]
        for row in found
        if row["arm"] in order
    ]
    title = f"### {cut[0].upper()}{cut[1:]}: {found[0]['parameters'] / 1e6:.1f} million parameters\n"
    return f"{title}\n" + markdown_table(["student", "KL", "agreement", "perplexity", "seconds"], lines)


def _curves(students: Sequence[Row], out: Path) -> str:
    """KL over the share of neurons removed, one line for each way that has all shares."""
    lines = {
        arm.name: [row["kl"] for cut in NEURONS for row in students if (row["cut"], row["arm"]) == (cut, arm.name)]
        for arm in ARMS["mlp 25 %"]
    }
    lines = {name: kls for name, kls in lines.items() if len(kls) == len(NEURONS)}
    if not lines:
        return ""
    figure, axis = plt.subplots(figsize=(8, 6), layout="constrained")
    for number, (name, kls) in enumerate(sorted(lines.items(), key=lambda line: -line[1][-1])):
        axis.plot(list(NEURONS.values()), kls, marker="os^Dv"[number // 10], color=f"C{number % 10}", label=name)
    axis.set(xlabel="MLP neurons removed, %", ylabel="KL, nats per answer token", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    save_plot(figure, out / "neurons.png")
    return f"![KL over the share of neurons removed]({out.name}/neurons.png)\n"


def _speed(timed: Sequence[Row]) -> str:
    if not timed:
        return ""
    lines = [
        [
            row["speed_of"] + (", per_layer" if row["unequal_layers"] else ""),
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['gflops']:.1f}",
            *(
                f"{row[name]:.2f} ({row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f})"
                for name in ("torch", "onnxruntime")
            ),
        ]
        for row in sorted(timed, key=lambda row: -row["parameters"])
    ]
    made = timed[0]["settings"]
    return (
        f"Time of a prefill of {made['batch']} x {made['length']} tokens with logits at all positions, float32, over the dense model's: the "
        f"median (and the middle half) of {made['repetitions']} pairs of runs in turns.\n\n"
        + markdown_table(["student", "million parameters", "GFLOP", "torch", "ONNX Runtime"], lines)
    )
