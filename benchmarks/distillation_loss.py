"""The chunked distillation loss against the naive one: memory beyond the inputs, and time of forward and backward.

    python -m benchmarks.distillation_loss [--objective NAME] [--precision TYPE] [--json FILE]

Naive: both heads' logits and log-probabilities at once in float32, gradients by autograd.  Both sides compute d/d hidden and
d/d weight of the student's head.  Every side works in a process of its own, which calls one at a time in turns; its peak memory
is the highest resident size during the call over the one before (CPU, Linux), or what the allocator reports (CUDA).  With CUDA and
`liger-kernel` installed, its fused JSD is a third column, for the objectives it has.  The ratios are the worst of the sizes,
this project over naive.
"""

import argparse
import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import interleave, parser, report, spread
from benchmarks.workers import Gate, Worker
from models import losses
from models.losses import FullTargets, Head, Objective, linear_objective
from program.screen import as_command

SIZES = ["8192x49152x576", "2048x151936x896"]
NAIVE = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "jsd": losses.generalized_jsd,
    "skew_forward_kl": losses.skew_forward_kl,
    "skew_reverse_kl": losses.skew_reverse_kl,
    "total_variation": losses.total_variation,
    "top_k_kl": losses.top_k_kl,
}
LIGER_BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


def main() -> None:
    """Measure every size and print the ratios."""
    options = parser(__doc__)
    options.add_argument(
        "--objective", choices=NAIVE, default="forward_kl", help="loss to compare (default: forward_kl)"
    )
    options.add_argument(
        "--precision", choices=["float32", "bfloat16"], default="float32", help="of the matrix products, by autocast"
    )
    options.add_argument(
        "--sizes",
        nargs="+",
        default=SIZES,
        metavar="NxVxD",
        help=f"tokens, vocabulary, hidden (default: {' '.join(SIZES)})",
    )
    options.add_argument(
        "--chunk-tokens", type=int, default=0, help="tokens of a chunk (default: the loss's own choice)"
    )
    arguments = options.parse_args()
    sides = ["potstill", "naive"]
    if torch.cuda.is_available() and find_spec("liger_kernel") and arguments.objective in LIGER_BETAS:
        sides.append("liger")
    results: list[dict[str, Any]] = []
    ratios = {"peak_extra_memory": 0.0, "time": 0.0}
    for size in arguments.sizes:
        rows = measure(size, sides, arguments)
        results += rows.values()
        for ratio, key in (("peak_extra_memory", "peak_extra_mib"), ("time", "median_s")):
            ratios[ratio] = max(ratios[ratio], rows["potstill"][key] / rows["naive"][key])
    packages = ["torch", "liger-kernel"] if "liger" in sides else ["torch"]
    report(results, ratios, packages, arguments.json)


def measure(size: str, sides: list[str], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """One row a side, in turns."""
    settings = {key: getattr(arguments, key) for key in ("objective", "precision", "chunk_tokens")}
    workers = {
        side: Worker("benchmarks.distillation_loss:work", {"side": side, "size": size, **settings}) for side in sides
    }
    answers: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    calls = {side: lambda side=side: answers[side].append(workers[side].step()) for side in sides}  # type: ignore[misc]
    try:
        seconds = interleave(calls, repetitions=arguments.repetitions)
    finally:
        for worker in workers.values():
            worker.close()
    losses_found = [answers[side][0]["loss"] for side in sides]
    if max(losses_found[:2]) - min(losses_found[:2]) > 1e-2 * losses_found[0]:
        raise RuntimeError(
            f"expected equal losses of both sides, found {losses_found}; the measurement compares unlike things"
        )
    rows = {}
    for side in sides:
        counted = [answer["seconds"] for answer in answers[side][-len(seconds[side]) :]]
        peak = max(answer["peak_extra_mib"] for answer in answers[side])
        rows[side] = {
            "name": side,
            "size": size,
            "objective": arguments.objective,
            **spread(counted),
            "peak_extra_mib": peak,
        }
    return rows


def work(gate: Gate, side: str, size: str, **settings: Any) -> None:
    """The worker's side: one measured call whenever the gate opens."""
    arguments = argparse.Namespace(**settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, vocabulary, hidden = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(0)
    student_ND, teacher_ND = (torch.randn(tokens, hidden, generator=generator).to(device) for _ in "st")
    weights = [torch.randn(vocabulary, hidden, generator=generator).div_(hidden**0.5).to(device) for _ in "st"]
    inputs = [student_ND.requires_grad_(), weights[0].requires_grad_()]
    step = STEPS[side](student_ND, weights[0], teacher_ND, weights[1], arguments)

    def call() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bfloat16"):
            loss = step()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    gate.arrive()
    while True:
        for tensor in inputs:
            tensor.grad = None
        base = reset_peak(device)
        started = time.perf_counter()
        loss = call()
        seconds = time.perf_counter() - started
        gate.arrive(seconds=seconds, peak_extra_mib=(peak(device) - base) / 2**20, loss=loss)


def potstill(
    student_ND: Tensor, student_VD: Tensor, teacher_ND: Tensor, teacher_VD: Tensor, arguments: argparse.Namespace
) -> Callable[[], Tensor]:
    """This project's loss."""
    labels_N = torch.zeros(len(student_ND), dtype=torch.long, device=student_ND.device)
    targets = FullTargets(teacher_ND, Head(teacher_VD))
    objective = Objective({arguments.objective: 1.0})
    return lambda: linear_objective(
        student_ND, Head(student_VD), targets, labels_N, objective, chunk_tokens=arguments.chunk_tokens
    )[0]


def naive(
    student_ND: Tensor, student_VD: Tensor, teacher_ND: Tensor, teacher_VD: Tensor, arguments: argparse.Namespace
) -> Callable[[], Tensor]:
    """All logits at once."""

    def step() -> Tensor:
        with torch.no_grad():
            teacher_logits_NV = F.linear(teacher_ND, teacher_VD)
        return NAIVE[arguments.objective](F.linear(student_ND, student_VD), teacher_logits_NV).sum()

    return step


def liger(
    student_ND: Tensor, student_VD: Tensor, teacher_ND: Tensor, teacher_VD: Tensor, arguments: argparse.Namespace
) -> Callable[[], Tensor]:
    """Liger's chunked loss, the divergence alone."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels_N = torch.zeros(len(student_ND), dtype=torch.long, device=student_ND.device)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=LIGER_BETAS[arguments.objective])
    return partial(loss, student_ND, student_VD, teacher_ND, teacher_VD, labels_N, None, None)


STEPS = {"potstill": potstill, "naive": naive, "liger": liger}


def reset_peak(device: torch.device) -> int:
    """Give freed memory back, forget the peak so far, and return the bytes in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(device: torch.device) -> int:
    """Highest bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")


def resident(field: str) -> int:
    """A size of this process in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    sys.exit(as_command(main)())
