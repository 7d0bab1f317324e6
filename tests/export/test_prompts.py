"""Prompts to verify on: rendered as in training, padded on the left."""

import json

import pytest
from tiny_models import tiny_tokenizer

from export.prompts import PROMPTS, prompts_for_verification


def written(path, *prompts):
    path.write_text("\n".join(json.dumps({"prompt": prompt, "response": "4"}) for prompt in prompts))
    return path


def texts(tokenizer, batch):
    rows = zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
    return [tokenizer.decode(ids_P[mask_P]) for ids_P, mask_P in rows]


def test_prompts_of_a_file_stand_as_in_training(tmp_path):
    tokenizer, prompts = tiny_tokenizer(), ["What is 2 plus 2?", "And 3?", "left out"]
    batch = prompts_for_verification(tokenizer, written(tmp_path / "mine.jsonl", *prompts), 2)
    expected = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in prompts[:2]
    ]
    assert texts(tokenizer, batch) == expected
    assert batch["prompt_mask"][1].tolist() == sorted(batch["prompt_mask"][1].tolist())  # padding comes first
    assert batch["prompt_mask"][0].all()


def test_some_come_along():
    tokenizer = tiny_tokenizer()
    batch = prompts_for_verification(tokenizer, None, len(PROMPTS))
    assert all(prompt in text for prompt, text in zip(PROMPTS, texts(tokenizer, batch), strict=True))


def test_without_a_template_prompts_are_taken_as_they_are(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    batch = prompts_for_verification(tokenizer, written(tmp_path / "mine.jsonl", "What is 2 plus 2?"), 1)
    assert batch["prompt_ids"][0].tolist() == tokenizer("What is 2 plus 2?")["input_ids"]


def test_more_than_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"at most 8 prompts to verify on, those that come along, found --prompts 9"):
        prompts_for_verification(tiny_tokenizer(), None, 9)
    path = written(tmp_path / "mine.jsonl", "one")
    with pytest.raises(ValueError, match=r"at most 1 prompts .* in '.*mine\.jsonl', found --prompts 2; .*--verify-on"):
        prompts_for_verification(tiny_tokenizer(), path, 2)
