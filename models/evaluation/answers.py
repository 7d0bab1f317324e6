"""Evaluates a student: perplexity, KL to the teacher, top-1 agreement and task score, through torchmetrics.

Legend: N answer tokens, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.text import Perplexity
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.collate import Batch
from models.copies import inference_copy
from models.forward import answer_labels, lazy_logits
from models.generation.decoder import Decoder, decoder_for
from models.generation.rollout import answer_texts, rollout
from models.loading.reference import end_token_ids
from models.losses import forward_kl
from models.losses.output_head import LazyLogits, pieces_of
from models.teacher import Teacher

Scorer = Callable[[list[str], Batch], Sequence[float]]


class AnswerMetrics(nn.Module):
    """Running figures over answer tokens; states are summed over ranks by torchmetrics.

    `compute` gives `perplexity` (of the gold answers), and, where there was data for them, `kl` (KL(teacher || student), nats
    per answer token), `top1_agreement` (share of answer tokens whose most probable token is the teacher's), `top_k_kl` (in the place of both,
    where only the teacher's top tokens are known: a lower bound of `kl`), `task_score` (exact
    match with the gold answer) and `scorer_score` (the task's own scorer, which accepts other right answers).
    """

    def __init__(self) -> None:
        super().__init__()
        self.perplexity = Perplexity()
        self.kl = MeanMetric()
        self.top1_agreement = MeanMetric()
        self.top_k_kl = MeanMetric()
        self.task_score = MeanMetric()
        self.scorer_score = MeanMetric()

    def update(self, logits: LazyLogits, labels_N: Tensor, teacher_logits: LazyLogits | None) -> None:
        """Add the answer tokens of one batch, some at a time; heads padded to different sizes are cut to the ids that both have."""
        for rows in pieces_of(len(labels_N), logits.vocabulary):
            logits_nV, labels_n = logits[rows], labels_N[rows]
            if teacher_logits is not None:
                theirs_nV = teacher_logits[rows]
                vocabulary = min(logits_nV.shape[1], theirs_nV.shape[1])
                logits_nV, theirs_nV = logits_nV[:, :vocabulary], theirs_nV[:, :vocabulary]
                self.kl.update(forward_kl(logits_nV, theirs_nV))
                self.top1_agreement.update((logits_nV.argmax(-1) == theirs_nV.argmax(-1)).float())
            self.perplexity.update(logits_nV.float().unsqueeze(0), labels_n.unsqueeze(0))

    def compute(self) -> dict[str, float]:
        """All figures that have data."""
        metrics = {"perplexity": self.perplexity, "kl": self.kl, "top1_agreement": self.top1_agreement}
        metrics |= {"top_k_kl": self.top_k_kl, "task_score": self.task_score, "scorer_score": self.scorer_score}
        return {name: float(metric.compute()) for name, metric in metrics.items() if metric.update_called}

    def reset(self) -> None:
        """Forget everything."""
        for metric in (
            self.perplexity,
            self.kl,
            self.top1_agreement,
            self.top_k_kl,
            self.task_score,
            self.scorer_score,
        ):
            metric.reset()


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    tokenizer: PreTrainedTokenizerBase,
    teacher: Teacher | None = None,
    scorer: Scorer | None = None,
    max_new_tokens: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, float]:
    """Figures of a model over batches, see `AnswerMetrics`; the model is copied to `dtype` and left alone.

    Args:
        model: The model to judge.
        batches: Batches with gold answers.
        tokenizer: Turns generated tokens into text.
        teacher: Adds KL and agreement.
        scorer: Gives a score in 0..1 for every generated answer of a batch; adds the task score.
        max_new_tokens: Length of generated answers in tokens; 0 leaves the task score out.
        dtype: Floating point type of the computation.
    """
    device = model.device
    judged = model if teacher and model is teacher.model else inference_copy(model, dtype)
    decoder = decoder_for(model, model.dtype if judged is model else dtype) if scorer and max_new_tokens else None
    metrics = AnswerMetrics().to(device)
    for cpu_batch in batches:
        batch = move_data_to_device(cpu_batch, device)
        theirs = teacher.lazy_logits(batch) if teacher else None
        ours = theirs if theirs is not None and judged is model else lazy_logits(judged, batch)
        metrics.update(ours, answer_labels(batch), theirs)
        if scorer and decoder:
            texts = generate_texts(
                decoder, tokenizer, batch, max_new_tokens=max_new_tokens, end_tokens=end_token_ids(model)
            )
            scores = scorer(texts, batch)
            metrics.task_score.update(torch.tensor(list(scores), device=device))
    return metrics.compute()


def generate_texts(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    *,
    max_new_tokens: int,
    end_tokens: Sequence[int],
) -> list[str]:
    """Greedy answers to the prompts of a batch."""
    answers = rollout(
        decoder, batch["prompt_ids"], batch["prompt_mask"], max_new_tokens=max_new_tokens, end_tokens=end_tokens
    )
    return answer_texts(tokenizer, answers)
