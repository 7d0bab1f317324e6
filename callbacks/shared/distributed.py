"""Changing a student that several processes train together: every rank makes the same change, then DDP is wrapped again.

`DistributedDataParallel` sorts gradients into buckets when it wraps a model.  After a change of structure its buckets have the
old sizes and its hooks hold on to the old shapes, so the wrapper is thrown away and made again.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TypeVar

from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from models.structure.edits import Edit
from models.student import StudentModule

T = TypeVar("T")


def check_strategy(trainer: Trainer) -> None:
    """Refuse a strategy under which a student cannot change in the middle of `fit`.

    Raises:
        ValueError: The strategy shards the model (FSDP, DeepSpeed and others), or starts its processes from a function, where
            the changed student could not be handed back to the process that has the original one.
    """
    strategy = trainer.strategy
    if isinstance(strategy, SingleDeviceStrategy):
        return
    # Exactly this class: DeepSpeed's strategy extends it, and shards.
    if type(strategy) is not DDPStrategy:
        raise ValueError(
            f"expected one device or the strategy ddp for changing the student during fit, found {type(strategy).__name__}; "
            "set trainer.strategy to ddp, or change it in a run of its own and train its student/ folder with that strategy"
        )
    if strategy._start_method != "popen":
        raise ValueError(
            "expected the strategy ddp for changing the student during fit on several devices, found its processes started "
            f"by {strategy._start_method}; set trainer.strategy to ddp"
        )


def edit_on_all_ranks(trainer: Trainer, module: StudentModule, edits: Sequence[Edit]) -> None:
    """Apply rank 0's edits to the student on every rank, so that no tie and no last bit can part them."""
    edits = trainer.strategy.broadcast(list(edits))
    if edits:
        module.edit(edits)
        rebuild_ddp_wrapper(trainer.strategy)


def rebuild_ddp_wrapper(strategy: Strategy) -> None:
    """Replace the wrapper that averages gradients by one for the model as it is now; does nothing on one device."""
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        # Nobody else holds the old wrapper: with it go its reducer and the reducer's hooks on the parameters.
        strategy.model = strategy.model.module
        strategy.configure_ddp()


def share_of_rank(trainer: Trainer, batches: Iterable[T], count: int) -> Iterable[T]:
    """This rank's share of `count` batches: every `world_size`-th, or all of them where there is not one for each rank.

    Either way, sums and means over all ranks weigh every batch the same.
    """
    if trainer.world_size == 1 or count < trainer.world_size:
        return batches
    return islice(batches, trainer.global_rank, None, trainer.world_size)
