"""The page of the quantization study, written from its rows: what each format and method leaves, and at how many bits a weight.

`<out>/notes.md`, where there is one, is taken over into the page: words that no program can write, safe from the next run.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.study import Row, markdown_table, save_plot, write_study_page


def write_page(rows: Sequence[Row], out: Path, command: str) -> Path:
    """Write `<out>.md` and the plot in `<out>/`.

    Args:
        rows: Students.
        out: Folder of rows and the plot; the page lies beside it.
        command: What made it.

    Returns:
        The page's path.
    """
    parts = [
        "## Before any training\n",
        _method(rows),
        _plot(rows, out),
        *(_table(format, rows) for format in dict.fromkeys(row["format"] for row in rows)),
    ]
    return write_study_page(out, "What does quantization leave?", command, parts, rows)


def _method(rows: Sequence[Row]) -> str:
    return (
        f"`{rows[0]['settings']['model']}` with the projections of its decoder layers quantized, calibrated on 128 of its own answers to "
        "instructions, and judged, in float32, on its own answers to the 80 questions of MT-Bench: KL(unquantized || quantized) in "
        "nats per answer token, share of tokens with the same most probable token, perplexity of the answers.  Bits are those of a "
        "stored weight with its share of the scales of its group.  Max: no value is clipped; mse: the scales with the least squared "
        "error of weights and inputs; smoothed: channels are scaled before rounding, folded into the layer before; sensitive: tokens "
        "count by what the predictions owe to them; cache: only keys and values are rounded, weights keep 16 bits.  "
        "ModelOpt and torchao quantize the same layers by their presets, their INT4 in groups of the same size; the scales that ModelOpt's AWQ "
        "puts on inputs stay multiplications at inference.  Graphs of ONNX Runtime GenAI's builder are measured by "
        "`python -m benchmarks.onnx_decode`.\n\n"
        "The packaged weights of SmolLM2-135M were rounded to 4 bits in blocks of 32 once before, so figures of INT4 do not carry "
        "over to other models.\n"
    )


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
