"""Figures against pairs counted by hand and torchmetrics' own on repeated rows; intervals against what they must cover."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error, multiclass_auroc

from models.evaluation.ranking import RankingMetrics, Units


def batch_of(classes: list[int], users: list[str | None], *, num_classes: int = 2, start: int = 0) -> dict[str, Any]:
    class_B = torch.tensor(classes)
    return {
        "index": list(range(start, start + len(classes))),
        "class_B": class_B,
        "weights_BC": torch.eye(num_classes)[class_B],
        "user": users,
    }


def drawn(
    num_samples: int, num_users: int, *, num_models: int = 2, num_classes: int = 2, seed: int = 0
) -> tuple[Tensor, dict[str, Any]]:
    """Logits that know something of the classes, the first model's the most."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(num_classes, (num_samples,), generator=generator)
    logits = torch.randn(num_samples, num_models, num_classes, generator=generator)
    for model in range(num_models):
        logits[:, model] += torch.eye(num_classes)[classes] * (1.5 - model)
    users = [str(user) for user in torch.randint(num_users, (num_samples,), generator=generator).tolist()]
    return logits, batch_of(classes.tolist(), users, num_classes=num_classes)


def figures(logits: Tensor, batch: dict[str, Any], resamples: int = 0) -> dict[str, float]:
    metrics = RankingMetrics(resamples)
    metrics.update(logits, batch)
    return {name: float(value) for name, value in metrics.compute().items()}


def pairs_won(scores: list[float], classes: list[int], positive: int = 1) -> float | None:
    """The share of pairs of a positive and a negative in which the positive has more, ties for half."""
    yes = [score for score, number in zip(scores, classes, strict=True) if number == positive]
    no = [score for score, number in zip(scores, classes, strict=True) if number != positive]
    won = [float(a > b) + 0.5 * float(a == b) for a in yes for b in no]
    return sum(won) / len(won) if won else None


def test_two_classes_by_hand() -> None:
    logits, batch = drawn(60, 7)
    logits[::5] = logits[0]  # ties
    found = figures(logits, batch)
    probabilities = logits.double().softmax(-1)
    classes = batch["class_B"].tolist()
    for model, name in enumerate(("{}", "teacher_{}")):
        scores = probabilities[:, model, 1].tolist()
        assert found[name.format("auroc")] == pytest.approx(pairs_won(scores, classes), abs=1e-6)
        by_user = []
        for user in set(batch["user"]):
            rows = [row for row, other in enumerate(batch["user"]) if other == user]
            by_user.append(pairs_won([scores[row] for row in rows], [classes[row] for row in rows]))
        known = [value for value in by_user if value is not None]
        assert found[name.format("user_auroc")] == pytest.approx(sum(known) / len(known), abs=1e-6)
        loss = -sum(probabilities[row, model, number].log().item() for row, number in enumerate(classes)) / 60
        assert found[name.format("log_loss")] == pytest.approx(loss)
        bins: dict[int, list[float]] = {}
        for score, number in zip(scores, classes, strict=True):
            bins.setdefault(int(score * 15), []).append(number - score)
        assert found[name.format("ece")] == pytest.approx(sum(abs(sum(gaps)) for gaps in bins.values()) / 60, abs=1e-6)
    for name in ("auroc", "user_auroc", "log_loss", "ece"):
        assert found[f"{name}_difference"] == pytest.approx(found[name] - found[f"teacher_{name}"])
    assert len(found) == 12


def test_more_classes_are_one_against_the_rest() -> None:
    logits, batch = drawn(80, 6, num_models=1, num_classes=4)
    found = figures(logits, batch)
    probabilities, classes = logits[:, 0].double().softmax(-1), batch["class_B"]
    assert found["auroc"] == pytest.approx(float(multiclass_auroc(probabilities, classes, 4, "macro")), abs=1e-6)
    by_user = []
    for user in set(batch["user"]):
        rows = [row for row, other in enumerate(batch["user"]) if other == user]
        values = [
            pairs_won(probabilities[rows, number].tolist(), classes[rows].tolist(), number) for number in range(4)
        ]
        known = [value for value in values if value is not None]
        by_user += [sum(known) / len(known)] if known else []
    assert found["user_auroc"] == pytest.approx(sum(by_user) / len(by_user), abs=1e-6)
    top, chosen = probabilities.max(-1)
    assert found["ece"] == pytest.approx(float(binary_calibration_error(top, (chosen == classes).long(), 15)), abs=1e-5)
    assert not any("teacher" in name or "difference" in name for name in found)


def test_scores_that_float32_probabilities_would_tie() -> None:
    """Sure as it is, the model ranks: 1 - 1e-11 is above 1 - 1e-10."""
    logits = torch.tensor([[[0.0, 23.0]], [[0.0, 25.0]], [[0.0, 24.0]]])
    assert figures(logits, batch_of([0, 1, 1], ["a"] * 3))["auroc"] == 1.0


def test_graded_samples_count_by_their_weights() -> None:
    logits, batch = drawn(9, 3, num_models=1)
    batch["weights_BC"] = torch.tensor([[0.3, 0.7]]).expand(9, 2)
    expected = -(batch["weights_BC"] * logits[:, 0].log_softmax(-1)).sum(-1).mean()
    assert figures(logits, batch)["log_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_batches_in_any_order_and_samples_given_twice_change_nothing() -> None:
    """A rank that has one sample less than others gets one twice."""
    logits, batch = drawn(30, 5)
    metrics = RankingMetrics(20)
    for rows in ([7, 3], list(range(10, 30)), list(range(12)), [29]):
        metrics.update(
            logits[rows],
            {
                key: value[rows] if isinstance(value, Tensor) else [value[row] for row in rows]
                for key, value in batch.items()
            },
        )
    assert {name: float(value) for name, value in metrics.compute().items()} == figures(logits, batch, 20)


def test_a_class_that_does_not_occur_leaves_auroc_out() -> None:
    logits, batch = drawn(8, 2, num_models=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = figures(logits, {**batch, **{key: batch_of([1] * 8, [])[key] for key in ("class_B", "weights_BC")}})
    assert found.keys() == {"log_loss", "ece"}
    three = batch_of([0, 1] * 4, batch["user"], num_classes=3)
    assert "auroc" not in figures(torch.randn(8, 1, 3), three)


def test_without_users_there_is_no_figure_by_user() -> None:
    logits, batch = drawn(20, 3)
    assert not any("user" in name for name in figures(logits, {**batch, "user": [None] * 20}, 5))
    mixed = [None, *batch["user"][1:]]
    assert "user_auroc" in figures(logits, {**batch, "user": mixed})


def test_nothing_is_left_after_a_reset_or_in_a_checkpoint() -> None:
    metrics = RankingMetrics()
    metrics.update(*drawn(5, 2))
    assert metrics.state_dict() == {}
    metrics.reset()
    assert metrics.index == metrics.users == []


# Intervals ----------------------------------------------------------------------------------------------------------


def test_a_resample_is_the_figures_of_repeated_samples() -> None:
    logits, batch = drawn(40, 6)
    metrics = RankingMetrics()
    metrics.update(logits, batch)
    units = Units(metrics._judged())
    users = units.judged.user_N.unique().tolist()
    counts = torch.tensor([2, 0, 1, 3, 0, 1])
    times = counts[torch.tensor([users.index(key) for key in units.judged.user_N.tolist()])].tolist()
    rows = [row for row, count in enumerate(times) for _ in range(count)]
    copies: dict[int, int] = {}
    names = []  # every time that a user is drawn, it is another user
    for row in rows:
        copies[row] = copies.get(row, -1) + 1
        names.append(f"{batch['user'][row]} {copies[row]}")
    repeated = {**batch_of([batch["class_B"][row].item() for row in rows], names)}
    expected = figures(logits[rows], repeated)
    for name, value_M in units.values(counts).items():
        assert value_M.tolist() == pytest.approx([expected[name], expected[f"teacher_{name}"]], abs=1e-6), name


def test_intervals_of_single_samples_cover_the_truth_as_often_as_they_say() -> None:
    """The mean of a known distribution, 60 times: 95 % is 57; the binomial's 0.1 % tail begins at 50."""
    logits, _ = drawn(20_000, 1, num_models=1, seed=1)
    pool = drawn(20_000, 1, num_models=1, seed=1)[1]["class_B"]
    truth = float(torch.nn.functional.cross_entropy(logits[:, 0], pool))
    covered = 0
    for seed in range(60):
        rows = torch.randperm(20_000, generator=torch.Generator().manual_seed(seed))[:80]
        found = figures(logits[rows], batch_of(pool[rows].tolist(), [None] * 80), 200)
        covered += found["log_loss_low"] <= truth <= found["log_loss_high"]
    assert covered >= 50
    assert found["log_loss_low"] < found["log_loss"] < found["log_loss_high"]


def test_users_are_drawn_whole() -> None:
    """Users whose samples are copies of one another: as many draws as users, not as samples."""
    logits, batch = drawn(30, 1, num_models=1)
    classes = batch["class_B"].tolist() * 20
    many = logits.repeat(20, 1, 1)
    whole = figures(many, batch_of(classes, [str(number % 30) for number in range(600)]), 400)
    apart = figures(many, batch_of(classes, [None] * 600), 400)
    once = figures(logits, batch_of(classes[:30], [None] * 30), 400)
    width = {name: found["log_loss_high"] - found["log_loss_low"] for name, found in
             (("whole", whole), ("apart", apart), ("once", once))}  # fmt: skip
    assert width["whole"] == pytest.approx(width["once"], rel=0.15)
    assert width["whole"] > 3 * width["apart"]  # sqrt(20)


def test_the_difference_is_that_of_the_same_draws() -> None:
    """Two models that are nearly the same: their difference is known far better than either."""
    logits, batch = drawn(200, 30)
    logits[:, 1] = logits[:, 0] + 0.05 * torch.randn(200, 2, generator=torch.Generator().manual_seed(3))
    found = figures(logits, batch, 200)
    for name in ("auroc", "user_auroc", "log_loss"):
        both = found[f"{name}_high"] - found[f"{name}_low"]
        assert 0 < found[f"{name}_difference_high"] - found[f"{name}_difference_low"] < both / 5
    assert found == figures(logits, batch, 200), "the draws are the same each time"


def test_one_user_has_no_interval() -> None:
    logits, batch = drawn(20, 1)
    assert not any(name.endswith(("_low", "_high")) for name in figures(logits, batch, 10))


def test_settings() -> None:
    with pytest.raises(ValueError, match="expected model.resamples between 0 and 1,000,000, found -1; 0 leaves"):
        RankingMetrics(-1)
