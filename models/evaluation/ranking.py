"""Metrics of label probabilities: AUROC, log-loss and calibration, with intervals.

Several models are judged on the same samples at once, so that the difference of two models gets an interval of its own.  Scores
are gathered from all ranks once; every rank then computes the same figures from the same rows.

Legend: B samples of a batch, N samples of a split, M models (the student, then its teacher if there is one), C classes, U units that
are drawn together, R resamples.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Annotated

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_calibration_error,
    multiclass_calibration_error,
)
from torchmetrics.utilities import dim_zero_cat

from datamodules.collate import Batch
from program.ranges import Between, check_arguments

BINS = 15  # of the calibration error, of equal width
COVERED = 0.95  # by an interval
COLUMNS = ("{}", "teacher_{}", "{}_difference")  # names of what is said of the models in order, and of their difference


@dataclass(frozen=True)
class Judged:
    """Samples and what the models say of them; rows may come several times.

    Attributes:
        log_p_NMC: Log-probabilities among the labels, float64.
        weights_NC: The data's distribution over the classes.
        class_N: The most probable class of each.
        user_N: The same number for the same user; one of its own for a sample without user.
    """

    log_p_NMC: Tensor
    weights_NC: Tensor
    class_N: Tensor
    user_N: Tensor

    def rows(self, rows_N: Tensor) -> "Judged":
        """Some of the samples."""
        return replace(self, **{name: tensor[rows_N] for name, tensor in vars(self).items()})


class RankingMetrics(Metric):
    """Figures of label probabilities over a split: each of the student, of its teacher if there is one, and their difference.

    - `auroc`: the chance that a sample of a class gets a higher probability of it than one of another class; the mean over the
      classes, one against the rest.  Left out where a class does not occur.
    - `user_auroc`: the same among the samples of one user; the mean over users with more than one class.
    - `log_loss`: cross-entropy with the data's distribution over the classes, nats per sample.
    - `ece`: expected calibration error, 15 bins of equal width: of the second of two classes, or of the most probable class of more.

    The teacher's are named `teacher_auroc` and so on, student less teacher `auroc_difference`.  With resamples, each has a 95 %
    bootstrap interval `..._low` to `..._high`.  Whole users are drawn, since samples of one user resemble each other and drawing them
    singly would make intervals too narrow; samples without user are drawn singly.  (torchmetrics' BootStrapper draws the samples of
    every batch by themselves.)  The draws are the same each time.

    Args:
        resamples: Draws for the intervals; 0 for none.

    Raises:
        ValueError: resamples is out of its range.
    """

    full_state_update = False
    index: list[Tensor]
    logits: list[Tensor]
    weights: list[Tensor]
    classes: list[Tensor]
    users: list[Tensor]

    def __init__(self, resamples: Annotated[int, Between(0, 1e6, advice="0 leaves the intervals out")] = 0) -> None:
        super().__init__()
        check_arguments(RankingMetrics.__init__, locals(), "model.")
        self.resamples = resamples
        for name in ("index", "logits", "weights", "classes", "users"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits_BMC: Tensor, batch: Batch) -> None:
        """Add a batch of ranking data, with the logits of the label tokens by each model."""
        self.index.append(torch.tensor(batch["index"], device=logits_BMC.device))
        self.logits.append(logits_BMC)
        self.weights.append(batch["weights_BC"])
        self.classes.append(batch["class_B"])
        keys = [_user_key(user, index) for user, index in zip(batch["user"], batch["index"], strict=True)]
        self.users.append(torch.tensor(keys, device=logits_BMC.device))

    def compute(self) -> dict[str, Tensor]:
        """Every figure that the samples give."""
        units = Units(self._judged())
        values = {name: _columns(value_M) for name, value_M in units.values(torch.ones_like(units.sizes_U)).items()}
        figures = _named(values, "")
        if self.resamples:
            low, high = units.intervals(self.resamples)
            figures |= _named(low, "_low") | _named(high, "_high")
        return {name: value for name, value in figures.items() if not value.isnan()}

    def _judged(self) -> Judged:
        # Ranks that have one sample less than others were given one twice.
        index_N = dim_zero_cat(self.index).cpu()
        order_N = index_N.argsort(stable=True)
        first_N = torch.ones_like(order_N, dtype=torch.bool)
        first_N[1:] = index_N[order_N].diff() != 0
        judged = Judged(
            dim_zero_cat(self.logits).cpu().double().log_softmax(-1),
            dim_zero_cat(self.weights).cpu().double(),
            dim_zero_cat(self.classes).cpu(),
            dim_zero_cat(self.users).cpu(),
        )
        return judged.rows(order_N[first_N])


class Units:
    """Samples in units that are drawn together.

    Args:
        judged: The samples, each once.
    """

    def __init__(self, judged: Judged) -> None:
        self.judged = judged
        _, self.unit_N, self.sizes_U = judged.user_N.unique(return_inverse=True, return_counts=True)

    @cached_property
    def auroc_UM(self) -> Tensor:
        """AUROC within each unit; not a number where all its samples have one class."""
        rows = self.unit_N.argsort(stable=True).split(self.sizes_U.tolist())
        none_M = torch.full((self.judged.log_p_NMC.shape[1],), math.nan, dtype=torch.double)
        return torch.stack([_auroc(self.judged.rows(rows_N)) if len(rows_N) > 1 else none_M for rows_N in rows])

    def values(self, counts_U: Tensor) -> dict[str, Tensor]:
        """Figures (M,) with every unit so many times; not a number where they have no meaning."""
        drawn = self.judged.rows(torch.arange(len(self.unit_N)).repeat_interleave(counts_U[self.unit_N]))
        num_classes = self.judged.weights_NC.shape[1]
        auroc_M, counts_UM = _auroc(drawn), counts_U[:, None] * ~self.auroc_UM.isnan()
        return {
            "auroc": auroc_M if len(drawn.class_N.unique()) == num_classes else torch.full_like(auroc_M, math.nan),
            "user_auroc": (self.auroc_UM.nan_to_num() * counts_UM).sum(0) / counts_UM.sum(0),
            "log_loss": -(drawn.weights_NC[:, None] * drawn.log_p_NMC).sum(-1).mean(0),
            "ece": _calibration_error(drawn),
        }

    def intervals(self, resamples: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The ends of the percentile intervals by name, of the models and their difference.

        Resamples in which a figure has no meaning do not count for it; nothing is known from a single unit.
        """
        generator = torch.Generator().manual_seed(0)
        num_units = len(self.sizes_U)
        if num_units < 2:
            return {}, {}
        draws: dict[str, list[Tensor]] = {}
        for _ in range(resamples):
            counts_U = torch.randint(num_units, (num_units,), generator=generator).bincount(minlength=num_units)
            for name, value_M in self.values(counts_U).items():
                draws.setdefault(name, []).append(_columns(value_M))
        tail = (1 - COVERED) / 2
        ends = [
            {name: torch.stack(values).nanquantile(share, dim=0) for name, values in draws.items()}
            for share in (tail, 1 - tail)
        ]
        return ends[0], ends[1]


def _columns(value_M: Tensor) -> Tensor:
    """The models' values and, of two, their difference."""
    return torch.cat([value_M, value_M[:1] - value_M[1:]]) if len(value_M) == 2 else value_M


def _named(values: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    return {
        column.format(name) + suffix: value
        for name, columns in values.items()
        for column, value in zip(COLUMNS, columns, strict=False)
    }


def _auroc(judged: Judged) -> Tensor:
    """AUROC of each model, shape (M,): the mean over the classes that some but not all samples have."""
    num_classes = judged.weights_NC.shape[1]
    by_class = []
    for number in range(num_classes) if num_classes > 2 else (1,):
        has_it_N = (judged.class_N == number).long()
        if 0 < has_it_N.sum() < len(has_it_N):
            scores = judged.log_p_NMC[..., number].exp().unbind(1)
            by_class.append(torch.stack([binary_auroc(p_N, has_it_N, validate_args=False) for p_N in scores]).double())
    nothing_M = torch.full(judged.log_p_NMC.shape[1:2], math.nan, dtype=torch.double)
    return torch.stack(by_class).mean(0) if by_class else nothing_M


def _calibration_error(judged: Judged) -> Tensor:
    """Expected calibration error of each model, shape (M,)."""
    num_classes = judged.weights_NC.shape[1]
    p_MNC = judged.log_p_NMC.exp().transpose(0, 1)
    if num_classes == 2:
        errors = [binary_calibration_error(p_N, judged.class_N, BINS) for p_N in p_MNC[..., 1].contiguous()]
    else:
        errors = [multiclass_calibration_error(p_NC, judged.class_N, num_classes, BINS) for p_NC in p_MNC]
    return torch.stack(errors).double()


def _user_key(user: str | None, index: int) -> int:
    """A number that is the same on all ranks: 63 bits of a hash of the user, or one below 0 for a sample without user."""
    return -1 - index if user is None else int.from_bytes(blake2b(user.encode(), digest_size=8).digest()) >> 1
