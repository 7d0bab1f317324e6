"""Gradual structured pruning in the middle of `fit`: tensors and optimizer state really shrink, parameters stay the same objects."""

from dataclasses import dataclass
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.data import data_of
from callbacks.distributed import check_strategy, edit_on_all_ranks, share_of_rank
from callbacks.order import StepBoundary, check_order
from models.architecture import DecoderLayer, count_parameters, decoder_layers
from models.pruning import activation_scores, event_steps, sparsity_after, top_indices, units_to_keep
from models.pruning.schedule import Shape
from models.structure import Edit
from models.student import StudentModule


@dataclass(frozen=True)
class PruningEvent:
    """What every layer keeps after optimizer step `step`."""

    step: int
    neurons: int
    kv_groups: int


class GradualPruning(Callback):
    """Remove MLP neurons and attention key/value groups (with their query heads) in several events during training.

    Each event collects activation importance (Minitron, arXiv 2407.14679) on fresh training batches and cuts the least
    important units of every layer, the same number everywhere, so that the student stays an ordinary Hugging Face model.

    Args:
        mlp_sparsity: Share of MLP neurons removed at the end, 0 to 1 (1 excluded).
        kv_group_sparsity: Share of key/value groups removed at the end, 0 to 1 (1 excluded).
        start_step: Optimizer steps done before the first event.
        end_step: Optimizer steps done before the last event.
        events: Number of events, evenly spaced.
        schedule: Course of the sparsity over the events: cubic removes most at first, linear equal shares.
        multiple: Neurons kept are rounded to a multiple of this (FP8 matrix units want 16, GPUs like 64 or 128).
        calibration_batches: Training batches used to judge importance at each event.
        seed: Seed of the choice of these batches.

    Raises:
        ValueError: A setting is out of range or leaves a layer without neurons or heads; the data module is no
            `ChatDataModule`; the strategy shards the model (prune in a run of its own before).
    """

    needs_whole_student = True

    def __init__(
        self,
        mlp_sparsity: float = 0.0,
        kv_group_sparsity: float = 0.0,
        start_step: int = 0,
        end_step: int = 0,
        events: int = 1,
        schedule: Shape = "cubic",
        multiple: int = 64,
        calibration_batches: int = 8,
        seed: int = 0,
    ) -> None:
        for name, value in (("mlp_sparsity", mlp_sparsity), ("kv_group_sparsity", kv_group_sparsity)):
            if not 0 <= value < 1:
                raise ValueError(
                    f"expected GradualPruning.{name} between 0 and 1 (1 excluded), found {value}; "
                    "it is the share to remove, for example 0.375"
                )
        if not 1 <= start_step <= end_step or events < 1 or (events == 1) != (start_step == end_step):
            raise ValueError(
                f"expected 1 <= start_step <= end_step and one event exactly if they are equal, found start_step "
                f"{start_step}, end_step {end_step}, events {events}; change GradualPruning in the recipe"
            )
        self.mlp_sparsity = mlp_sparsity
        self.kv_group_sparsity = kv_group_sparsity
        self.steps = event_steps(start_step, end_step, events)
        self.schedule = schedule
        self.multiple = multiple
        self.calibration_batches = calibration_batches
        self.seed = seed
        self.plan: dict[int, PruningEvent] = {}
        self._boundary = StepBoundary()

    @property
    def last_step(self) -> int:
        """Optimizer steps done before the last event."""
        return self.steps[-1]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Plan all events from the sizes of the *unpruned* student; a checkpoint loads only after this."""
        if stage != "fit":
            return
        check_order(trainer.callbacks)  # type: ignore[attr-defined]
        check_strategy(trainer)
        data_of(trainer)
        assert isinstance(pl_module, StudentModule)
        pl_module.configure_model()
        self.plan = {event.step: event for event in self._planned_events(decoder_layers(pl_module.student)[0])}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An event that happened before a checkpoint was saved does not happen again after it loaded."""
        self._boundary.start(trainer.global_step)
        assert isinstance(pl_module, StudentModule)
        for logger in trainer.loggers:
            logger.log_metrics({"pruning/parameters": count_parameters(pl_module.student)}, step=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Cut if an event is due after this optimizer step."""
        assert isinstance(pl_module, StudentModule)
        if self._boundary.passed(trainer.global_step) and trainer.global_step in self.plan:
            self._cut(trainer, pl_module, self.plan[trainer.global_step])

    def _planned_events(self, layer: DecoderLayer) -> list[PruningEvent]:
        events = []
        for number, step in enumerate(self.steps, start=1):
            mlp = sparsity_after(number, len(self.steps), self.mlp_sparsity, self.schedule)
            groups = sparsity_after(number, len(self.steps), self.kv_group_sparsity, self.schedule)
            event = PruningEvent(
                step=step,
                neurons=layer.num_neurons if mlp == 0 else units_to_keep(layer.num_neurons, mlp, self.multiple),
                kv_groups=units_to_keep(layer.num_kv_groups, groups, 1),
            )
            for kept, total, name in (
                (event.neurons, layer.num_neurons, "mlp_sparsity"),
                (event.kv_groups, layer.num_kv_groups, "kv_group_sparsity"),
            ):
                if kept < 1:
                    raise ValueError(
                        f"expected GradualPruning.{name} to leave something of {total} units per layer (multiples of "
                        f"{self.multiple if name == 'mlp_sparsity' else 1}), found {getattr(self, name)}, which leaves "
                        f"{kept}; lower it"
                    )
            events.append(event)
        return events

    def _cut(self, trainer: Trainer, module: StudentModule, event: PruningEvent) -> None:
        batches = data_of(trainer).calibration_batches(self.calibration_batches, self.seed + event.step)
        with trainer.precision_plugin.forward_context():
            scores = activation_scores(
                module.student,
                share_of_rank(trainer, batches, self.calibration_batches),
                total=lambda x: trainer.strategy.reduce(x, reduce_op="sum"),
            )
        before = count_parameters(module.student)
        edits: list[Edit] = []
        for layer in decoder_layers(module.student):
            for op, kept, total, layer_scores in (
                ("narrow_mlp", event.neurons, layer.num_neurons, scores.neurons),
                ("narrow_kv_groups", event.kv_groups, layer.num_kv_groups, scores.kv_groups),
            ):
                if kept < total:
                    edits.append({"op": op, "layer": layer.index, "keep": top_indices(layer_scores[layer.index], kept)})
        edit_on_all_ranks(trainer, module, edits)
        after = count_parameters(module.student)
        figures: dict[str, float] = {
            "pruning/parameters": after,
            "pruning/neurons_per_layer": event.neurons,
            "pruning/kv_groups_per_layer": event.kv_groups,
        }
        for logger in trainer.loggers:  # directly: the trainer's own logging would put it at a later step
            logger.log_metrics(figures, step=event.step)
        rank_zero_info(
            f"Pruned after step {event.step}: {event.neurons} neurons and {event.kv_groups} key/value groups per layer, "
            f"{before:,} -> {after:,} parameters"
        )
