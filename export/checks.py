"""The outcome of a comparison, and how it is gathered."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from models.losses import forward_kl

Status = Literal["passed", "failed", "not_run"]
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
        worst: Tensor and step with the largest relative difference.
        note: How to read the figures.
    """

    name: str
    status: Status
    reason: str | None = None
    bound: float | None = None
    bounded: Literal["max_relative_difference", "kl"] = "max_relative_difference"
    max_abs_difference: float | None = None
    mean_abs_difference: float | None = None
    max_relative_difference: float | None = None
    greedy_agreement: float | None = None
    identical_texts: float | None = None
    kl: float | None = None
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
        self._kl.append(forward_kl(ours_NV, theirs_NV))
        self._agreement.append(ours_NV.argmax(dim=-1) == theirs_NV.argmax(dim=-1))

    def add_choices(self, ours_BV: Tensor, theirs_BV: Tensor) -> None:
        """Compare the tokens that both choose next, prompt by prompt, from the logits of the last position."""
        same_B = ours_BV.argmax(dim=-1) == theirs_BV.argmax(dim=-1)
        self._same_text_B = same_B if self._same_text_B is None else self._same_text_B & same_B

    def check(
        self, name: str, bound: float, bounded: str = "max_relative_difference", note: str | None = None
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
            bounded="kl" if bounded == "kl" else "max_relative_difference",
            max_abs_difference=self.max_abs,
            mean_abs_difference=self._sum_abs / max(self._count, 1),
            max_relative_difference=self.max_relative,
            greedy_agreement=torch.cat(self._agreement).float().mean().item(),
            identical_texts=None if self._same_text_B is None else self._same_text_B.float().mean().item(),
            kl=kl,
            worst=self.worst,
            note=note,
        )
