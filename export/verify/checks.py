"""The outcome of a comparison, and how it is gathered."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from models.losses import forward_kl

Status = Literal["passed", "failed", "not_run"]
Verdict = Literal["equivalent", "different", "too few tokens to say"]


@dataclass
class Check:
    """One comparison of an artefact with torch.

    Attributes:
        name: What was compared.
        status: `not_run` is neither good nor bad: see `reason`.
        reason: Why it failed or did not run: what differed by how much, or what was missing.
        rounding_ratio: Of a comparison layer by layer: the largest distance of a token's features, over what rounding explains there.
        bound: Largest accepted `rounding_ratio`; or the margin of `difference` within which a free run is equivalent, nats per token.
        worst: Place and step of the largest ratio.
        greedy_agreement: Share of tokens for which both choose the same next token.
        kl: Mean KL(torch || artefact) in nats per token.
        verdict: Of a free run: is the artefact as good as the torch model, within the margin?
        difference: Of a free run: mean KL(judge || artefact) - KL(judge || torch), nats per token.
        interval: Its 95 % confidence interval.
        tokens: How many were compared.
        note: How to read the figures.
    """

    name: str
    status: Status
    reason: str | None = None
    rounding_ratio: float | None = None
    bound: float | None = None
    worst: str | None = None
    greedy_agreement: float | None = None
    kl: float | None = None
    verdict: Verdict | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    tokens: int | None = None
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


class Comparison:
    """Gathers distances over places and steps, and turns them into a `Check`."""

    def __init__(self) -> None:
        self.places = 0
        self.worst_ratio, self.worst = 0.0, ""
        self._first: dict[float, str] = {}
        self._kl: list[Tensor] = []
        self._agreement: list[Tensor] = []

    def add(self, place: str, ours_ND: Tensor, theirs_ND: Tensor, explained: float, order: float = 2.0) -> None:
        """Compare an artefact's features of N tokens with torch's; `explained` is the relative distance by rounding."""
        self.places += 1
        largest = float(distances(ours_ND, theirs_ND, order).amax())
        ratio = largest / max(explained, torch.finfo(torch.float32).eps)
        if not ratio <= self.worst_ratio:
            self.worst_ratio = ratio
            self.worst = f"{place} (relative distance {largest:.3g}, {explained:.3g} explained)"

    def reject(self, what: str) -> None:
        """Fail, whatever the distances are."""
        self.places += 1
        self.worst_ratio, self.worst = float("inf"), what

    def add_distributions(self, ours_NV: Tensor, theirs_NV: Tensor) -> None:
        """Compare the greedy tokens and the distributions of logits."""
        self._kl.append(forward_kl(ours_NV, theirs_NV))
        self._agreement.append(ours_NV.argmax(dim=-1) == theirs_NV.argmax(dim=-1))

    def check(self, name: str, bound: float, note: str | None = None) -> Check:
        """The check: failed beyond the bound, or where something is not a number."""
        passed = self.worst_ratio <= bound
        return Check(
            name=name,
            status="passed" if passed else "failed",
            reason=None
            if passed
            else f"{self.worst_ratio:.3g} times what rounding explains, above the bound of {bound:g}, at {self.worst}",
            rounding_ratio=self.worst_ratio,
            bound=bound,
            worst=self.worst,
            greedy_agreement=torch.cat(self._agreement).float().mean().item() if self._agreement else None,
            kl=torch.cat(self._kl).mean().item() if self._kl else None,
            tokens=sum(map(len, self._kl)) or None,
            note=note,
        )


def distances(ours_ND: Tensor, theirs_ND: Tensor, order: float = 2.0) -> Tensor:
    """The distance of each of N tokens, euclidean or of the worst feature (order infinity), relative to the second one's euclidean length;
    NaN and infinity are infinitely far away.
    """
    ours_ND, theirs_ND = ours_ND.detach().float(), theirs_ND.detach().float()
    smallest = torch.finfo(torch.float32).tiny
    found_N = (ours_ND - theirs_ND).norm(order, dim=-1) / theirs_ND.norm(dim=-1).clamp(min=smallest)
    return found_N.nan_to_num(nan=torch.inf, posinf=torch.inf)


def raise_on_failure(verification: Sequence[dict[str, Any]]) -> None:
    """Raise `VerificationError` naming every failed check of a report, and how far from harm the files are."""
    failed = [f"{check['name']}: {check['reason']}" for check in verification if check["status"] == "failed"]
    if not failed:
        return
    runs = [check for check in verification if check.get("verdict")]
    judged = "; ".join(
        f"{check['name']}: {check['verdict']}, {check['difference']:+.3g} nats per token" for check in runs
    )
    harm = f" Free runs on held-out text say: {judged}." if runs else ""
    raise VerificationError(
        f"expected the exported files to compute what the model computes, found {len(failed)} failed checks ({'; '.join(failed)}); do not "
        f"serve these files, and report the case with its report.json.{harm}"
    )


class VerificationError(ValueError):
    """An exported artefact does not compute what the torch model computes."""
