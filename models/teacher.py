"""The frozen teacher.

`Teacher` is deliberately *not* an `nn.Module`: it is then no part of the student's `state_dict`, of the optimizer or of a
distributed wrapper, and nothing can train it, quantize it or save it by accident.

Legend: N answer tokens, D hidden, V vocabulary.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.forward import answer_hidden, answer_lengths, answer_states
from models.hardware.attention import use_attention
from models.hardware.low_precision import quantize_weights
from models.loading.reference import load_model
from models.losses import FullTargets, Targets, head_of, logits_of
from models.losses.output_head import LazyLogits

TeacherDtype = Literal["auto", "float32", "bfloat16", "int8"]


class Teacher:
    """A frozen model that answers with next-token logits.

    `dtype` is the floating point type of the weights and of the computation; with `int8`, the linear layers of the
    decoder are kept in 8 bits with one scale per output, and the head stays in `dtype`.
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
    """A teacher that runs its body once for each sample, known by its position in the split.

    For students that change while the samples do not: repeated evaluation, or several runs on the same data.  It keeps D numbers
    per answer token.

    `hidden` is what it remembers from before, and adds to: final hidden states (answer tokens, D) by position.
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
