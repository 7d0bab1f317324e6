"""Collates tokenized examples into one padded batch, as a pure function.

Training rows are padded on the right, rollout prompts on the left, so that sampling continues behind the last column.
Masks and labels come from the lengths, not from comparing ids with the pad id, which often is the end token as well.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from datamodules.chat import Example

IGNORE_INDEX = -100  # what torch's cross entropy ignores


Batch = dict[str, Any]
"""What every loader yields; B samples, T tokens of prompt and answer, P tokens of prompts:

| key              | what it is                                                                                        |
|------------------|---------------------------------------------------------------------------------------------------|
| `input_ids`      | (B, T) long, right padded                                                                         |
| `attention_mask` | (B, T) long, 0 or 1                                                                               |
| `labels`         | (B, T) long, `IGNORE_INDEX` except on answer tokens                                               |
| `prompt_ids`     | (B, P) long, left padded                                                                          |
| `prompt_mask`    | (B, P) long, 0 or 1                                                                               |
| `prompt_lengths` | of each sample, tokens of its prompt                                                              |
| `prompts`        | readable prompts                                                                                  |
| `answers`        | gold answers                                                                                      |
| `answer_spans`   | of each sample, where its answers are: half-open ranges that say the same as `labels`, which on a GPU nobody looks at |
| `index`          | positions in the split                                                                            |
| `step`           | training only: the `OptimizerStep` it belongs to, see `datamodules/loader.py`                     |

Data modules may add their own, as `datamodules/ranking.py` does.
"""


class OptimizerStep(NamedTuple):
    """The optimizer step that a micro-batch belongs to."""

    position: int  # of the micro-batch in the step
    size: int  # micro-batches of the step
    answer_tokens: int | Tensor  # of all of them, on this rank
    batches: list[Batch]  # their prompts, with the micro-batch that begins the step or resumes within it; else none

    @property
    def begins(self) -> bool:
        """Whether this micro-batch is the first one of the step that is handed out."""
        return bool(self.batches)

    @property
    def ends(self) -> bool:
        """Whether this micro-batch is the last one of the step."""
        return self.position + 1 == self.size


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's pad token, or its end token where it has none (padding is masked, so either will do)."""
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(pad_id, int)
    return pad_id


def collate(examples: Sequence[Example], *, pad_id: int) -> Batch:
    """Pad at least one example to the longest; `pad_id` fills `input_ids` and `prompt_ids` where their masks are 0."""
    right = partial(pad_sequence, batch_first=True)
    left = partial(pad_sequence, batch_first=True, padding_side="left")
    ids = [example.input_ids.long() for example in examples]
    prompt_ids = [row[: example.prompt_length] for row, example in zip(ids, examples, strict=True)]
    labels = [torch.full_like(row, IGNORE_INDEX) for row in ids]
    for label_row, row, example in zip(labels, ids, examples, strict=True):
        for start, end in example.answer_spans:
            label_row[start:end] = row[start:end]
    return Batch(
        input_ids=right(ids, padding_value=pad_id),
        attention_mask=right([torch.ones_like(row) for row in ids]),
        labels=right(labels, padding_value=IGNORE_INDEX),
        prompt_ids=left(prompt_ids, padding_value=pad_id),
        prompt_mask=left([torch.ones_like(row) for row in prompt_ids]),
        prompt_lengths=[example.prompt_length for example in examples],
        prompts=[example.prompt for example in examples],
        answers=[example.answer for example in examples],
        answer_spans=[example.answer_spans for example in examples],
        index=[example.index for example in examples],
    )
