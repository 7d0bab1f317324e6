"""The quantization benchmark on a tiny model: what it prints, what it writes, and that it goes on where it stopped."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks import chats, onnx_decode
from benchmarks.quantization import __main__ as quantization
from benchmarks.quantization import arms as quantization_arms
from benchmarks.quantization import training as quantization_training
from benchmarks.quantization.arms import Arm, HeadArm, best
from benchmarks.quantization.peers import Peer
from benchmarks.quantization.training import WAYS
from benchmarks.study import Rows
from datamodules.collate import Batch
from models.post_training.settings import PostTrainingQuantization
from models.post_training.smoothing import STRENGTHS
from models.quantization import quantized_linears
from models.quantization.formats import FORMATS, format_of
from models.quantization.lsq import scale_of
from tests.helpers.study_pages import page_beside
from tests.helpers.tiny import tiny_folder, tiny_model

pytestmark = pytest.mark.long


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in the place of SmolLM2, and few conversations."""
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        quantization,
        "MODEL",
        tiny_folder(tmp_path / "model", hidden_size=64, intermediate_size=64, head_dim=16, vocab_size=259),
    )
    monkeypatch.setattr(quantization, "CALIBRATION_SAMPLES", 4)
    monkeypatch.setattr(quantization, "JUDGED_EVERY", 1)
    monkeypatch.setattr(quantization, "calibration_prompts", lambda count: [f"say {n}" for n in range(count)])
    monkeypatch.setattr(quantization, "held_out_prompts", lambda: [f"what is {n}?" for n in range(3)])
    monkeypatch.setattr(quantization, "PACKAGES", ("torch",))
    sampled = chats.answered
    monkeypatch.setattr(quantization, "answered", lambda *a, **k: sampled(*a, **k, max_new_tokens=8))
    return tmp_path


def test_every_format_and_peer_has_its_place() -> None:
    for format, arms in quantization_arms.ARMS.items():
        assert {arm.format for arm in arms} == {format} and len({arm.name for arm in arms}) == len(arms)
    assert {*FORMATS, "none"} == set(quantization_arms.ARMS)
    studied = [arm for arms in quantization_arms.ARMS.values() for arm in arms]
    assert set(quantization_arms.PEERS) <= set(studied)
    for ours, theirs in quantization_arms.COMPARISONS.values():
        assert ours in studied and theirs in studied and ours.format == theirs.format and isinstance(ours, Arm)


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        (Arm("int8"), {"method": "nearest", "weight_search": "max", "input_search": "max", "smoothing": ()}),
        (Arm("int8", "gptq", "mse"), {"method": "gptq", "weight_search": "mse", "input_search": "mse"}),
        (
            Arm("int8", "quantease", smoothing=True),
            {"method": "quantease", "smoothing": STRENGTHS},
        ),
        (Arm("int8", sensitive=True), {"sensitive": True}),
        (Arm("int8", compensate=True), {"compensate": True}),
        (quantization_arms.COMPARISONS["int8_kl"][0], vars(PostTrainingQuantization(compensate=False))),
        (best("int8_weight_only"), vars(PostTrainingQuantization(compensate=True))),
    ],
)
def test_an_arm_is_what_its_name_says(arm: Arm, expected: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, PostTrainingQuantization]] = []
    monkeypatch.setattr(quantization_arms, "quantize_after_training", lambda _, __, *what, **___: asked.append(what))
    arm.quantize(tiny_model(), [])
    [(format, settings)] = asked
    assert format == arm.format and {**vars(settings), **expected} == vars(settings)
    assert settings.sensitive == arm.sensitive


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Arm, Arm | Peer]]:
    found: dict[str, tuple[Arm, Arm | Peer]] = {
        "int8_kl": (Arm("int8", "gptq", "mse"), Arm("int8")),
        "int4_kl": (Arm("int4_g32", "quantease", "mse", True), Arm("int4_g32")),
        "int4_kl_over_mse": (Arm("int4_g32", "quantease", "mse", True), Arm("int4_g32", "nearest", "mse")),
    }
    monkeypatch.setattr(quantization, "COMPARISONS", found)
    return found


def check_quick(bench: Path, comparisons: dict[str, tuple[Arm, Arm | Peer]], printed: str) -> None:
    found = json.loads((bench / "quick.json").read_text())
    kl = {(row["format"], row["arm"]): row["kl"] for row in found["results"]}
    arms = {arm for pair in comparisons.values() for arm in pair}
    assert set(kl) == {(arm.format, arm.name) for arm in arms} and len(found["results"]) == len(arms)
    assert set(found["ratios"]) == set(comparisons)
    for name, (ours, theirs) in comparisons.items():
        assert found["ratios"][name] == pytest.approx(kl[ours.format, ours.name] / kl[theirs.format, theirs.name])
        assert name in printed
    for row in found["results"]:
        assert row["kl"] > 0 and row["seconds"] > 0 and row["bits"] == format_of(row["format"]).weight.bits()


def test_quick_prints_ratios_and_writes_json(
    bench: Path, comparisons: dict[str, tuple[Arm, Arm | Peer]], capsys: pytest.CaptureFixture[str]
) -> None:
    quantization.main(["--quick", "--json", str(bench / "quick.json")])
    check_quick(bench, comparisons, capsys.readouterr().out)


def test_quick_with_peers(bench: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("modelopt.torch.quantization")
    pytest.importorskip("torchao")
    comparisons = {**quantization_arms.COMPARISONS}
    monkeypatch.setattr(quantization, "COMPARISONS", comparisons)
    quantization.main(["--quick", "--json", str(bench / "quick.json")])
    check_quick(bench, comparisons, capsys.readouterr().out)


def test_a_missing_peer_is_named_before_any_work(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.quantization.peers.find_spec", lambda _: None)
    monkeypatch.setattr(quantization.Bench, "__init__", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(ModuleNotFoundError, match="expected the package `nvidia-modelopt`"):
        quantization.main(["--quick"])
    with pytest.raises(ModuleNotFoundError, match="expected the package `torchao`"):
        quantization.main(["--formats", "int8", "--out", str(bench / "study")])


def test_a_kept_row_of_other_settings_is_refused_before_any_work(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization.Bench, "__init__", lambda *_: pytest.fail("work has begun"))
    study = quantization.Study(bench / "study", samples=4)
    first, last = Arm("int4_g32"), Arm("int8")
    settings = {**study.rows.settings, **asdict(last), "search": "mse"}
    study.rows.write("int8_nearest_max", {"kl": 1.0, "settings": settings})
    with pytest.raises(ValueError, match=r"int8_nearest_max in .* to be made with search = 'max', found 'mse'"):
        study.calibrated([first, last])


@pytest.fixture
def study(bench: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two arms for each of two formats, two ways to train one of them, and graphs."""
    formats = ("int8", "int4_g32", "fp8_e4m3", "none")
    arms: dict[str, tuple[Arm | HeadArm, ...]] = {format: (Arm(format), best(format)) for format in formats[:3]}
    arms["none"] = (Arm("none", kv_cache="int8"), HeadArm("int4_g32", "quantease", sensitive=True))
    monkeypatch.setattr(quantization, "ARMS", arms)
    monkeypatch.setattr(onnx_decode, "HEAD_DIM", 16)
    monkeypatch.setattr(onnx_decode, "PAST", 4)
    monkeypatch.setattr(onnx_decode, "NEW", 2)
    monkeypatch.setattr(onnx_decode, "PROMPT", 8)
    monkeypatch.setattr(onnx_decode, "_prompt", lambda length: [3] * length)
    command = ["--out", str(bench / "study"), "--formats", *formats, "--samples", "4"]
    return [*command, "--train", "int4_g32", "--ways", *WAYS, "--steps", "2", "--repetitions", "2"]


@pytest.fixture
def training(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization_training, "calibration_prompts", lambda count: [f"say {n}" for n in range(count)])
    monkeypatch.setattr(quantization_training, "answered", quantization.answered)
    monkeypatch.setattr(quantization_training, "TRAINING_SAMPLES", 16)
    monkeypatch.setattr(quantization_training, "_LEARNING_RATES", dict.fromkeys(FORMATS, 1e-3))


@pytest.mark.usefixtures("training")
def test_the_study_writes_a_page_and_goes_on_where_it_stopped(
    bench: Path, study: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = page_beside(bench / "study", "quantization", "quantization")
    made.write_text(made.read_text().replace("int4_g128", "int4_g32"))
    quantization.main(study)
    rows = Rows(bench / "study.jsonl").all()
    graphs = rows.pop("graphs")
    assert len(rows) == 8 + len(WAYS) and all(row["settings"] and row["machine"] for row in rows.values())
    page = (bench / "study.md").read_text()
    trained = [row for row in rows.values() if "way" in row]
    start = rows["int4_g32_quantease_mse_smoothed_where_it_helps_sensitive_compensating"]["kl"]
    for row in rows.values():
        shown = row["way"] + f" | {start:.4f}" if "way" in row else row["arm"]
        assert row["kl"] > 0 and (
            f"| {shown} | {row['kl']:.4f} |" in page or "on all" in shown
        )  # the page leaves it out
    assert len({row["kl"] for row in trained} | {start}) == len(WAYS) + 1  # every way moves it, elsewhere
    assert "### `int4_g32`: 4.5 bits a weight" in page and "### `int8`: 8 bits a weight" in page
    assert "### `none`: 16 bits a weight" in page and "| cache int8, max |" in page
    assert "| head int4_g32, quantease, mse, sensitive |" in page and "](study/bits.png)" in page
    assert (bench / "study/bits.png").is_file()
    sizes = {row["format"]: row["megabytes"] for row in graphs["graphs"]}
    assert sizes["fp32"] > sizes["int8"] > sizes["int4_g32"] and "none" not in sizes
    for row in graphs["graphs"]:
        assert f"| {row['format']} | {row['megabytes']:.0f} |" in page
        assert ("tokens_per_second" in row) == (row["format"] != "fp8_e4m3")

    monkeypatch.setattr(quantization.Bench, "__init__", lambda *_: pytest.fail("made again"))
    quantization.main(study)
    assert (bench / "study.md").read_text() == page
    with pytest.raises(ValueError, match="expected .* to be made with samples = 5, found 4"):
        quantization.main([*study, "--samples", "5"])


def test_a_kept_start_is_not_changed_by_who_got_it(bench: Path) -> None:
    kept = quantization.Bench(4)
    first = kept.start(Arm("int8"))
    before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    for parameter in first.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.start(Arm("int8")).state_dict().items())
    other = kept.start(Arm("int4_g32")).state_dict()
    assert any(name not in other or not torch.equal(tensor, other[name]) for name, tensor in before.items())


def test_training_starts_with_the_calibrated_figures(bench: Path) -> None:
    kept = quantization.Bench(4)
    figures = [kept.judge(make(Arm("int4_g32", "gptq", "mse"))) for make in (kept.quantized, kept.start)]
    assert figures[0]["kl"] == pytest.approx(figures[1]["kl"], rel=1e-4)


@pytest.mark.usefixtures("training")
def test_training_moves_the_calibrated_student(bench: Path) -> None:
    quantization.main(["--qat", "--samples", "4", "--steps", "2", "--json", str(bench / "qat.json")])
    found = json.loads((bench / "qat.json").read_text())
    rows, ratios = found["results"], found["ratios"]
    assert [row["format"] for row in rows] == ["fp8_e4m3"] * 2 + ["int4_g128"] * 3
    training = quantization_training
    ways = {"fp8_qat_kl": training.DISTILLED, "int4_qat_kl": training.LEARNED, "int4_on_all_kl": training.ON_ALL}
    for (name, way), before, after in zip(ways.items(), (0, 2, 2), (1, 3, 4), strict=True):
        assert rows[after]["way"] == way
        assert ratios[name] == pytest.approx(rows[after]["kl"] / rows[before]["kl"]) and ratios[name] != 1
    assert set(ratios) == set(ways)


@pytest.mark.usefixtures("training")
def test_learned_scales_are_those_that_are_judged(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, judged = quantization.Bench(4), list[PreTrainedModel]()

    def judge(student: PreTrainedModel) -> dict[str, float]:
        judged.append(student)
        return {}

    monkeypatch.setattr(kept, "judge", judge)
    quantization_training.trained_row(kept, Arm("int4_g32", "gptq", "mse"), quantization_training.LEARNED, 2)
    before, after = (quantized_linears(model) for model in (kept.start(Arm("int4_g32", "gptq", "mse")), *judged))
    for name, linear in after.items():
        scale = linear.weight_quantizer.scale
        assert not torch.equal(scale, before[name].weight_quantizer.scale)
        assert torch.equal(scale, scale_of(linear.weight_quantizer.log_scale.detach()))


@pytest.mark.usefixtures("training")
def test_calibrated_on_all_starts_after_every_conversation_once(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, arm, seen = quantization.Bench(4), Arm("int4_g32", "gptq", "mse"), list[list[int]]()
    original = Arm.quantize

    def quantize(self: Arm, model: PreTrainedModel, batches: list[Batch]) -> None:
        seen.append([id(batch) for batch in batches])
        original(self, model, batches)

    monkeypatch.setattr(Arm, "quantize", quantize)
    monkeypatch.setattr(quantization_training, "_batches", lambda *_: 3 * kept.held_out[:1])
    quantization_training.trained_row(kept, arm, quantization_training.ON_ALL, 3)
    assert seen == [[id(batch) for batch in [*kept.calibration, kept.held_out[0]]]]


def test_batches_are_those_of_the_steps_in_a_new_order_each_epoch(bench: Path, training: None) -> None:
    kept = quantization.Bench(4)
    orders = [[batch["index"] for batch in quantization_training._batches(kept, 5, seed)] for seed in (0, 0, 1)]
    for order in orders:
        assert len(order) == 5 and sorted(order[:2]) == sorted(order[2:4]) and order[0] != order[1]
    assert orders[0] == orders[1] and {str(order) for order in orders} != {str(orders[0])}


def test_one_command_at_a_time(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quantization.main(["--quick", "--qat"])
    assert "expected --quick or --qat, found both" in capsys.readouterr().err
