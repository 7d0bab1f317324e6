"""Ranking candidates that share a prefix: latency and throughput with and without sharing, and response times under load.

    python -m benchmarks.ranking [--candidates 1 2 5 10 20 50 100] [--json FILE] [--plot FILE.png]
    python -m benchmarks.ranking --repetitions 0 --load 0 --agreement 1000 [--json FILE]     how equal the scores are

Films of MovieLens 100K for a member, in the prompts of `configs/ranking.yaml`: about 300 tokens of question, profile and ratings,
then about 20 of the film.  In each runtime, in float32:

    hot       the prefix's cache is there from an earlier request
    cold      the prefix is computed in the same call
    scratch   every pair is a whole prompt, in batches
    loop      plain transformers: one whole prompt after the other

All ways start with texts, and all take turns in every repetition; one round before them is not counted.  More than 50 candidates are
repeated less often.  Then, in ONNX Runtime, requests of 20 films for random members arrive at random times, and
one worker answers them.  About 14 minutes on two cores.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from benchmarks.harness import parser, report, spread
from benchmarks.page import Row, grouped, save_plot
from benchmarks.ranking.films import draw_members, draw_pairs, shuffled_films, sizes_of, usual_prefix
from benchmarks.ranking.load import draw_requests, under_load
from benchmarks.ranking.ways import RUNTIMES, Score, agreement, open_session, transformers_loop, ways
from datamodules.movielens_ranking import MovieLens
from datamodules.ranking import Candidate
from models.loading.reference import load_model
from program.screen import as_command

RATIO_AT = 50  # candidates; more of them are repeated less often
WARM_UP = 10  # candidates
FILMS_EACH = 20  # candidates of a request under load
SEED = 0
MARKERS = {"hot": "o", "cold": "s", "scratch": "v", "loop": "^"}
MAX_LENGTH = 768  # tokens, as in configs/ranking.yaml
PACKAGES = ("torch", "transformers", "onnxruntime")


def measure(
    sides: Mapping[tuple[str, str], Score], prefix: str, films: Sequence[str], numbers: Sequence[int], repetitions: int
) -> list[Row]:
    """Time every side, by runtime and way, for every number of the first films, in turns; so often up to `RATIO_AT` of them."""
    for score in sides.values():
        score(prefix, films[:WARM_UP])
    seconds: dict[tuple[str, str, int], list[float]] = {(*side, number): [] for number in numbers for side in sides}
    times_of = {number: max(1, repetitions * RATIO_AT // max(number, RATIO_AT)) for number in numbers}
    turns = [number for turn in range(repetitions) for number in numbers if turn < times_of[number]]
    for number in tqdm(turns, desc="Latency", unit="round", leave=False):
        for side, score in sides.items():
            started = time.perf_counter()
            score(prefix, films[:number])
            seconds[*side, number].append(time.perf_counter() - started)
    rows = []
    for (runtime, way, number), times in seconds.items():
        row: Row = {"runtime": runtime, "way": way, "candidates": number, "repetitions": len(times), **spread(times)}
        rows.append(row | {"candidates_per_second": number / row["median_s"]})
    return rows


def ratios_of(rows: Sequence[Row]) -> dict[str, float]:
    """Time with a shared prefix over time from scratch, at 50 candidates (else the most); `hot_prefix_N` is the worst runtime's."""
    numbers = {row["candidates"] for row in rows}
    number = RATIO_AT if RATIO_AT in numbers else max(numbers)
    median = {(row["runtime"], row["way"]): row["median_s"] for row in rows if row["candidates"] == number}
    runtimes = [runtime for runtime, way in median if way == "scratch"]
    hot = {runtime: median[runtime, "hot"] / median[runtime, "scratch"] for runtime in runtimes}
    ratios = {f"hot_prefix_{number}": max(hot.values())}
    for runtime in runtimes:
        ratios[f"hot_prefix_{number}_{runtime}"] = hot[runtime]
        ratios[f"cold_prefix_{number}_{runtime}"] = median[runtime, "cold"] / median[runtime, "scratch"]
        ratios[f"hot_prefix_{number}_{runtime}_over_loop"] = median[runtime, "hot"] / median["transformers", "loop"]
    return ratios


def plot_latency(rows: Sequence[Row], path: Path) -> None:
    """Draw the median time of every row and its range; colours are runtimes and markers are ways."""
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    figure, axis = plt.subplots(figsize=(8, 6), layout="constrained")
    by_size = sorted(rows, key=lambda row: row["candidates"])
    for (runtime, way), line in grouped(by_size, ["runtime", "way"]).items():
        axis.errorbar(
            [row["candidates"] for row in line],
            [row["median_s"] for row in line],
            yerr=[[row["median_s"] - row["min_s"] for row in line], [row["max_s"] - row["median_s"] for row in line]],
            marker=MARKERS[way],
            color=f"C{runtimes.index(runtime)}",
            capsize=3,
            label=f"{runtime}: {way}",
        )
    numbers = [row["candidates"] for row in line]
    axis.set(xscale="log", yscale="log", xlabel="candidates", ylabel="seconds for all of them")
    axis.set_xticks(numbers, map(str, numbers))
    axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    save_plot(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the options ask for."""
    options = options_of(arguments)
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    data = MovieLens(options.model, labels=options.labels, folder=options.folder, max_length=MAX_LENGTH)
    tokenizer, candidates = data.tokenizer, cast(list[Candidate], data.conversations("test"))
    asked = (options.candidates if options.repetitions else []) + ([FILMS_EACH] if options.load else [])
    films = shuffled_films(candidates, at_least=max(asked, default=0))
    model = load_model(options.model).requires_grad_(False)
    sessions = {runtime: open_session(runtime, model, options.threads) for runtime in RUNTIMES}
    sides: dict[tuple[str, str], Score] = {
        (runtime, way): score
        for runtime, session in sessions.items()
        for way, score in ways(session, tokenizer, options.labels).items()
    }
    sides["transformers", "loop"] = transformers_loop(model, tokenizer, options.labels)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    if options.repetitions:
        prefix = usual_prefix(candidates)
        sizes = sizes_of(tokenizer, prefix, films[: max(options.candidates)])
        rows = [row | sizes for row in measure(sides, prefix, films, options.candidates, options.repetitions)]
        ratios = ratios_of(rows)
        if options.plot:
            plot_latency(rows, options.plot)
    if options.load:
        runtime = RUNTIMES[-1]
        members = draw_members(candidates, options.members)
        requests = draw_requests(members, films, options.requests, films_each=FILMS_EACH, seed=SEED)
        found = under_load(sessions[runtime], tokenizer, options.labels, requests, options.load, seed=SEED)
        rows.append({"runtime": runtime, "way": "load", "candidates": FILMS_EACH, "members": len(members), **found})
    if options.agreement:
        scores = {f"{runtime}_{way}": sides[runtime, way] for way in ("scratch", "hot") for runtime in RUNTIMES}
        found = agreement(scores, draw_pairs(candidates, options.agreement))
        rows.append({"way": "agreement", **found})
        largest, pairs = found["max_difference"], found["pairs"]
        print(f"largest difference of {' / '.join(scores)}: {largest:.1e} nats on {pairs} pairs")
    report(rows, ratios, PACKAGES, options.json)


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    options = parser(__doc__, repetitions=3)
    add = options.add_argument
    text = "model reference (default: %(default)s)"
    add("--model", default="package:smollm2-135m-instruct", metavar="REF", help=text)
    add("--folder", metavar="DIR", help="MovieLens' files (default: the package recbole)")
    add("--labels", nargs=2, default=["no", "yes"], metavar=("NO", "YES"), help="answers (default: no yes)")
    add("--candidates", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50, 100], metavar="N", help="films for a member")
    add("--threads", type=int, default=2, help="of torch and of ONNX Runtime (default: %(default)s)")
    add("--load", type=float, default=0.7, metavar="SHARE", help="of the capacity; 0: no load (default: %(default)s)")
    add("--requests", type=int, default=120, metavar="N", help="under load (default: %(default)s)")
    add("--members", type=int, default=32, metavar="N", help="who asks under load (default: %(default)s; 16 stay hot)")
    add("--agreement", type=int, default=0, metavar="N", help="pairs on which all scores are compared (default: none)")
    add("--plot", type=Path, metavar="FILE.png", help="draw the latencies")
    found = options.parse_args(arguments)
    numbers = [*found.candidates, found.threads, found.requests, found.members]
    if min(numbers) < 1 or min(found.repetitions, found.agreement) < 0 or not 0 <= found.load < 1:
        raise ValueError(
            "expected numbers of at least 1, --repetitions and --agreement of at least 0 and --load from 0 to below 1, found "
            f"{' '.join(sys.argv[1:] if arguments is None else arguments)}; correct them"
        )
    return found


if __name__ == "__main__":
    sys.exit(as_command(main)())
