"""Procedurally generated reasoning tasks with gold answers and scorers, from the package reasoning-gym.

Questions are drawn at random, so two seeds share questions (of 50 gcd questions up to 30, about 40). In held-out
splits, what occurs in training, in another held-out split, or twice, is therefore replaced by the next draw.
"""

import difflib
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice, zip_longest
from typing import Any

from datamodules.base import ChatDataModule, exact_match, most_common_share
from datamodules.chat import Conversation
from datamodules.collate import Batch

# Questions drawn for a held-out split before it is given up: so many for each one wanted, and some more.
DRAWS_PER_QUESTION, EXTRA_DRAWS = 20, 1000
DRAWS_AT_ONCE = 200
# A held-out split must avoid the questions of these.
EARLIER_SPLITS: dict[str, tuple[str, ...]] = {"train": (), "val": ("train",), "test": ("train", "val")}


@dataclass(frozen=True)
class Item:
    """One question of a task; `entry` is what the task's own scorer wants to see."""

    task: str
    entry: dict[str, Any]

    @property
    def question(self) -> str:
        """The prompt, without white space around it: two questions with the same text are the same question."""
        return self.entry["question"].strip()


class ReasoningTasks(ChatDataModule):
    """An even mix of reasoning-gym tasks.

    Args:
        tokenizer: Model reference whose tokenizer and chat template are used; the command line sets it to the student.
        tasks: reasoning-gym task names, each with its settings: `{gcd: {max_value: 100}, syllogism: {}}`.
        train_size: Training questions of all tasks together.
        val_size: Validation questions of all tasks together, none of them in training.
        test_size: Test questions of all tasks together, none of them in training or validation.
        length_bucketing: Put training samples of similar length into the same batch. It saves padding, but the length
            of a question often tells its task, so that most batches would hold a single task.
        **kwargs: As for `ChatDataModule`.

    Raises:
        ValueError: There is no task, a task or one of its settings is unknown, or a size is below the number of tasks.
        ModuleNotFoundError: reasoning-gym is not installed.
    """

    def __init__(
        self,
        tokenizer: str,
        tasks: dict[str, dict[str, Any]],
        *,
        train_size: int = 2000,
        val_size: int = 200,
        test_size: int = 1000,
        length_bucketing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, length_bucketing=length_bucketing, **kwargs)
        self.tasks = tasks
        self.sizes: dict[str, int] = {"train": train_size, "val": val_size, "test": test_size}
        if not tasks or min(self.sizes.values()) < len(tasks):
            raise ValueError(
                f"expected at least one task and sizes of at least one question a task, found {len(tasks)} tasks and "
                f"train_size {train_size}, val_size {val_size}, test_size {test_size}; add tasks or raise the sizes"
            )
        self._scorers = {task: create_task(task, settings) for task, settings in tasks.items()}
        self._items: dict[str, list[Item]] = {}

    def items(self, split: str) -> list[Item]:
        """The questions of a split, tasks alternating; `Batch["index"]` counts in this list."""
        if split not in self._items:
            taken = {item.question for earlier in EARLIER_SPLITS[split] for item in self.items(earlier)}
            size, extra = divmod(self.sizes[split], len(self.tasks))
            by_task: list[list[Item]] = []
            for i, task in enumerate(self.tasks):
                count = size + (i < extra)
                if split == "train":
                    by_task.append(list(islice(self._draws(task, split), count)))
                else:
                    by_task.append(self._unseen(task, split, count, taken))
                    taken.update(item.question for item in by_task[-1])
            self._items[split] = [item for row in zip_longest(*by_task) for item in row if item is not None]
        return self._items[split]

    @property
    def has_score(self) -> bool:
        """Every task has gold answers."""
        return True

    def load_split(self, split: str) -> list[Conversation]:
        """The split's questions with their gold answers."""
        return [
            Conversation(
                [{"role": "user", "content": item.question}, {"role": "assistant", "content": item.entry["answer"]}],
                f"{item.task}, {split} question {number}",
            )
            for number, item in enumerate(self.items(split), start=1)
        ]

    def score(self, predictions: list[str], batch: Batch, split: str) -> list[float]:
        """Exact match with the gold answer, 0 or 1."""
        return exact_match(predictions, batch["answers"])

    def gym_score(self, predictions: list[str], batch: Batch, split: str) -> list[float]:
        """The tasks' own scorers, 0..1; they accept other right answers and give some credit for a wrong form."""
        items = [self.items(split)[i] for i in batch["index"]]
        return [
            float(self._scorers[item.task].score_answer(prediction.strip(), item.entry))
            for item, prediction in zip(items, predictions, strict=True)
        ]

    def constant_answer_score(self, split: str) -> float:
        """The mean over tasks of the exact match that each task's most common answer reaches."""
        answers: dict[str, list[str]] = {}
        for example in self.examples(split):
            answers.setdefault(self.items(split)[example.index].task, []).append(example.answer)
        return sum(most_common_share(task_answers) for task_answers in answers.values()) / len(answers)

    def _draws(self, task: str, split: str) -> Iterator[Item]:
        """Endless questions of a task; a text seeds the generator, so that no two splits or tasks share a seed."""
        seeds = random.Random(f"{self.seed}/{task}/{split}")
        while True:
            for entry in create_task(task, self.tasks[task], size=DRAWS_AT_ONCE, seed=seeds.randrange(2**31)):
                if not isinstance(entry["answer"], str):
                    raise ValueError(
                        f"expected a gold answer for every question, found {entry['answer']!r} in the task {task!r}; "
                        "leave this task out"
                    )
                yield Item(task, entry)

    def _unseen(self, task: str, split: str, size: int, taken: set[str]) -> list[Item]:
        """`size` different questions outside `taken`, in the order they are drawn."""
        found: dict[str, Item] = {}
        num_draws = DRAWS_PER_QUESTION * size + EXTRA_DRAWS
        for item in islice(self._draws(task, split), num_draws):
            if item.question not in taken:
                found.setdefault(item.question, item)
            if len(found) == size:
                return list(found.values())
        earlier = {i.question for e in EARLIER_SPLITS[split] for i in self.items(e) if i.task == task}
        raise ValueError(
            f"expected {size} {split} questions of {task!r} that occur in no earlier split, found {len(found)} in "
            f"{num_draws} draws ({len(earlier)} different ones are in earlier splits); widen the task's settings or "
            "lower the sizes"
        )


def create_task(task: str, settings: dict[str, Any], *, size: int = 1, seed: int = 0) -> Any:
    """A reasoning-gym data set.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.
        ValueError: The task or one of its settings is unknown or out of range, or a setting belongs to this module.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected the package `reasoning-gym` for reasoning tasks, found none; run `pip install -e .[quickstart]`"
        ) from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS) or sorted(DATASETS)
        raise ValueError(f"expected a reasoning-gym task, found {task!r}; did you mean {', '.join(near)}?")
    if own := {"size", "seed"} & settings.keys():
        raise ValueError(
            f"expected settings of the task {task!r} without {' and '.join(sorted(own))}, found {settings}; set "
            "train_size, val_size, test_size and seed of the data module instead"
        )
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed, **settings)
    except (TypeError, AssertionError, ValueError) as error:  # what the tasks' own checks raise
        known = [field.name for field in fields(DATASETS[task][1]) if field.name not in ("size", "seed")]
        raise ValueError(
            f"expected valid settings of the task {task!r} ({', '.join(known)}), found {settings} ({error}); "
            "correct them"
        ) from error
