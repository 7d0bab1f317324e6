"""`report.json` for programs, `report.md` with plots for people: what a run or an export measured, and nothing else."""

import csv
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from export.plots import plot_artefacts, plot_training
from program.files import write_file

Report = dict[str, Any]


def write_report(output: Path, report: Report) -> None:
    """Write `report.json`, `report.md` and `plots/` into an export's folder, each under a temporary name first.

    Args:
        output: Folder of the export; a `metrics.csv` in it (a run's folder) adds the plots of the training.
        report: `artefacts`, `verification`, `benchmark`, `versions`, and of a training run `teacher`, `phases`,
            `constant_answer_score`, `pruning` (the figures of every event) and, where graphs were judged, `served`.
    """
    plots = output / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    history = read_metrics(output / "metrics.csv")
    training = plot_training(history, report.get("phases", []), report.get("pruning", []), plots)
    pictures = training + plot_artefacts(report, plots)
    _write(output / "report.json", json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n")
    _write(output / "report.md", markdown(report, [picture.relative_to(output).as_posix() for picture in pictures]))


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The columns of Lightning's `metrics.csv` as (step, value) pairs; empty if there is no such file."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if value and name not in ("step", "epoch"):
                columns.setdefault(name, []).append((int(row["step"]), float(value)))
    return columns


def markdown(report: Report, pictures: Sequence[str]) -> str:
    """The readable report."""
    sections = ["# Report", summary(report), _pruning_table(report), _verification_table(report)]
    sections += [f"![{Path(picture).stem}]({picture})" for picture in pictures]
    versions = ", ".join(f"{name} {version}" for name, version in report.get("versions", {}).items())
    sections.append(f"Versions: {versions}." if versions else "")
    return "\n\n".join(section for section in sections if section) + "\n"


def summary(report: Report) -> str:
    """What the end of a run shows on the screen: quality, sizes and speed."""
    sections = [phase_table(report), _served_table(report), _artefact_table(report), _benchmark_table(report)]
    return "\n\n".join(section for section in sections if section)


def phase_table(report: Report) -> str:
    """Teacher and student after each phase, as a Markdown table; empty for an export without a training run."""
    rows = [row for row in [report.get("teacher"), *report.get("phases", [])] if row]
    if not rows:
        return ""
    constant = report.get("constant_answer_score")
    figures = {"KL to teacher (nats/token)": "kl", "top-1 agreement": "top1_agreement", "task score": "task_score"}
    cells = [[row["name"], f"{row['parameters']:,}", *_numbers(row, figures.values())] for row in rows]
    lines = ["## Quality on held-out questions", _table(["", "parameters", *figures], cells)]
    if constant is not None:
        lines.append(f"Always giving each task's most common answer scores {constant:.3f}.")
    return "\n\n".join(lines)


def closing(report: Report, output: Path) -> str:
    """The last lines of a run: what was made, how good it is, how fast, where it is, and what comes next."""
    paths = {row["path"]: row for row in report["artefacts"]}
    served = {row["name"]: row for row in report.get("served", [])}
    speed = {row["name"]: row for row in report.get("benchmark", [])}
    best = "student_cpu" if "student_cpu" in speed else "student"
    made = [f"{row['path']} ({row['kind']}, {row['bytes'] / 1e6:.0f} MB)" for row in paths.values()]
    lines = [f"Made:   {made[0]}" if made else "Made:   nothing", *(f"        {text}" for text in made[1:])]
    if best in served:
        rows = [name for name in ("teacher", "student", "student_cpu") if name in served]
        lines += [f"{'Good:' if not at else '':7} {name}: {_quality(served[name])}" for at, name in enumerate(rows)]
        if report.get("constant_answer_score") is not None:
            lines.append(f"        always the most common answer: task score {report['constant_answer_score']:.3f}")
    if best in speed:
        lines.append(f"Fast:   {_speed(speed[best])}")
    if best in speed and "teacher" in speed:
        lines.append(f"        teacher: {_speed(speed['teacher'])}")
        found = ratios(speed[best], speed["teacher"])
        lines.append(
            f"        {found['first_token']:.1f} times as fast to the first token, {found['decode']:.1f} times as fast "
            f"after it, {found['bytes']:.2f} of the size"
        )
    lines.append(f"Where:  {output}/, and all figures in {output / 'report.md'}")
    python = _interpreter()
    if "onnx/model.onnx" in paths:
        lines.append(f"Next:   ask it something:   {python} -m export.chat {output}")
    if "compressed" in paths:
        lines.append(f"        serve it:           vllm serve {output / 'compressed'}")
    return "\n".join(lines)


def ratios(student: Report, teacher: Report) -> dict[str, float]:
    """How a row of the benchmark compares with the teacher's: how many times as fast, and which share of the size."""
    return {
        "decode": student["tokens_per_second"] / teacher["tokens_per_second"],
        "first_token": teacher["time_to_first_token_ms"] / student["time_to_first_token_ms"],
        "bytes": student["bytes"] / teacher["bytes"],
    }


def _quality(row: Report) -> str:
    score = ""
    if "task_score" in row:
        score = f"task score {row['task_score']:.3f} ({row['task_score_low']:.3f} to {row['task_score_high']:.3f}), "
    return f"{score}KL to the teacher {row['kl']:.3f} ({row['kl_low']:.3f} to {row['kl_high']:.3f}) nats a token"


def _speed(row: Report) -> str:
    return (
        f"{row['time_to_first_token_ms']:.0f} ms to the first token behind {row['prompt_tokens']}, then "
        f"{row['tokens_per_second']:.0f} tokens/s, {row['bytes'] / 1e6:.0f} MB"
    )


def _interpreter() -> str:
    """The running Python as one would type it here."""
    path = Path(sys.executable)
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else "python"


def _served_table(report: Report) -> str:
    rows = report.get("served", [])
    if not rows:
        return ""
    header = ["graph", "KL to teacher (nats/token)", "95 %", "task score", "95 %"]
    cells = [[row["name"], *_with_interval(row, "kl"), *_with_interval(row, "task_score")] for row in rows]
    note = (
        f"In ONNX Runtime, as they are served: {rows[0]['tokens']:,} answer tokens and the greedy answers of {rows[0]['questions']} "
        f"held-out conversations; intervals of KL are clustered by conversation, those of scores are Wilson's."
    )
    return "\n\n".join(["## Graphs as they are served", _table(header, cells), note])


def _with_interval(row: Report, name: str) -> list[str]:
    if name not in row:
        return ["-", "-"]
    return [f"{row[name]:.4f}", f"{row[f'{name}_low']:.4f} to {row[f'{name}_high']:.4f}"]


def _pruning_table(report: Report) -> str:
    events = report.get("pruning", [])
    if not events:
        return ""
    measure, name = ("loss", "Cross-entropy") if "loss_before" in events[0] else ("kl", "KL to the teacher")
    figures = [f"{measure}_{moment}" for moment in ("before", "after_cut", "after_repair", "recovered")]
    rows = []
    for event in events:
        before, cut, repair, recovered = _numbers(event, figures)
        undone = " (undone)" if event.get("repair_undone") else ""
        rows.append([str(event["step"]), f"{event['parameters']:,}", before, cut, repair + undone, recovered])
    header = ["step", "parameters", "before", "after the cut", "after the repair", "recovered"]
    note = (
        f"{name} in nats per token; recovered is by how much it fell until the next event, or the end of the training."
    )
    return "\n\n".join(["## Pruning events", _table(header, rows), note])


def _artefact_table(report: Report) -> str:
    rows = [[a["kind"], a["path"], f"{a['bytes'] / 1e6:.1f}"] for a in report.get("artefacts", [])]
    return "## Artefacts\n\n" + _table(["", "path", "MB"], rows) if rows else ""


def _benchmark_table(report: Report) -> str:
    rows = report.get("benchmark", [])
    title = "## Speed in ONNX Runtime on this machine's CPU"
    missing = [f"Not measured: {row['name']}: {row['reason']}" for row in report.get("not_measured", [])]
    if not rows:
        return "\n\n".join([title, *missing]) if missing else ""
    header = ["graph", "MB", "time to first token (ms)", "tokens/s"]
    spread = ("time_to_first_token_ms", "tokens_per_second")
    cells = [[row["name"], f"{row['bytes'] / 1e6:.1f}", *(_with_spread(row, name) for name in spread)] for row in rows]
    first = rows[0]
    note = (
        f"Median (smallest to largest) of {first['repetitions']} repetitions in turns; one conversation, a prompt of "
        f"{first['prompt_tokens']} tokens, {first['new_tokens']} new ones."
    )
    return "\n\n".join([title, _table(header, cells), note, *missing])


def _with_spread(row: Report, name: str) -> str:
    return f"{row[name]:.1f} ({row[f'{name}_min']:.1f} to {row[f'{name}_max']:.1f})"


def _verification_table(report: Report) -> str:
    checks = report.get("verification", [])
    if not checks:
        return ""
    figures = {
        "times rounding": "rounding_ratio",
        "difference (nats)": "difference",
        "bound": "bound",
        "greedy agreement": "greedy_agreement",
        "KL (nats)": "kl",
    }
    rows = [
        [
            check["name"],
            check["status"],
            *_numbers(check, figures.values()),
            check.get("reason") or check.get("verdict") or "",
        ]
        for check in checks
    ]
    return "## Verification\n\n" + _table(["check", "status", *figures, "remarks"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    alignment = ["---", *["---:" if _is_numeric(column, rows) else "---" for column in range(1, len(header))]]
    lines = [header, alignment, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _is_numeric(column: int, rows: Sequence[Sequence[str]]) -> bool:
    return all(row[column].lstrip("-")[:1].isdigit() or row[column] in ("", "-") for row in rows)


def _numbers(row: Report, names: Iterable[str]) -> list[str]:
    return ["-" if row.get(name) is None else f"{row[name]:.4g}" for name in names]


def _write(path: Path, text: str) -> None:
    write_file(path, lambda path: path.write_text(text, encoding="utf-8"))
