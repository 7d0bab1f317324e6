"""Verifies everything that an export has written, on prompts in small groups.

A recorded run keeps all logits and all that entered a quantizer: of SmolLM2-135M in FP8, 32 MB of logits and 64 MB of inputs for
a prompt of 100 tokens and 64 more.  So one group of prompts goes through all artefacts before the next is recorded, and checks of
the same name become one.

Letters: B prompts, P their length.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from export.audit import audit
from export.checks import Check, merged
from export.engines import Engines
from export.layout import (
    CPU_GRAPH,
    CPU_PREFILL_GRAPH,
    ENGINE_LABEL_SOURCE,
    ENGINE_SOURCE,
    GRAPH,
    LABEL_GRAPH,
    PREFILL_GRAPH,
)
from export.progress import Phases
from export.reference import Reference, record
from export.settings import ExportSettings
from export.to_onnx import UNQUANTIZED
from export.verify import verify_cpu, verify_engine, verify_label_engine, verify_onnx
from export.verify_prompts import verify_labels, verify_longest, verify_prefill
from models.quantization.linear import quantized_linears, rounds_inputs

PROMPTS_AT_ONCE = 8


def verify_artefacts(
    model: PreTrainedModel,
    folder: Path,
    engines: Engines | None,
    settings: ExportSettings,
    prompts: Mapping[str, Tensor],
    phases: Phases,
) -> list[Check]:
    """Compare graphs and engine with the torch model they were made from.

    Args:
        model: The torch model, with the quantizers that were exported.
        folder: Has the files of `export/layout.py`.
        engines: What was compiled, if anything.
        settings: What was exported.
        prompts: `prompt_ids` (B, P), left padded, and `prompt_mask` (B, P).
        phases: Show the progress.

    Returns:
        One check for each artefact and part; see `export/verify.py`.
    """
    found = [
        _verify_group(model, folder, engines, settings, group, phases, part)
        for part, group in _groups(prompts, PROMPTS_AT_ONCE)
    ]
    with phases.phase("Verification of the longest prompt"):
        longest = longest_prompt(prompts["prompt_ids"], prompts["prompt_mask"], _longest(model, settings))
        alone = record(model, longest["prompt_ids"], longest["prompt_mask"], decode_steps=0)
        found.append([verify_longest(alone, folder / GRAPH, threads=settings.threads)])
    if engines is not None and settings.precision not in UNQUANTIZED:
        precision = settings.precision
        found.append([audit(model, engine.products, precision + title) for title, engine in engines.titled()])
    return merged(found)


def _groups(prompts: Mapping[str, Tensor], size: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Words for the progress, and some of the prompts without the padding that all of them have."""
    count = len(prompts["prompt_ids"])
    for start in range(0, count, size):
        some = {name: tensor[start : start + size] for name, tensor in prompts.items()}
        first = int(some["prompt_mask"].any(dim=0).int().argmax())
        last = min(start + size, count)
        part = f", prompts {start + 1} to {last} of {count}" if count > size else ""
        yield part, {name: tensor[:, first:] for name, tensor in some.items()}


def _verify_group(
    model: PreTrainedModel,
    folder: Path,
    engines: Engines | None,
    settings: ExportSettings,
    prompts: Mapping[str, Tensor],
    phases: Phases,
    part: str,
) -> list[Check]:
    steps, threads = settings.decode_steps + 1, settings.threads
    with phases.phase("Reference run in torch", steps, part) as on_step:
        reference: Reference = record(
            model, prompts["prompt_ids"], prompts["prompt_mask"], decode_steps=settings.decode_steps, on_step=on_step
        )
    runs = 2 if quantized_linears(model) or rounds_inputs(model) else 1
    with phases.phase("Verification of model.onnx", steps * runs, part) as on_step:
        checks = verify_onnx(model, reference, folder / GRAPH, threads=threads, on_step=on_step)
        if settings.prefill:
            checks.append(verify_prefill(reference, folder / PREFILL_GRAPH, threads=threads))
        if settings.labels:
            checks.append(verify_labels(reference, folder / LABEL_GRAPH, threads=threads))
    if settings.cpu:
        with phases.phase("Verification of cpu.onnx", steps, part) as on_step:
            checks += verify_cpu(reference, folder / CPU_GRAPH, threads=threads, on_step=on_step)
            if settings.prefill:
                checks.append(verify_prefill(reference, folder / CPU_PREFILL_GRAPH, threads=threads, for_cpu=True))
    source = folder / ENGINE_SOURCE
    if source.is_file():
        with phases.phase("Verification of engine-source.onnx", steps, part) as on_step:
            checks += verify_onnx(model, reference, source, threads=threads, free_run=False, on_step=on_step)
            if settings.labels:
                checks.append(verify_labels(reference, folder / ENGINE_LABEL_SOURCE, threads=threads))
    if engines is not None:
        with phases.phase("Verification of the engine", steps, part) as on_step:
            checks += verify_engine(reference, engines.model.path, settings.precision, settings.tensorrt, on_step)
            if engines.labels is not None:
                path = engines.labels.path
                checks.append(verify_label_engine(reference, path, settings.precision, settings.tensorrt))
    return checks


def _longest(model: PreTrainedModel, settings: ExportSettings) -> int:
    """Tokens of the longest prompt that graph and engine have to take."""
    return min(settings.sequence[2], getattr(model.config, "max_position_embeddings", None) or settings.sequence[2])


def longest_prompt(input_ids_BT: Tensor, attention_mask_BT: Tensor, length: int) -> dict[str, Tensor]:
    """One prompt of so many tokens, from those of all prompts over and over: the longest that an artefact has to take."""
    tokens = input_ids_BT[attention_mask_BT.bool()]
    ids_1T = tokens.repeat(-(-length // len(tokens)))[None, :length]
    return {"prompt_ids": ids_1T, "prompt_mask": torch.ones_like(ids_1T)}
