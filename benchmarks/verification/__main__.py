"""Verification, verified: how often it fails right graphs, and whether it finds planted faults.

    python -m benchmarks.verification [--repetitions 200] [--whole 10] [--student FOLDER] [--threads 2] [--json FILE]
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.chats import calibration_prompts
from benchmarks.harness import parser, report
from benchmarks.verification.faults import PLANTED, Fault
from datamodules.chat import Conversation, encode
from datamodules.collate import Batch, collate, pad_id_of
from export.calibration import requantized
from export.cpu_graph.head_blocks import with_stored_head
from export.cpu_graph.to_cpu import write_cpu_graph
from export.folders.student import load_student
from export.layout import CPU, GRAPH
from export.onnx_graph.labels import write_labels
from export.onnx_graph.layer_kinds import slice_layers
from export.onnx_graph.prefill import write_beside, write_prefill
from export.onnx_graph.to_onnx import Precision, export_onnx, precision_of
from export.sessions.onnx_session import OnnxSession
from export.verify.checks import Check
from export.verify.exactness import FedSession, compare_alone, compare_graph, compare_longest
from export.verify.faithfulness import compare_served, judged_by, num_tokens_for, sampled, torch_served
from export.verify.rounding import FLOAT16, FLOAT32, Arithmetic
from export.verify.torch_run import Run
from models.copies import shared_copy, with_rounded_weights
from models.loading.reference import end_token_ids, load_model, load_tokenizer
from models.post_training.settings import PostTrainingQuantization
from models.quantization.linear import freeze_scales
from models.structure.edits import apply_edit
from program.screen import as_command

MODEL, LAYERS = "package:smollm2-135m-instruct", [0, 1, 2, 3]
STUDENT = Path("runs/quickstart/student")
FORMATS: tuple[Precision, ...] = ("fp16", "fp8", "int8", "int4_g64", "int4_g64_zp")
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 8.0, "sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2},
}
METHOD = PostTrainingQuantization(method="nearest", sensitive=False)
CALIBRATED_ON, LONGEST_PROMPT, LONG = 8, 200, 512  # conversations, characters, tokens of one long prompt
ASKED = 8  # prompts of a free run
PACKAGES = ["torch", "transformers", "onnx", "onnxruntime"]
Texts = tuple[Tensor, Tensor]
"""Left-padded prompts (B, T), and 1 for tokens and 0 for padding."""


@dataclass(frozen=True)
class Right:
    """A right graph, and what it was made from.

    Attributes:
        name: Of the format, or of the family.
        model: The torch model that the graph computes, its weights rounded.
        path: The graph.
        of: Which model this is.
        judged: The torch model that a free run is judged against; None: `model`.
    """

    name: str
    model: PreTrainedModel
    path: Path
    of: str
    judged: PreTrainedModel | None = None

    @property
    def for_cpu(self) -> bool:
        """Whether it is a graph of `export.cpu_graph.to_cpu`."""
        return self.path.name == CPU

    @property
    def arithmetic(self) -> Arithmetic:
        """Of the numbers between the products."""
        return FLOAT16 if "fp16" in self.name or "half" in self.name else FLOAT32


def main() -> None:
    """Write right graphs, verify them again and again, and plant faults in them."""
    options = parser(__doc__)
    options.set_defaults(repetitions=200)
    options.add_argument("--whole", type=int, default=10, help="of these, of whole models (default: %(default)s)")
    options.add_argument("--student", type=Path, default=STUDENT, help="a whole model (default: %(default)s)")
    options.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime (default: %(default)s)")
    options.add_argument("--quick", action="store_true", help="tiny random models in two formats, no free runs")
    arguments = options.parse_args()
    whole = 0 if arguments.quick else arguments.whole
    threads, count = arguments.threads, arguments.repetitions - whole
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.quick:
            batches, prompts = _random_texts()
            graphs = right_graphs(tiny("llama"), batches, folder, ("fp16", "int8"), "tiny Llama")
        else:
            model = load_model(MODEL)
            batches, prompts = _texts()
            graphs = right_graphs(slice_layers(model, LAYERS), batches, folder, FORMATS, "four layers of SmolLM2")
        alarms = false_alarms(graphs, prompts, count, threads, free=not arguments.quick)
        planted = [*graphs, *further_graphs(graphs, folder, () if arguments.quick else FAMILIES)]
        faults = planted_faults(planted, _drawn(prompts, random.Random(0), 3, padded=True), threads, PLANTED)
        if whole:
            entire = _whole_graphs(model, batches, folder / "whole", arguments.student)
            alarms += false_alarms(entire, prompts, whole, threads, free=True)
    ratios = {
        "false_alarms": sum(row["false_alarms"] for row in alarms) / sum(row["verifications"] for row in alarms),
        "undecided": sum(row["undecided"] for row in alarms) / max(1, sum(row["free_runs"] for row in alarms)),
        "caught": statistics.mean(row["caught"] for row in faults),
    }
    report([*alarms, *faults], ratios, PACKAGES, arguments.json)


def right_graphs(
    model: PreTrainedModel, batches: Sequence[Batch], folder: Path, formats: Sequence[Precision], of: str
) -> list[Right]:
    """The graphs of a model in several formats; `fp8` comes also with float16 between the products, `int8` also for the CPU."""
    graphs = []
    for precision in tqdm(formats, desc=f"Graphs of {of}", leave=False):
        plain = precision == "fp16"
        made = model if plain else requantized(model, batches, _format(precision), METHOD)
        graphs += _written(made, folder / precision, precision, of)
    return graphs


def _format(precision: Precision) -> str:
    return "fp8_e4m3" if precision == "fp8" else precision


def _written(model: PreTrainedModel, folder: Path, precision: Precision, of: str) -> list[Right]:
    rounded = with_rounded_weights(model)
    path = export_onnx(model, folder / "model.onnx", precision=precision).path
    graphs = [Right(precision, rounded, path, of)]
    if precision == "fp8":
        half = export_onnx(model, folder / "half.onnx", precision=precision, activations="float16").path
        graphs.append(Right("fp8 half", rounded, half, of))
    if precision == "int8":
        cpu = write_cpu_graph(path)
        stored = with_stored_head(rounded, onnx.load(cpu, load_external_data=False).graph)
        graphs.append(Right("int8 cpu", stored, cpu, of, rounded))
    return graphs


def further_graphs(graphs: Sequence[Right], folder: Path, families: Sequence[str] | dict[str, Any]) -> Iterator[Right]:
    """Graphs for faults that others can't have: of other families, with a quantized cache, of the last position, of labels."""
    by_name = {graph.name: graph for graph in graphs}
    int8, fp16 = by_name["int8"], by_name["fp16"]
    yield Right("int8, prefill", int8.model, write_prefill(int8.path), int8.of)
    yield Right("fp16, labels", fp16.model, write_labels(fp16.path, {"yes": 10, "no": 20}), fp16.of)
    for family in families:
        for graph in _written(tiny(family), folder / family, "fp32", f"tiny {family}"):
            yield replace(graph, name=family)
    cached = tiny("llama")
    apply_edit(cached, {"op": "quantize_cache", "format": "int8"})
    with torch.no_grad():
        cached.train()(torch.arange(3, 123)[None])
    freeze_scales(cached)
    path = export_onnx(cached.eval(), folder / "cached" / "model.onnx", precision="fp32").path
    yield Right("llama, cache in int8", with_rounded_weights(cached), path, "tiny Llama")


def tiny(family: str) -> PreTrainedModel:
    """A small random model of three layers, no parameter of which is at its default."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 128, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": 2}
    settings = sizes | heads | FAMILIES.get(family, {})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1).add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def false_alarms(
    graphs: Sequence[Right], prompts: Sequence[Tensor], count: int, threads: int, *, free: bool
) -> list[dict[str, Any]]:
    """Verify right graphs `count` times in turns; a row for each."""
    found: dict[str, list[tuple[list[Check], float]]] = {graph.name: [] for graph in graphs}
    sessions = {graph.name: FedSession(graph.path, threads, for_cpu=graph.for_cpu) for graph in graphs}
    for number in tqdm(range(count), desc=f"Verifications of {graphs[0].of}", leave=False):
        graph, begun = graphs[number % len(graphs)], time.perf_counter()
        asked = free and number // len(graphs) % 3 == 0
        checks = verified(graph, sessions[graph.name], prompts, number, threads if asked else 0)
        found[graph.name].append((checks, time.perf_counter() - begun))
    return [_row(graph, found[graph.name]) for graph in graphs if found[graph.name]]


def verified(graph: Right, session: FedSession, prompts: Sequence[Tensor], number: int, threads: int) -> list[Check]:
    """One verification; `number` decides everything about its texts.  Of 0 threads there is no free run."""
    draw = random.Random(number)
    prompt_ids, prompt_mask = _drawn(prompts, draw, draw.randint(1, 6), padded=draw.random() < 0.5)
    model, judged = graph.model, graph.judged or graph.model
    if draw.random() < 0.5:
        model, judged = (_nudged(each, graph.arithmetic.unit, seed=number) for each in (model, judged))
    run = Run(model, prompt_ids, prompt_mask, draw.randint(8, 16))
    checks = [*compare_graph(graph.name, [run], session), compare_alone(graph.name, [run], session)]
    if threads:
        asked = dict(zip(("prompt_ids", "prompt_mask"), _drawn(prompts, draw, ASKED, padded=True), strict=True))
        held_out = judged_by(judged, sampled(judged, asked, num_tokens_for(judged)))
        reference = torch_served(judged, held_out, lambda: None)
        found = held_out.measure(OnnxSession(graph.path, threads=threads), end_token_ids(judged), lambda: None)
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


def planted_faults(
    graphs: Sequence[Right], texts: Texts, threads: int, planted: dict[str, tuple[Fault, tuple[str, ...]]]
) -> list[dict[str, Any]]:
    """Plant every fault in every graph in which it is one; a row for each."""
    rows = []
    for graph in tqdm(graphs, desc="Faults", leave=False):
        examined = Examined(graph, texts, threads)
        right = examined.first_failure(graph.path)
        if right.status == "failed":
            raise RuntimeError(f"expected a right graph to plant faults in, found {right.name}: {right.reason}")
        for name, (fault, where) in planted.items():
            if graph.name in where:
                rows.append(examined.row(name, fault))
    return rows


class Examined:
    """One right graph, and the same texts for each fault that is planted in it."""

    def __init__(self, graph: Right, texts: Texts, threads: int, decode_steps: int = 8) -> None:
        self.graph, self._threads, self._model = graph, threads, graph.model
        ids_BT, mask_BT = texts
        vocabulary = self._model.config.vocab_size
        tokens = (ids_BT % vocabulary)[mask_BT.bool()]
        self._long_1T = tokens.repeat(-(-LONG // len(tokens)))[None, :LONG]
        steps = 0 if graph.name.endswith(("prefill", "labels")) else decode_steps
        self._run = Run(self._model, ids_BT % vocabulary, mask_BT, steps)

    def first_failure(self, path: Path) -> Check:
        """The first check that fails, as a verification would go through them; the closest to it if none does."""
        name, runs, threads = self.graph.name, [self._run], self._threads
        session = FedSession(path, threads, for_cpu=self.graph.for_cpu)
        parts: list[Callable[[], list[Check]]] = [
            lambda: compare_graph(name, runs, session),
            lambda: [compare_alone(name, runs, session)],
            lambda: [compare_longest(name, self._model, self._long_1T, path, threads=threads)],
        ]
        checks: list[Check] = []
        for part in parts:
            checks += part()
            if any(check.status == "failed" for check in checks):
                break
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


def _whole_graphs(model: PreTrainedModel, batches: Sequence[Batch], folder: Path, student: Path) -> list[Right]:
    """FP8 and INT8 of a whole model: of the student in a folder, with its own graph if that lies where the quickstart puts it."""
    if not student.is_dir():
        return right_graphs(model, batches, folder, ("fp8", "int8"), "SmolLM2")
    own, _ = load_student(str(student))
    path, precision = student.parent / GRAPH, precision_of(own)
    if path.is_file():
        graphs = [Right(precision, with_rounded_weights(own), path, f"{student} with its own graph")]
    else:
        graphs = _written(own, folder / "student", precision, str(student))
    return graphs + right_graphs(own, batches, folder, ("int8",), str(student))


def _texts() -> tuple[list[Batch], list[Tensor]]:
    """Calibration batches, and other prompts (T,) to verify on."""
    tokenizer = load_tokenizer(MODEL)
    asked = [prompt for prompt in calibration_prompts(290) if len(prompt) <= LONGEST_PROMPT]
    conversations = [
        Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": "Yes."}], "prompt")
        for prompt in asked
    ]
    examples = encode(tokenizer, conversations)
    batches = [{**collate(examples[:CALIBRATED_ON], pad_id=pad_id_of(tokenizer))}]
    return batches, [example.input_ids[: example.prompt_length].long() for example in examples[CALIBRATED_ON:]]


def _random_texts() -> tuple[list[Batch], list[Tensor]]:
    """The same for tiny models."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 128, (4 + number % 9,), generator=generator) for number in range(40)]
    ids_BT = torch.randint(3, 128, (4, 40), generator=generator)
    return [{"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": ids_BT}], prompts


def _drawn(prompts: Sequence[Tensor], draw: random.Random, rows: int, *, padded: bool) -> Texts:
    """Some prompts: padded on the left, or cut to the length of the shortest."""
    some = draw.sample(list(prompts), rows)
    if not padded:
        shortest = min(map(len, some))
        some = [tokens[-shortest:] for tokens in some]
    masks = [torch.ones_like(tokens) for tokens in some]
    ids_BT, mask_BT = (pad_sequence(each, batch_first=True, padding_side="left") for each in (some, masks))
    return ids_BT, mask_BT


if __name__ == "__main__":
    sys.exit(as_command(main)())
