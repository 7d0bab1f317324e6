"""Data modules: conversations from files or the `datasets` library, and generated reasoning tasks."""

from datamodules.base import ChatDataModule
from datamodules.collate import IGNORE_INDEX, Batch
from datamodules.conversations import Conversations
from datamodules.reasoning import ReasoningTasks

__all__ = ["IGNORE_INDEX", "Batch", "ChatDataModule", "Conversations", "ReasoningTasks"]
