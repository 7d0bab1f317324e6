"""Ranking data from JSONL: rows, batches, what a step learns from, resume, and one clear sentence for whatever is wrong."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import PreTrainedModel

import train
from datamodules import Ranking
from datamodules.collate import IGNORE_INDEX, Batch
from datamodules.ranking import candidate_from, most_probable
from models import SFT, Distillation
from models.forward import answer_labels
from models.loading.reference import load_model
from models.losses import forward_kl
from models.student import StudentModule
from tests.helpers.distilling import KNOWN
from tests.helpers.short_runs import ROOT
from tests.helpers.tiny import tiny_model
from tests.helpers.training import tiny_trainer

HOWTO = ROOT / "docs/howto-own-model-and-data.md"
LABELS = ["n", "y", "?"]
Write = Callable[..., str]


def row(number: int) -> dict[str, Any]:
    """Two members with a prefix each, and candidates of different lengths."""
    user = number % 2
    return {
        "prefix": f"Member {user}: likes {'boats' if user else 'trains and planes'}",
        "prompt": f"Film {'x' * number}?",
        "label": LABELS[number % 3],
        "user": user,
    }


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write records (texts as they are) to a JSONL file."""

    def write_jsonl(records: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return str(path)

    return write_jsonl


def ranking(tokenizer_folder: str, train: str, **settings: Any) -> Ranking:
    return Ranking(tokenizer_folder, train, **{"labels": LABELS, "batch_size": 3, **settings})


def test_a_batch(tokenizer_folder: str, write: Write) -> None:
    graded = {"prompt": "Boat?", "labels": {"y": 1, "?": 3}}
    data = ranking(tokenizer_folder, write([row(n) for n in range(6)]), test=write([row(1), "", graded], "t.jsonl"))
    (batch,) = data.test_dataloader()
    assert batch["index"] == [1, 0]  # shortest first
    assert batch["class_B"].tolist() == [2, 1] and batch["class_B"].dtype == torch.long
    assert batch["weights_BC"].tolist() == [[0, 0.25, 0.75], [0, 1, 0]] and batch["weights_BC"].dtype == torch.float32
    assert batch["user"] == [None, "1"]
    assert batch["answers"] == ["?", "y"]
    assert batch["prompts"] == ["Boat?", "Member 1: likes boats\nFilm x?"]
    tokens = data.label_token_ids
    assert data.tokenizer.convert_ids_to_tokens(tokens.tolist()) == LABELS

    assert torch.equal(answer_labels(batch), tokens[batch["class_B"]])
    assert ((batch["labels"] != IGNORE_INDEX).sum(1) == 1).all()
    lengths = batch["attention_mask"].sum(1)
    assert torch.equal(batch["labels"][[0, 1], lengths - 1], tokens[batch["class_B"]])
    for i in range(2):
        prompt = batch["input_ids"][i, : lengths[i] - 1]
        assert torch.equal(batch["prompt_ids"][i][batch["prompt_mask"][i].bool()], prompt)
        assert data.tokenizer.decode(prompt).endswith("?<|im_end|>\n<|im_start|>assistant\n")
        shared = str(data.tokenizer.decode(prompt[: batch["prefix_length"][i]]))
        assert shared == "<|im_start|>user\n" + ["", "Member 1: likes boats\n"][i]


def test_same_prefix_same_first_tokens(tokenizer_folder: str, write: Write) -> None:
    data = ranking(tokenizer_folder, write([row(n) for n in range(12)]), system_prompt="Be brief.")
    starts: dict[str, set[tuple[int, ...]]] = {"0": set(), "1": set()}
    for batch in data.train_dataloader():
        for user, ids, length in zip(batch["user"], batch["input_ids"], batch["prefix_length"], strict=True):
            starts[user].add(tuple(ids[:length].tolist()))
    assert [len(start) for start in starts.values()] == [1, 1]
    texts = [data.tokenizer.decode(list(*start)) for start in starts.values()]
    assert [text.splitlines()[-1] for text in texts] == ["Member 0: likes trains and planes", "Member 1: likes boats"]
    assert all("system\nBe brief." in text for text in texts)


@pytest.mark.parametrize(
    ("record", "weights"),
    [
        ({"label": "y"}, (0, 1, 0)),
        ({"label": 2}, (0, 0, 1)),
        ({"labels": {"n": 2, "y": 2}}, (0.5, 0.5, 0)),
        ({"labels": {"?": 0.1, "n": 0}}, (0, 0, 1)),
    ],
)
def test_targets(record: dict[str, Any], weights: tuple[float, ...]) -> None:
    candidate = candidate_from({"prompt": "a", **record}, LABELS, "here")
    assert candidate.weights == weights
    assert candidate.answer == LABELS[most_probable(weights)]
    assert sum(candidate.weights) == pytest.approx(1)


@pytest.mark.parametrize("record", [{}, {"prefix": None, "user": None}, {"prefix": "", "more": 1}])
def test_optional_fields(record: dict[str, Any]) -> None:
    candidate = candidate_from({"prompt": "a", "label": "y", **record}, LABELS, "here")
    assert (candidate.prefix, candidate.user) == ("", None)


def test_numbers_as_labels() -> None:
    """A number is a position; where it could be meant as the label's text, it is refused."""
    zero = candidate_from({"prompt": "a", "label": 0}, ["0", "1"], "here")
    assert zero.weights == (1, 0)
    for number in (1, 3):
        with pytest.raises(ValueError, match=f'found the number {number} in line 3, .* write "{number}" in quotes'):
            candidate_from({"prompt": "a", "label": number}, ["1", "2", "3"], "line 3")
    assert candidate_from({"prompt": "a", "label": "3"}, ["1", "2", "3"], "here").weights == (0, 0, 1)


GOOD = {"prompt": "a", "label": "y"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": "a"', r"expected one JSON object a line, .*line 3 \("),
        ({}, "field `prompt` with a text, found no field in .*line 3"),
        ({"question": "a", "label": "y"}, "found question, label in .*rows.jsonl line 3"),
        ({"prompt": " ", "label": "y"}, "found ' ' in .*line 3"),
        ({"prompt": 5, "label": "y"}, "found 5 in .*line 3"),
        ({**GOOD, "prefix": ["a"]}, r"expected `prefix` as a text, found \['a'\] in .*line 3"),
        ({**GOOD, "user": 1.5}, "expected `user` as a text or a whole number, found 1.5 in .*line 3"),
        ({**GOOD, "user": True}, "found True in .*line 3"),
        ({"prompt": "a", "answer": "y"}, "either `label` or `labels`, found prompt, answer in .*line 3"),
        ({**GOOD, "labels": {"y": 1}}, "either `label` or `labels`, found both in .*line 3"),
        (
            {"prompt": "a", "label": "maybe"},
            r"among \['n', 'y', '\?'\] or its position from 0, found 'maybe' in .*line 3",
        ),
        ({"prompt": "a", "label": 3}, "found 3 in .*line 3"),
        ({"prompt": "a", "label": -1}, "found -1 in .*line 3"),
        ({"prompt": "a", "label": True}, "found True in .*line 3"),
        ({"prompt": "a", "label": None}, "found None in .*line 3"),
        ({"prompt": "a", "labels": {"y": 1, "maybe": 1}}, "expected `labels` as weights .*, found 'maybe' in .*line 3"),
        ({"prompt": "a", "labels": ["y"]}, r"expected `labels` as weights .*, found \['y'\] in .*line 3"),
        ({"prompt": "a", "labels": {"y": 2, "n": -1}}, "at least 0 and not all 0, found {'y': 2, 'n': -1} in .*line 3"),
        ({"prompt": "a", "labels": {"y": 0}}, "not all 0, found {'y': 0} in .*line 3"),
        ({"prompt": "a", "labels": {}}, "not all 0, found {} in .*line 3"),
        ({"prompt": "a", "labels": {"y": "1"}}, "not all 0, found {'y': '1'} in .*line 3"),
        ('{"prompt": "a", "labels": {"y": NaN}}', "not all 0, found {'y': nan} in .*line 3"),
        ('{"prompt": "a", "labels": {"y": Infinity, "n": -Infinity}}', "not all 0, found .* in .*line 3"),
    ],
)
def test_bad_row_is_named_by_its_line(tokenizer_folder: str, write: Write, bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ranking(tokenizer_folder, write([GOOD, "", bad, GOOD])).setup("fit")
    assert "\n" not in str(caught.value)


def test_label_that_the_tokenizer_splits(tokenizer_folder: str, write: Write) -> None:
    data = Ranking(tokenizer_folder, write([{"prompt": "a", "label": "no"}]))
    with pytest.raises(ValueError, match=r"found 'no' as \['n', 'o'\]; choose labels"):
        data.setup("fit")


def test_class_that_never_occurs_in_training(tokenizer_folder: str, write: Write) -> None:
    rows = [{"prompt": "a", "label": "n"}, {"prompt": "b", "labels": {"n": 1, "?": 0.1}}]
    only = [{"prompt": "a", "label": "n"}]
    with pytest.raises(ValueError, match="every label among the 2 training samples, found none with 'y'; add some"):
        ranking(tokenizer_folder, write(rows)).setup("fit")
    with pytest.raises(ValueError, match="found none with 'y' or '\\?'"):
        ranking(tokenizer_folder, write(only)).setup("fit")
    data = ranking(tokenizer_folder, write([row(n) for n in range(3)]), test=write(only, "test.jsonl"))
    data.setup("fit")
    data.setup("test")  # what is judged may lack one


def test_files_and_splits(tokenizer_folder: str, write: Write, tmp_path: Path) -> None:
    data = ranking(tokenizer_folder, write([row(n) for n in range(3)]))
    data.setup("fit")
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="expected test data, found none; set `test` to a .jsonl file"):
        data.setup("test")
    with pytest.raises(FileNotFoundError, match="expected a file at '.*missing.jsonl', found none"):
        ranking(tokenizer_folder, str(tmp_path / "missing.jsonl")).setup("fit")
    with pytest.raises(ValueError, match="at least one row in '.*empty.jsonl', found none"):
        ranking(tokenizer_folder, write(["", ""], "empty.jsonl")).setup("fit")


def test_repeated_rows_stay(tokenizer_folder: str, write: Write) -> None:
    """A candidate may be shown, and answered, more than once."""
    data = ranking(tokenizer_folder, write([{**row(0), "label": label} for label in [*LABELS, "n"]]))
    examples = data.examples("train")
    assert len({tuple(example.input_ids[:-1].tolist()) for example in examples}) == 1
    assert [example.answer for example in examples] == [*LABELS, "n"]


def test_long_prompts_are_dropped_never_cut(tokenizer_folder: str, write: Write) -> None:
    path = write([row(n) for n in range(12)])
    whole = ranking(tokenizer_folder, path).examples("train")
    limit = sorted(map(len, whole))[8]
    data = ranking(tokenizer_folder, path, max_length=limit)
    kept = data.examples("train")
    assert data.truncation["train"] == {"cut": 0, "dropped": 12 - len(kept), "total": 12}
    assert [e.input_ids.tolist() for e in kept] == [e.input_ids.tolist() for e in whole if len(e) <= limit]


def test_calibration_batches_have_all_fields(tokenizer_folder: str, write: Write) -> None:
    data = ranking(tokenizer_folder, write([row(n) for n in range(12)]))
    (batch,) = data.calibration_batches(1, seed=0)
    assert batch.keys() == next(iter(data.train_dataloader())).keys() - {"step"}
    assert {"class_B", "weights_BC", "user", "prefix_length"} < batch.keys()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("num_seen", range(4))
def test_loader_resumes_in_mid_epoch(tokenizer_folder: str, write: Write, num_workers: int, num_seen: int) -> None:
    build = partial(ranking, tokenizer_folder, write([row(n) for n in range(11)]), num_workers=num_workers)
    loader = build().train_dataloader()
    batches = iter(loader)
    for _ in range(num_seen):
        next(batches)
    state = loader.state_dict()
    rest = list(batches)
    resumed = build().train_dataloader()
    resumed.load_state_dict(state)
    again = list(resumed)
    assert len(again) == 4 - num_seen
    for ours, theirs in zip(again, rest, strict=True):
        assert ours["index"] == theirs["index"] and torch.equal(ours["weights_BC"], theirs["weights_BC"])
        assert (ours["user"], ours["prefix_length"]) == (theirs["user"], theirs["prefix_length"])


class Losses(Callback):
    """What every step says."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


@pytest.mark.parametrize("kind", ["sft", "distillation"])
def test_training_takes_these_batches_as_they_are(
    kind: str, student_folder: str, teacher_folder: str, write: Write, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"optimizer": partial(torch.optim.AdamW, lr=1e-2), "generate_tokens": 0}
    module: StudentModule = (
        SFT(student_folder, **settings)
        if kind == "sft"
        else Distillation(teacher=teacher_folder, student=student_folder, **settings)
    )
    path = write([row(n) for n in range(6)])
    data = ranking(student_folder, path, val=path, test=path)
    losses = Losses()
    trainer = tiny_trainer(tmp_path, 2, callbacks=[losses])
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == len(losses.losses) == 2
    (figures,) = trainer.test(module, datamodule=data, verbose=False)
    assert "test/perplexity" in figures

    student, teacher = tiny_model(), load_model(teacher_folder)
    batch = next(iter(ranking(student_folder, path).train_dataloader()))
    logits_BV, teacher_logits_BV = (_at_the_label(model, batch) for model in (student, teacher))
    if kind == "sft":
        expected = torch.nn.functional.cross_entropy(logits_BV, data.label_token_ids[batch["class_B"]])
    else:
        expected = forward_kl(logits_BV[:, :KNOWN], teacher_logits_BV[:, :KNOWN]).mean()
    assert losses.losses[0] == pytest.approx(float(expected), rel=1e-4)
    changed = zip(module.student.parameters(), student.parameters(), strict=True)
    assert all(not torch.equal(after, before) for after, before in changed)


@torch.no_grad()
def _at_the_label(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits (B, V) where the prompt ends."""
    logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows = torch.arange(len(batch["index"]))
    return logits_BTV[rows, batch["attention_mask"].sum(1) - 2]


def test_the_howto(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are rows, and its overlay turns a recipe into one for ranking."""
    section = HOWTO.read_text(encoding="utf-8").split("## 8. ")[1]
    (rows,) = re.findall(r"```json\n(.*?)```", section, re.DOTALL)
    candidates = [candidate_from(json.loads(line), ("no", "yes"), "the how-to") for line in rows.splitlines()]
    assert [candidate.weights for candidate in candidates] == [(0, 1), (0.75, 0.25), (0, 1)]
    assert [bool(candidate.prefix) for candidate in candidates] == [True, True, False]

    (overlay,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    (tmp_path / "ranking.yaml").write_text(overlay)
    (command,) = re.findall(r"^python train.py (fit .*)", section, re.MULTILINE)
    monkeypatch.chdir(HOWTO.parent.parent)
    with pytest.raises(SystemExit) as stop:
        train.main([*command.replace("ranking.yaml", str(tmp_path / "ranking.yaml")).split(), "--print_config"])
    assert stop.value.code == 0
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["class_path"].endswith("Ranking")
    assert data["init_args"]["labels"] == ["no", "yes"]
    assert data["init_args"]["batch_size"] == 16  # as the recipe has it
