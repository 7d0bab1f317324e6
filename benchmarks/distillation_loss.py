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
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import parser, report, spread
from benchmarks.workers import Gate, Worker, peak_bytes, reset_peak, resident_bytes, take_turns
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
    add = options.add_argument
    add("--objective", choices=NAIVE, default="forward_kl", help="loss to compare (default: %(default)s)")
    text = "of the matrix products, by autocast"
    add("--precision", choices=["float32", "bfloat16"], default="float32", help=text)
    text = f"tokens, vocabulary, hidden (default: {' '.join(SIZES)})"
    add("--sizes", nargs="+", default=SIZES, metavar="NxVxD", help=text)
    add("--chunk-tokens", type=int, default=0, help="tokens of a chunk (default: the loss's own choice)")
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
    settings = {"size": size} | {key: getattr(arguments, key) for key in ("objective", "precision", "chunk_tokens")}
    workers = {side: Worker("benchmarks.distillation_loss:work", {"side": side, **settings}) for side in sides}
    rows, losses_found = {}, []
    for side, calls in take_turns(workers, repetitions=arguments.repetitions, warm_up=1).items():
        losses_found.append(calls[0]["loss"])
        about = {"name": side, "size": size, "objective": arguments.objective}
        peak = max(call["peak_extra_mib"] for call in calls)
        rows[side] = about | spread([call["seconds"] for call in calls]) | {"peak_extra_mib": peak}
    if max(losses_found[:2]) - min(losses_found[:2]) > 1e-2 * losses_found[0]:
        raise RuntimeError(
            f"expected equal losses of both sides, found {losses_found}; the measurement compares unlike things"
        )
    return rows


@dataclass
class Case:
    """What a loss is computed of."""

    student_ND: Tensor
    student_VD: Tensor
    teacher_ND: Tensor
    teacher_VD: Tensor
    labels_N: Tensor
    objective: str
    chunk_tokens: int


def work(gate: Gate, side: str, size: str, objective: str, precision: str, chunk_tokens: int) -> None:
    """The worker's side: one measured call whenever the gate opens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, vocabulary, hidden = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(0)
    student_ND, teacher_ND = (torch.randn(tokens, hidden, generator=generator).to(device) for _ in "st")
    weights = [torch.randn(vocabulary, hidden, generator=generator).div_(hidden**0.5).to(device) for _ in "st"]
    inputs = [student_ND.requires_grad_(), weights[0].requires_grad_()]
    labels_N = torch.zeros(tokens, dtype=torch.long, device=device)
    case = Case(student_ND, weights[0], teacher_ND, weights[1], labels_N, objective, chunk_tokens)

    gate.arrive()
    while True:
        for tensor in inputs:
            tensor.grad = None
        base = bytes_in_use()
        reset_peak()
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = SIDES[side](case)
        loss.backward()
        value = loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        del loss
        gate.arrive(seconds=seconds, peak_extra_mib=(peak_bytes() - base) / 2**20, loss=value)


def potstill(case: Case) -> Tensor:
    """This project's loss."""
    head, targets = Head(case.student_VD), FullTargets(case.teacher_ND, Head(case.teacher_VD))
    objective, tokens = Objective({case.objective: 1.0}), case.chunk_tokens
    return linear_objective(case.student_ND, head, targets, case.labels_N, objective, chunk_tokens=tokens)[0]


def naive(case: Case) -> Tensor:
    """All logits at once."""
    with torch.no_grad():
        teacher_logits_NV = F.linear(case.teacher_ND, case.teacher_VD)
    return NAIVE[case.objective](F.linear(case.student_ND, case.student_VD), teacher_logits_NV).sum()


def liger(case: Case) -> Tensor:
    """Liger's chunked loss, the divergence alone."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=LIGER_BETAS[case.objective])
    hidden = case.student_ND, case.student_VD, case.teacher_ND, case.teacher_VD
    found: Tensor = loss(*hidden, case.labels_N, None, None)
    return found


SIDES = {"potstill": potstill, "naive": naive, "liger": liger}


def bytes_in_use() -> int:
    """Memory in use when what was freed has been given back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes("VmRSS")


if __name__ == "__main__":
    sys.exit(as_command(main)())
