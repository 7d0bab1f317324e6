"""From a Lightning checkpoint to an ordinary model."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.lora import merge_adapters
from models.low_precision import admit_optimizer_states
from models.student import StudentModule


def load_student_checkpoint(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The student of a Lightning checkpoint with its structure, adapters merged, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: The file is not a checkpoint of a `StudentModule`.
    """
    admit_optimizer_states(path)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if "edits" not in checkpoint or "student" not in checkpoint.get("hyper_parameters", {}):
        raise ValueError(
            f"expected a checkpoint written by train.py at {str(path)!r}, found one without a student's structure; "
            "give the .ckpt file of a run, or a Hugging Face folder"
        )
    settings = checkpoint["hyper_parameters"]
    module = StudentModule(settings["student"], trust_remote_code=settings.get("trust_remote_code", False))
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return merge_adapters(module.student.eval()), module.tokenizer
