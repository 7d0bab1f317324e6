"""Conversations to token ids through the tokenizer's chat template, as plain functions.

A conversation is rendered turn by turn and cut into segments: a prompt (what the model reads), an answer (what it has
to write), the next prompt, ... Every segment is tokenized on its own, as at inference, where the model continues the
ids of a finished prompt: tokenizing both as one string could merge characters of prompt and answer into one token.

The rollout prompt is everything before the last assistant turn, so its ids are a prefix of the ids that training sees.
The last answer ends with the tokenizer's end token: what a template writes after it (ChatML's newline) is dropped, and
if a template ends turns with another token, the end token is appended.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Messages up to and including the last assistant turn, and where they come from (for error messages)."""

    messages: list[Message]
    source: str

    @property
    def prompt(self) -> list[Message]:
        """Every message before the last assistant turn."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The gold text: the content of the last assistant turn."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Example:
    """One tokenized conversation.

    `answer_spans` are half-open token ranges, one for each supervised assistant turn; the last starts where the rollout
    prompt ends. `index` is the position in the split before anything was dropped.
    """

    input_ids: Tensor
    answer_spans: tuple[tuple[int, int], ...]
    prompt: str
    answer: str
    index: int

    @property
    def prompt_length(self) -> int:
        """Tokens in the rollout prompt."""
        return self.answer_spans[-1][0]

    def __len__(self) -> int:
        return len(self.input_ids)


def conversation_from(messages: Sequence[Message], source: str) -> Conversation:
    """Check messages and cut what follows the last assistant turn.

    Raises:
        ValueError: A message is malformed, its role is unknown, an answer is empty, or no assistant turn follows another message.
    """
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise ValueError(
                f"expected every message as {{'role': ..., 'content': text}}, found {message!r:.100} in {source}; "
                "give each message a role and a text"
            )
        if message["role"] not in ROLES:
            raise ValueError(
                f"expected a role among {', '.join(ROLES)}, found {message['role']!r} in {source}; rename the role"
            )
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(
                f"expected a text in every assistant message, found none in {source}: a model would learn to say nothing; fill it in, or "
                "leave the conversation out"
            )
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    if last == 0:
        raise ValueError(
            f"expected a prompt followed by an assistant message, found the roles "
            f"{[message['role'] for message in messages]} in {source}; add the answer to learn from"
        )
    return Conversation([{"role": m["role"], "content": m["content"]} for m in messages[: last + 1]], source)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, reference: str | None = None) -> None:
    """Raise `ValueError` if the tokenizer lacks a chat template or an end token; `reference` says whose it is."""
    reference = reference or tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise ValueError(
            f"expected a tokenizer with a chat template, found none in {reference!r}, as base models have it; take the instruct "
            "variant of the model, or put a chat_template.jinja into its folder (beside a .gguf file): "
            "docs/howto-own-model-and-data.md shows one"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"expected a tokenizer with an end token, found none in {reference!r}; set it in tokenizer_config.json"
        )


def encode(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    system_prompt: str | None = None,
    supervise_all_turns: bool = True,
) -> list[Example]:
    """Tokenize conversations (see the module's docstring for how), at any length.

    `system_prompt` comes before those that have no system message (`None`: the template's default).  With
    `supervise_all_turns`, earlier assistant turns get labels, too.

    Raises:
        ValueError: There is no template or no end token, or the template refuses a conversation or does not render it turn by turn.
    """
    check_tokenizer(tokenizer)
    segments = [
        _segments(tokenizer, with_system_prompt(c.messages, system_prompt), c.source, supervise_all_turns)
        for c in conversations
    ]
    ids = iter(token_ids(tokenizer, [text for texts in segments for text in texts]))
    return [
        _join(tokenizer.eos_token_id, conversation, [next(ids) for _ in texts], index)
        for index, (conversation, texts) in enumerate(zip(conversations, segments, strict=True))
    ]


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of rendered texts: the template has already written the special tokens, so none are added here."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def truncate(example: Example, *, max_length: int, max_prompt_length: int | None = None) -> Example | None:
    """Cut the tail of the last answer to `max_length` tokens in all; `None` if no answer token is left.

    `None` is also returned for a prompt of more than `max_prompt_length` tokens: cutting it would change the question.
    """
    too_long = max_prompt_length is not None and example.prompt_length > max_prompt_length
    if too_long or example.prompt_length >= max_length:
        return None
    if len(example) <= max_length:
        return example
    start, _ = example.answer_spans[-1]
    # A copy, not a view: the tail that was cut off should not stay in memory.
    return replace(
        example,
        input_ids=example.input_ids[:max_length].clone(),
        answer_spans=(*example.answer_spans[:-1], (start, max_length)),
    )


def with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """Put a system message first, unless there is one or `system_prompt` is `None`."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def readable(messages: Sequence[Message]) -> str:
    """A prompt for people: the question alone, or `role: content` lines if there is more than one message."""
    named = [f"{message['role']}: {message['content']}" for message in messages]
    return messages[0]["content"] if len(messages) == 1 else "\n".join(named)


def _segments(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], source: str, supervise_all_turns: bool
) -> list[str]:
    """The rendered text as prompt, answer, prompt, answer, ... - concatenated, it is the rendered conversation."""
    assistant_turns = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
    segments: list[str] = []
    done = ""
    for turn in assistant_turns if supervise_all_turns else assistant_turns[-1:]:
        prompt = render(tokenizer, messages[:turn], source, add_generation_prompt=True)
        full = render(tokenizer, messages[: turn + 1], source, add_generation_prompt=False)
        if not prompt.startswith(done):
            raise ValueError(
                f"expected a chat template that keeps earlier turns as they were, found one that rewrites them in "
                f"{source}; set supervise_all_turns to false to learn from the last answer only"
            )
        if not full.startswith(prompt):
            raise ValueError(
                f"expected a chat template whose generation prompt begins the assistant's turn, found {prompt[-40:]!r} "
                f"before {full[-40:]!r} in {source}; use a template with a generation prompt"
            )
        segments += [prompt[len(done) :], full[len(prompt) :]]
        done = full
    return segments


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], source: str, *, add_generation_prompt: bool
) -> str:
    """The conversation as text; raises `ValueError` if the template refuses it."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except TemplateError as error:
        raise ValueError(
            f"expected messages that the chat template accepts, found the roles {[m['role'] for m in messages]} in "
            f"{source} ({error}); leave system_prompt out, or change the messages or the template"
        ) from error


def _join(eos_id: int, conversation: Conversation, segments: list[list[int]], index: int) -> Example:
    """Concatenate the ids of prompt, answer, prompt, ...; each span ends with its end token, if it has one."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for prompt_ids, answer_ids in zip(segments[::2], segments[1::2], strict=True):
        start = len(ids) + len(prompt_ids)
        after_end = answer_ids[::-1].index(eos_id) if eos_id in answer_ids else 0
        spans.append((start, start + len(answer_ids) - after_end))
        ids += prompt_ids + answer_ids
    start, end = spans[-1]
    ids = ids[:end]
    if ids[-1] != eos_id:
        ids.append(eos_id)
        spans[-1] = (start, len(ids))
    return Example(
        input_ids=torch.tensor(ids, dtype=torch.int32),
        answer_spans=tuple(spans),
        prompt=readable(conversation.prompt),
        answer=conversation.answer,
        index=index,
    )
