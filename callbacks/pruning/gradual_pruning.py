"""Gradual structured pruning in the middle of `fit`: tensors and optimizer state really shrink, parameters stay the same objects.

This file decides when; `plan` and `budget` how much, `event` does it, `models/pruning` knows what is worth keeping.
"""

from dataclasses import dataclass, field
from statistics import fmean
from typing import Annotated, Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from callbacks.pruning.budget import PruningBudget
from callbacks.pruning.event import cut_student, in_words
from callbacks.pruning.judge import PruningJudge
from callbacks.pruning.plan import PruningPlan, Sparsities, Sparsity, When, steps_of
from callbacks.shared.averaging import follow_edits, refuse_averaging
from callbacks.shared.distributed import check_strategy
from callbacks.shared.run import StepBoundary, check_order, data_of
from models.architecture import count_parameters
from models.distillation import Distillation
from models.pruning.budget.schedule import Course
from models.pruning.budget.target import Budget
from models.pruning.cut import PruningSettings, Targets
from models.structure.shape import shape_of
from models.student import StudentModule
from program.ranges import Between, Count, Positive, check_arguments


@dataclass
class Plateau:
    """Detects that a loss has stopped falling, by its means over the last `patience` steps and over those before.

    Args:
        patience: Losses in each mean.
        min_delta: Share of the earlier mean by which the later one must be lower to count as falling.
        losses: Since the last event, at most 2 * `patience`; plain numbers, so that a resumed run answers the same.
    """

    patience: int
    min_delta: float
    losses: list[float] = field(default_factory=list)

    def add(self, loss: float) -> None:
        """Note the loss of one more optimizer step."""
        self.losses = [*self.losses, loss][-2 * self.patience :]

    @property
    def reached(self) -> bool:
        """Whether the loss has stopped falling; False until enough was seen."""
        if len(self.losses) < 2 * self.patience:
            return False
        before, after = fmean(self.losses[: self.patience]), fmean(self.losses[self.patience :])
        return after > before * (1 - self.min_delta)


class GradualPruning(Callback):
    """Remove MLP neurons, attention heads, layers and channels of the hidden state in several events during training.

    Each event judges importance on fresh training batches, cuts, and repairs the remaining weights by least squares.
    Layers stay equal, and the student an ordinary Hugging Face model, unless allocation is per_layer.

    Args:
        mlp_sparsity: Share of MLP neurons removed at the end, 0 to 1 (1 excluded), as all sparsities.
        kv_group_sparsity: Share of key/value groups removed at the end, with their query heads.
        query_head_sparsity: Share of the query heads of every remaining group removed at the end.
        depth_sparsity: Share of decoder layers removed at the end.
        hidden_sparsity: Share of the hidden size removed at the end.
        budget: What the student may cost at the end, as a share of the dense student's parameters, FLOPs or latency, instead of
            sparsities of the same axes. With allocation uniform every layer keeps as much as fits; groups come in whole numbers, neurons
            fill the rest. With per_layer, neurons and groups of all layers go where they cost least for what they save. A latency is
            measured in a search before the first step, for uniform layers, and met within 10 %; with per_layer the FLOPs of what is
            found are the budget.
        start_step: Optimizer steps done before the first event (with when: plateau, at least).
        end_step: Optimizer steps done before the last event (with when: plateau, at most).
        events: Number of events.
        schedule: Course over the events of each sparsity, and of the cost removed for a budget: cubic removes most at first, linear
            equal shares.
        when: steps are evenly spaced events; plateau is an event as soon as the training loss has stopped falling, and at the
            latest at evenly spaced steps.
        patience: Steps in each of the two means of the training loss that plateau compares, one after the other.
        min_delta: Share by which the later mean must be lower for the loss to be falling.
        turns: MLP and attention take turns: the MLP is cut in odd events, the attention in even ones.
        calibration_batches: Training batches on which each event judges importance and repairs.
        judge_batches: Held-out batches (validation data if there is any) on which the KL to the teacher is measured before and
            after each cut and repair; 0 for none.
        **settings: How units are chosen, see `PruningSettings`.

    Raises:
        ValueError: A setting is out of range or leaves nothing of an axis; nothing is to be pruned; a budget is out of reach, or
            shares an axis with a sparsity; hidden states are distilled while their number or size changes; the data module is no
            `ChatDataModule`; the strategy shards the model (prune in a run of its own before); a callback that averages weights
            comes first.
    """

    needs_whole_student = True

    def __init__(
        self,
        mlp_sparsity: Sparsity = 0.0,
        kv_group_sparsity: Sparsity = 0.0,
        query_head_sparsity: Sparsity = 0.0,
        depth_sparsity: Sparsity = 0.0,
        hidden_sparsity: Sparsity = 0.0,
        *,
        budget: Budget | None = None,
        start_step: int = 0,
        end_step: int = 0,
        events: int = 1,
        schedule: Course = "cubic",
        when: When = "steps",
        patience: Positive = 50,
        min_delta: Annotated[float, Between(0)] = 0.01,
        turns: bool = False,
        calibration_batches: Positive = 8,
        judge_batches: Count = 4,
        **settings: Any,
    ) -> None:
        check_arguments(GradualPruning.__init__, locals(), "GradualPruning.")
        self.settings = PruningSettings(**settings)
        self.sparsities = Sparsities(
            mlp_sparsity, kv_group_sparsity, query_head_sparsity, depth_sparsity, hidden_sparsity
        )
        self.steps = steps_of(start_step, end_step, events, when)
        unequal, multiple = self.settings.allocation == "per_layer", self.settings.multiple
        self.plan = PruningPlan(self.sparsities, events, schedule, multiple, turns, unequal, budget)
        self.start_step = start_step
        self.calibration_batches = calibration_batches
        self.targets: list[Targets] = []
        self.history: list[dict[str, Any]] = []  # the figures of all events so far
        self._budget = PruningBudget(budget, multiple) if budget else None
        self._plateau = Plateau(patience, min_delta) if when == "plateau" else None
        self._judge = PruningJudge(judge_batches, self.settings.seed)
        self._boundary = StepBoundary()

    @property
    def last_step(self) -> int:
        """Optimizer steps done before the last event, at most."""
        return self.steps[-1]

    @property
    def finished(self) -> bool:
        """Whether all events have taken place."""
        return len(self.history) == len(self.steps)

    @property
    def makes_layers_unequal(self) -> bool:
        """Whether layers end with different sizes, which one `config.json` cannot express."""
        of_layers = {"mlp_sparsity", "kv_group_sparsity", "query_head_sparsity"} & set(self.sparsities.given)
        return bool(of_layers or self.plan.budget) and self.settings.allocation == "per_layer"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Plan all events from the sizes of the *unpruned* student; a checkpoint loads only after this."""
        if stage != "fit":
            return
        check_order(trainer.callbacks)  # type: ignore[attr-defined]
        earlier = trainer.callbacks[: trainer.callbacks.index(self)]  # type: ignore[attr-defined]
        # A checkpoint of theirs would load into old shapes.
        refuse_averaging(earlier, "GradualPruning before", "it behind; reorder trainer.callbacks in the recipe")
        check_strategy(trainer)
        data_of(trainer)
        assert isinstance(pl_module, StudentModule)
        changes = [name for name in ("depth_sparsity", "hidden_sparsity") if getattr(self.sparsities, name)]
        if changes and isinstance(pl_module, Distillation) and pl_module.hidden_state_weight:
            raise ValueError(
                f"expected model.hidden_state_weight 0 with GradualPruning.{changes[0]}, found {pl_module.hidden_state_weight:g}: "
                "layers or channels would no longer be the teacher's; set one of them to 0"
            )
        pl_module.configure_model()
        dense = shape_of(pl_module.student)
        self.targets = self.plan.targets(dense)
        if self._budget is not None:
            self._budget.dense = dense

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what a latency budget comes down to, if no checkpoint has said it by now."""
        assert isinstance(pl_module, StudentModule)
        if self._budget is not None and self._budget.is_measured:
            sizes = self._budget.search(trainer, pl_module, self.targets[-1])
            self.targets = self.plan.targets(self._budget.dense, sizes)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An event that a checkpoint holds does not happen again; one that it was saved just before does."""
        self._boundary.start(trainer.global_step)
        assert isinstance(pl_module, StudentModule)
        measured = self._budget.measured if self._budget else {}
        self._log(trainer, {"parameters": count_parameters(pl_module.student), **measured})
        self._cut_if_due(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the loss, before any callback can save the step."""
        if self._plateau is not None and not self.finished:
            self._plateau.add(float(trainer.callback_metrics["train/loss"]))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Cut if an event is due after this optimizer step."""
        assert isinstance(pl_module, StudentModule)
        if self._boundary.passed(trainer.global_step):
            self._cut_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the recovery after the last event has regained."""
        assert isinstance(pl_module, StudentModule)
        if self.history and self._judge.num_batches:
            self._note_recovery(trainer, self._judge.measure(pl_module), self._judge(trainer, pl_module))
        self._judge.forget()

    def state_dict(self) -> dict[str, Any]:
        """Figures of the events so far, the losses since the last one where these decide, and what a search has found."""
        return {
            "history": self.history,
            "losses": self._plateau.losses if self._plateau else [],
            "latency": self._budget.found if self._budget else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the events so far."""
        self.history = state_dict["history"]
        if self._plateau is not None:
            self._plateau.losses = state_dict["losses"]
        if self._budget is not None:
            self._budget.found = state_dict["latency"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give averaged weights, which load next, the shapes they were saved in."""
        assert isinstance(pl_module, StudentModule)
        follow_edits(trainer, pl_module)

    def _cut_if_due(self, trainer: Trainer, module: StudentModule) -> None:
        if self.finished:
            return
        step, number = trainer.global_step, len(self.history)
        due = step >= self.steps[number]
        if self._plateau is not None and step >= self.start_step:
            due = trainer.strategy.broadcast(due or self._plateau.reached)
        if due:
            self._cut(trainer, module, number)

    def _cut(self, trainer: Trainer, module: StudentModule, number: int) -> None:
        batches = self._judge.calibration_batches(data_of(trainer), number + 1, self.calibration_batches)
        before = count_parameters(module.student)
        figures = cut_student(trainer, module, batches, self.targets[number], self.settings, self._judge)
        last = number + 1 == len(self.steps)
        if self._budget is not None:
            figures |= self._budget.figures(shape_of(module.student)) | (self._budget.measured if last else {})
        measure = self._judge.measure(module)
        if self.history and self._judge.num_batches:
            self._note_recovery(trainer, measure, figures[f"{measure}_before"])
        self.history.append({"event": number + 1, "step": trainer.global_step, **figures})
        if self._plateau is not None:
            self._plateau.losses = []  # the model is another one now
        self._log(trainer, figures)
        event = f"Pruned after step {trainer.global_step} (event {number + 1} of {len(self.steps)})"
        rank_zero_info(f"{event}: {before:,} -> {in_words(figures, measure)}")
        if self._budget is not None and last:
            rank_zero_info(self._budget.verdict(shape_of(module.student)))

    def _note_recovery(self, trainer: Trainer, measure: str, now: float) -> None:
        last = self.history[-1]
        after = min(last[key] for key in (f"{measure}_after_repair", f"{measure}_after_cut") if key in last)
        last[f"{measure}_recovered"] = after - now
        self._log(trainer, {f"{measure}_recovered": after - now})

    def _log(self, trainer: Trainer, figures: dict[str, float]) -> None:
        """Give figures to the loggers directly: the trainer's own logging would put them at a later step."""
        for logger in trainer.loggers:
            logger.log_metrics({f"pruning/{name}": value for name, value in figures.items()}, step=trainer.global_step)
