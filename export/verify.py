"""Does the artefact compute what the torch model computes?  Prompts, then greedy tokens with a cache, step by step.

| artefact               | compared                                             | bound                                     |
|------------------------|------------------------------------------------------|-------------------------------------------|
| float32 / float16 ONNX | logits and new cache entries                         | 1e-4 / 1e-2 of the largest value          |
| weight-only ONNX       | as float32 / float16                                 | the same                                  |
| the same, as served    | distributions                                        | KL: 2 x that of the model and itself with |
|                        |                                                      | inputs rounded as fast kernels round them |
| rounded inputs, fed    | the same, and what enters each activation quantizer  | 1e-4 (float32 between) / 1e-2 (float16)   |
| rounded inputs, free   | distributions                                        | KL: 2 x the model's own sensitivity       |
| one prompt at a time   | logits without padding with the run of the batch     | as for the file, free                     |
| longest prompt         | one prompt of the largest length that is allowed     | as for the file, free                     |
| `cpu.onnx`             | float32 as above; quantized ones as a free run       | the same                                  |
| engine                 | as the ONNX file; with rounded inputs as a free run  | needs a GPU, else `not_run`               |

"Fed": each activation quantizer gets the value that entered it in torch, see `export/cut.py` for why; what the graph computed in
its place is compared too, in float16 graphs by root mean square.  "Sensitivity": how far
the torch model moves from itself when its embeddings change in the last digit; no runtime with another order of summation can
be expected to come closer.  Rows at padding positions are left out.  A check that fails is never repeated with a wider bound.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from export.checks import BOUNDS, Check, Comparison
from export.cut import FED, cut_at_quantizers
from export.engine_runtime import EngineSession, why_not_runnable
from export.reference import Reference, Step, record
from export.runtime import OnnxSession, Output, new_entries
from export.to_tensorrt import Flavour
from export.trace import cache_names
from export.verify_prompts import (
    KL_PER_SENSITIVITY,
    SMALLEST_KL_BOUND,
    Session,
    bounded_by_kl,
    compare_labels,
    metadata_of,
    verify_alone,
)
from models.quantization.linear import quantized_linears, rounds_inputs

_FREE_NOTE = f"bound: {KL_PER_SENSITIVITY:g} x the torch model's own sensitivity to its last digits, {SMALLEST_KL_BOUND} nats at least"
_SERVED_NOTE = (
    f"fast kernels round inputs to 8 bits; bound: {KL_PER_SENSITIVITY:g} x what this does to the torch model, {SMALLEST_KL_BOUND} nats at "
    'least; a session with "session.qdq_matmulnbits_accuracy_level" = "0" does not round them, and is slower'
)
_FED_NOTE = "each activation quantizer was fed the value that entered it in torch; see export/cut.py"


def verify(
    model: PreTrainedModel,
    onnx_path: Path,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    *,
    decode_steps: int = 64,
    bound: float | None = None,
) -> list[Check]:
    """Compare an ONNX file with its model on a batch of left-padded prompts and `decode_steps` greedy tokens.

    Args:
        model: The torch model; for an FP8 file with its fake quantizers.
        onnx_path: Written by `export_onnx`.
        input_ids_BT: Left-padded prompts, int64.
        attention_mask_BT: 1 for tokens, 0 for padding, int64.
        decode_steps: Tokens after the prompts.
        bound: Largest accepted relative difference; default: that of the file's precision.
    """
    reference = record(model, input_ids_BT, attention_mask_BT, decode_steps=decode_steps)
    return verify_onnx(model, reference, onnx_path, bound=bound)


def verify_onnx(
    model: PreTrainedModel,
    reference: Reference,
    path: Path,
    *,
    threads: int | None = None,
    bound: float | None = None,
    free_run: bool = True,
    on_step: Callable[[], None] = lambda: None,
) -> list[Check]:
    """Compare an ONNX file with a recorded run; see `verify`.  `free_run` only matters where inputs are rounded."""
    metadata = metadata_of(path)
    bound = BOUNDS[metadata["activations"]] if bound is None else bound
    name = f"onnx {metadata['precision']}"
    if quantized_linears(model) and metadata["activations"] == "float16":
        name += " (float16 between)"
    exact = OnnxSession(path, threads=threads, exact=True)
    if rounds_inputs(model):
        checks = _compare_fed(name, model, reference, path, threads, bound, on_step)
    else:
        checks = _compare_run(name, exact, reference, bound, on_step)
    if (quantized_linears(model) or rounds_inputs(model)) and free_run:
        served = OnnxSession(path, threads=threads)
        checks.append(verify_free_run(f"{name}, as served", served, reference, on_step))
    if len(reference.steps[0].input_ids) > 1:
        checks.append(verify_alone(name, exact, reference, bound))
    return checks


def verify_cpu(
    reference: Reference, path: Path, *, threads: int | None = None, on_step: Callable[[], None] = lambda: None
) -> list[Check]:
    """Compare a graph of `export.for_cpu` with a recorded run: float32 as any, quantized ones, whose head is rounded, as served.

    Keys behind padding are left out, as such a graph turns them by their place in the cache: logits tell whether that is right.
    """
    precision, session = metadata_of(path)["precision"], OnnxSession(path, threads=threads)
    name = f"onnx {precision} for the CPU"
    if precision == "fp32" and reference.sensitivity is None:
        return _compare_run(name, session, reference, BOUNDS["float32"], on_step, padded_keys=False)
    return [verify_free_run(name, session, reference, on_step)]


def verify_free_run(
    name: str, session: Session, reference: Reference, on_step: Callable[[], None] = lambda: None
) -> Check:
    """Compare the distributions of an artefact with torch's, each with its own rounding decisions."""
    comparison = Comparison()
    cache = None
    for number, step in enumerate(reference.steps):
        output = session.run(step.input_ids, step.attention_mask, cache)
        cache = output.cache
        comparison.add_logits(number, output.logits[step.valid], step.logits[step.valid])
        comparison.add_choices(output.logits[:, -1], step.logits[:, -1])
        on_step()
    note = _FREE_NOTE if reference.sensitivity is not None else _SERVED_NOTE
    return bounded_by_kl(comparison, f"{name}, free run", reference, note)


def verify_engine(
    reference: Reference,
    path: Path,
    precision: str,
    flavour: Flavour = "auto",
    on_step: Callable[[], None] = lambda: None,
) -> list[Check]:
    """Compare an engine with a recorded run; without a GPU the checks are `not_run`, with the reason."""
    name = f"engine {precision}"
    reason = why_not_runnable(flavour)
    if reason is not None:
        return [Check(f"{name}, {phase}", "not_run", reason=reason) for phase in ("prefill", "decode")]
    session = EngineSession(path, flavour)
    if reference.sensitivity is not None:
        return [verify_free_run(name, session, reference, on_step)]
    return _compare_run(name, session, reference, _engine_bound(precision), on_step)


def verify_label_engine(reference: Reference, path: Path, precision: str, flavour: Flavour = "auto") -> Check:
    """Compare an engine that returns log-probabilities of labels with the recorded prompts; see `verify_engine`."""
    name, reason = f"engine {precision}, labels", why_not_runnable(flavour)
    if reason is not None:
        return Check(name, "not_run", reason=reason)
    return compare_labels(name, EngineSession(path, flavour), reference, _engine_bound(precision))


def _engine_bound(precision: str) -> float:
    return BOUNDS["float32" if precision == "fp32" else "float16"]


def _compare_run(
    name: str,
    session: Session,
    reference: Reference,
    bound: float,
    on_step: Callable[[], None],
    *,
    padded_keys: bool = True,
) -> list[Check]:
    comparisons = {"prefill": Comparison(), "decode": Comparison()}
    cache = None
    for number, step in enumerate(reference.steps):
        output = session.run(step.input_ids, step.attention_mask, cache)
        cache = output.cache
        comparison = comparisons["decode" if number else "prefill"]
        _compare_step(comparison, number, step, output, reference.cache_scales, padded_keys=padded_keys)
        comparisons["decode"].add_choices(output.logits[:, -1], step.logits[:, -1])  # the first token, too
        on_step()
    return [comparison.check(f"{name}, {phase}", bound) for phase, comparison in comparisons.items()]


def _compare_fed(
    name: str,
    model: PreTrainedModel,
    reference: Reference,
    path: Path,
    threads: int | None,
    bound: float,
    on_step: Callable[[], None],
) -> list[Check]:
    graph, entering = cut_at_quantizers(path)
    session = OnnxSession(path, threads=threads, graph=graph, exact=True)
    quantizers = dict(model.named_modules())
    half = metadata_of(path)["activations"] == "float16"
    comparisons = {"prefill": Comparison(), "decode": Comparison()}
    cache = None
    for number, step in enumerate(reference.steps):
        fed = {quantizer: step.quantizer_inputs[quantizer] for quantizer in entering}
        if half:  # values on the grid: float16 must not decide their rounding once more
            fed = {name: quantizers[name].quantize(value).half() for name, value in fed.items()}  # type: ignore[operator]
        others = {quantizer + FED: value for quantizer, value in fed.items()}
        output = session.run(step.input_ids, step.attention_mask, cache, others)
        cache = output.cache
        comparison = comparisons["decode" if number else "prefill"]
        _compare_step(comparison, number, step, output, reference.cache_scales)
        comparisons["decode"].add_choices(output.logits[:, -1], step.logits[:, -1])
        for quantizer, tensor in entering.items():
            theirs = step.quantizer_inputs[quantizer]
            ours = output.others[tensor].reshape(theirs.shape)  # of attention, heads may still lie apart
            if theirs.dim() == 4:  # keys and values
                ours, theirs = ours.transpose(1, 2), theirs.transpose(1, 2)
            add = comparison.add_inside if half else comparison.add
            add(f"input of {quantizer} at step {number}", ours[step.valid], theirs[step.valid])
        on_step()
    return [comparison.check(f"{name}, {phase}", bound, note=_FED_NOTE) for phase, comparison in comparisons.items()]


def _compare_step(
    comparison: Comparison,
    number: int,
    step: Step,
    output: Output,
    scales: Sequence[float],
    *,
    padded_keys: bool = True,
) -> None:
    comparison.add_logits(number, output.logits[step.valid], step.logits[step.valid])
    entries = new_entries(output.cache, step.input_ids.shape[1], scales)
    names = cache_names("present", len(entries) // 2)
    unpadded_BT = step.valid & step.attention_mask.all(dim=1, keepdim=True)
    for name, ours, theirs in zip(names, entries, step.cache, strict=True):
        compared_BT = step.valid if padded_keys or name.endswith("value") else unpadded_BT
        if compared_BT.any():
            both = (tensor.transpose(1, 2)[compared_BT] for tensor in (ours, theirs))
            comparison.add_layer(f"{name} at step {number}", *both)
