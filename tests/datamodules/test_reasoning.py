"""Generated tasks: held-out questions are unseen, sizes are kept, runs repeat, scores are what they say."""

import random
import sys
from collections import Counter
from typing import Any

import pytest

from datamodules import ReasoningTasks
from datamodules.chat import conversation_from

# 1 and 2 digits: so few different sums that other seeds alone would repeat many.
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
TASKS: dict[str, dict[str, Any]] = {"chain_sum": SUMS, "syllogism": {}, "spell_backward": {"max_word_len": 4}}
SIZES: dict[str, Any] = {"train_size": 100, "val_size": 40, "test_size": 61}


@pytest.fixture(scope="module")
def data(tokenizer_folder: str) -> ReasoningTasks:
    data = ReasoningTasks(tokenizer_folder, TASKS, **SIZES)
    data.setup("fit")
    data.setup("test")
    return data


def questions(data: ReasoningTasks, split: str) -> list[str]:
    return [item.question for item in data.items(split)]


def test_sizes_and_even_mix(data: ReasoningTasks) -> None:
    for split, size in (("train", 100), ("val", 40), ("test", 61)):
        counts = Counter(item.task for item in data.items(split))
        assert sum(counts.values()) == len(data.examples(split)) == size
        assert max(counts.values()) - min(counts.values()) <= 1
        assert set(counts) == set(TASKS)


def test_held_out_questions_are_unseen_and_different(data: ReasoningTasks) -> None:
    train, val, test = (questions(data, split) for split in ("train", "val", "test"))
    assert not set(train) & set(val)
    assert not set(train) & set(test)
    assert not set(val) & set(test)
    assert len(set(val)) == len(val)
    assert len(set(test)) == len(test)


def test_questions_that_two_tasks_share_are_held_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def same_questions(task: str, settings: dict, *, size: int = 1, seed: int = 0) -> list[dict[str, str]]:
        draw = random.Random(seed)
        return [{"question": f"{draw.randrange(60)}?", "answer": task} for _ in range(size)]

    monkeypatch.setattr("datamodules.reasoning.create_task", same_questions)
    data = ReasoningTasks("any", {"a": {}, "b": {}}, train_size=10, val_size=20)
    assert len(set(questions(data, "val"))) == 20
    assert not set(questions(data, "val")) & set(questions(data, "train"))


def test_this_would_fail_with_other_seeds_alone(tokenizer_folder: str) -> None:
    """Guards the test above: with these settings independent draws do collide."""
    first, second = (
        questions(ReasoningTasks(tokenizer_folder, {"chain_sum": SUMS}, train_size=60, seed=seed), "train")
        for seed in (0, 1)
    )
    assert len(set(first) & set(second)) > 10


def test_same_seed_same_questions_whatever_is_set_up_first(data: ReasoningTasks, tokenizer_folder: str) -> None:
    again = ReasoningTasks(tokenizer_folder, TASKS, **SIZES)
    again.setup("predict")
    again.setup("validate")
    for split in ("train", "val", "test"):
        assert again.items(split) == data.items(split)
    other = ReasoningTasks(tokenizer_folder, TASKS, **SIZES, seed=1)
    assert questions(other, "test") != questions(data, "test")


def test_too_few_different_questions(tokenizer_folder: str) -> None:
    data = ReasoningTasks(tokenizer_folder, {"chain_sum": SUMS}, train_size=200, val_size=200)
    distinct = len(set(questions(data, "train")))
    with pytest.raises(ValueError, match=rf"expected 200 val questions of 'chain_sum' .*\({distinct} different ones"):
        data.setup("validate")


def test_scores(data: ReasoningTasks) -> None:
    batch = next(iter(data.test_dataloader()))
    wrong = [answer + "x" for answer in batch["answers"]]
    assert data.score([f" {answer}\n" for answer in batch["answers"]], batch, "test") == [1.0] * len(wrong)
    assert data.score(wrong, batch, "test") == [0.0] * len(wrong)
    assert data.gym_score(batch["answers"], batch, "test") == [1.0] * len(wrong)
    assert max(data.gym_score([""] * len(wrong), batch, "test")) < 1
    items = data.items("test")
    assert batch["prompts"] == [items[i].question for i in batch["index"]]
    assert batch["answers"] == [items[i].entry["answer"] for i in batch["index"]]


def test_constant_answer_score_is_the_best_constant_of_each_task(data: ReasoningTasks) -> None:
    best = []
    for task in TASKS:
        gold = [item.entry["answer"] for item in data.items("test") if item.task == task]
        best.append(max(sum(answer == constant for answer in gold) / len(gold) for constant in set(gold)))
    assert data.constant_answer_score("test") == pytest.approx(sum(best) / 3)
    assert data.constant_answer_score("test") > 1 / 3 * 0.5  # syllogism alone has two answers


def test_conversations_are_well_formed(data: ReasoningTasks) -> None:
    for conversation in data.conversations("val"):
        assert conversation_from(conversation.messages, "").messages == conversation.messages


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"chain_sums": {}}, "found 'chain_sums'; did you mean chain_sum"),
        ({"gcd": {"max_valu": 3}}, r"settings of the task 'gcd' \(min_numbers, .*found {'max_valu': 3}"),
        ({"gcd": {"max_value": -3}}, r"found {'max_value': -3} \(max_value must"),
        ({"gcd": {"seed": 3}}, "settings of the task 'gcd' without seed"),
        ({}, "at least one task .* found 0 tasks"),
    ],
)
def test_bad_tasks_are_refused_before_anything_runs(tasks: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReasoningTasks("any", tasks)


def test_split_smaller_than_the_number_of_tasks() -> None:
    with pytest.raises(ValueError, match="found 3 tasks and train_size 2000, val_size 2, test_size 1000"):
        ReasoningTasks("any", TASKS, val_size=2)


def test_task_without_gold_answers(tokenizer_folder: str) -> None:
    with pytest.raises(ValueError, match="found None in the task 'propositional_logic'; leave this task out"):
        ReasoningTasks(tokenizer_folder, {"propositional_logic": {}}).setup("fit")


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e .\[quickstart\]"):
        ReasoningTasks("any", TASKS)
