"""Rendering and tokenizing: labels are exactly the answers, prompts are exactly what inference would see."""

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from datamodules.chat import Conversation, Example, check_tokenizer, conversation_from, encode, readable, truncate
from datamodules.label_prompts import frame_of
from tests.helpers.chat_doubles import CHATML, byte_tokenizer

QUESTION = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Four."}]
TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]


def supervised(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[str]:
    return [str(tokenizer.decode(example.input_ids[start:end])) for start, end in example.answer_spans]


def prompt(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    return str(tokenizer.decode(example.input_ids[: example.prompt_length]))


def test_prompt_and_answer_of_one_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = encode(tokenizer, [Conversation(QUESTION, "here")])

    as_at_inference = tokenizer.apply_chat_template(QUESTION[:1], add_generation_prompt=True, return_dict=False)
    assert example.input_ids[: example.prompt_length].tolist() == as_at_inference
    assert supervised(tokenizer, example) == ["Four.<|im_end|>"]
    assert len(example) == example.answer_spans[-1][1]  # ChatML's newline after the last turn is dropped
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert (example.prompt, example.answer) == ("2+2?", "Four.")


def test_answer_never_merges_with_the_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenized together, the prompt's last newline and the answer's first would be one token."""
    messages = [QUESTION[0], {"role": "assistant", "content": "\nFour."}]
    (example,) = encode(tokenizer, [Conversation(messages, "here")])

    text = prompt(tokenizer, example)
    assert text.endswith("assistant\n")
    assert example.input_ids[: example.prompt_length].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(tokenizer.decode(example.input_ids), add_special_tokens=False)["input_ids"]
    assert len(example) == len(whole) + 1, "this tokenizer no longer merges, so the test shows nothing"


def test_every_assistant_turn_is_supervised(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = encode(tokenizer, [Conversation(TWO_TURNS, "here")])

    assert supervised(tokenizer, example) == ["hello<|im_end|>", "ciao<|im_end|>"]
    rendered = tokenizer.apply_chat_template(TWO_TURNS[:-1], tokenize=False, add_generation_prompt=True)
    assert prompt(tokenizer, example) == rendered
    assert tokenizer.decode(example.input_ids) == rendered + "ciao<|im_end|>"
    assert example.prompt == "system: Be brief.\nuser: hi\nassistant: hello\nuser: bye"


def test_only_the_last_turn_is_supervised_on_request(tokenizer: PreTrainedTokenizerBase) -> None:
    every, last = (
        encode(tokenizer, [Conversation(TWO_TURNS, "here")], supervise_all_turns=choice)[0] for choice in (True, False)
    )
    assert supervised(tokenizer, last) == ["ciao<|im_end|>"]
    assert last.input_ids.tolist() == every.input_ids.tolist()


def test_what_follows_the_last_answer_is_cut() -> None:
    conversation = conversation_from([*QUESTION, {"role": "user", "content": "thanks"}], "here")
    assert conversation.messages == QUESTION


def test_system_prompt_only_where_there_is_none(tokenizer: PreTrainedTokenizerBase) -> None:
    conversations = [Conversation(QUESTION, "here"), Conversation(TWO_TURNS, "here")]
    without, own = (prompt(tokenizer, e) for e in encode(tokenizer, conversations, system_prompt="Think."))
    assert without.startswith("<|im_start|>system\nThink.<|im_end|>")
    assert "Think." not in own
    assert "system" not in prompt(tokenizer, encode(tokenizer, conversations[:1])[0])


def test_end_token_is_added_where_the_template_has_another() -> None:
    tokenizer = byte_tokenizer(CHATML.replace("<|im_end|>", "[END]"))
    (example,) = encode(tokenizer, [Conversation(QUESTION, "here")])
    assert supervised(tokenizer, example) == ["Four.[END]\n<|im_end|>"]


def test_template_that_rewrites_earlier_turns() -> None:
    """Templates of thinking models drop the thoughts of earlier turns."""
    shown = "{{ m['content'] if m['role'] != 'assistant' or loop.last else '' }}"
    tokenizer = byte_tokenizer(CHATML.replace("{{ m['content'] }}", shown))
    conversation = Conversation(TWO_TURNS, "data.jsonl line 7")
    with pytest.raises(ValueError, match=r"rewrites them in data.jsonl line 7; set supervise_all_turns to false"):
        encode(tokenizer, [conversation])
    (example,) = encode(tokenizer, [conversation], supervise_all_turns=False)
    assert supervised(tokenizer, example) == ["ciao<|im_end|>"]
    assert "hello" not in prompt(tokenizer, example)


def test_template_without_matching_generation_prompt() -> None:
    tokenizer = byte_tokenizer(CHATML.replace("<|im_start|>assistant\n", "<|im_start|>model\n"))
    with pytest.raises(ValueError, match="generation prompt begins the assistant's turn"):
        encode(tokenizer, [Conversation(QUESTION, "here")])


def test_template_that_refuses() -> None:
    tokenizer = byte_tokenizer("{{ raise_exception('only two roles') }}")
    with pytest.raises(ValueError, match=r"\['user'\] in data.jsonl line 3 \(only two roles\)"):
        encode(tokenizer, [Conversation(QUESTION, "data.jsonl line 3")])


def test_tokenizers_that_cannot_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    check_tokenizer(tokenizer, "good")
    with pytest.raises(ValueError, match="chat template, found none in 'base-model'"):
        check_tokenizer(byte_tokenizer(chat_template=None), "base-model")
    base = byte_tokenizer(chat_template=None)
    base.name_or_path = "base-model"
    for use in (lambda: encode(base, [Conversation(QUESTION, "here")]), lambda: frame_of(base)):
        with pytest.raises(ValueError, match=r"in 'base-model', as base models .* put a chat_template.jinja into"):
            use()
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="end token, found none in 'endless'"):
        check_tokenizer(endless, "endless")


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([{"role": "human", "content": "hi"}, QUESTION[1]], "found 'human' in line 3"),
        (["hi"], "found 'hi' in line 3"),
        ([{"role": "user", "content": None}, QUESTION[1]], "'content': None} in line 3"),
        ([QUESTION[0]], r"found the roles \['user'\] in line 3"),
        ([QUESTION[1], QUESTION[0]], r"found the roles \['assistant', 'user'\] in line 3"),
        ([], r"found the roles \[\] in line 3"),
    ],
)
def test_bad_messages(messages: list, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        conversation_from(messages, "line 3")


def test_truncation_cuts_the_answer_and_drops_long_prompts(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = encode(tokenizer, [Conversation(TWO_TURNS, "here")])
    start, end = example.answer_spans[-1]

    assert truncate(example, max_length=end) is example
    cut = truncate(example, max_length=end - 1)
    assert cut is not None
    assert supervised(tokenizer, cut) == ["hello<|im_end|>", "ciao"]
    assert torch.equal(cut.input_ids, example.input_ids[:-1])
    one = truncate(example, max_length=start + 1)
    assert one is not None
    assert supervised(tokenizer, one)[-1] == "c"
    assert truncate(example, max_length=start) is None
    assert truncate(example, max_length=end, max_prompt_length=start) is example
    assert truncate(example, max_length=end, max_prompt_length=start - 1) is None


def test_readable_prompts() -> None:
    assert readable(QUESTION[:1]) == "2+2?"
    assert readable(QUESTION) == "user: 2+2?\nassistant: Four."
