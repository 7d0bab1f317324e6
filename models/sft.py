"""Supervised fine-tuning: cross-entropy on the answers of the data ("teacher correction" when the teacher is tuned)."""

from torch import Tensor
from torch.nn import functional as F

from models.forward import Batch, answer_labels, answer_logits
from models.student import StudentModule


class SFT(StudentModule):
    """Fine-tune a model on gold answers; the loss is the mean cross-entropy per answer token, in nats."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        loss = F.cross_entropy(answer_logits(self.student, batch).float(), answer_labels(batch))
        self.log("train/loss", loss, prog_bar=True)
        return self.finite(loss, batch)
