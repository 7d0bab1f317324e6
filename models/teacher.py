"""The frozen teacher.

`Teacher` is deliberately *not* an `nn.Module`: it is then no part of the student's `state_dict`, of the optimizer or of a
distributed wrapper, and nothing can train it, quantize it or save it by accident.

Legend: N answer tokens, D hidden, V vocabulary.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.collate import Batch
from models.forward import answer_hidden, answer_lengths, answer_states
from models.hardware.attention import use_attention
from models.hardware.low_precision import quantize_weights
from models.hardware.sharding import shard
from models.loading.reference import check_same_tokenizer, load_model, load_tokenizer
from models.losses import FullTargets, Targets, check_head, head_of, logits_of
from models.losses.output_head import LazyLogits

TeacherDtype = Literal["auto", "float32", "bfloat16", "int8"]


class Teacher:
    """A frozen model that answers with next-token logits.

    Args:
        reference: Model reference, see `models/loading/reference.py`.
        dtype: Floating point type of the weights, and of the computation.
        int8: Keep the linear layers of the decoder in 8 bits with one scale per output; the head stays in `dtype`.
        trust_remote_code: Run Python code that comes with the model.
    """

    def __init__(
        self, reference: str, *, dtype: torch.dtype, int8: bool = False, trust_remote_code: bool = False
    ) -> None:
        model = load_model(reference, dtype=dtype, trust_remote_code=trust_remote_code)
        use_attention(model)
        self.model: PreTrainedModel = model.requires_grad_(False)
        if int8:
            quantize_weights(model.base_model)

    def to(self, device: torch.device) -> "Teacher":
        """Move the teacher to a device; returns itself."""
        self.model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the signature
        return self

    def shard(self, mesh: DeviceMesh) -> None:
        """Spread the teacher over the processes of a mesh, as the student is."""
        shard(self.model, mesh)

    @torch.no_grad()
    def targets(self, batch: Batch, layers: Iterable[int] = ()) -> tuple[Targets, list[Tensor]]:
        """What the teacher says at the answer positions, not yet multiplied with its head; outputs of some layers."""
        with torch.autocast(self.model.device.type, enabled=False):
            hidden_NE, states = answer_states(self.model, batch, layers)
        return FullTargets(hidden_NE, head_of(self.model)), states

    @torch.no_grad()
    def answer_hidden(self, batch: Batch) -> Tensor:
        """Final hidden states (N, D) at the positions that predict answer tokens."""
        with torch.autocast(self.model.device.type, enabled=False):
            return answer_hidden(self.model, batch)

    def answer_logits(self, batch: Batch) -> Tensor:
        """Logits (N, V) at the answer positions of a batch, see `models.forward.answer_logits`."""
        return self.lazy_logits(batch)[:]

    def lazy_logits(self, batch: Batch, vocabulary: int | None = None) -> LazyLogits:
        """The same, computed some rows at a time, over the first tokens of the vocabulary."""
        vocabulary = vocabulary or len(self.model.get_output_embeddings().weight)
        return LazyLogits(self.answer_hidden(batch), self._logits, vocabulary)

    @torch.no_grad()
    def _logits(self, hidden_ND: Tensor) -> Tensor:
        with torch.autocast(self.model.device.type, enabled=False):
            return logits_of(self.model, hidden_ND)


class RememberingTeacher(Teacher):
    """A teacher that runs its body once for each sample it is shown again, keyed by the sample's position in its split.

    For students that change while the samples do not: repeated evaluation, or several runs on the same data.  It keeps D numbers
    per answer token.

    Args:
        teacher: The teacher to ask.
        hidden: What it remembers from before, and adds to: final hidden states (answer tokens, D) by position.
    """

    def __init__(self, teacher: Teacher, hidden: dict[int, Tensor] | None = None) -> None:
        self.model = teacher.model
        self._hidden: dict[int, Tensor] = {} if hidden is None else hidden

    def answer_hidden(self, batch: Batch) -> Tensor:
        """Final hidden states (N, D), from memory if all samples were seen before."""
        if not all(index in self._hidden for index in batch["index"]):
            parts = super().answer_hidden(batch).split(answer_lengths(batch))
            self._hidden |= dict(zip(batch["index"], parts, strict=True))
        return torch.cat([self._hidden[index] for index in batch["index"]])


def load_teacher(
    reference: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: TeacherDtype,
    inference_dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> Teacher:
    """A teacher that a student with this tokenizer can learn from.

    Args:
        reference: Model reference, see `models/loading/reference.py`.
        tokenizer: The student's.
        dtype: Of the teacher's weights; auto is `inference_dtype`, int8 keeps its decoder layers in 8 bits.
        inference_dtype: Of the computation where `dtype` names none.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ValueError: The tokenizers differ, or the losses cannot compute with the teacher's head.
    """
    check_same_tokenizer(tokenizer, load_tokenizer(reference, trust_remote_code=trust_remote_code))
    floats = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    teacher = Teacher(
        reference,
        dtype=floats.get(dtype, inference_dtype),
        int8=dtype == "int8",
        trust_remote_code=trust_remote_code,
    )
    check_head(teacher.model, head_of(teacher.model))
    return teacher
