"""Verification, verified: how often it fails right graphs, and whether it finds planted faults.

    python -m benchmarks.verification [--repetitions 200] [--whole 10] [--student FOLDER] [--json FILE]
    python -m benchmarks.verification --quick       tiny random models: does the command work?

Most of it runs on the first four decoder layers of SmolLM2 with its own head, `--whole` of the verifications on whole models: on the
quickstart's student if it is there, else on all of SmolLM2 quantized on the spot; `model` says which.  Every verification draws other
prompts, another number of them (1 to 6), padded or not, and other decode steps; every second one (on average) changes the last digits of torch's
embeddings (by one unit roundoff of the graph's type) and leaves the graph alone; every third one judges a free run as well.

| ratio          | what it is                                                                          | wanted |
|----------------|-------------------------------------------------------------------------------------|--------|
| `false_alarms` | verifications of right graphs with a check that failed, over all of them            | 0      |
| `undecided`    | free runs that ended with "too few tokens to say", over all of them                 | small  |
| `caught`       | planted faults (`benchmarks/verification/faults.py`) that made a check fail, over all | 1    |

A row of `right` is one format of one model: the largest and the median `rounding_ratio` of its verifications (the bound is 4); of its
free runs the largest difference in nats per token, half of the interval's width, and the standard deviation of a token's
difference that this width belongs to.  A row of `fault` names the check that found it, or the largest ratio where none did.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.harness import parser, report
from benchmarks.verification import graphs as right
from benchmarks.verification.faults import PLANTED, Fault
from benchmarks.verification.graphs import Right, Texts, drawn
from export.onnx_graph.layer_kinds import slice_layers
from export.onnx_graph.prefill import write_beside
from export.onnx_graph.to_onnx import Precision
from export.sessions.onnx_session import OnnxSession
from export.verify.checks import Check
from export.verify.exactness import FedSession, compare_alone, compare_graph, compare_longest
from export.verify.faithfulness import compare_served, judged_by, num_tokens_for, sampled, torch_served
from export.verify.torch_run import Run
from models.copies import shared_copy
from models.loading.reference import end_token_ids, load_model
from program.screen import as_command

LAYERS = [0, 1, 2, 3]
STUDENT = Path("runs/quickstart/student")
FORMATS: tuple[Precision, ...] = ("fp16", "fp8", "int8", "int4_g64", "int4_g64_zp")
THREADS = 2  # of ONNX Runtime
LONG = 512  # tokens of one long prompt
ASKED = 8  # prompts of a free run
PACKAGES = ["torch", "transformers", "onnx", "onnxruntime"]


def main() -> None:
    """Write right graphs, verify them again and again, and plant faults in them."""
    options = parser(__doc__, repetitions=200)
    options.add_argument("--whole", type=int, default=10, help="of these, of whole models (default: %(default)s)")
    options.add_argument("--student", type=Path, default=STUDENT, help="a whole model (default: %(default)s)")
    options.add_argument("--quick", action="store_true", help="tiny random models in two formats, no free runs")
    arguments = options.parse_args()
    whole = 0 if arguments.quick else arguments.whole
    count = arguments.repetitions - whole
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.quick:
            batches, prompts = right.random_texts()
            graphs = right.right_graphs(right.tiny("llama"), batches, folder, ("fp16", "int8"), "tiny Llama")
        else:
            model = load_model(right.MODEL)
            batches, prompts = right.real_texts()
            graphs = right.right_graphs(slice_layers(model, LAYERS), batches, folder, FORMATS, "four layers of SmolLM2")
        alarms = false_alarms(graphs, prompts, count, free=not arguments.quick)
        planted = [*graphs, *right.further_graphs(graphs, folder, () if arguments.quick else right.FAMILIES)]
        faults = planted_faults(planted, drawn(prompts, random.Random(0), 3, padded=True))
        if whole:
            entire = right.whole_graphs(model, batches, folder / "whole", arguments.student)
            alarms += false_alarms(entire, prompts, whole, free=True)
    ratios = {
        "false_alarms": sum(row["false_alarms"] for row in alarms) / sum(row["verifications"] for row in alarms),
        "undecided": sum(row["undecided"] for row in alarms) / max(1, sum(row["free_runs"] for row in alarms)),
        "caught": statistics.mean(row["caught"] for row in faults),
    }
    report([*alarms, *faults], ratios, PACKAGES, arguments.json)


def false_alarms(graphs: Sequence[Right], prompts: Sequence[Tensor], count: int, *, free: bool) -> list[dict[str, Any]]:
    """Verify right graphs `count` times in turns; a row for each."""
    found: dict[str, list[tuple[list[Check], float]]] = {graph.name: [] for graph in graphs}
    sessions = {graph.name: FedSession(graph.path, THREADS, for_cpu=graph.for_cpu) for graph in graphs}
    for number in tqdm(range(count), desc=f"Verifications of {graphs[0].of}", leave=False):
        graph, begun = graphs[number % len(graphs)], time.perf_counter()
        asked = free and number // len(graphs) % 3 == 0
        checks = verified(graph, sessions[graph.name], prompts, number, free=asked)
        found[graph.name].append((checks, time.perf_counter() - begun))
    return [_row(graph, found[graph.name]) for graph in graphs if found[graph.name]]


def verified(graph: Right, session: FedSession, prompts: Sequence[Tensor], number: int, *, free: bool) -> list[Check]:
    """One verification; `number` decides everything about its texts."""
    draw = random.Random(number)
    prompt_ids, prompt_mask = drawn(prompts, draw, draw.randint(1, 6), padded=draw.random() < 0.5)
    model, judged = graph.model, graph.judged or graph.model
    if draw.random() < 0.5:
        model, judged = (_nudged(each, graph.arithmetic.unit, seed=number) for each in (model, judged))
    run = Run(model, prompt_ids, prompt_mask, draw.randint(8, 16))
    checks = [*compare_graph(graph.name, [run], session), compare_alone(graph.name, [run], session)]
    if free:
        asked = dict(zip(("prompt_ids", "prompt_mask"), drawn(prompts, draw, ASKED, padded=True), strict=True))
        held_out = judged_by(judged, sampled(judged, asked, num_tokens_for(judged)))
        reference = torch_served(judged, held_out, lambda: None)
        found = held_out.measure(OnnxSession(graph.path, threads=THREADS), end_token_ids(judged), lambda: None)
        checks.append(compare_served(graph.name, judged, found, reference))
    return checks


def _nudged(model: PreTrainedModel, unit: float, seed: int) -> PreTrainedModel:
    """The model with other last digits of its embeddings; the head stays."""
    changed = shared_copy(model)
    embedding: Any = changed.get_input_embeddings()
    noise = torch.randn(embedding.weight.shape, generator=torch.Generator().manual_seed(seed))
    nudged = torch.addcmul(embedding.weight, embedding.weight, noise, value=unit)
    embedding.weight = nn.Parameter(nudged, requires_grad=False)
    return changed


def _row(graph: Right, found: Sequence[tuple[list[Check], float]]) -> dict[str, Any]:
    every = [check for checks, _ in found for check in checks]
    ratios = [max(check.rounding_ratio or 0.0 for check in checks) for checks, _ in found]
    runs = [check for check in every if check.verdict is not None]
    halves = [(check.interval[1] - check.interval[0]) / 2 for check in runs if check.interval is not None]
    sizes = [half / 1.96 * (check.tokens or 0) ** 0.5 for half, check in zip(halves, runs, strict=True)]
    failures = [check for check in every if check.status == "failed"]
    return {
        "name": graph.name,
        "what": "right",
        "model": graph.of,
        "verifications": len(found),
        "false_alarms": sum(any(check.status == "failed" for check in checks) for checks, _ in found),
        "ratio_median": statistics.median(ratios),
        "ratio_max": max(ratios),
        "worst": max(every, key=lambda check: check.rounding_ratio or 0.0).worst,
        "failures": [f"{check.name}: {check.reason}" for check in failures],
        "free_runs": len(runs),
        "undecided": sum(check.verdict == "too few tokens to say" for check in runs),
        "largest_difference": max((abs(check.difference or 0.0) for check in runs), default=0.0),
        "half_interval": max(halves, default=0.0),
        "token_sd": max(sizes, default=0.0),
        "median_s": statistics.median(seconds for _, seconds in found),
    }


def planted_faults(graphs: Iterable[Right], texts: Texts) -> list[dict[str, Any]]:
    """Plant every fault in every graph in which it is one; a row for each."""
    rows = []
    for graph in tqdm(graphs, desc="Faults", leave=False):
        examined = Examined(graph, texts)
        check = examined.first_failure(graph.path)
        if check.status == "failed":
            raise RuntimeError(f"expected a right graph to plant faults in, found {check.name}: {check.reason}")
        rows += [examined.row(name, fault) for name, (fault, where) in PLANTED.items() if graph.name in where]
    return rows


class Examined:
    """One right graph, and the same texts for each fault that is planted in it."""

    def __init__(self, graph: Right, texts: Texts, decode_steps: int = 8) -> None:
        self.graph, self._model = graph, graph.model
        ids_BT, mask_BT = texts
        vocabulary = self._model.config.vocab_size
        tokens = (ids_BT % vocabulary)[mask_BT.bool()]
        self._long_1T = tokens.repeat(-(-LONG // len(tokens)))[None, :LONG]
        steps = 0 if graph.name.endswith(("prefill", "labels")) else decode_steps
        self._run = Run(self._model, ids_BT % vocabulary, mask_BT, steps)

    def first_failure(self, path: Path) -> Check:
        """The first check that fails, as a verification would go through them; the closest to it if none does."""
        name, runs = self.graph.name, [self._run]
        session = FedSession(path, THREADS, for_cpu=self.graph.for_cpu)
        parts: list[Callable[[], list[Check]]] = [
            lambda: compare_graph(name, runs, session),
            lambda: [compare_alone(name, runs, session)],
            lambda: [compare_longest(name, self._model, self._long_1T, path, threads=THREADS)],
        ]
        checks: list[Check] = []
        while parts and not any(check.status == "failed" for check in checks):
            checks += parts.pop(0)()
        return max(checks, key=lambda check: (check.status == "failed", check.rounding_ratio or 0.0))

    def row(self, name: str, fault: Fault) -> dict[str, Any]:
        """Plant a fault and look for it."""
        path = write_beside(self.graph.path, "fault.onnx", fault)
        check = self.first_failure(path)
        path.unlink()
        return {
            "name": name,
            "what": "fault",
            "graph": self.graph.name,
            "model": self.graph.of,
            "caught": check.status == "failed",
            "rounding_ratio": check.rounding_ratio,
            "check": check.name,
            "worst": check.worst,
        }


if __name__ == "__main__":
    sys.exit(as_command(main)())
