"""Scores, schedules and surgery for structured pruning."""

from models.pruning.schedule import event_steps, sparsity_after, units_to_keep
from models.pruning.scores import ImportanceScores, activation_scores, top_indices
from models.pruning.slicing import narrow_linear, narrow_parameter

__all__ = [
    "ImportanceScores",
    "activation_scores",
    "event_steps",
    "narrow_linear",
    "narrow_parameter",
    "sparsity_after",
    "top_indices",
    "units_to_keep",
]
