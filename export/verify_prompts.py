"""Verification of prompts alone, without decoding: one by one, the longest, and graphs that keep the last position; see `export/verify.py`."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import onnx
import torch
from torch import Tensor

from export.checks import BOUNDS, Check, Comparison
from export.label_graph import LOG_PROBS
from export.reference import Reference
from export.runtime import OnnxSession, Output
from export.to_onnx import UNQUANTIZED

KL_PER_SENSITIVITY = 2.0
SMALLEST_KL_BOUND = (
    0.01  # of small models, a run has a handful of rounding decisions that could fall either way, or none
)


class Session(Protocol):
    """What runs an artefact: `OnnxSession`, or `EngineSession` on a GPU."""

    def run(self, input_ids_BT: Tensor, attention_mask_BS: Tensor, cache: list[Any] | None = None) -> Output:
        """See `OnnxSession.run`."""
        ...


def verify_alone(name: str, session: Session, reference: Reference, bound: float) -> Check:
    """Compare each prompt alone, without padding, with torch's run of all of them together.

    Args:
        name: Of the artefact.
        session: Runs it.
        reference: Its first step is used.
        bound: Of the relative difference; where inputs are rounded, distributions are compared as in a free run.
    """
    step, comparison = reference.steps[0], Comparison()
    for row, valid in enumerate(step.valid):
        ids_1T = step.input_ids[row, valid][None]
        output = session.run(ids_1T, torch.ones_like(ids_1T))
        comparison.add_logits(0, output.logits[0], step.logits[row, valid])
    if reference.sensitivity is not None:
        return bounded_by_kl(comparison, f"{name}, one prompt at a time", reference)
    return comparison.check(f"{name}, one prompt at a time", bound)


def verify_longest(reference: Reference, path: Path, *, threads: int | None = None) -> Check:
    """Compare an ONNX file with the recorded run of `longest_prompt`."""
    metadata, session = metadata_of(path), OnnxSession(path, threads=threads, exact=True)
    name = f"onnx {metadata['precision']}"
    check = verify_alone(name, session, reference, BOUNDS[metadata["activations"]])
    return replace(check, name=f"{name}, longest prompt ({reference.steps[0].input_ids.shape[1]} tokens)")


def verify_prefill(reference: Reference, path: Path, *, threads: int | None = None, for_cpu: bool = False) -> Check:
    """Compare a graph of the last position only with the recorded prompts; see `verify_alone` and `verify_cpu` for the bounds."""
    precision, activations = metadata_of(path)["precision"], metadata_of(path)["activations"]
    step, comparison = reference.steps[0], Comparison()
    output = OnnxSession(path, threads=threads, exact=not for_cpu).run(step.input_ids, step.attention_mask)
    comparison.add_logits(0, output.logits[:, -1], step.logits[:, -1])
    name = f"onnx {precision}{' for the CPU' if for_cpu else ''}, prefill graph"
    if reference.sensitivity is not None or (for_cpu and precision != "fp32"):
        return bounded_by_kl(comparison, name, reference)
    return comparison.check(name, BOUNDS[activations])


class LabelSession(Session, Protocol):
    """The same for an artefact that returns log-probabilities of labels."""

    labels: dict[str, int]


def verify_labels(reference: Reference, path: Path, *, threads: int | None = None) -> Check:
    """Compare a graph of labels' log-probabilities with the recorded prompts; see `verify_alone` for the bounds."""
    precision, activations = metadata_of(path)["precision"], metadata_of(path)["activations"]
    between = " (float16 between)" if activations == "float16" and precision not in UNQUANTIZED else ""
    session = OnnxSession(path, threads=threads, exact=True)
    return compare_labels(f"onnx {precision}{between}, label graph", session, reference, BOUNDS[activations])


def compare_labels(name: str, session: LabelSession, reference: Reference, bound: float) -> Check:
    """Compare what is said of labels with the recorded prompts.

    Distributions are over the labels and one bucket for all other tokens.  Arguments as of `verify_alone`.
    """
    step, comparison = reference.steps[0], Comparison()
    ours_BC = session.run(step.input_ids, step.attention_mask).others[LOG_PROBS]
    theirs_BC = step.logits[:, -1].float().log_softmax(-1)[:, list(session.labels.values())]
    comparison.add("log-probabilities", ours_BC, theirs_BC)
    comparison.add_distributions(_with_rest(ours_BC), _with_rest(theirs_BC))
    if reference.sensitivity is not None:
        return bounded_by_kl(comparison, name, reference)
    return comparison.check(name, bound)


def _with_rest(log_probs_BC: Tensor) -> Tensor:
    """Log-probabilities (B, C + 1): those of the labels, and of all other tokens together."""
    rest_B1 = (1 - log_probs_BC.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(torch.float32).eps).log()
    return torch.cat([log_probs_BC, rest_B1], dim=-1)


def bounded_by_kl(comparison: Comparison, name: str, reference: Reference, note: str | None = None) -> Check:
    """The check of distributions: by a multiple of how far the model moves from itself, or the smallest bound."""
    moves = [kl for kl in (reference.sensitivity, reference.kernel_rounding) if kl is not None]
    sensitivity = max(moves, default=None)
    bound = max(KL_PER_SENSITIVITY * (sensitivity or 0.0), SMALLEST_KL_BOUND)
    return comparison.check(name, bound, "kl", sensitivity, note)


def metadata_of(path: Path) -> dict[str, str]:
    """What the graph says of itself: precision, structure, type between the products."""
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
