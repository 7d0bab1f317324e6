"""Training and judging a student that gives one label: its step by hand, however it is cut, and what is refused."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datamodules.collate import Batch
from models.forward import answer_hidden, answer_logits
from models.loading.reference import load_model
from models.losses import Head, head_of
from models.losses.labels import LabelObjective
from models.ranking_distillation import RankingDistillation
from models.teacher import Teacher
from tests.helpers.distilling import KNOWN, assert_same_weights
from tests.helpers.loss_references import kl
from tests.helpers.ranking_runs import CUTS, LABELS, MIX, fit, rank, row, rows_of, write_rows
from tests.helpers.ranks import ended_well, start
from tests.helpers.tiny import tiny_batch, tiny_folder
from tests.helpers.training import loader, tiny_trainer

FIGURES = ("auroc", "user_auroc", "log_loss", "ece")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a wider teacher, whose heads have more rows than the tokenizer; 16 samples, and 7 to judge."""
    folder = tmp_path_factory.mktemp("ranking")
    tiny_folder(folder / "student", seed=1)
    tiny_folder(folder / "teacher", seed=2, hidden_size=40, vocab_size=310)
    write_rows(folder / "rows.jsonl", range(16))
    write_rows(folder / "judged.jsonl", range(20, 27))
    return folder


def loss_by_hand(
    model: nn.Module, teacher: nn.Module, batch: Batch, tokens: Tensor, objective: LabelObjective
) -> Tensor:
    """The mean over the samples, from whole sequences of logits."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    rows, last = torch.arange(len(batch["index"])), batch["attention_mask"].sum(1) - 2  # predicts the last token
    ours = model(**inputs).logits[rows, last, :KNOWN].double()
    with torch.no_grad():
        theirs = teacher(**inputs).logits[rows, last, :KNOWN].double()
    t = objective.temperature
    labels = -(batch["weights_BC"] * ours[:, tokens].softmax(-1).log()).sum(-1)
    within = kl((theirs[:, tokens] / t).softmax(-1), (ours[:, tokens] / t).softmax(-1))
    whole = kl((theirs / t).softmax(-1), (ours / t).softmax(-1))
    return (objective.cross_entropy * labels + objective.label_kl * within + objective.full_kl * whole).mean()


@pytest.mark.parametrize("objective", [LabelObjective(), MIX], ids=["labels alone", "mix"])
def test_a_step(place: Path, tmp_path: Path, objective: LabelObjective) -> None:
    """One step of plain SGD equals one written by hand on whole sequences, and so do the figures."""
    data, sgd = rows_of(place, batch_size=16), partial(torch.optim.SGD, lr=0.1)
    teacher = {} if objective.needs_teacher else {"teacher": None}
    module = rank(place, objective=objective, optimizer=sgd, **teacher)
    trainer = tiny_trainer(tmp_path, steps=1, limit_val_batches=0)
    trainer.fit(module, data)
    (batch,) = list(data.train_dataloader())
    model = load_model(str(place / "student"))
    loss = loss_by_hand(model, load_model(str(place / "teacher")), batch, data.label_token_ids, objective)
    loss.backward()
    sgd(model.parameters()).step()
    assert_same_weights(module.student, model)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["train/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert logged.keys() == {"train/loss", *(f"train/{name}" for name in objective.weights)}
    mixed = sum(weight * logged[f"train/{name}"] for name, weight in objective.weights.items())
    assert mixed == pytest.approx(loss.item(), rel=1e-4)


def test_one_position_goes_through_the_head(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole sequence, in training and in validation."""
    rows: list[int] = []
    shape_logits = Head.shape_logits

    def spying(self: Head, products_NV: Tensor) -> Tensor:
        rows.append(products_NV.numel() // products_NV.shape[-1])
        return shape_logits(self, products_NV)

    module = rank(place)
    module.configure_model()
    monkeypatch.setattr(Head, "shape_logits", spying)
    for model in (module.student, module.teacher.model):
        model.get_output_embeddings().register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    tiny_trainer(tmp_path, steps=1).fit(module, rows_of(place))
    assert rows and max(rows) == 4  # samples of a batch


# However a step is cut, and ranks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(place: Path) -> dict[str, dict[str, Any]]:
    process = start(["-m", "tests.helpers.ranking_runs", str(place)], place)
    single = {cut: fit(place, cut) for cut in CUTS if CUTS[cut][0] == 1}
    ended_well(process)
    ranks = [torch.load(place / f"rank{number}.pt", weights_only=True) for number in (0, 1)]
    return {**single, "2 ranks x 2 x 4": ranks[0], "the other rank": ranks[1]}


@pytest.mark.parametrize("cut", ["4 x 4", "2 ranks x 2 x 4", "the other rank"])
def test_the_same_step_and_the_same_figures_however_it_is_cut(runs: dict[str, dict[str, Any]], cut: str) -> None:
    whole, parts = runs["1 x 16"], runs[cut]
    assert float((parts["update"] - whole["update"]).norm() / whole["update"].norm()) < 1e-5
    for name in ("train/loss", "train/cross_entropy", "train/label_kl", "train/full_kl"):
        assert parts["logged"][name] == pytest.approx(whole["logged"][name], rel=1e-4), name
    # Perplexity and KL are means over what every rank was given, twice the odd sample included; these are not.
    ranking = {name for name in whole["tested"] if any(figure in name for figure in FIGURES)}
    assert len(ranking) == 3 * 3 * len(FIGURES)  # two models and their difference, with two ends each
    for name in ranking:
        assert parts["tested"][name] == pytest.approx(whole["tested"][name], abs=1e-4), name


# Judging -------------------------------------------------------------------------------------------------------------


def test_student_and_teacher_are_judged_side_by_side(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, module = rows_of(place), rank(place)
    with caplog.at_level("INFO"):
        (found,) = tiny_trainer(tmp_path).test(module, data, verbose=False)
    (batch,) = list(rows_of(place, eval_batch_size=7).test_dataloader())
    for column, folder in (("test/{}", "student"), ("test/teacher_{}", "teacher")):
        logits = answer_logits(load_model(str(place / folder)), batch)[:, data.label_token_ids]
        loss = -(batch["weights_BC"] * logits.log_softmax(-1)).sum(-1).mean()
        assert found[column.format("log_loss")] == pytest.approx(loss.item(), rel=1e-4)
        ends = [found[column.format("log_loss") + end] for end in ("_low", "_high")]
        assert ends[0] < loss < ends[1]
    (validated,) = tiny_trainer(tmp_path).validate(module, data, verbose=False)
    assert {name.removeprefix("val/") for name in validated} == {
        name.removeprefix("test/") for name in found if not name.endswith(("_low", "_high"))
    }
    assert {"val/kl", "val/top1_agreement", "val/perplexity", "val/auroc_difference"} <= validated.keys()
    line = next(record.message for record in caplog.records if record.message.startswith("log_loss: student"))
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", line)]
    names = [column.format("log_loss") + end for column in ("test/{}", "test/teacher_{}", "test/{}_difference")
             for end in ("", "_low", "_high")]  # fmt: skip
    assert numbers == pytest.approx([found[name] for name in names], abs=1e-4)


def test_a_teacher_is_asked_once_for_a_sample_to_judge(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And samples of val and test, which have the same numbers, are not mistaken for each other."""
    asked: list[list[int]] = []
    answer = Teacher.answer_hidden

    def counting(self: Teacher, batch: Batch) -> Tensor:
        asked.append(batch["index"])
        return answer(self, batch)

    monkeypatch.setattr(Teacher, "answer_hidden", counting)
    write_rows(tmp_path / "others.jsonl", range(33, 40))  # as long as those of val, and so in the same order
    data = rows_of(place, test=str(tmp_path / "others.jsonl"))
    module = rank(place, objective=LabelObjective())
    tiny_trainer(tmp_path, steps=4, val_check_interval=2).fit(module, data)
    assert sorted(index for batch in asked for index in batch) == list(
        range(7)
    )  # not for training, which needs no teacher
    (both,) = tiny_trainer(tmp_path).test(module, data, verbose=False)
    (alone,) = tiny_trainer(tmp_path).test(rank(place), data, verbose=False)
    assert both["test/teacher_log_loss"] == alone["test/teacher_log_loss"]


def test_predictions_are_labels_and_their_probabilities(place: Path, tmp_path: Path) -> None:
    data, module = rows_of(place, eval_batch_size=7), rank(place, teacher=None, objective=LabelObjective())
    (rows,) = tiny_trainer(tmp_path).predict(module, data)
    (batch,) = list(data.predict_dataloader())
    student = load_model(str(place / "student"))
    logits = answer_hidden(student, batch) @ head_of(student).weight_VD[data.label_token_ids].T
    for found, expected, index in zip(rows, logits.softmax(-1), batch["index"], strict=True):
        assert found["prompt"] == row(20 + index)["prompt"]
        assert found["user"] == str(row(20 + index)["user"])
        assert list(found["probabilities"]) == list(LABELS)
        assert list(found["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert found["prediction"] == LABELS[int(expected.argmax())]


def test_metrics_never_enter_a_checkpoint(place: Path, tmp_path: Path) -> None:
    module = rank(place)
    trainer = tiny_trainer(tmp_path, steps=1)
    trainer.fit(module, rows_of(place))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"student.{name}" for name in module.student.state_dict()}
    loaded = RankingDistillation.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.objective == MIX
    assert_same_weights(loaded.student, module.student)


# What is refused -----------------------------------------------------------------------------------------------------


def test_a_label_that_is_never_to_be_judged_is_one_sentence(place: Path, tmp_path: Path) -> None:
    """Before the first step; whoever only judges is warned and gets the other figures."""
    held_out = write_rows(tmp_path / "held_out.jsonl", range(0, 6, 3))  # "n" alone
    data = partial(rows_of, place, val=held_out, test=held_out)
    message = (
        r"expected every label among the 2 val samples, found none with 'y' or '\?': there is no AUROC without; add"
    )
    with pytest.raises(ValueError, match=message) as error:
        tiny_trainer(tmp_path, steps=1).fit(rank(place), data())
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match=message.replace("val", "test")):
        (found,) = tiny_trainer(tmp_path).test(rank(place), data(), verbose=False)
    assert "test/auroc" not in found and found["test/log_loss"] > 0


def test_data_without_labels_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a data module of samples with labels, found none; use Ranking"):
        tiny_trainer(tmp_path, steps=1).fit(rank(place), loader([tiny_batch()]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": None}, "expected model.teacher for cross_entropy and label_kl and full_kl, found none; name one"),
        ({"teacher": "offline:somewhere"}, "expected a live teacher for ranking, found 'offline:somewhere'; name"),
        ({"resamples": -1}, "expected model.resamples between 0 and 1,000,000, found -1"),
    ],
)
def test_settings(place: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank(place, **settings)
