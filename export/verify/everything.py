"""Verifies everything that an export has written.

| question                                              | how                                                     | of                        |
|-------------------------------------------------------|---------------------------------------------------------|---------------------------|
| does it compute what the model computes?              | layer by layer, fed from torch: `exactness.py`          | every graph               |
| is it as good, run as a server runs it?               | paired test on held-out answers: `faithfulness.py`      | what is served: `model.onnx`, `cpu.onnx`, the engine |
| are its products those of the format?                 | counted in the network that TensorRT read               | engines |

A check that fails is never repeated with a wider bound.  What needs a GPU is `not_run` without one, never passed.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from export.cpu_graph.head_blocks import with_stored_head
from export.engine.write import Engines
from export.layout import CPU_GRAPH, ENGINE_LABEL_SOURCE, ENGINE_SOURCE, GRAPH, LABEL_GRAPH, PREFILL_GRAPH
from export.onnx_graph.metadata import read_graph
from export.onnx_graph.to_onnx import UNQUANTIZED
from export.phases import Phases
from export.sessions.engine_session import EngineSession, why_not_runnable
from export.sessions.onnx_session import OnnxSession
from export.sessions.session import Session
from export.verify.checks import Check
from export.verify.exactness import FedSession, compare_alone, compare_graph, compare_longest
from export.verify.faithfulness import (
    answer_tokens,
    compare_labels,
    compare_served,
    judged_by,
    num_tokens_for,
    sampled,
    torch_served,
)
from export.verify.served import HeldOut, Served
from export.verify.torch_run import Run
from models.copies import with_rounded_weights
from models.loading.reference import end_token_ids
from models.quantization.linear import quantized_linears

_TENSORRT_NAMES = {"fp8_e4m3": "FP8", "int8": "INT8", "int4": "INT4"}
PROMPTS_AT_ONCE = 4  # what enters and leaves the layers of a prompt of 100 tokens of SmolLM2-135M is 100 MB


@dataclass(frozen=True)
class Extent:
    """How far, and how, graphs are compared with torch.

    Attributes:
        decode_steps: Tokens behind each prompt.
        longest: Tokens of the longest prompt that is tried, within the positions of the model.
        threads: Threads in ONNX Runtime; None: its choice.
    """

    decode_steps: int = 64
    longest: int = 1024
    threads: int | None = None


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        checks: One for each artefact and part.
        served: Graphs that are served, judged on held-out answers, by name: `student`, `student_cpu`.
    """

    checks: list[Check]
    served: dict[str, Served]


def verify_artefacts(
    model: PreTrainedModel,
    folder: Path,
    engines: Engines | None,
    precision: str,
    *,
    extent: Extent,
    prompts: Mapping[str, Tensor],
    phases: Phases,
    held_out: HeldOut | None = None,
) -> Verification:
    """Compare graphs and engines with the torch model they were made from.

    Args:
        model: The torch model, with the quantizers that were exported; it is not changed.
        folder: Has files of `export/layout.py`; those that are there are verified.
        engines: What was compiled, if anything.
        precision: Of all of them.
        extent: How far they are compared.
        prompts: `prompt_ids` (B, P), left padded, and `prompt_mask` (B, P).
        phases: Show the progress.
        held_out: For the free runs; None, or too few answers without a judge: answers that the model samples to the prompts.
    """
    audits: list[Check] = []
    if engines is not None and precision not in UNQUANTIZED:
        audits = [audit(model, engine.products, precision + title) for title, engine in engines.titled()]
    model = with_rounded_weights(model)
    checks = _exactness(model, folder, precision, extent, prompts, phases)
    free, served = _free_runs(model, folder, engines, precision, extent, prompts, phases, held_out)
    return Verification(checks + audits + free, served)


def _exactness(
    model: PreTrainedModel, folder: Path, precision: str, extent: Extent, prompts: Mapping[str, Tensor], phases: Phases
) -> list[Check]:
    groups = list(_groups(prompts))
    steps = len(groups) * (extent.decode_steps + 1)
    positions = getattr(model.config, "max_position_embeddings", None) or extent.longest
    longest_1T = longest_prompt(prompts["prompt_ids"], prompts["prompt_mask"], min(extent.longest, positions))
    checks: list[Check] = []

    def compare(name: str, path: str, model: PreTrainedModel, on_token: Callable[[], None], **beside: str) -> None:
        """A graph on prompts with tokens behind them, then on each alone; graphs beside it on the prompts only."""
        runs = [Run(model, *group, extent.decode_steps) for group in groups]
        session = FedSession(folder / path, extent.threads, for_cpu=path == CPU_GRAPH)
        checks.extend(compare_graph(name, runs, session, on_token=on_token))
        if len(prompts["prompt_ids"]) > 1:
            checks.append(compare_alone(name, runs, session))
        for kind, other in beside.items():
            if (folder / other).is_file():
                asked = [replace(run, decode_steps=0) for run in runs]
                found = compare_graph(name, asked, FedSession(folder / other, extent.threads))
                checks.extend(replace(check, name=f"{name}, {kind} graph") for check in found)

    def compare_long(name: str, path: str, model: PreTrainedModel) -> None:
        checks.append(compare_longest(name, model, longest_1T, folder / path, threads=extent.threads))

    if (folder / GRAPH).is_file():
        name = f"onnx {precision}"
        with phases.phase("Verification of model.onnx", steps) as on_token:
            compare(name, GRAPH, model, on_token, prefill=PREFILL_GRAPH, label=LABEL_GRAPH)
        with phases.phase("Verification of the longest prompt"):
            compare_long(name, GRAPH, model)
    if (folder / CPU_GRAPH).is_file():
        name = f"onnx {precision} for the CPU"
        with phases.phase("Verification of cpu.onnx", steps) as on_token:
            stored = with_stored_head(model, read_graph(folder / CPU_GRAPH).graph)
            compare(name, CPU_GRAPH, stored, on_token)
            compare_long(name, CPU_GRAPH, stored)
    if (folder / ENGINE_SOURCE).is_file():
        with phases.phase("Verification of engine-source.onnx", steps) as on_token:
            name = f"onnx {precision} (float16 between)"
            compare(name, ENGINE_SOURCE, model, on_token, label=ENGINE_LABEL_SOURCE)
    return checks


def _free_runs(
    model: PreTrainedModel,
    folder: Path,
    engines: Engines | None,
    precision: str,
    extent: Extent,
    prompts: Mapping[str, Tensor],
    phases: Phases,
    held_out: HeldOut | None,
) -> tuple[list[Check], dict[str, Served]]:
    ends, wanted = end_token_ids(model), num_tokens_for(model)
    why_not = None if engines is None else why_not_runnable(engines.model.flavour)
    checks = _not_run(engines, precision, why_not)
    if held_out is None or (held_out.judge is None and answer_tokens(held_out) < wanted):
        with phases.phase("Sampling held-out answers"):
            held_out = sampled(model, prompts, wanted)
    judged = judged_by(model, held_out)
    served: dict[str, Served] = {}

    def measured(title: str, opened: Callable[[], Session]) -> Served:
        with phases.phase(title, len(judged.batches)) as on_batch:
            return judged.measure(opened(), ends, on_batch)

    with phases.phase("Torch, judged", len(judged.batches)) as on_batch:
        reference = torch_served(model, judged, on_batch)
    for title, name, path in (("", "student", GRAPH), (" for the CPU", "student_cpu", CPU_GRAPH)):
        if (folder / path).is_file():
            opened = partial(OnnxSession, folder / path, threads=extent.threads)
            served[name] = measured(f"{Path(path).name}, judged as served", opened)
            checks.append(compare_served(f"onnx {precision}{title}", model, served[name], reference))
    if engines is not None and why_not is None:
        engine, labels = engines.model, engines.labels
        found = measured("Engine, judged", partial(EngineSession, engine.path, engine.flavour))
        checks.append(compare_served(f"engine {precision}", model, found, reference))
        if labels is not None:
            session = EngineSession(labels.path, labels.flavour)
            checks.append(compare_labels(f"engine {precision}, labels", session, model, prompts))
    return checks, served


def audit(model: PreTrainedModel, products: Mapping[str, int], engine: str) -> Check:
    """Whether the network that TensorRT's parser read has a quantized product for every quantized layer of the model.

    Networks are strongly typed: a product between two DequantizeLinear of FP8 is what the compiler fuses.  What it
    chose in the end only a GPU can tell.  `products` is what `export.engine.to_tensorrt.inspect` counted.
    """
    linears = quantized_linears(model).values()
    inputs = [linear.input_quantizer for linear in linears]
    wanted = Counter(
        f"{'HALF' if input is None else _TENSORRT_NAMES[input.grid.numbers]} x "
        f"{_TENSORRT_NAMES[linear.weight_quantizer.grid.numbers]}"
        for linear, input in zip(linears, inputs, strict=True)
    )
    missing = [
        f"{count} {name}, found {products.get(name, 0)}"
        for name, count in wanted.items()
        if products.get(name, 0) < count
    ]
    found = ", ".join(f"{count} {name}" for name, count in sorted(products.items()))
    return Check(
        name=f"engine {engine}, quantized products in the parsed network",
        status="failed" if missing else "passed",
        reason=f"expected {'; '.join(missing)}" if missing else None,
        note=f"products with a weight: {found}; which kernels were chosen for them only a GPU can tell",
    )


def _not_run(engines: Engines | None, precision: str, reason: str | None) -> list[Check]:
    """What an engine would be checked for, where it can't run."""
    if engines is None or reason is None:
        return []
    names = [f"engine {precision}, free run", *([f"engine {precision}, labels"] if engines.labels else [])]
    return [Check(name, "not_run", reason=reason) for name in names]


def _groups(prompts: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Some prompts and their mask at a time, without the padding that all of them have."""
    ids_BT, mask_BT = prompts["prompt_ids"], prompts["prompt_mask"]
    for start in range(0, len(ids_BT), PROMPTS_AT_ONCE):
        some_BT = mask_BT[start : start + PROMPTS_AT_ONCE]
        first = int(some_BT.any(dim=0).int().argmax())
        yield ids_BT[start : start + PROMPTS_AT_ONCE, first:], some_BT[:, first:]


def longest_prompt(input_ids_BT: Tensor, attention_mask_BT: Tensor, length: int) -> Tensor:
    """One prompt (1, length) of the tokens of all prompts over and over: the longest that an artefact has to take."""
    tokens = input_ids_BT[attention_mask_BT.bool()]
    return tokens.repeat(-(-length // len(tokens)))[None, :length]
