"""The page of the quantization study, written from its rows: what each format and method leaves, and at how many bits a weight.

`<out>/notes.md`, where there is one, is taken over into the page: words that no program can write, safe from the next run.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.study import Row, markdown_table, save_plot, write_study_page


def write_page(calibrated: Sequence[Row], trained: Sequence[Row], graphs: Row | None, out: Path, command: str) -> Path:
    """Write `<out>.md` and the plot in `<out>/`.

    Args:
        calibrated: Students before training.
        trained: Students after training.
        graphs: Figures of graphs, under `graphs`.
        out: Folder of rows and the plot; the page lies beside it.
        command: What made it.

    Returns:
        The page's path.
    """
    parts = [
        "## Before any training\n",
        _method(calibrated),
        _plot(calibrated, out),
        *(_table(format, calibrated) for format in dict.fromkeys(row["format"] for row in calibrated)),
        _trained(trained, calibrated),
        _graphs(graphs),
    ]
    every = [*calibrated, *trained, *([graphs] if graphs else [])]
    return write_study_page(out, "What does quantization leave?", command, parts, every)


def _method(rows: Sequence[Row]) -> str:
    made = rows[0]["settings"]
    return (
        f"`{made['model']}` with the projections of its decoder layers quantized, calibrated on {made['samples']} of its own answers to "
        "instructions, and judged, in float32, on its own answers to the questions of MT-Bench, one batch of eight in "
        f"{made['judged_every']}: KL(unquantized || quantized) in nats per answer token, share of tokens with the same most probable "
        "token, perplexity of the answers.  Bits are those of a stored weight with its share of the scales of its group.\n\n"
        "| word | what |\n|---|---|\n"
        "| nearest, gptq, quantease | how weights are rounded: each to nearest, or layer after layer so that what follows is disturbed least |\n"
        "| max, mse, percentile | scales: no value is clipped; least squared error of weights and inputs; 99.99 % of the inputs fit |\n"
        "| smoothed where it helps | channels are scaled before rounding, folded into the layer before |\n"
        "| sensitive | tokens count by what the predictions owe to them |\n"
        "| compensating | each layer compensates for the rounding errors of earlier ones |\n"
        "| cache | only keys and values are rounded, weights keep 16 bits |\n"
        "| head | only the output head is rounded, with a weight of its own |\n\n"
        "ModelOpt and torchao quantize the same layers by their presets, their INT4 in groups of the same size; the scales that ModelOpt's AWQ "
        "puts on inputs stay multiplications at inference.  Graphs of ONNX Runtime GenAI's builder are measured by "
        "`python -m benchmarks.onnx_decode`.\n\n"
        "The packaged weights of SmolLM2-135M were rounded to 4 bits in blocks of 32 once before, so figures of INT4 do not carry "
        "over to other models.\n"
    )


def _trained(rows: Sequence[Row], calibrated: Sequence[Row]) -> str:
    """What each way to train gives back, of what calibration alone has lost."""
    if not rows:
        return ""
    lines = []
    for row in rows:
        start = next(
            each
            for each in calibrated
            if row["format"] == each["format"] and row["arm"].startswith(f"{each['arm']}, {row['way']}")
        )
        lines.append(
            [
                f"`{row['format']}`",
                row["way"],
                f"{start['kl']:.4f}",
                f"{row['kl']:.4f}",
                f"{1 - row['kl'] / start['kl']:.0%}",
                f"{row['top1_agreement']:.3f}",
                f"{row['perplexity']:.3f}",
                f"{row['seconds']:.0f}",
            ]
        )
    text = (
        "## After training\n\n"
        f"From the best calibrated student of a format, {rows[0]['steps']} steps of eight instructions that calibration has not seen, the "
        "same in all ways.  QAT alone learns from the unquantized model's answers as if they were gold, distillation from its probabilities; "
        "on policy, the quantized student answers for itself.  Calibrated on all: it starts from a calibration that has seen training's "
        "conversations, too.  Recovered: share of the KL that is gone.\n\n"
    )
    header = ["format", "way", "KL before", "KL", "recovered", "agreement", "perplexity", "seconds"]
    return text + markdown_table(header, lines, text_columns=2)


def _graphs(row: Row | None) -> str:
    if row is None:
        return ""
    lines = [
        [
            f"`{each['format']}`",
            f"{each['megabytes']:.0f}",
            _speed(each, "tokens_per_second", "decode", ".0f"),
            _speed(each, "first_token_ms", "prefill", ".0f"),
        ]
        for each in row["graphs"]
    ]
    text = (
        "## Size and speed\n\n"
        "`cpu.onnx` of each format (FP8: `model.onnx`, as CPUs have no products for it) with two threads, in turns: tokens per second "
        f"behind 128 tokens, and time to the first token behind 512; medians of {row['settings']['repetitions']} repetitions, in "
        "brackets the largest over the smallest time.\n\n"
    )
    return text + markdown_table(["format", "MB", "tokens/s", "first token, ms"], lines)


def _speed(row: Row, figure: str, spread: str, digits: str) -> str:
    if figure not in row:
        return "-"
    return f"{row[figure]:{digits}} ({row[spread]['max_s'] / row[spread]['min_s']:.2f})"


def _table(format: str, rows: Sequence[Row]) -> str:
    found = sorted((row for row in rows if row["format"] == format), key=lambda row: row["kl"])
    lines = [
        [
            row["arm"],
            f"{row['kl']:.4f}",
            f"{row['top1_agreement']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{row['seconds']:.0f}",
        ]
        for row in found
    ]
    title = f"### `{format}`: {found[0]['bits']:.4g} bits a weight\n"
    return f"{title}\n" + markdown_table(["student", "KL", "agreement", "perplexity", "seconds"], lines)


def _plot(rows: Sequence[Row], out: Path) -> str:
    """KL over bits a weight: a mark for every student, one kind for each way; presets of one package are one way."""
    ways = dict.fromkeys(_way(row) for row in rows)
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    for number, way in enumerate(ways):
        marked = [row for row in rows if _way(row) == way]
        shift = 0.01 * (number - (len(ways) - 1) / 2)  # formats of the same size would hide each other
        axis.scatter(
            [row["bits"] + shift for row in marked],
            [row["kl"] for row in marked],
            marker="os^Dv"[number // 10],
            color=f"C{number % 10}",
            label=way,
        )
    axis.set(xlabel="bits a weight", ylabel="KL, nats per answer token", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    save_plot(figure, out / "bits.png")
    return f"![KL over bits a weight]({out.name}/bits.png)\n"


def _way(row: Row) -> str:
    package: str | None = row["settings"].get("package")
    return package or row["arm"]
