"""`EvaluatedModule`: how a module with a student validates, tests and predicts."""

from typing import Any

import torch
from lightning import LightningModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.collate import Batch
from models.evaluation.answers import AnswerMetrics, generate_texts
from models.forward import answer_labels, lazy_logits
from models.generation.decoder import Decoder, decoder_for
from models.loading.reference import end_token_ids
from models.losses.output_head import LazyLogits


class EvaluatedModule(LightningModule):
    """Figures of the student over a split, and its greedy answers; subclasses build the student and train it."""

    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int  # tokens that take part; heads may be padded beyond
    generate_tokens: int  # length of the answers that are scored; 0 for none

    def __init__(self) -> None:
        super().__init__()
        self.metrics = AnswerMetrics()
        self._decoders: dict[PreTrainedModel, Decoder] = {}  # of an evaluation: a copy of each model that has to answer

    def teacher_logits(self, batch: Batch, split: str) -> LazyLogits | None:
        """Logits of a teacher at the answer positions (N, V), or None without a teacher."""
        return None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics."""
        self._evaluation_step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics."""
        self._evaluation_step(batch, "test")

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation."""
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        """Forget the last evaluation."""
        self._start_evaluation()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self._end_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self._end_evaluation("test")

    def on_predict_epoch_start(self) -> None:
        """Forget the last evaluation."""
        self._start_evaluation()

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, str]]:
        """Greedy answers: one row `{prompt, prediction, answer}` per sample."""
        texts = self._answers(self.student, batch)
        rows = zip(batch["prompts"], texts, batch["answers"], strict=True)
        return [{"prompt": prompt, "prediction": text, "answer": answer} for prompt, text, answer in rows]

    def on_predict_epoch_end(self) -> None:
        """Free the copy."""
        self._decoders.clear()

    def _start_evaluation(self) -> None:
        self.metrics.reset()
        self._decoders.clear()

    def _evaluation_step(self, batch: Batch, split: str) -> None:
        logits = lazy_logits(self.student, batch, self.vocabulary)
        self.metrics.update(logits, answer_labels(batch), self.teacher_logits(batch, split))
        self._score(self.student, self.metrics, batch, split)

    def _score(self, model: PreTrainedModel, metrics: AnswerMetrics, batch: Batch, split: str) -> None:
        """Add the task score of a model's greedy answers, where the data has one."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if self.generate_tokens and getattr(datamodule, "has_score", False):
            texts = self._answers(model, batch)
            metrics.task_score.update(torch.tensor(datamodule.score(texts, batch, split), device=self.device))
            if hasattr(datamodule, "gym_score"):
                metrics.scorer_score.update(torch.tensor(datamodule.gym_score(texts, batch, split), device=self.device))

    def _answers(self, model: PreTrainedModel, batch: Batch) -> list[str]:
        if model not in self._decoders:
            self._decoders[model] = decoder_for(model, self.inference_dtype)
        return generate_texts(
            self._decoders[model],
            self.tokenizer,
            batch,
            max_new_tokens=max(self.generate_tokens, 1),
            end_tokens=end_token_ids(model),
        )

    def _end_evaluation(self, split: str) -> dict[str, float]:
        self._decoders.clear()
        figures = {f"{split}/{name}": value for name, value in self.metrics.compute().items()}
        self.log_dict(figures)
        self.metrics.reset()
        return figures

    @property
    def inference_dtype(self) -> torch.dtype:
        """Floating point type for generation: bfloat16 where training uses half precision, else float32."""
        precision = "32" if self._trainer is None else str(self.trainer.precision)
        return torch.float32 if precision.startswith(("32", "64")) else torch.bfloat16
