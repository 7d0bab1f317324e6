"""The outcome of a comparison, and how it is gathered."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from models.losses import forward_kl

Status = Literal["passed", "failed", "not_run"]
Bounded = Literal["max_relative_difference", "kl"]
# Largest accepted max|a - b| / max|b|, by the type between the matrix products.
BOUNDS = {"float32": 1e-4, "float16": 1e-2}


@dataclass
class Check:
    """One comparison of an artefact with torch.

    Attributes:
        name: What was compared.
        status: `not_run` is neither good nor bad: see `reason`.
        reason: Why it failed or did not run: which output differed by how much, or what was missing.
        bound: Largest accepted value of `bounded`.
        bounded: Which of the figures below the bound is for.
        max_abs_difference: Largest |a - b| over all compared tensors at tokens (padding is left out).
        mean_abs_difference: Mean |a - b| over all of them.
        max_relative_difference: Largest max|a - b| / max|b| of one tensor at one step, b from torch.
        greedy_agreement: Share of tokens for which both choose the same next token.
        identical_texts: Share of prompts for which both choose the same token at every step: the greedy texts are the same.
        kl: Mean KL(torch || artefact) in nats per token.
        sensitivity: The same of the torch model and itself with inputs changed in their last digits, or rounded as fast kernels round
            them where weights alone are rounded, see `export/reference.py`.
        prompts, tokens: How many were compared: the first stand behind `identical_texts`, the others behind all means.
        worst: Tensor and step with the largest relative difference.
        note: How to read the figures.
    """

    name: str
    status: Status
    reason: str | None = None
    bound: float | None = None
    bounded: Bounded = "max_relative_difference"
    max_abs_difference: float | None = None
    mean_abs_difference: float | None = None
    max_relative_difference: float | None = None
    greedy_agreement: float | None = None
    identical_texts: float | None = None
    kl: float | None = None
    sensitivity: float | None = None
    prompts: int | None = None
    tokens: int | None = None
    worst: str | None = None
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


class Comparison:
    """Gathers differences over tensors and steps, and turns them into a `Check`."""

    def __init__(self) -> None:
        self.max_abs = 0.0
        self.max_relative = 0.0
        self.worst = ""
        self._sum_abs, self._count = 0.0, 0
        self._layers: list[
            tuple[str, float]
        ] = []  # cache entries in the order of the layers, and their relative differences
        self._kl: list[Tensor] = []
        self._agreement: list[Tensor] = []
        self._same_text_B: Tensor | None = None

    def add(self, name: str, ours: Tensor, theirs: Tensor) -> float:
        """Compare one tensor with torch's; both hold valid positions only.  NaN counts as an infinite difference."""
        differences = (ours.float() - theirs.float()).abs().nan_to_num(nan=torch.inf)
        largest = differences.amax().item()
        self.max_abs = max(self.max_abs, largest)
        self._sum_abs, self._count = (
            self._sum_abs + differences.double().sum().item(),
            self._count + differences.numel(),
        )
        return self._note(name, largest, theirs.float().abs().amax().item())

    def add_layer(self, name: str, ours: Tensor, theirs: Tensor) -> None:
        """Compare what a decoder layer puts into the cache; of these, the first one beyond the bound is named."""
        self._layers.append((name, self.add(name, ours, theirs)))

    def add_inside(self, name: str, ours: Tensor, theirs: Tensor) -> None:
        """Compare a tensor inside a float16 graph by root mean square.

        Attention scores of 64 and more are 0.06 apart in float16, so single values of an attention's result may be off by
        almost a percent in a sound graph; their mean square is not.
        """
        difference = (ours.float() - theirs.float()).nan_to_num(nan=torch.inf).square().mean().sqrt().item()
        self._note(name, difference, theirs.float().square().mean().sqrt().item())

    def _note(self, name: str, difference: float, size: float) -> float:
        relative = difference / max(size, torch.finfo(torch.float32).tiny)
        if relative >= self.max_relative:
            self.max_relative, self.worst = relative, f"{name} (by {difference:.3g} absolute, {relative:.3g} relative)"
        return relative

    def add_logits(self, step: int, ours_NV: Tensor, theirs_NV: Tensor) -> None:
        """Compare logits, the greedy tokens and the distributions; N valid positions."""
        self.add(f"logits at step {step}", ours_NV, theirs_NV)
        self.add_distributions(ours_NV, theirs_NV)

    def add_distributions(self, ours_NV: Tensor, theirs_NV: Tensor) -> None:
        """Compare the greedy tokens and the distributions of logits."""
        self._kl.append(forward_kl(ours_NV, theirs_NV))
        self._agreement.append(ours_NV.argmax(dim=-1) == theirs_NV.argmax(dim=-1))

    def add_choices(self, ours_BV: Tensor, theirs_BV: Tensor) -> None:
        """Compare the tokens that both choose next, prompt by prompt, from the logits of the last position."""
        same_B = ours_BV.argmax(dim=-1) == theirs_BV.argmax(dim=-1)
        self._same_text_B = same_B if self._same_text_B is None else self._same_text_B & same_B

    def check(
        self,
        name: str,
        bound: float,
        bounded: Bounded = "max_relative_difference",
        sensitivity: float | None = None,
        note: str | None = None,
    ) -> Check:
        """The check: failed if the bounded figure is above the bound, or not a number."""
        kl = torch.cat(self._kl).mean().item()
        found = kl if bounded == "kl" else self.max_relative
        passed = found <= bound
        what = f"KL {kl:.3g} nats" if bounded == "kl" else f"relative difference {found:.3g}"
        first = next((layer for layer, relative in self._layers if relative > bound), None)
        return Check(
            name=name,
            status="passed" if passed else "failed",
            reason=None
            if passed
            else f"{what} above the bound {bound:.3g}; largest difference: {self.worst}"
            + (f"; first layer beyond it: {first}" if first and bounded != "kl" else ""),
            bound=bound,
            bounded=bounded,
            max_abs_difference=self.max_abs,
            mean_abs_difference=self._sum_abs / max(self._count, 1),
            max_relative_difference=self.max_relative,
            greedy_agreement=torch.cat(self._agreement).float().mean().item(),
            identical_texts=None if self._same_text_B is None else self._same_text_B.float().mean().item(),
            kl=kl,
            sensitivity=sensitivity,
            prompts=None if self._same_text_B is None else len(self._same_text_B),
            tokens=sum(map(len, self._kl)),
            worst=self.worst,
            note=note,
        )


def merged(groups: Iterable[Sequence[Check]]) -> list[Check]:
    """One check for each name, of the checks of several groups of prompts.

    Largest differences are the largest of all groups, means are those over all tokens, and so is a mean that is bounded: its
    bound is the mean of the groups' bounds.  The reason of a failure is that of the worst group.
    """
    found: dict[str, list[Check]] = {}
    for checks in groups:
        for check in checks:
            found.setdefault(check.name, []).append(check)
    return [_merged(checks) for checks in found.values()]


def _merged(checks: Sequence[Check]) -> Check:
    worst = max(checks, key=_excess)
    if len(checks) == 1 or worst.tokens is None:
        return worst

    def mean(figure: str, weight: str = "tokens") -> float | None:
        if getattr(worst, figure) is None:
            return None
        total = sum(getattr(check, figure) * getattr(check, weight) for check in checks)
        return float(total / sum(getattr(check, weight) for check in checks))

    bound, kl = mean("bound"), mean("kl")
    failed = not kl <= bound if worst.bounded == "kl" else worst.status == "failed"  # type: ignore[operator]  # of every comparison
    return replace(
        worst,
        status="failed" if failed else "passed",
        reason=worst.reason if failed else None,
        bound=bound,
        max_abs_difference=max(check.max_abs_difference or 0.0 for check in checks),
        mean_abs_difference=mean("mean_abs_difference"),
        greedy_agreement=mean("greedy_agreement"),
        identical_texts=mean("identical_texts", "prompts"),
        kl=kl,
        sensitivity=mean("sensitivity"),
        prompts=None if worst.prompts is None else sum(check.prompts or 0 for check in checks),
        tokens=sum(check.tokens or 0 for check in checks),
    )


def _excess(check: Check) -> float:
    """The bounded figure over its bound; a comparison that did not run has none."""
    figure = check.kl if check.bounded == "kl" else check.max_relative_difference
    if figure is None or not check.bound:
        return 0.0
    return float("inf") if figure != figure else figure / check.bound


def raise_on_failure(verification: Sequence[dict[str, Any]]) -> None:
    """Raise `VerificationError` naming every failed check of a report, which output differed and by how much."""
    failed = [f"{check['name']}: {check['reason']}" for check in verification if check["status"] == "failed"]
    if failed:
        raise VerificationError(
            f"expected the exported files to compute what the model computes, found {len(failed)} failed checks "
            f"({'; '.join(failed)}); do not use these files, and report the case with its report.json"
        )


class VerificationError(RuntimeError):
    """An exported artefact does not compute what the torch model computes."""
