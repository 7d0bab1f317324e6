"""The pruning benchmark on a tiny model: what it prints, what it writes, and that it goes on where it stopped."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import chats
from benchmarks.pruning import __main__ as pruning
from benchmarks.pruning import arms as pruning_arms
from benchmarks.pruning import speed as pruning_speed
from benchmarks.study import Rows
from datamodules.collate import IGNORE_INDEX
from models.loading.reference import load_model, load_tokenizer
from models.pruning.cut import Targets
from tests.helpers.study_pages import page_beside
from tests.helpers.tiny import tiny_folder

pytestmark = pytest.mark.long


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in the place of SmolLM2, and small files in the place of the packages'."""
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    files = {chats.INSTRUCTIONS: tmp_path / "instructions.jsonl", chats.QUESTIONS: tmp_path / "questions.jsonl"}
    kinds = [*chats.PERMISSIVE, "vicgalle/alpaca-gpt4"] * 4
    rows = [{"task_prompt": f' "say {n}" ', "task_type": kind} for n, kind in enumerate(kinds)]
    rows.append({"task_prompt": "long " * 400, "task_type": chats.PERMISSIVE[0]})
    files[chats.INSTRUCTIONS].write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [{"turns": [f"what is {n}?", "and then?"]} for n in range(5)]
    files[chats.QUESTIONS].write_text("".join(json.dumps(row) + "\n" for row in questions))
    monkeypatch.setattr(chats, "fetch", lambda file: files[file])
    monkeypatch.setattr(pruning, "MODEL", tiny_folder(tmp_path / "model", intermediate_size=192))
    monkeypatch.setattr(pruning, "CALIBRATION_SAMPLES", 8)
    cuts = {"mlp 37.5 %": Targets(neurons=128), "kv 1 of 3": Targets(kv_groups=1), "depth 20 %": Targets(layers=1)}
    monkeypatch.setattr(pruning, "CUTS", cuts)
    return tmp_path


def test_prompts_are_permissive_short_and_in_a_fixed_order(bench: Path) -> None:
    prompts = chats.calibration_prompts(8)
    assert sorted(prompts) == sorted(f"say {n}" for n in range(12) if n % 3 != 2)
    assert prompts[:3] == chats.calibration_prompts(3)
    assert chats.held_out_prompts() == [f"what is {n}?" for n in range(5)]
    with pytest.raises(ValueError, match="expected at most 8 calibration prompts, found 9; ask for fewer"):
        chats.calibration_prompts(9)


def test_answers_are_the_models_own_and_sampled_once(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(pruning.MODEL), load_tokenizer(pruning.MODEL)
    prompts = chats.held_out_prompts()
    first = chats.answered(model, tokenizer, "tiny", prompts, max_new_tokens=6, batch_size=2)
    assert [len(batch["index"]) for batch in first] == [2, 2, 1]
    assert sorted(index for batch in first for index in batch["index"]) == [0, 1, 2, 3, 4]
    for batch in first:
        answers_BT = batch["labels"] != IGNORE_INDEX
        assert torch.equal(batch["labels"][answers_BT], batch["input_ids"][answers_BT])
        assert 1 <= int(answers_BT.sum(1).min()) <= int(answers_BT.sum(1).max()) <= 6
        assert tokenizer.decode(batch["prompt_ids"][0]).count("what is") == 1
    monkeypatch.setattr(chats, "_sample", lambda *_: pytest.fail("sampled again"))
    again = chats.answered(model, tokenizer, "tiny", prompts, max_new_tokens=6, batch_size=2)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))


def test_quick_prints_ratios_and_writes_json(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruning.main(["--quick", "--json", str(bench / "quick.json")])
    found = json.loads((bench / "quick.json").read_text())
    assert len(found["results"]) == len(pruning.QUICK_CUTS) * len(pruning.QUICK_ARMS)
    kl = {(row["cut"], row["arm"]): row["kl"] for row in found["results"]}
    ours, theirs = pruning.QUICK_ARMS[2], pruning.BASELINE
    for cut, name in zip(pruning.QUICK_CUTS, ("mlp", "kv"), strict=True):
        ratio = found["ratios"][f"osscar_kl_over_activation_kl_{name}"]
        assert ratio == pytest.approx(kl[cut, ours.name] / kl[cut, theirs.name])
        assert found["ratios"][f"osscar_kl_over_activation_kl_{name}_uniform"] > 0
    assert all(row["kl"] > 0 and row["seconds"] > 0 for row in found["results"])
    assert "osscar_kl_over_activation_kl_mlp" in capsys.readouterr().out


def test_the_study_writes_a_page_and_goes_on_where_it_stopped(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arms for each of the tiny model's cuts, timed twice."""
    arms = (pruning_arms.BASELINE, pruning_arms.Arm("osscar", "sequential", "per_layer"))
    monkeypatch.setattr(pruning, "ARMS", dict.fromkeys(pruning.CUTS, arms))
    monkeypatch.setattr(pruning_speed, "REPETITIONS", 2)
    study = ["--out", str(bench / "study"), "--cuts", *pruning.CUTS]
    page_beside(bench / "study", "pruning", "pruning")
    pruning.main(study)
    rows = list(Rows(bench / "study.jsonl").all().values())
    students, timed = [row for row in rows if "arm" in row], [row for row in rows if "speed_of" in row]
    assert len(students) == 6 and all(row["kl"] > 0 and row["settings"] and row["machine"] for row in students)
    shapes = {json.dumps([row["hidden"], row["layers"]]) for row in students}
    assert {json.dumps([row["hidden"], row["layers"]]) for row in timed} == shapes
    assert all(row["torch_low"] <= row["torch"] <= row["torch_high"] and row["onnxruntime"] > 0 for row in timed)
    for row in students:
        assert next(speed for speed in timed if speed["layers"] == row["layers"])["parameters"] == row["parameters"]
    page = (bench / "study.md").read_text()
    shown = [row for row in students if f"### {row['cut']}: " in page]
    assert shown and all(f"| {row['arm']} | {row['kl']:.3f} |" in page for row in shown)
    assert all(f"| {row['parameters'] / 1e6:.1f} | {row['gflops']:.1f} |" in page for row in timed)

    for module, name in ((pruning, "Bench"), (pruning_speed, "load_model")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("made again"))
    pruning.main(study)
    assert (bench / "study.md").read_text() == page
