"""The trainer's data module, as what the callbacks need it to be."""

from lightning import Trainer

from datamodules.base import ChatDataModule


def data_of(trainer: Trainer) -> ChatDataModule:
    """The data module of the run.

    Raises:
        ValueError: There is none, or it is none of ours and cannot score, calibrate or provide prompts.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, ChatDataModule):
        found = "none" if datamodule is None else type(datamodule).__name__
        raise ValueError(
            f"expected a data module that extends ChatDataModule, found {found}; use Conversations or ReasoningTasks, or "
            "write a subclass with load_split() (see datamodules/base.py)"
        )
    return datamodule
