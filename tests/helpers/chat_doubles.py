"""A tokenizer and a data module for tests: a byte-level ChatML tokenizer, and questions of random lengths."""

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from datamodules.base import ChatDataModule
from datamodules.chat import Conversation

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHATML, pad_token: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """One token a byte, and one for two newlines, which a tokenizer of prompt and answer together would merge."""
    specials = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    vocab = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Like Llama's: outside a chat template, texts get a start token.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token=pad_token
    )
    fast.chat_template = chat_template
    return fast


class Words(ChatDataModule):
    """Questions and answers of random lengths."""

    def load_split(self, split: str) -> list[Conversation]:
        draw = random.Random(split)
        return [
            Conversation(
                [
                    {"role": "user", "content": f"{i} " + "?" * draw.randrange(30)},
                    {"role": "assistant", "content": "!" * draw.randrange(1, 30)},
                ],
                f"{split} {i}",
            )
            for i in range({"train": 50, "val": 20, "test": 20}[split])
        ]
