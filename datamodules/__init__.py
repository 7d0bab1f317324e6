"""Data modules: conversations from files or the `datasets` library, generated reasoning tasks, and candidates to rank."""

from datamodules.base import ChatDataModule
from datamodules.collate import IGNORE_INDEX, Batch
from datamodules.conversations import Conversations
from datamodules.movielens_ranking import MovieLens
from datamodules.ranking import Ranking, RankingBatch, RankingData
from datamodules.reasoning import ReasoningTasks

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "ChatDataModule",
    "Conversations",
    "MovieLens",
    "Ranking",
    "RankingBatch",
    "RankingData",
    "ReasoningTasks",
]
