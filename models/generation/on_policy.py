"""On-policy distillation: decides which optimizer steps learn from the student's own answers, and samples or replays these.

Every decision is a draw whose seed names the optimizer step: all micro-batches of a step and all ranks decide alike, and a
resumed run decides as the uninterrupted one did.

Legend: B samples, G generated tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal

import torch
from lightning import Trainer
from torch.nn import functional as F

from datamodules.collate import Batch
from models.generation.decoder import Decoder
from models.generation.replay import ReplayBuffer
from models.generation.rollout import Rollout, pad_left, rollout
from models.generation.sampling import Sampling, seed_of
from models.losses import Objective
from program.ranges import Between, Count, Share, check_fields

Source = Literal["dataset", "fresh", "replay"]


@dataclass(frozen=True)
class OnPolicy:
    """When and how the student answers for itself.

    Args:
        start: Optimizer steps of stage 1; negative leaves stage 2 out.
        ramp: Optimizer steps over which the share of on-policy steps rises to its final value after that.
        share: Final share of steps on the student's own answers, 0 to 1.
        adaptive: Instead of the ramp, begin stage 2 with a share of 0 and add this much (up to share) whenever validation shows
            a log-perplexity that rose by `tolerance` or more (DistiLLM: 0.1); 0 for the ramp.
        tolerance: See adaptive; nats per token.
        tokens: Length of the student's own answers in tokens, at most.
        batch_size: Answers sampled at once; 0 for all of the optimizer step. Less needs less memory and more time.
        replay_size: Answers kept for replay; once there are so many, a share of on-policy steps that grows from 0 to 1 over
            the run learns from them instead of sampling again (DistiLLM: 1000). 0 samples again in every step.
        seed: Seed of the draws and samples; the same on every rank.

    Raises:
        ValueError: A number is out of its range.
    """

    start: int = -1
    ramp: Count = 0
    share: Share = 1.0
    adaptive: Share = 0.0
    tolerance: Annotated[float, Between(-math.inf, math.inf)] = 0.1
    tokens: Annotated[int, Between(1, 1e6)] = 64
    batch_size: Count = 0
    replay_size: Count = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "on_policy.")


class OnPolicyAnswers:
    """Draws the source of every optimizer step's answers, and samples, keeps and replays the student's own."""

    def __init__(self, settings: OnPolicy, sampling: Sampling) -> None:
        self.settings, self.sampling = settings, sampling
        self.replay = ReplayBuffer(settings.replay_size)
        self.adaptive_share = 0.0
        self._last_nll: float | None = None

    def probability(self, step: int) -> float:
        """Probability that an optimizer step uses the student's own answers."""
        settings = self.settings
        if settings.start < 0 or step < settings.start:
            return 0.0
        if settings.adaptive:
            return self.adaptive_share
        return settings.share * min((step - settings.start + 1) / max(settings.ramp, 1), 1.0)

    def source(self, step: int, max_steps: int) -> Source:
        """Where the answers of an optimizer step come from."""
        generator = torch.Generator().manual_seed(seed_of("draw", self.settings.seed, step))
        own, fresh = torch.rand(2, generator=generator).tolist()
        if own >= self.probability(step):
            return "dataset"
        # DistiLLM replays more and more of its buffer; a run without an end has no such course, so it stays fresh.
        progress = step / max_steps if max_steps > 0 else 0.0
        return "replay" if self.settings.replay_size and self.replay.is_full and fresh < progress else "fresh"

    def validated(self, nll: float) -> None:
        """Take note of a validation's log-perplexity: where it rose, the student needs more of its own mistakes."""
        if self.settings.adaptive and self._last_nll is not None and nll >= self._last_nll + self.settings.tolerance:
            self.adaptive_share = min(self.adaptive_share + self.settings.adaptive, self.settings.share)
        self._last_nll = nll

    def answers(
        self,
        source: Source,
        batches: list[Batch],
        step: int,
        rank: int,
        decoder: Callable[[], Decoder],
        *,
        end_tokens: Sequence[int],
        vocabulary: int,
    ) -> list[tuple[Batch, Rollout]]:
        """Prompts and the student's answers for all micro-batches of an optimizer step, from one generation or the buffer.

        Each rank draws from its own buffer.  `decoder` makes a decoder of the student's present weights, and is asked
        only if there is something to sample: tokens below `vocabulary`, up to one of `end_tokens`.
        """
        sizes = [len(batch["index"]) for batch in batches]
        if source == "replay":
            generator = torch.Generator().manual_seed(seed_of("replay", self.settings.seed, step, rank))
            return [self.replay.draw(size, generator, batches[0]["prompt_ids"].device) for size in sizes]
        together: Batch = {
            "prompt_ids": pad_left([batch["prompt_ids"] for batch in batches]),
            "prompt_mask": pad_left([batch["prompt_mask"] for batch in batches]),
            "index": [index for batch in batches for index in batch["index"]],
        }
        seeds = [seed_of("rollout", self.settings.seed, step, index) for index in together["index"]]
        answers = self._sample(decoder(), together, seeds, end_tokens, vocabulary)
        if self.settings.replay_size:
            self.replay.add(together, answers)
        lengths = iter(answers.lengths)
        parts = zip(batches, answers.tokens_BG.split(sizes), strict=True)
        return [(batch, Rollout(tokens_BG, list(islice(lengths, len(tokens_BG))))) for batch, tokens_BG in parts]

    def _sample(
        self, decoder: Decoder, batch: Batch, seeds: list[int], end_tokens: Sequence[int], vocabulary: int
    ) -> Rollout:
        """Answers to all prompts, `batch_size` of them at once."""
        size = self.settings.batch_size or len(seeds)
        pieces = [
            rollout(
                decoder,
                batch["prompt_ids"][start : start + size],
                batch["prompt_mask"][start : start + size],
                max_new_tokens=self.settings.tokens,
                end_tokens=end_tokens,
                sampling=self.sampling,
                seeds=seeds[start : start + size],
                vocabulary=vocabulary,
            )
            for start in range(0, len(seeds), size)
        ]
        width = max(piece.tokens_BG.shape[1] for piece in pieces)
        tokens = [F.pad(piece.tokens_BG, (0, width - piece.tokens_BG.shape[1])) for piece in pieces]
        return Rollout(torch.cat(tokens), [length for piece in pieces for length in piece.lengths])

    def state_dict(self) -> dict[str, Any]:
        """What the draws depend on beside the step."""
        return {"adaptive_share": self.adaptive_share, "last_nll": self._last_nll, "replay": self.replay.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.adaptive_share, self._last_nll = state["adaptive_share"], state["last_nll"]
        self.replay.load_state_dict(state["replay"])


def check_policy_gradient(objectives: Mapping[Any, Objective], on_policy: OnPolicy) -> None:
    """Raise `ValueError` for policy gradients on answers that the student has not just sampled: its estimate needs these."""
    replays = on_policy.replay_size and "policy_gradient" in objectives["replay"].weights
    if replays or "policy_gradient" in objectives["dataset"].weights:
        raise ValueError(
            "expected policy_gradient in model.on_policy_objective only and without on_policy.replay_size, found it for "
            f"{'replayed answers' if replays else 'the answers of the data'}; it needs answers that were just sampled"
        )


def check_course(on_policy: OnPolicy, trainer: Trainer) -> None:
    """Raise `ValueError` for settings of stage 2 that would never take effect in this run."""
    data = getattr(trainer, "datamodule", None)
    if 0 < trainer.max_steps <= on_policy.start:
        raise ValueError(
            f"expected on_policy.start below trainer.max_steps ({trainer.max_steps}), found {on_policy.start}, so that stage 2 would never "
            "begin; lower it, or set it to -1 for stage 1 alone"
        )
    if on_policy.replay_size and trainer.max_steps <= 0:
        raise ValueError(
            f"expected trainer.max_steps for on_policy.replay_size, found {trainer.max_steps}; the share of replayed answers "
            "grows over the run, so set its length, or leave replay_size out"
        )
    if on_policy.adaptive and data is not None and not data.has_split("val"):
        raise ValueError(
            "expected validation data for on_policy.adaptive, found none; add it, or let the share rise by on_policy.ramp"
        )
