"""Collates tokenized examples into one padded batch, as a pure function.

Training rows are padded on the right, rollout prompts on the left (so that every prompt's last token stands in the
last column and sampling continues there). Masks and labels come from the lengths, never from comparing ids with the
pad id: many tokenizers pad with the end token, and the answer's own end token must stay visible and supervised.

Shapes: B batch, T tokens of prompt and answer, P prompt tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.chat import Example

IGNORE_INDEX = -100  # what torch's cross entropy ignores


Batch = dict[str, Any]
"""What every loader yields; B samples, T tokens, P tokens of prompts:

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
| `answer_spans`   | of each sample, where its answers are: half-open ranges, known to the host without a look at a GPU |
| `index`          | positions in the split                                                                            |
| `step`           | training only: the `OptimizerStep` it belongs to, see `datamodules/loader.py`                     |

Data modules may add their own, as `datamodules/ranking.py` does.
"""


class OptimizerStep(NamedTuple):
    """The optimizer step that a micro-batch belongs to.

    Attributes:
        position: Of the micro-batch in the step.
        size: Micro-batches of the step.
        answer_tokens: Of all of them, on this rank.
        batches: Their prompts, with the micro-batch that begins the step or resumes within it; with the others, none.
    """

    position: int
    size: int
    answer_tokens: int | Tensor
    batches: list[Batch]

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
    """Pad examples to the longest among them.

    Args:
        examples: At least one.
        pad_id: Fills `input_ids` and `prompt_ids` where their masks are 0.
    """
    num_rows = len(examples)
    num_tokens = max(len(example) for example in examples)
    num_prompt_tokens = max(example.prompt_length for example in examples)

    input_ids_BT = torch.full((num_rows, num_tokens), pad_id)
    attention_mask_BT = torch.zeros((num_rows, num_tokens), dtype=torch.long)
    labels_BT = torch.full((num_rows, num_tokens), IGNORE_INDEX)
    prompt_ids_BP = torch.full((num_rows, num_prompt_tokens), pad_id)
    prompt_mask_BP = torch.zeros((num_rows, num_prompt_tokens), dtype=torch.long)
    for row, example in enumerate(examples):
        length, prompt_length = len(example), example.prompt_length
        input_ids_BT[row, :length] = example.input_ids
        attention_mask_BT[row, :length] = 1
        for start, end in example.answer_spans:
            labels_BT[row, start:end] = example.input_ids[start:end]
        prompt_ids_BP[row, num_prompt_tokens - prompt_length :] = example.input_ids[:prompt_length]
        prompt_mask_BP[row, num_prompt_tokens - prompt_length :] = 1

    return Batch(
        input_ids=input_ids_BT,
        attention_mask=attention_mask_BT,
        labels=labels_BT,
        prompt_ids=prompt_ids_BP,
        prompt_mask=prompt_mask_BP,
        prompt_lengths=[example.prompt_length for example in examples],
        prompts=[example.prompt for example in examples],
        answers=[example.answer for example in examples],
        answer_spans=[example.answer_spans for example in examples],
        index=[example.index for example in examples],
    )
