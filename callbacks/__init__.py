"""Callbacks decide *when*; the functions in `models/` and `export/` decide *what*."""

from callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from callbacks.export import ExportOnFitEnd
from callbacks.lora import LoRA
from callbacks.phases import PhaseEvaluation
from callbacks.preflight import Preflight
from callbacks.progress import TrainingProgress
from callbacks.pruning.gradual_pruning import GradualPruning
from callbacks.quantization import QuantizationAwareTraining
from callbacks.samples import SampleCompletions
from callbacks.throughput import Throughput

__all__ = [
    "AtomicCheckpointIO",
    "Checkpoint",
    "ExportOnFitEnd",
    "GradualPruning",
    "LoRA",
    "PhaseEvaluation",
    "Preflight",
    "QuantizationAwareTraining",
    "SampleCompletions",
    "Throughput",
    "TrainingProgress",
]
