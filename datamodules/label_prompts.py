"""Prompts whose answer is one label token, and how many of their tokens a common prefix decides.

The user's message is the prefix, a newline and the prompt, without white space around either. It is tokenized as a
whole, so its score never depends on whether a key/value cache is shared. `prefix_length` only says where the cache may
be cut. Usually that is behind the whole prefix; a tokenizer that merges across the newline costs a token.

The template is rendered once, not once a prompt (a scorer has to render many in a millisecond): it writes the user's
message between two texts that do not depend on it, which `frame_of` checks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from datamodules.chat import Conversation, check_tokenizer, encode, render, token_ids, with_system_prompt

# Stands for the user's message while the template is rendered; two of them show that the rest stays the same.
STANDINS = ("a stand-in\nof two lines", "<another> 'stand-in' & more")


@dataclass(frozen=True)
class Frame:
    """What the chat template writes before and after the user's message, up to where the answer begins."""

    before: str
    after: str

    def prefix(self, prefix: str) -> str:
        """The text that all prompts with this prefix begin with."""
        return self.before + message_of(prefix, "")

    def prompt(self, prefix: str, prompt: str) -> str:
        """Everything that the model reads before it answers."""
        return self.before + message_of(prefix, prompt) + self.after


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt, and how many of its first tokens every prompt of the same prefix shares."""

    ids: list[int]
    prefix_length: int


def message_of(prefix: str, prompt: str) -> str:
    """The user's message: prefix, newline, prompt; the prompt alone if the prefix is empty."""
    return (f"{prefix.strip()}\n" if prefix.strip() else "") + prompt.strip()


def frame_of(tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None) -> Frame:
    """The chat template around a user's message; raises `ValueError` if there is none, or it refuses or changes it."""
    check_tokenizer(tokenizer)
    frames = []
    for message in STANDINS:
        messages = with_system_prompt([{"role": "user", "content": message}], system_prompt)
        text = render(tokenizer, messages, "prompts", add_generation_prompt=True)
        before, found, after = text.rpartition(message)
        frames.append(Frame(before, after) if found else None)
    if frames[0] is None or frames[0] != frames[1]:
        raise ValueError(
            "expected a chat template that writes the user's message as it is and the rest without regard to it, found "
            "one that changes either; use a template without conditions on the message"
        )
    return frames[0]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, frame: Frame, pairs: Sequence[tuple[str, str]]) -> list[Prompt]:
    """Tokenize (prefix, prompt) pairs; an empty prefix stands for the system message and the template's own text."""
    ids = token_ids(tokenizer, [frame.prompt(prefix, prompt) for prefix, prompt in pairs])
    prefixes = list(dict.fromkeys(prefix for prefix, _ in pairs))
    alone = dict(zip(prefixes, token_ids(tokenizer, [frame.prefix(prefix) for prefix in prefixes]), strict=True))
    lengths = {prefix: len(tokens) for prefix, tokens in alone.items()}
    for (prefix, _), tokens in zip(pairs, ids, strict=True):
        same = (a == b for a, b in zip(alone[prefix], tokens, strict=False))
        lengths[prefix] = min(lengths[prefix], sum(takewhile(bool, same)))
    return [Prompt(tokens, lengths[prefix]) for (prefix, _), tokens in zip(pairs, ids, strict=True)]


def label_token_ids(
    tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], system_prompt: str | None = None
) -> list[int]:
    """The token of each of two or more different labels; raises `ValueError` if one is no single token of an answer."""
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"expected at least two different labels, found {list(labels)}; name every class once")
    question = {"role": "user", "content": STANDINS[0]}
    answers = [[question, {"role": "assistant", "content": label}] for label in labels]
    conversations = [Conversation(messages, "the labels") for messages in answers]
    examples = encode(tokenizer, conversations, system_prompt=system_prompt)
    tokens = []
    for label, example in zip(labels, examples, strict=True):
        answer_ids = example.input_ids[example.prompt_length :].tolist()
        pieces = [str(tokenizer.decode([token])) for token in answer_ids]
        # Some tokenizers put a space before the first word of an answer.
        if pieces[0].strip() != label:
            shown = [piece for token, piece in zip(answer_ids, pieces, strict=True) if token != tokenizer.eos_token_id]
            raise ValueError(
                f"expected every label as one token at the start of the assistant's answer, found {label!r} as {shown}; "
                "choose labels that the tokenizer has as a whole, such as short lower-case words or digits"
            )
        tokens.append(answer_ids[0])
    return tokens
