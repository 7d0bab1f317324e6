"""Supervised fine-tuning: cross-entropy on the answers of the data ("teacher correction" when the teacher is tuned)."""

from torch import Tensor

from datamodules.collate import Batch
from models.forward import answer_hidden, answer_labels
from models.losses import Objective, head_of, linear_objective
from models.student import StudentModule

CROSS_ENTROPY = Objective({"cross_entropy": 1.0})


class SFT(StudentModule):
    """Fine-tune a model on gold answers; the loss is the mean cross-entropy per answer token of the optimizer step, in nats."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of one micro-batch."""
        step = self.step_of(batch)
        if step.begins:
            self.step_mean.start(step.answer_tokens)
        hidden_ND = answer_hidden(self.student, batch)
        total, _ = linear_objective(
            hidden_ND, head_of(self.student), None, answer_labels(batch), CROSS_ENTROPY, chunk_tokens=self.chunk_tokens
        )
        return self.share_of_step(total, batch)
