"""Quality of a graph as it is served: KL to a teacher, and task score of its own answers.

Everything goes through the session that serves: a prompt at once, then token by token on the cache, the gold answer for the distance
and greedy tokens for the score.  A batch is forgotten before the next one begins, and logits are compared one position at a time, so
that neither the number of questions nor the length of answers costs memory.

Letters: B conversations, P prompt tokens, N answer tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from datamodules.collate import IGNORE_INDEX, Batch
from export.sessions.session import Session
from models.evaluation.answers import Scorer
from models.generation.rollout import Rollout, answer_texts
from models.losses import forward_kl

TeacherLogits = Callable[[int, Batch, Tensor], Tensor]
"""(number of the batch, batch, (n,) positions among its answer tokens in the order of `answer_labels`) -> logits (n, V)."""

_Z = 1.96  # standard errors to each side of a mean: 95 %


@dataclass(frozen=True)
class Served:
    """What was found.

    Attributes:
        kl_N: KL(teacher || graph) of each answer token, nats.
        conversation_N: Which conversation each token belongs to, as `Batch["index"]` counts them.
        scores: Task score of each question, 0 to 1, in the order of the batches; empty without a scorer.
    """

    kl_N: Tensor
    conversation_N: Tensor
    scores: tuple[float, ...]

    def figures(self) -> dict[str, Any]:
        """`kl` and `task_score` with the ends of their 95 % intervals, `_low` and `_high`, and how many `tokens` and `questions`."""
        found = {**_named("kl", clustered_mean(self.kl_N, self.conversation_N)), "tokens": len(self.kl_N)}
        if self.scores:
            found |= _named("task_score", wilson(self.scores))
        return found | {"questions": len(self.conversation_N.unique())}


@dataclass(frozen=True)
class HeldOut:
    """Conversations that artefacts are judged on.

    Attributes:
        batches: With gold answers, none from training.  Judged is what follows `prompt_ids`: of several turns the last.
        judge: What is thought of the answers; None: what the model without rounded inputs thinks of them.
        tokenizer: Turns generated tokens into text.
        scorer: Gives a score in 0..1 for every generated answer of a batch; None: there is no task score.
        max_new_tokens: Length of generated answers, tokens; 0: nothing is generated.
    """

    batches: Sequence[Batch]
    judge: TeacherLogits | None = None
    tokenizer: Any = None
    scorer: Scorer | None = None
    max_new_tokens: int = 0

    @torch.no_grad()
    def measure(self, session: Session, end_tokens: Sequence[int], on_batch: Callable[[], None]) -> Served:
        """Judge what runs in a session; a call must leave the cache that it is given as it was, as `OnnxSession` does.

        Args:
            session: Runs the graph.
            end_tokens: Tokens that end an answer.
            on_batch: Called after each batch.
        """
        assert self.judge is not None
        distances: list[Tensor] = []
        conversations: list[Tensor] = []
        scores: list[float] = []
        for number, batch in enumerate(self.batches):
            prompt = session.run(batch["prompt_ids"], batch["prompt_mask"])
            next_BV, cache = prompt.logits[:, -1].clone(), prompt.cache
            del prompt  # logits of all positions
            for kl_n, rows_n in _distances(session, number, batch, next_BV, cache, self.judge):
                distances.append(kl_n)
                conversations.append(torch.tensor(batch["index"])[rows_n])
            if self.scorer is not None and self.max_new_tokens:
                answers = _greedy(session, batch, next_BV, cache, end_tokens, self.max_new_tokens)
                scores += self.scorer(answer_texts(self.tokenizer, answers), batch)
            on_batch()
        return Served(torch.cat(distances), torch.cat(conversations), tuple(scores))


def _distances(
    session: Session, number: int, batch: Batch, next_BV: Tensor, cache: Any, teacher_logits: TeacherLogits
) -> Iterable[tuple[Tensor, Tensor]]:
    """KL (n,) of one position of the answers at a time, and the rows (n,) that have an answer token there."""
    supervised_BT = batch["labels"] != IGNORE_INDEX
    # Where each supervised token stands among all of them, in the order of `answer_labels`.
    order_BT = (supervised_BT.flatten().cumsum(0) - 1).view_as(supervised_BT)
    prompts_B, mask_BS = batch["prompt_mask"].sum(1), batch["prompt_mask"]
    longest = int((batch["attention_mask"].sum(1) - prompts_B).max())
    rows_B, last = torch.arange(len(prompts_B)), supervised_BT.shape[1] - 1
    for step in range(longest):
        at_B = (prompts_B + step).clamp(max=last)
        rows_n = rows_B[supervised_BT[rows_B, at_B] & (prompts_B + step <= last)]
        if len(rows_n):
            theirs_nV = teacher_logits(number, batch, order_BT[rows_n, at_B[rows_n]]).float()
            vocabulary = min(theirs_nV.shape[1], next_BV.shape[1])
            yield forward_kl(next_BV[rows_n, :vocabulary].float(), theirs_nV[:, :vocabulary]), rows_n
        if step + 1 < longest:
            mask_BS = torch.cat([mask_BS, torch.ones_like(mask_BS[:, :1])], dim=1)
            output = session.run(batch["input_ids"][rows_B, at_B][:, None], mask_BS, cache)
            next_BV, cache = output.logits[:, -1], output.cache


def _greedy(
    session: Session, batch: Batch, next_BV: Tensor, cache: Any, end_tokens: Sequence[int], max_new_tokens: int
) -> Rollout:
    """The most probable token each time, until all answers have ended."""
    mask_BS, ends = batch["prompt_mask"], torch.tensor(list(end_tokens), dtype=torch.long)
    alive_B = torch.ones(len(mask_BS), dtype=torch.bool)
    tokens: list[Tensor] = []
    lengths_B = torch.zeros(len(mask_BS), dtype=torch.long)
    while True:
        token_B = next_BV.argmax(-1)
        tokens.append(token_B)
        lengths_B += alive_B
        alive_B = alive_B & ~torch.isin(token_B, ends)
        if len(tokens) == max_new_tokens or not alive_B.any():
            return Rollout(torch.stack(tokens, dim=1), lengths_B.tolist())
        mask_BS = torch.cat([mask_BS, torch.ones_like(mask_BS[:, :1])], dim=1)
        output = session.run(token_B[:, None], mask_BS, cache)
        next_BV, cache = output.logits[:, -1], output.cache


def clustered_mean(values_N: Tensor, clusters_N: Tensor) -> tuple[float, float, float]:
    """Mean with the ends of its 95 % interval, where values of one cluster depend on each other: a ratio of two sums over clusters,
    its variance linearized (Cochran, Sampling Techniques, 1977, section 6.3).
    """
    values_N = values_N.double()
    mean = values_N.mean()
    _, cluster_N = clusters_N.unique(return_inverse=True)
    clusters = int(cluster_N.max()) + 1
    residuals = torch.zeros(clusters, dtype=torch.float64).index_add_(0, cluster_N, values_N - mean)
    correction = clusters / max(clusters - 1, 1)
    error = _Z * float((correction * residuals.square().sum()).sqrt()) / len(values_N)
    return float(mean), float(mean) - error, float(mean) + error


def wilson(scores: Sequence[float]) -> tuple[float, float, float]:
    """Mean of scores in 0..1 with the ends of Wilson's 95 % interval, which is that of scores of 0 and 1, and too wide for others."""
    count, mean = len(scores), sum(scores) / len(scores)
    center = (mean + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    error = _Z * math.sqrt(mean * (1 - mean) / count + _Z**2 / (4 * count**2)) / (1 + _Z**2 / count)
    return mean, center - error, center + error


def _named(name: str, mean_and_ends: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), mean_and_ends, strict=True))
