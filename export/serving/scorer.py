"""Ranking: the log-probabilities of label tokens for many candidates that share a prefix, such as a member's profile.

The prefix goes through the model once, alone, and its cache is kept for the next request ("hot").  Candidates are short suffixes:
a batch of them continues that cache.  Tokens, and so scores, are those of the whole prompt, see `datamodules/label_prompts.py`; what
is shared changes the time only.

Letters: N candidates, C labels, B batch, T new tokens, P tokens of the prefix, S = P + T, V vocabulary.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.label_prompts import Prompt, encode_prompts, frame_of, label_token_ids
from export.onnx_graph.labels import LOG_PROBS
from export.sessions.session import SharingSession
from program.ranges import Count, Positive, check_arguments


class Scorer:
    """Scores candidates one prefix at a time.

    Args:
        session: Runs the model; a graph that keeps the logits of the last position only saves most of the head's work, and one of
            `export/onnx_graph/labels.py` returns what is asked for.
        tokenizer: Of the model, with its chat template.
        labels: The classes in order; each has to be one token.
        system_prompt: As in the data that the model was trained on.
        batch_size: Candidates at a time.
        max_prefixes: Prefixes whose caches are kept; the one that was not used for longest leaves first.

    Raises:
        ValueError: A label is not one token, the session's graph has others, or a number is below 1.
    """

    def __init__(
        self,
        session: SharingSession,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str] = ("no", "yes"),
        *,
        system_prompt: str | None = None,
        batch_size: Positive = 32,
        max_prefixes: Count = 16,
    ) -> None:
        check_arguments(Scorer.__init__, locals(), "")
        self.session, self.tokenizer = session, tokenizer
        self.labels, self.batch_size, self.max_prefixes = tuple(labels), batch_size, max_prefixes
        self._frame = frame_of(tokenizer, system_prompt)
        label_ids = label_token_ids(tokenizer, labels, system_prompt)
        self._computed: dict[str, int] = getattr(session, "labels", {})  # by the session's graph, with their tokens
        if self._computed and not set(label_ids) <= set(self._computed.values()):
            raise ValueError(
                f"expected a graph for the labels {list(labels)}, found one for {list(self._computed)}; score these, or export again "
                "with --labels"
            )
        columns = list(self._computed.values())
        self._columns = torch.tensor([columns.index(token) for token in label_ids] if columns else label_ids)
        self._caches: OrderedDict[tuple[int, ...], list[Any]] = OrderedDict()

    def score(self, prefix: str, candidates: Sequence[str]) -> Tensor:
        """Log-probabilities (N, C) of the labels among all tokens, float32 on the CPU, in the order of the candidates.

        Equal candidates are computed once; no candidates give a result without rows.
        """
        distinct = list(dict.fromkeys(candidates))
        prompts = encode_prompts(self.tokenizer, self._frame, [(prefix, candidate) for candidate in distinct])
        shortest_first = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
        scores = torch.empty(len(distinct), len(self.labels))
        for start in range(0, len(prompts), self.batch_size):
            part = shortest_first[start : start + self.batch_size]
            scores[part] = self._score([prompts[index] for index in part])
        place = {candidate: row for row, candidate in enumerate(distinct)}
        return scores[[place[candidate] for candidate in candidates]]

    def forget(self) -> None:
        """Drop the caches of all prefixes."""
        self._caches.clear()

    def _score(self, prompts: Sequence[Prompt]) -> Tensor:
        shared = min(min(prompt.prefix_length, len(prompt.ids) - 1) for prompt in prompts)
        cache = self._cache_of(tuple(prompts[0].ids[:shared])) if shared else None
        suffixes = [torch.tensor(prompt.ids[shared:]) for prompt in prompts]
        width = max(len(suffix) for suffix in suffixes)
        ids_BT = torch.zeros(len(prompts), width, dtype=torch.long)
        mask_BS = torch.ones(len(prompts), shared + width, dtype=torch.long)
        for row, suffix in enumerate(suffixes):
            ids_BT[row, width - len(suffix) :] = suffix
            mask_BS[row, shared : shared + width - len(suffix)] = 0
        output = self.session.run(ids_BT, mask_BS, None if cache is None else self.session.repeat(cache, len(prompts)))
        every = output.others[LOG_PROBS] if self._computed else output.logits[:, -1].float().log_softmax(dim=-1)
        return every[:, self._columns.to(every.device)].cpu()

    def _cache_of(self, prefix_ids: tuple[int, ...]) -> list[Any]:
        cache = self._caches.pop(prefix_ids, None)
        if cache is None:
            ids_1P = torch.tensor([prefix_ids])
            cache = self.session.run(ids_1P, torch.ones_like(ids_1P)).cache
        self._caches[prefix_ids] = cache
        while len(self._caches) > self.max_prefixes:
            self._caches.popitem(last=False)
        return cache
