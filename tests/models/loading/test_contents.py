"""Models are what their files say: nothing missing, left over, misshapen or not finite, and no flipped bit in a checkpoint."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from callbacks import AtomicCheckpointIO
from models.loading.checkpoint import read_checkpoint
from models.loading.contents import check_finite
from models.loading.reference import load_model
from models.loading.student_folder import save_unequal_layers
from models.structure.edits import apply_edit
from models.student import StudentModule
from tests.helpers.tiny import tiny_folder, tiny_model

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


def edit_config(folder: Path, **entries: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


SPOILED = {
    "a tensor less": (lambda f: edit_weights(f, lambda w: w.pop(UP)), f"no tensor for {UP};"),
    "a renamed tensor": (lambda f: edit_weights(f, lambda w: w.update(other=w.pop(UP))), f"no tensor for {UP};"),
    "a tensor more": (lambda f: edit_weights(f, lambda w: w.update(more=w[UP].clone())), "no place for more;"),
    "a narrow tensor": (
        lambda f: edit_weights(f, lambda w: w.update({UP: w[UP][:40].clone()})),
        f"another size of {UP};",
    ),
    "a layer less in the config": (lambda f: edit_config(f, num_hidden_layers=1), "no place for .* and 6 more;"),
    "a layer more in the config": (lambda f: edit_config(f, num_hidden_layers=3), "no tensor for .* and 6 more;"),
    "NaN": (lambda f: edit_weights(f, lambda w: w[UP][3].fill_(torch.nan)), f"found 32 of 1536 in {UP} that are"),
    "infinite": (lambda f: edit_weights(f, lambda w: w[UP][3, 4].fill_(torch.inf)), f"found 1 of 1536 in {UP} that"),
    "quantized in a way unknown": (
        lambda f: edit_config(f, quantization_config={"quant_method": "new"}),
        "of 'new' in",
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_folder_that_is_not_what_it_says_is_refused(how: str, tmp_path: Path) -> None:
    spoil, message = SPOILED[how]
    folder = Path(tiny_folder(tmp_path / "model"))
    load_model(str(folder))
    spoil(folder)
    with pytest.raises(ValueError, match=f"expected .*{message}") as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


def test_a_tied_head_may_be_missing_and_old_frequencies_left_over(tmp_path: Path) -> None:
    folder = Path(tiny_folder(tmp_path / "model"))
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    edit_weights(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_model(str(folder))
    untied = Path(tiny_folder(tmp_path / "untied", tie_word_embeddings=False))
    edit_weights(untied, lambda w: w.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"no tensor for lm_head.weight;"):
        load_model(str(untied))


def test_a_folder_of_unequal_layers_is_looked_at_as_well(tmp_path: Path) -> None:
    model = tiny_model()
    apply_edit(model, {"op": "narrow_mlp", "layer": 0, "keep": list(range(16))})
    model.model.norm.weight.data[0] = torch.nan
    save_unequal_layers(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"expected finite weights in .*found 1 of 32 in model.norm.weight"):
        load_model(str(tmp_path / "model"))


def test_all_kinds_of_numbers_are_looked_at() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        model = torch.nn.Linear(3, 3).to(dtype)
        check_finite(model, "a model")
        model.bias.data[1] = -torch.inf
        with pytest.raises(ValueError, match="found 1 of 3 in bias"):
            check_finite(model, "a model")


# Checkpoints --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(student_folder: str, tmp_path: Path) -> Path:
    """A student's weights, as a run saves them."""
    module = StudentModule(student_folder)
    module.configure_model()
    content = {"state_dict": module.state_dict(), "hyper_parameters": {"student": student_folder}, "edits": []}
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_a_flipped_bit_anywhere_is_found(checkpoint: Path) -> None:
    """In every record: tensors, and the pickle that describes them."""
    whole = checkpoint.read_bytes()
    read_checkpoint(checkpoint)
    with zipfile.ZipFile(checkpoint) as archive:
        records = [record for record in archive.infolist() if record.file_size > 100]
    assert len(records) > 20
    for record in records:
        data = bytearray(whole)
        with zipfile.ZipFile(checkpoint) as archive, archive.open(record) as file:
            start = whole.index(file.read(64), record.header_offset)
        data[start + record.file_size // 2] ^= 4
        checkpoint.write_bytes(data)
        with pytest.raises(
            ValueError, match=r"does not load as one \(.* differs from its checksum: the file is damaged\)"
        ):
            read_checkpoint(checkpoint)
        with pytest.raises(ValueError, match="expected a checkpoint at"):
            AtomicCheckpointIO().load_checkpoint(checkpoint)
        checkpoint.write_bytes(whole)


def test_a_cut_checkpoint_is_one_sentence(checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        checkpoint.write_bytes(whole[:size])
        for settings_only in (False, True):
            with pytest.raises(ValueError, match="expected a checkpoint at .*; take an earlier one") as error:
                read_checkpoint(checkpoint, settings_only=settings_only)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [[], {"edits": {}, "hyper_parameters": {}, "state_dict": {}}, {"state_dict": {}}, torch.ones(2), "text"]
)
def test_a_checkpoint_of_another_program_is_one_sentence(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="found one without a student's structure; give the .ckpt file of a run"):
        read_checkpoint(tmp_path / "other.ckpt")
