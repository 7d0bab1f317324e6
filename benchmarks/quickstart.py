"""The quickstart's figures: copied from its report into the README, and compared with what is written there.

    python -m benchmarks.quickstart runs/quickstart/report.json            # into docs/results/quickstart.{json,png} and README.md
    python -m benchmarks.quickstart runs/quickstart/report.json --check    # exit 1 if the report and that file do not go together

A check compares what another machine and other rounding may change within the tolerances below.  Both say which of the quickstart's aims
a report misses.

| figure                                                   | may differ from the file by | aim                        |
|----------------------------------------------------------|-----------------------------|----------------------------|
| `task_score` of each graph                                | 0.12                        | -                          |
| share of the teacher's gain over the constant answer      | -                           | at least 0.85              |
| `kl` of each graph                                        | 0.05 nats, or its interval  | `student_cpu` at most 0.12 |
| decoding, first token: times as fast as the teacher's     | a factor of 2               | at least 2.5 and 2         |
| share of the teacher's size                               | 0.02                        | at most 0.334              |
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study import write_text
from export.benchmark.report import machine
from export.plots import plot_artefacts
from export.report import ratios
from program.files import move_into_place, staging_folder
from program.screen import as_command

ROOT = Path(__file__).parents[1]
FIGURES, PICTURE, README = Path("docs/results/quickstart.json"), Path("docs/results/quickstart.png"), Path("README.md")
BEGIN, END = "<!-- quickstart-results -->", "<!-- /quickstart-results -->"
SCORE, KL, SPEED, SIZE = 0.12, 0.05, 2.0, 0.02  # tolerances
GAIN, LARGEST_KL, LEAST_SPEED, LARGEST_SIZE = 0.85, 0.12, {"decode": 2.5, "first_token": 2.0}, 0.334  # aims
Figures = dict[str, Any]

_GRAPHS = {
    "teacher": "teacher, float32 graph",
    "student": "student, FP8 graph (for GPUs)",
    "student_cpu": "student, INT8 graph for CPUs",
}


@as_command
def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command; 0 if everything went well, 1 if a check found something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report.json of `make quickstart`")
    parser.add_argument("--check", action="store_true", help="compare instead of copying; writes nothing")
    parser.add_argument("--install-minutes", type=float, metavar="N", help="what installing took, for the README")
    options = parser.parse_args(arguments)
    report = _read(options.report)
    if options.check:
        figures = figures_of(report, {})
        _say_what_is_missed(figures)
        found = list(differences(figures, _read(root / FIGURES)))
        for sentence in found:
            print(f"error: {sentence}", file=sys.stderr)
        return 1 if found else 0
    teacher = _read(options.report.parent / "teacher/report.json")
    minutes = {"teacher": teacher["minutes"], "student": report["minutes"], "install": options.install_minutes}
    about = {"commit": _commit(root), "machine": machine(), "minutes": minutes}
    figures = figures_of(report, about)
    readme = with_table((root / README).read_text(encoding="utf-8"), figures)
    write_text(root / FIGURES, json.dumps(figures, indent=2) + "\n")
    write_text(root / README, readme)
    with staging_folder((root / FIGURES).parent) as staging:
        (picture,) = plot_artefacts(figures, staging)
        move_into_place(picture, root / PICTURE)
    print(f"Wrote {FIGURES}, {PICTURE} and the table in {README}")
    _say_what_is_missed(figures)
    return 0


def _say_what_is_missed(figures: Figures) -> None:
    for sentence in missed_aims(figures):
        print(f"missed aim: {sentence}", file=sys.stderr)


def figures_of(report: Figures, about: Figures) -> Figures:
    """What is kept of a report, behind words about the run."""
    kept = ("constant_answer_score", "teacher", "phases", "served", "benchmark", "artefacts")
    figures = about | {name: report[name] for name in kept}
    rows = {row["name"]: row for row in report["benchmark"]}
    figures["ratios"] = {name: ratios(rows[name], rows["teacher"]) for name in rows if name != "teacher"}
    scores, constant = {row["name"]: row["task_score"] for row in report["served"]}, report["constant_answer_score"]
    figures["gain"] = {  # the share that a graph keeps of what the teacher gains over the constant answer
        name: (scores[name] - constant) / (scores["teacher"] - constant) for name in rows if name != "teacher"
    }
    return figures | {"versions": {"python": platform.python_version()} | report["versions"]}


def differences(found: Figures, stated: Figures) -> Iterator[str]:
    """What does not hold, one sentence each."""
    served = {row["name"]: row for row in found["served"]}
    for row in stated["served"]:
        by_chance = row["kl_high"] - row["kl"]  # a few tokens make most of it
        for name, tolerance in (("task_score", SCORE), ("kl", max(KL, by_chance))):
            now = served[row["name"]][name]
            if not abs(now - row[name]) <= tolerance:
                yield _sentence(f"{name} of {row['name']}", f"{row[name]:.3f} within {tolerance:.2g}", now)
    now, then = found["ratios"]["student_cpu"], stated["ratios"]["student_cpu"]
    for name in LEAST_SPEED:
        if not now[name] >= then[name] / SPEED:
            what = f"{name} of student_cpu, times as fast as the teacher's"
            yield _sentence(what, f"at least {then[name] / SPEED:.2f}", now[name])
    if not abs(now["bytes"] - then["bytes"]) <= SIZE:
        yield _sentence(
            "size of student_cpu, share of the teacher's", f"{then['bytes']:.3f} within {SIZE}", now["bytes"]
        )


def missed_aims(found: Figures) -> Iterator[str]:
    """Which aims of the quickstart a report misses, one sentence each."""
    now, kl = found["ratios"]["student_cpu"], {row["name"]: row for row in found["served"]}["student_cpu"]["kl"]
    for graph, gain in found["gain"].items():
        if not gain >= GAIN:
            yield _sentence(f"share of the teacher's gain that {graph} keeps", f"at least {GAIN}", gain)
    if not kl <= LARGEST_KL:
        yield _sentence("kl of student_cpu", f"at most {LARGEST_KL}", kl)
    for name, least in LEAST_SPEED.items():
        if not now[name] >= least:
            yield _sentence(f"{name} of student_cpu, times as fast as the teacher's", f"at least {least}", now[name])
    if not now["bytes"] <= LARGEST_SIZE:
        yield _sentence("size of student_cpu, share of the teacher's", f"at most {LARGEST_SIZE}", now["bytes"])


def with_table(readme: str, figures: Figures) -> str:
    """The README with the figures between its markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, behind = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected {BEGIN} and {END} in {README}, found none; put them where the table shall stand")
    return f"{before}{BEGIN}\n{table(figures)}\n{END}{behind}"


def table(figures: Figures) -> str:
    """The README's table, and the words under it."""
    speed = {row["name"]: row for row in figures["benchmark"]}
    parameters = {"teacher": figures["teacher"]["parameters"]}
    student = figures["phases"][-1]["parameters"]
    lines = [
        "| | parameters | MB | KL to teacher (nats/token) | exact match | first token (ms) | tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in figures["served"]:
        fast = speed[row["name"]]
        cells = [
            _GRAPHS[row["name"]],
            f"{parameters.get(row['name'], student):,}",
            f"{fast['bytes'] / 1e6:.0f}",
            f"{row['kl']:.3f}",
            f"{row['task_score']:.3f} ({row['task_score_low']:.3f} to {row['task_score_high']:.3f})",
            f"{fast['time_to_first_token_ms']:.0f}",
            f"{fast['tokens_per_second']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _words(figures)])


def _words(figures: Figures) -> str:
    served, fast, ratio = figures["served"][0], figures["benchmark"][0], figures["ratios"]["student_cpu"]
    minutes, place, versions = figures["minutes"], figures["machine"], figures["versions"]
    total = sum(value for value in minutes.values() if value is not None)
    installing = "" if minutes["install"] is None else f", {minutes['install']:.1f} of them for installing"
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"The graph for CPUs decodes {ratio['decode']:.1f} times as fast as the teacher's, has its first token {ratio['first_token']:.1f} times as\n"
        f"fast, takes {ratio['bytes']:.2f} of the space, and keeps {figures['gain']['student_cpu']:.2f} of what the teacher gains over always giving a task's\n"
        f"most common answer ({figures['constant_answer_score']:.3f}). Each graph was judged in ONNX Runtime on {served['questions']} held-out questions that do not occur in\n"
        f"training (95 % intervals). Times are ONNX Runtime on the CPU, one conversation, a prompt of {fast['prompt_tokens']} tokens and {fast['new_tokens']} new ones,\n"
        f"medians of {fast['repetitions']}; a CPU has no FP8 arithmetic. One run of `make quickstart` on {place['cores']} cores ({place['processor']}), commit\n"
        f"{figures['commit'][:7]}: {total:.0f} minutes{installing}; {packages}. The teacher starts\n"
        f"from dequantized Q4_1 weights."
    )


def _sentence(what: str, expected: str, found: float) -> str:
    return (
        f"expected {what} of {expected}, found {found:.3f}; if the change is meant, run `make quickstart` and "
        "`python -m benchmarks.quickstart` again, and say why"
    )


def _read(path: Path) -> Figures:
    if not path.is_file():
        raise FileNotFoundError(f"expected a report at {str(path)!r}, found none; run `make quickstart` first")
    figures: Figures = json.loads(path.read_text(encoding="utf-8"))
    return figures


def _commit(root: Path) -> str:
    """The commit that is checked out, with no file changed."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    if changed:
        raise ValueError(
            f"expected a checkout without changes, found {changed.splitlines()[0].split()[-1]} changed; commit, run `make quickstart`, and "
            "copy its figures then"
        )
    return git("rev-parse", "HEAD")


if __name__ == "__main__":
    sys.exit(main())
