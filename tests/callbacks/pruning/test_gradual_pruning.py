"""What a pruning event does to everything around the student, and what it says; exact resume is in `test_resume.py`."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from callbacks import ExportOnFitEnd, Preflight, QuantizationAwareTraining
from callbacks.pruning import event as pruning_event
from callbacks.pruning.judge import PruningJudge
from datamodules import Conversations
from export.report import read_metrics
from models import SFT
from models.architecture import count_parameters, decoder_layers
from tests.helpers.pruning_runs import fit, make_places, pruning
from tests.helpers.tiny import tiny_folder
from tests.helpers.tiny_models import is_uniform


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_places(tmp_path_factory.mktemp("places"))


class Watch(Callback):
    """Copies of weights, moments and averages, by name, before or after the events, by step."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, dict[str, Tensor]]] = {}
        self.num_edits: dict[int, int] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        state = trainer.optimizers[0].state
        parameters = dict(pl_module.student.named_parameters())
        tensors = {"weight": parameters} | {
            key: {name: state[p][key] for name, p in parameters.items()} for key in ("exp_avg", "exp_avg_sq")
        }
        for callback in trainer.callbacks:
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                average: Any = callback._average_model.module
                tensors["average"] = dict(average.student.named_parameters())
        self.seen[trainer.global_step] = {
            kind: {name: t.detach().clone() for name, t in named.items()} for kind, named in tensors.items()
        }
        self.num_edits[trainer.global_step] = len(pl_module.edits)


def cut(named: dict[str, Tensor], edits: list[dict[str, Any]], num_groups: int) -> dict[str, Tensor]:
    """The rows and columns that `narrow_mlp` and `narrow_kv_groups` keep, written out."""
    named = dict(named)

    def keep(name: str, dim: int, indices: list[int], width: int) -> None:
        parts = named[name].unflatten(dim, (-1, width))
        named[name] = parts.index_select(dim, torch.tensor(indices)).flatten(dim, dim + 1)

    for edit in edits:
        prefix = f"model.layers.{edit['layer']}."
        if edit["op"] == "narrow_mlp":
            for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                keep(f"{prefix}mlp.{name}.weight", dim, edit["keep"], 1)
        else:
            for name, dim, width in (("q_proj", 0, 16), ("k_proj", 0, 8), ("v_proj", 0, 8), ("o_proj", 1, 16)):
                keep(f"{prefix}self_attn.{name}.weight", dim, edit["keep"], width)
    return named


@pytest.mark.parametrize("repair", ["none", "layerwise"])
def test_what_is_kept_stays_bit_for_bit(repair: Any, places: dict[str, str], tmp_path: Path) -> None:
    before, after = Watch(), Watch()
    averaging = EMAWeightAveraging(decay=0.6)
    trainer = fit(places, tmp_path, before, pruning(0.5, 0.5, repair=repair), after, averaging)
    module: Any = trainer.lightning_module
    moved = 0
    for step in (2, 4):
        edits = module.edits[before.num_edits[step] : after.num_edits[step]]
        assert edits
        expected = {kind: cut(named, edits, 2) for kind, named in before.seen[step].items()}
        found = after.seen[step]
        for kind in ("exp_avg", "exp_avg_sq"):
            for name, tensor in expected[kind].items():
                assert torch.equal(found[kind][name], tensor), (kind, name)
                assert tensor.any()
        for name, tensor in expected["weight"].items():
            if torch.equal(found["weight"][name], tensor):
                assert torch.equal(found["average"][name], expected["average"][name])
                continue
            assert name.endswith(("o_proj.weight", "down_proj.weight"))
            shift = found["weight"][name] - tensor
            torch.testing.assert_close(found["average"][name], expected["average"][name] + shift)
            moved += 1
    assert (moved > 0) == (repair != "none")


def test_figures_of_every_event(places: dict[str, str], tmp_path: Path) -> None:
    callback = pruning(0.5, 0.5)
    trainer = fit(
        places,
        tmp_path,
        callback,
        trainer_logger=CSVLogger(str(tmp_path), name="", version=""),
        trainer_precision="bf16-mixed",
    )
    first, second = callback.history
    assert [first["step"], second["step"]] == [2, 4]
    assert {"kl_before", "kl_after_cut", "kl_after_repair", "kl_recovered"} < first.keys()
    assert first["kl_recovered"] == min(first["kl_after_cut"], first["kl_after_repair"]) - second["kl_before"]
    assert second["parameters"] == count_parameters(trainer.lightning_module.student) < first["parameters"]
    assert (second["neurons_per_layer"], second["query_heads_per_layer"], second["kv_groups_per_layer"]) == (24, 2, 1)
    logged = read_metrics(tmp_path / "metrics.csv")
    for name in ("kl_before", "kl_after_cut", "kl_after_repair", "layers", "hidden_size"):
        assert logged[f"pruning/{name}"] == [(2, pytest.approx(first[name])), (4, pytest.approx(second[name]))]
    assert [step for step, _ in logged["pruning/kl_recovered"]] == [4, 7]
    assert all(first[key] > 0 for key in ("kl_before", "kl_after_cut", "kl_after_repair"))


@pytest.mark.parametrize(("precision", "half"), [("32-true", False), ("bf16-mixed", True)])
def test_events_compute_in_the_precision_of_the_training(
    precision: Any, half: bool, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And see the weights of a repair at once: autocast must not keep copies of them."""
    found = []

    def noting(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
            return function(*args, **kwargs)

        return call

    for name in ("plan_cut", "repair_cut"):
        monkeypatch.setattr(pruning_event, name, noting(getattr(pruning_event, name)))
    fit(places, tmp_path, pruning(0.5), trainer_precision=precision)
    assert len(found) == 4
    assert all(enabled == half and not (half and cached) for enabled, cached in found)


def test_a_repair_that_does_harm_is_undone(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[dict[str, torch.Tensor]] = []

    @torch.no_grad()
    def spoil(model: Any, *args: Any, **kwargs: Any) -> None:
        weights.append({name: p.clone() for name, p in model.named_parameters()})
        model.model.layers[0].mlp.down_proj.weight.add_(10)

    rising = itertools.count(1)
    monkeypatch.setattr(PruningJudge, "__call__", lambda *_: float(next(rising)))
    monkeypatch.setattr(pruning_event, "repair_cut", spoil)
    callback = pruning(0.5)

    def right_after_the_event(trainer: Trainer, figures: object) -> None:
        weights.append({name: p.detach().clone() for name, p in trainer.lightning_module.student.named_parameters()})

    monkeypatch.setattr(callback, "_log", right_after_the_event)
    fit(places, tmp_path, callback, trainer_max_steps=3)
    (event,) = callback.history
    assert event["repair_undone"] == 1
    assert event["kl_after_repair"] > event["kl_after_cut"]
    spoiled_from, after = weights[1], weights[2]  # the first entry is that of on_train_start
    assert all(torch.equal(after[name], tensor) for name, tensor in spoiled_from.items())


def test_without_a_teacher_the_loss_is_measured(places: dict[str, str], tmp_path: Path) -> None:
    callback = pruning(0.5, repair="none")
    trainer = Trainer(
        accelerator="cpu", max_steps=5, default_root_dir=tmp_path, callbacks=[callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = SFT(student=places["student"], optimizer=partial(torch.optim.AdamW, lr=1e-3))
    trainer.fit(module, Conversations(tokenizer=places["student"], train=places["data"], batch_size=3, val_fraction=0))
    for event in callback.history:
        assert {"loss_before", "loss_after_cut", "loss_recovered"} < event.keys()
        assert "loss_after_repair" not in event
    silent = pruning(0.5, judge_batches=0)
    fit(places, tmp_path, silent, trainer_max_steps=5)
    assert not [key for event in silent.history for key in event if key.startswith(("kl_", "loss_"))]


def test_calibration_is_fresh_and_not_what_is_judged(places: dict[str, str]) -> None:
    for val_fraction in (0.0, 0.2):
        data = Conversations(tokenizer=places["student"], train=places["data"], batch_size=3, val_fraction=val_fraction)
        judge = pruning(0.5)._judge
        judged = [] if val_fraction else judge._held_out(data)
        events = [judge.calibration_batches(data, event, 2) for event in (1, 2)]
        samples = [i for batches in (judged, *events) for batch in batches for i in batch["index"]]
        assert len(samples) == len(set(samples)) == 3 * (2 * bool(judged) + 4)


def test_a_plateau_brings_events_forward_and_a_falling_loss_does_not(places: dict[str, str], tmp_path: Path) -> None:
    def steps(min_delta: float) -> list[int]:
        callback = pruning(
            0.5, when="plateau", start_step=1, end_step=6, patience=1, min_delta=min_delta, judge_batches=0
        )
        fit(places, tmp_path, callback, trainer_accumulate_grad_batches=2)
        assert callback._plateau is not None
        assert not callback._plateau.losses
        return [event["step"] for event in callback.history]

    assert steps(10.0) == [2, 4]  # it would have to fall below zero
    callback = pruning(0.5, when="plateau", start_step=1, end_step=6, patience=5)
    fit(places, tmp_path, callback)
    assert [event["step"] for event in callback.history] == callback.steps == [3, 6]  # never two means of five steps


def test_a_plateau_is_judged_by_the_loss_of_every_step(places: dict[str, str], tmp_path: Path) -> None:
    callback = pruning(0.5, when="plateau", start_step=1, end_step=99)
    logger = CSVLogger(str(tmp_path), name="", version="")
    fit(
        places,
        tmp_path,
        callback,
        trainer_accumulate_grad_batches=2,
        trainer_logger=logger,
        trainer_log_every_n_steps=1,
    )
    assert not callback.history
    logged = [loss for _, loss in read_metrics(tmp_path / "metrics.csv")["train/loss"]]
    assert callback.state_dict()["losses"] == pytest.approx(logged)
    assert len(logged) == 7


def test_a_compiled_student_is_compiled_anew(places: dict[str, str], tmp_path: Path) -> None:
    compiled: list[int] = []

    class Compile(Callback):
        def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            pl_module.configure_model()
            pl_module.student.base_model.compile(backend=self.backend)

        def backend(self, graph: Any, inputs: Any) -> Any:
            compiled.append(count_parameters(student[0]) if student else 0)
            return graph.forward

        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            student.append(pl_module.student)

    student: list[nn.Module] = []
    torch._dynamo.reset()
    short = places | {name: tiny_folder(tmp_path / name, num_hidden_layers=2) for name in ("student", "teacher")}
    run = partial(pruning, 0.5, 0.5, depth_sparsity=0.5, hidden_sparsity=0.25, start_step=1, end_step=1, events=1)
    trainer = fit(short, tmp_path, Compile(), run(), trainer_max_steps=2)
    assert len(set(compiled)) == 2  # before the event and after it
    plain = fit(short, tmp_path, run(), trainer_max_steps=2)
    ours, theirs = (t.lightning_module.state_dict() for t in (trainer, plain))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth_sparsity": 1.0}, "GradualPruning.depth_sparsity between 0 and 1"),
        ({"hidden_sparsity": -0.1}, "GradualPruning.hidden_sparsity between 0 and 1"),
        ({"events": 4}, "a step for every event"),
        ({"when": "plateau", "start_step": 3, "events": 2}, "a step for every event"),
        ({"when": "plateau", "patience": 0}, "GradualPruning.patience between 1 and"),
        ({"mlp_sparsity": 0.5, "turns": True}, "turns with mlp_sparsity, a sparsity of heads"),
        ({"calibration_batches": 0}, "GradualPruning.calibration_batches between 1 and"),
        ({"mlp_sparsity": 0.0}, "with a sparsity or a budget, found neither"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruning(**{"mlp_sparsity": 0.5} | settings)


def test_what_cannot_go_together_is_refused(places: dict[str, str], tmp_path: Path) -> None:
    run = partial(fit, places, tmp_path)
    for axis in ("depth_sparsity", "hidden_sparsity"):
        with pytest.raises(ValueError, match=f"hidden_state_weight 0 with GradualPruning.{axis}, found 0.5"):
            run(pruning(**{axis: 0.5}), hidden_state_weight=0.5, hidden_state_layers={0: 0})
        with pytest.raises(ValueError, match=f"{axis} to leave something"):
            run(pruning(**{axis: 0.95}))
    with pytest.raises(ValueError, match="GradualPruning before EMAWeightAveraging"):
        run(EMAWeightAveraging(), pruning(0.5))
    with pytest.raises(ValueError, match="QuantizationAwareTraining without WeightAveraging"):
        run(QuantizationAwareTraining(2), WeightAveraging())
    with pytest.raises(ValueError, match="allocation uniform for ExportOnFitEnd.plain"):
        run(pruning(0.5, allocation="per_layer"), ExportOnFitEnd(precision="fp32", formats=["hf"], plain=True))


class Stop(Callback):
    """The end of a preflight that found nothing."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        raise RuntimeError("the preflight let it pass")


def test_the_preflight_rehearses_every_axis(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, ...]] = []

    def note(model: Any) -> None:
        layer = decoder_layers(model)[0]
        sizes.append((model.config.hidden_size, layer.num_neurons, layer.num_query_heads, layer.num_kv_groups))
        assert is_uniform(model)
        real(model)

    from callbacks import preflight

    real = preflight._forward
    monkeypatch.setattr(preflight, "_forward", note)
    every_axis = pruning(0.5, 0.5, query_head_sparsity=0.5, depth_sparsity=0.5, hidden_sparsity=0.5)
    with pytest.raises(RuntimeError, match="let it pass"):
        fit(places, tmp_path, Stop(), every_axis, Preflight())
    assert sizes == [(24, 32, 4, 2), (16, 24, 1, 1)]
