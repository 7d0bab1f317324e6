"""Verifies everything that an export has written.

| question                                              | how                                                     | of                        |
|-------------------------------------------------------|---------------------------------------------------------|---------------------------|
| does it compute what the model computes?              | layer by layer, fed from torch: `exactness.py`          | every graph               |
| is it as good, run as a server runs it?               | paired test on held-out answers: `faithfulness.py`      | what is served: `model.onnx`, `cpu.onnx`, the engine |
| are its products those of the format?                 | counted in the network that TensorRT read: `products.py` | engines                   |

A check that fails is never repeated with a wider bound.  What needs a GPU is `not_run` without one, never passed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from export.cpu_graph.head_blocks import with_stored_head
from export.engine.write import Engines
from export.layout import (
    CPU_GRAPH,
    ENGINE_LABEL_SOURCE,
    ENGINE_SOURCE,
    GRAPH,
    LABEL_GRAPH,
    PREFILL_GRAPH,
)
from export.onnx_graph.metadata import read_graph
from export.onnx_graph.to_onnx import UNQUANTIZED
from export.phases import Phases
from export.sessions.engine_session import EngineSession, why_not_runnable
from export.sessions.onnx_session import OnnxSession
from export.settings import ExportSettings
from export.verify.checks import Check
from export.verify.exactness import FedSession, compare_alone, compare_graph, compare_longest
from export.verify.faithfulness import (
    HeldOut,
    answer_tokens,
    compare_labels,
    compare_served,
    judged_by,
    num_tokens_for,
    sampled,
    torch_served,
)
from export.verify.products import audit
from export.verify.served import Served
from export.verify.torch_run import Run
from models.copies import with_rounded_weights
from models.loading.reference import end_token_ids

PROMPTS_AT_ONCE = 4  # what enters and leaves the layers of a prompt of 100 tokens of SmolLM2-135M is 100 MB


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
    settings: ExportSettings,
    prompts: Mapping[str, Tensor],
    phases: Phases,
    held_out: HeldOut | None = None,
) -> Verification:
    """Compare graphs and engines with the torch model they were made from.

    Args:
        model: The torch model, with the quantizers that were exported; it is not changed.
        folder: Has files of `export/layout.py`; those that are there are verified.
        engines: What was compiled, if anything.
        settings: What was exported.
        prompts: `prompt_ids` (B, P), left padded, and `prompt_mask` (B, P).
        phases: Show the progress.
        held_out: For the free runs; None, or too few answers without a judge: answers that the model samples to the prompts.
    """
    audits: list[Check] = []
    if engines is not None and settings.precision not in UNQUANTIZED:
        audits = [audit(model, engine.products, settings.precision + title) for title, engine in engines.titled()]
    model = with_rounded_weights(model)
    checks = _exactness(model, folder, settings, prompts, phases)
    free, served = _free_runs(model, folder, engines, settings, prompts, phases, held_out)
    return Verification(checks + audits + free, served)


def _exactness(
    model: PreTrainedModel, folder: Path, settings: ExportSettings, prompts: Mapping[str, Tensor], phases: Phases
) -> list[Check]:
    threads, precision = settings.threads, settings.precision
    runs = [Run(model, *group, settings.decode_steps) for group in _groups(prompts)]
    steps = len(runs) * (settings.decode_steps + 1)
    several = len(prompts["prompt_ids"]) > 1
    longest_1T = longest_prompt(prompts["prompt_ids"], prompts["prompt_mask"], _longest(model, settings))
    checks: list[Check] = []

    def last_positions(name: str, path: str, runs: list[Run]) -> list[Check]:
        """A graph that returns something about the last position, compared on the prompts."""
        asked = [replace(run, decode_steps=0) for run in runs]
        found = compare_graph(name, asked, FedSession(folder / path, threads))
        return [replace(check, name=name) for check in found]

    def together_and_alone(
        name: str, path: str, runs: list[Run], on_token: Callable[[], None], *, for_cpu: bool = False
    ) -> list[Check]:
        """A graph compared on all prompts with tokens behind them, then on each prompt alone if there are several."""
        session = FedSession(folder / path, threads, for_cpu=for_cpu)
        found = compare_graph(name, runs, session, on_token=on_token)
        return [*found, compare_alone(name, runs, session)] if several else found

    if (folder / GRAPH).is_file():
        with phases.phase("Verification of model.onnx", steps) as on_token:
            name = f"onnx {precision}"
            checks += together_and_alone(name, GRAPH, runs, on_token)
            if settings.prefill:
                checks += last_positions(f"{name}, prefill graph", PREFILL_GRAPH, runs)
            if settings.labels:
                checks += last_positions(f"{name}, label graph", LABEL_GRAPH, runs)
        with phases.phase("Verification of the longest prompt"):
            checks.append(compare_longest(name, model, longest_1T, folder / GRAPH, threads=threads))
    if settings.cpu:
        with phases.phase("Verification of cpu.onnx", steps) as on_token:
            name, path = f"onnx {precision} for the CPU", folder / CPU_GRAPH
            stored = with_stored_head(model, read_graph(path).graph)
            runs_stored = [Run(stored, *group, settings.decode_steps) for group in _groups(prompts)]
            checks += together_and_alone(name, CPU_GRAPH, runs_stored, on_token, for_cpu=True)
            checks.append(compare_longest(name, stored, longest_1T, path, threads=threads))
    if (folder / ENGINE_SOURCE).is_file():
        with phases.phase("Verification of engine-source.onnx", steps) as on_token:
            name = f"onnx {precision} (float16 between)"
            checks += together_and_alone(name, ENGINE_SOURCE, runs, on_token)
            if settings.labels:
                checks += last_positions(f"{name}, label graph", ENGINE_LABEL_SOURCE, runs)
    return checks


def _free_runs(
    model: PreTrainedModel,
    folder: Path,
    engines: Engines | None,
    settings: ExportSettings,
    prompts: Mapping[str, Tensor],
    phases: Phases,
    held_out: HeldOut | None,
) -> tuple[list[Check], dict[str, Served]]:
    precision, ends = settings.precision, end_token_ids(model)
    why_not = None if engines is None else why_not_runnable(settings.tensorrt)
    checks = _not_run(engines, precision, why_not)
    wanted = num_tokens_for(model)
    if held_out is None or (held_out.judge is None and answer_tokens(held_out) < wanted):
        with phases.phase("Sampling held-out answers"):
            held_out = sampled(model, prompts, wanted)
    held_out = judged_by(model, held_out)
    with phases.phase("Torch, judged", len(held_out.batches)) as on_batch:
        reference = torch_served(model, held_out, on_batch)
    served: dict[str, Served] = {}
    for title, name, path in (("", "student", GRAPH), (" for the CPU", "student_cpu", CPU_GRAPH)):
        if not (folder / path).is_file():
            continue
        with phases.phase(f"{Path(path).name}, judged as served", len(held_out.batches)) as on_batch:
            session = OnnxSession(folder / path, threads=settings.threads)
            served[name] = held_out.measure(session, ends, on_batch)
        checks.append(compare_served(f"onnx {precision}{title}", model, served[name], reference))
    if engines is not None and why_not is None:
        with phases.phase("Engine, judged", len(held_out.batches)) as on_batch:
            found = held_out.measure(EngineSession(engines.model.path, settings.tensorrt), ends, on_batch)
        checks.append(compare_served(f"engine {precision}", model, found, reference))
        if engines.labels is not None:
            checks.append(
                compare_labels(
                    f"engine {precision}, labels", EngineSession(engines.labels.path, settings.tensorrt), model, prompts
                )
            )
    return checks, served


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


def _longest(model: PreTrainedModel, settings: ExportSettings) -> int:
    """Tokens of the longest prompt that graph and engine have to take."""
    return min(settings.sequence[2], getattr(model.config, "max_position_embeddings", None) or settings.sequence[2])


def longest_prompt(input_ids_BT: Tensor, attention_mask_BT: Tensor, length: int) -> Tensor:
    """One prompt (1, length) of the tokens of all prompts over and over: the longest that an artefact has to take."""
    tokens = input_ids_BT[attention_mask_BT.bool()]
    return tokens.repeat(-(-length // len(tokens)))[None, :length]
