"""Prompts to verify on: rendered as in training, padded on the left."""

import json

import pytest
import torch

from export.verify.prompts import PROMPTS, check_room, prompts_for_verification
from tests.helpers.tiny_models import tiny_model, tiny_tokenizer


def written(path, *prompts):
    path.write_text("\n".join(json.dumps({"prompt": prompt, "response": "4"}) for prompt in prompts))
    return path


def rows(batch):
    return [
        ids_P[mask_P].tolist() for ids_P, mask_P in zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
    ]


def rendered(tokenizer, prompts):
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [
        tokenizer.apply_chat_template(each, tokenize=True, add_generation_prompt=True, return_dict=False)
        for each in conversations
    ]


def test_prompts_of_a_file_stand_as_in_training(tmp_path):
    tokenizer, prompts = tiny_tokenizer(), ["What is 2 plus 2?", "And 3?", "left out"]
    batch = prompts_for_verification(tokenizer, written(tmp_path / "mine.jsonl", *prompts), 2)
    assert rows(batch) == rendered(tokenizer, prompts[:2])
    assert batch["prompt_mask"][1].tolist() == sorted(batch["prompt_mask"][1].tolist())  # padding comes first
    assert batch["prompt_mask"][0].all()
    assert batch["prompt_ids"].dtype == batch["prompt_mask"].dtype == torch.long


def test_some_come_along():
    tokenizer = tiny_tokenizer()
    assert rows(prompts_for_verification(tokenizer, None, len(PROMPTS))) == rendered(tokenizer, PROMPTS)


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


def test_prompts_and_decode_steps_have_to_fit_into_the_model():
    model = tiny_model()
    batch = prompts_for_verification(tiny_tokenizer(), None, 2)
    room = model.config.max_position_embeddings - batch["prompt_ids"].shape[1]
    check_room(model, batch, room)
    with pytest.raises(
        ValueError, match=f"expected prompts and decode steps within the .* and {room + 1} steps; lower"
    ):
        check_room(model, batch, room + 1)
    with pytest.raises(ValueError, match="expected a prompt of the benchmark within the .*, found 9999; lower"):
        check_room(model, batch, room, 9999)
