"""The budget of a run with pruning: the sizes that meet a latency, and what a student costs of the dense one."""

from dataclasses import asdict
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel

from callbacks.pruning.plan import shape_after
from export.sessions.timed_prefill import onnx_run
from models.pruning.budget.latency import Latency, Run, meet_latency, torch_run
from models.pruning.budget.target import Budget
from models.pruning.budget.uniform import Sizes, evenly_sparse
from models.pruning.cut import Targets
from models.structure.shape import Shape, shape_of, sliced
from models.student import StudentModule


class PruningBudget:
    """Searches once for what meets a latency, and counts what students cost.

    The candidates have layers all alike and FLOPs that fall evenly; they are cut from the dense student on the device
    of the run (see `Budget` for what runs them).  The result is in checkpoints: a resumed run has no dense student.

    Attributes:
        dense: The student before the first event; who uses this sets it as soon as it is known.
        found: None, or the result of a search: its settings, sizes of layers, the measured ratio and its quartiles.
    """

    dense: Shape

    def __init__(self, budget: Budget, multiple: int) -> None:
        self.found: dict[str, Any] | None = None
        self._budget = budget
        self._multiple = multiple
        self._settings = {**asdict(budget), "axes": list(budget.axes), "multiple": multiple}

    @property
    def is_measured(self) -> bool:
        """Whether the budget is one of time."""
        return self._budget.cost == "latency"

    @property
    def measured(self) -> dict[str, float]:
        """The time of the student that was found, over the dense student's; nothing without a search."""
        return {} if self.found is None else {"budget_latency_ratio": self.found["ratio"]}

    def search(self, trainer: Trainer, module: StudentModule, others: Targets) -> Sizes:
        """The sizes of layers that meet the latency, after the `others` targets: a checkpoint's, or those of a search.

        Raises `ValueError` if it cannot be met, is another than the checkpoint's, or the student is not the dense one.
        """
        if self.found is None:
            if shape_of(module.student) != self.dense:
                raise ValueError(
                    "expected the dense student for the search of a latency, found one that a run without this budget has pruned; "
                    "resume with that run's settings, or start again from its student/ folder"
                )
            self.found = self._search_on_rank_0(trainer, module, shape_after(self.dense, others))
        elif self.found["settings"] != self._settings:
            raise ValueError(
                f"expected the budget for which the checkpoint's sizes were found, {self.found['settings']}, found {self._settings}; "
                "set it back, or start without the checkpoint"
            )
        return self.found["sizes"]

    def figures(self, student: Shape) -> dict[str, float]:
        """What a student costs of the dense one, counted."""
        ratio = self._budget.measure(student) / self._budget.measure(self.dense)
        return {f"budget_{self._budget.counted}_ratio": ratio}

    def verdict(self, student: Shape) -> str:
        """What the last student costs beside what it may, for people."""
        whole, left = self._budget.measure(self.dense), self._budget.measure(student)
        counted = f"{left:,} of the dense student's {whole:,} {self._budget.counted} ({left / whole:.4f})"
        if self.found is None:
            return f"Budget of {self._budget.ratio:g}: {counted}"
        return (
            f"Budget of {self._budget.ratio:g} of the time: {self.found['ratio']:.3f} was measured with {_words(self.found['sizes'])} in "
            f"every layer; {counted}"
        )

    def _search_on_rank_0(self, trainer: Trainer, module: StudentModule, start: Shape) -> dict[str, Any]:
        outcome: dict[str, Any] | str = ""
        if trainer.is_global_zero:
            try:
                outcome = self._search(module, start)
            except ValueError as error:  # told to all ranks, which wait for it
                outcome = str(error)
        outcome = trainer.strategy.broadcast(outcome)
        if isinstance(outcome, str):
            raise ValueError(outcome)
        return outcome

    # Compiled code would be recompiled for every shape.
    @torch.compiler.set_stance("force_eager")
    def _search(self, module: StudentModule, start: Shape) -> dict[str, Any]:
        axes, measure = self._budget.axes, self._budget.measure

        def sizes_of(shape: Shape) -> Sizes:
            return {axis: shape.widest(axis) for axis in axes}

        def tell(shape: Shape, latency: Latency) -> None:
            rank_zero_info(
                f"Searching for {self._budget.ratio:g} of the dense student's {latency.dense_s * 1000:.3g} ms: "
                f"{latency.ratio:.3f} with {_words(sizes_of(shape))}"
            )

        met = meet_latency(
            self.dense,
            lambda sparsity: evenly_sparse(start, sparsity, axes, measure=measure, multiple=self._multiple),
            self._budget.ratio,
            prepare=lambda shape: self._run(module, sliced(module.student, shape).eval()),
            on_measured=tell,
        )
        found = {"sizes": sizes_of(met.shape), "ratio": met.latency.ratio, "quartiles": list(met.latency.spread)}
        return {"settings": self._settings, **found}

    def _run(self, module: StudentModule, student: PreTrainedModel) -> Run:
        batch, length = self._budget.batch, self._budget.length
        if self._budget.backend == "onnxruntime":
            return onnx_run(student.float().cpu(), batch=batch, length=length)
        student.to(module.inference_dtype)  # type: ignore[arg-type]
        return torch_run(student, batch=batch, length=length)


def _words(sizes: Sizes) -> str:
    return " and ".join(f"{units} {axis.replace('kv_', 'key/value ')}" for axis, units in sizes.items())
