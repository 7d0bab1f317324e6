"""A loader that resumes exactly and knows the whole optimizer step.

With gradient accumulation, two things need more than one micro-batch: a loss that is a mean over all answer tokens of
the optimizer step, and a rollout that samples all its answers at once.  So the micro-batches of a step are fetched
together, and each has the `OptimizerStep` as `batch["step"]`.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader

from datamodules.collate import IGNORE_INDEX, Batch, OptimizerStep

# What a rollout needs of a batch that is not its turn yet.
_PROMPT_KEYS = ("prompt_ids", "prompt_mask", "prompt_lengths", "index")


class ResumableLoader(StatefulDataLoader):
    """torchdata's loader, by optimizer steps; a state from another number of workers is refused in plain words.

    `accumulate` gives the present number of micro-batches of an optimizer step (None leaves the batches as they are),
    `limit` the number of batches after which the trainer ends the epoch.
    """

    def __init__(
        self,
        *args: Any,
        accumulate: Callable[[], int] | None = None,
        limit: Callable[[], float] = lambda: float("inf"),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.accumulate, self.limit = accumulate, limit
        self._before: dict[str, Any] | None = None  # the state before the step that is being handed out
        self._position = 0  # micro-batches of it that were handed out
        self._handed_out = 0  # batches of this epoch that were handed out
        self._skip = 0  # micro-batches of the first step that a resumed run has behind it
        self._resumed = False

    def __iter__(self) -> Iterator[Batch]:
        batches = super().__iter__()
        return batches if self.accumulate is None else self._by_steps(batches)

    def _by_steps(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        assert self.accumulate is not None
        if not self._resumed or self._handed_out >= self.limit():
            self._handed_out = self._skip = 0
        self._resumed = False
        while True:
            size = int(min(self.accumulate(), self.limit() - (self._handed_out - self._skip)))
            self._before = super().state_dict() if size > 1 else None
            step = list(islice(batches, max(size, 0)))
            if not step:
                return
            skip, self._skip = self._skip, 0
            _announce(step, first=skip)
            for self._position, batch in enumerate(step[skip:], start=skip + 1):
                self._handed_out += 1
                if self._position == len(step):
                    self._before = None
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position; in the middle of a step, the position before it and what was handed out of it."""
        state = super().state_dict() if self._before is None else self._before
        done = 0 if self._before is None else self._position
        return {**state, "num_workers": self.num_workers, "micro_batches": done, "handed_out": self._handed_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the state was saved; raises `ValueError` if another number of workers saved it."""
        if state_dict["num_workers"] != self.num_workers:
            raise ValueError(
                f"expected num_workers {state_dict['num_workers']} as in the run that saved the checkpoint, found "
                f"{self.num_workers}; resume with the same number"
            )
        state = dict(state_dict)
        self._skip, self._handed_out = state.pop("micro_batches"), state.pop("handed_out")
        self._resumed = True
        super().load_state_dict(state)


def _announce(step: list[Batch], first: int) -> None:
    """Tell every micro-batch about its optimizer step; `first` is the position of the one handed out first."""
    answer_tokens = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in step)
    prompts = [{key: batch[key] for key in _PROMPT_KEYS} for batch in step]
    for position, batch in enumerate(step):
        batch["step"] = OptimizerStep(position, len(step), answer_tokens, prompts if position == first else [])
