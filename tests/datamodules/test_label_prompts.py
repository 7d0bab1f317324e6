"""Prompts with one label token: tokens as the chat template makes them, prefixes shared to the token, labels checked."""

import json
import random
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from datamodules.chat import Conversation, encode
from datamodules.label_prompts import encode_prompts, frame_of, label_token_ids, message_of
from tests.helpers.chat_doubles import CHATML, byte_tokenizer


def merging_tokenizer(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """The byte tokenizer with more merges."""
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for first, second in merges:
        state["model"]["vocab"][first + second] = len(state["model"]["vocab"])
        state["model"]["merges"].append([first, second])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
    )


@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
@pytest.mark.parametrize("prefix", ["", "Profile: 30 years", " several\n\nlines \n"])
def test_tokens_are_those_of_the_chat_template(
    tokenizer: PreTrainedTokenizerBase, prefix: str, system_prompt: str | None
) -> None:
    (prompt,) = encode_prompts(tokenizer, frame_of(tokenizer, system_prompt), [(prefix, " Boat?\n")])
    messages = [{"role": "user", "content": message_of(prefix, "Boat?")}, {"role": "assistant", "content": "y"}]
    (chat,) = encode(tokenizer, [Conversation(messages, "here")], system_prompt=system_prompt)
    assert prompt.ids == chat.input_ids[: chat.prompt_length].tolist()
    shared = str(tokenizer.decode(prompt.ids[: prompt.prefix_length]))
    assert shared.endswith(f"{prefix.strip()}\n" if prefix.strip() else "<|im_start|>user\n")


def test_prompts_of_a_prefix_begin_with_its_tokens() -> None:
    """Whatever the tokenizer merges across the seam, and whichever prompts come together."""
    tokenizer = merging_tokenizer(("Ċ", "a"), ("b", "Ċ"), ("bĊ", "b"), ("a", "b"))
    frame = frame_of(tokenizer)
    draw = random.Random(0)

    def text(size: int) -> str:
        return "".join(draw.choices("ab\n", k=size)).strip() or "a"

    num_cut_early = 0
    for _ in range(50):
        prefixes = ["", text(6), text(6)]
        pairs = [(draw.choice(prefixes), text(4)) for _ in range(10)]
        prompts = encode_prompts(tokenizer, frame, pairs)
        for prefix in {prefix for prefix, _ in pairs}:
            group = [prompt for (own, _), prompt in zip(pairs, prompts, strict=True) if own == prefix]
            (length,) = {prompt.prefix_length for prompt in group}
            assert len({tuple(prompt.ids[:length]) for prompt in group}) == 1
            alone = tokenizer(frame.prefix(prefix), add_special_tokens=False)["input_ids"]
            assert group[0].ids[:length] == alone[:length]
            assert 0 < len(alone) - length + 1 <= 3
            num_cut_early += length < len(alone)
        for pair, prompt in zip(pairs, prompts, strict=True):
            (single,) = encode_prompts(tokenizer, frame, [pair])
            assert single.ids == prompt.ids
            assert single.prefix_length >= prompt.prefix_length
    assert num_cut_early > 20, "this tokenizer does not merge across the seam, so the test shows nothing"


def test_no_prompts_and_the_same_prompt_twice(tokenizer: PreTrainedTokenizerBase) -> None:
    frame = frame_of(tokenizer)
    assert encode_prompts(tokenizer, frame, []) == []
    first, other, again = encode_prompts(tokenizer, frame, [("p", "a"), ("p", "b"), ("p", "a")])
    assert first == again != other


@pytest.mark.parametrize(
    ("template", "system_prompt", "message"),
    [
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"), None, "as it is"),
        (
            CHATML.replace("{{ m['role'] }}", "{{ m['role'] }} {{ m['content'] | length }}"),
            None,
            "without regard to it",
        ),
        (
            "{{ raise_exception('no system') }}",
            "Be brief.",
            r"the roles \['system', 'user'\].*\(no system\); leave system_",
        ),
    ],
)
def test_templates_that_cannot_be_a_frame(template: str, system_prompt: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frame_of(byte_tokenizer(template), system_prompt)


def test_label_tokens() -> None:
    tokenizer = merging_tokenizer(("n", "o"), ("y", "e"), ("ye", "s"))
    tokens = label_token_ids(tokenizer, ["no", "yes"])
    assert tokenizer.convert_ids_to_tokens(tokens) == ["no", "yes"]
    assert label_token_ids(tokenizer, ["yes", "no"], "Be brief.") == tokens[::-1]


def test_label_after_a_space() -> None:
    """Templates of some families write a space before the answer; then that is part of the token."""
    template = CHATML.replace("{{ m['content'] }}", "{{ ' ' if m['role'] == 'assistant' else '' }}{{ m['content'] }}")
    tokenizer = merging_tokenizer(("Ġ", "n"), ("Ġ", "y"))
    tokenizer.chat_template = template.replace("assistant\n", "assistant").replace(
        "{{ m['role'] }}\n", "{{ m['role'] }}{{ '' if m['role'] == 'assistant' else '\n' }}"
    )
    assert tokenizer.convert_ids_to_tokens(label_token_ids(tokenizer, ["n", "y"])) == ["Ġn", "Ġy"]


THINKING = CHATML.replace("{{ m['content'] }}", "{{ 't' if m['role'] == 'assistant' else '' }}{{ m['content'] }}")


@pytest.mark.parametrize(
    ("template", "labels", "message"),
    [
        (CHATML, ["n", "yes"], r"found 'yes' as \['y', 'e', 's'\]; choose labels"),
        (THINKING, ["n", "y"], r"found 'n' as \['t', 'n'\]"),
        (CHATML, ["", "y"], r"found '' as \[\]"),
        (CHATML, ["n"], r"at least two different labels, found \['n'\]"),
        (CHATML, ["n", "y", "n"], r"at least two different labels, found \['n', 'y', 'n'\]"),
    ],
)
def test_labels_that_are_no_token(template: str, labels: list[str], message: str) -> None:
    tokenizer: Any = byte_tokenizer(template)
    with pytest.raises(ValueError, match=message):
        label_token_ids(tokenizer, labels)
