"""LightningModules and everything that concerns the networks."""

import program.screen  # noqa: F401
from models.distillation import Distillation
from models.ranking_distillation import RankingDistillation
from models.sft import SFT
from models.student import StudentModule

__all__ = ["SFT", "Distillation", "RankingDistillation", "StudentModule"]
