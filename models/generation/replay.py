"""Replay of the student's own answers, as in DistiLLM (arXiv 2402.03898, section 3.2): sampling is expensive, learning is cheap.

Fresh answers enter a buffer; as training goes on, a growing share of on-policy steps learns from the buffer instead of sampling.

Legend: B samples, P prompt tokens, G generated tokens.
"""

from typing import Any

import torch
from torch import Tensor

from datamodules.collate import Batch
from models.generation.rollout import Rollout, pad_left


class ReplayBuffer:
    """The latest answers of the student, with their prompts, on the CPU; the oldest leave first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._samples: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def is_full(self) -> bool:
        """Whether old answers leave when new ones come."""
        return len(self) == self.capacity

    def add(self, batch: Batch, answers: Rollout) -> None:
        """Keep the answers to a batch of prompts (`prompt_ids`, `prompt_mask`, `index`)."""
        prompts = zip(batch["prompt_ids"].cpu(), batch["prompt_mask"].cpu().bool(), strict=True)
        tokens = zip(answers.tokens_BG.cpu(), answers.lengths, strict=True)
        for (prompt, is_prompt), (answer, length), index in zip(prompts, tokens, batch["index"], strict=True):
            self._samples.append({"prompt": prompt[is_prompt], "answer": answer[:length].clone(), "index": index})
        self._samples = self._samples[-self.capacity :]

    def draw(self, num_samples: int, generator: torch.Generator, device: torch.device) -> tuple[Batch, Rollout]:
        """Prompts (left-padded) and answers of randomly drawn samples, none twice where there are enough."""
        order = torch.randperm(len(self), generator=generator).tolist()
        drawn = [self._samples[order[i % len(order)]] for i in range(num_samples)]
        ones = [torch.ones(1, len(sample["prompt"]), dtype=torch.long) for sample in drawn]
        batch = {
            "prompt_ids": pad_left([sample["prompt"][None] for sample in drawn]).to(device),
            "prompt_mask": pad_left(ones).to(device),
            "prompt_lengths": [len(sample["prompt"]) for sample in drawn],
            "index": [sample["index"] for sample in drawn],
        }
        answers = [sample["answer"] for sample in drawn]
        tokens_BG: Tensor = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True)
        return batch, Rollout(tokens_BG.to(device), [len(answer) for answer in answers])

    def state_dict(self) -> list[dict[str, Any]]:
        """All samples: plain tensors and numbers."""
        return self._samples

    def load_state_dict(self, samples: list[dict[str, Any]]) -> None:
        """Go on with these samples."""
        self._samples = list(samples)
