"""Every recipe on a machine with a GPU that is not there: preflight, steps, events, validation and the tracing of its export.

`tests/helpers/pretend_gpu.py` says what such a run shows, and what it cannot.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

import train
from callbacks import QuantizationAwareTraining
from datamodules import Conversations
from export.onnx_graph.to_onnx import export_onnx
from models import SFT, Distillation
from models.architecture import FAMILIES
from models.forward import answer_hidden, answer_labels, answer_lengths, answer_logits
from models.generation.decoder import decoder_for
from models.generation.on_policy import OnPolicy
from models.generation.rollout import Rollout, rollout
from models.generation.sampling import Sampling
from models.losses import FullTargets, Objective, head_of, linear_objective
from models.losses.objective import LOSSES
from models.post_training.calibrate import quantize_after_training
from models.post_training.format_choice import formats_by_pattern
from models.pruning.budget.target import Budget
from models.quantization import FORMATS, freeze_scales
from models.structure.edits import apply_edit, quantize_decoder
from tests.helpers.pretend_gpu import PretendGpu, pretend_gpu
from tests.helpers.pruning_runs import fit, make_places, pruning
from tests.helpers.short_runs import MOVED, ROOT, STEPS, short
from tests.helpers.tiny import tiny_batch, tiny_folder, tiny_jsonl, tiny_model
from tests.helpers.tiny_movielens import SETTINGS as FILMS
from tests.helpers.tiny_movielens import tiny_movielens

CHAT = {"train": "my.jsonl", "batch_size": 4, "max_length": 64, "val_fraction": 0.2}
TASKS = {"train_size": 32, "val_size": 4, "test_size": 4, "batch_size": 4, "eval_batch_size": 4}
QUICK = {
    "served_questions": 0,
    "cpu": False,
    "benchmark_repetitions": 0,
    "verify_prompts": 1,
    "formats": ["hf", "onnx"],
}
DATA = {"quickstart": TASKS, "quickstart_teacher": TASKS, "ranking": FILMS, "ranking_teacher": FILMS}
RECIPES = ["sft", "distill", "compress", "quickstart_teacher", "quickstart", "ranking_teacher", "ranking"]
OVERLAYS = [["checkpointing"], ["lora"], ["adam8bit"], ["bf16_weights", "teacher_int8"], ["wandb"]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "configs").symlink_to(ROOT / "configs")
    for seed, name in enumerate(("student", "teacher")):
        tiny_folder(folder / name, seed=seed, head_dim=16, max_position_embeddings=1024)
    tiny_jsonl(folder / "my.jsonl", [(f"{n} plus {n}?", str(2 * n)) for n in range(24)])
    tiny_movielens(folder / "films")
    return folder


@pytest.fixture
def gpu(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    monkeypatch.chdir(place)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pretend_gpu() as gpu:
        yield gpu


def arguments(name: str, overlays: Sequence[str] = (), **trainer: Any) -> list[str]:
    """A recipe with tiny models and a few steps; which device it takes, it finds out by itself."""
    export = MOVED["ExportOnFitEnd"] | (QUICK if name == "quickstart" else {})
    overlay = short(name, {**MOVED, "ExportOnFitEnd": export})
    overlay["trainer"] |= {"limit_val_batches": 1, "num_sanity_val_steps": 0, **trainer}
    has_teacher = "teacher" in yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())["model"]["init_args"]
    overlay["model"]["init_args"] |= {"student": "student"} | ({"teacher": "teacher"} if has_teacher else {})
    overlay["data"] = {"init_args": DATA.get(name, CHAT)}
    if name.startswith("ranking"):
        del overlay["model"]["init_args"]["generate_tokens"]
    Path("short.yaml").write_text(yaml.safe_dump(overlay))
    files = [f"configs/{name}.yaml", "short.yaml", *(f"configs/{overlay}.yaml" for overlay in overlays)]
    return ["fit", *(argument for file in files for argument in ("--config", file))]


@pytest.mark.parametrize(
    "name", ["sft", *(pytest.param(name, marks=pytest.mark.pretend_gpu) for name in RECIPES if name != "sft")]
)
def test_a_recipe_runs_on_a_gpu(gpu: PretendGpu, name: str) -> None:
    cli = train.main(arguments(name))
    assert cli.trainer.strategy.root_device == torch.device("cuda", 0)
    assert cli.trainer.global_step == STEPS


@pytest.mark.pretend_gpu
@pytest.mark.parametrize("overlays", OVERLAYS, ids="+".join)
def test_a_recipe_runs_on_a_gpu_under_the_overlays(gpu: PretendGpu, overlays: list[str]) -> None:
    with torch.compiler.set_stance("force_eager"):
        assert train.main(arguments("distill", overlays)).trainer.global_step == STEPS


# Methods ------------------------------------------------------------------------------------------------------------

AXES: dict[str, dict[str, Any]] = {
    "mlp": {"mlp_sparsity": 0.5},
    "groups": {"kv_group_sparsity": 0.5, "repair": "layerwise"},
    "heads": {"query_head_sparsity": 0.5},
    "depth": {"depth_sparsity": 0.5, "depth": "search"},
    "hidden": {"hidden_sparsity": 0.25},
    "budget": {"budget": Budget("parameters", 0.8), "allocation": "per_layer"},
    **{score: {"mlp_sparsity": 0.5, "score": score} for score in ("activation", "taylor", "wanda", "magnitude")},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_places(tmp_path_factory.mktemp("pruned"))


@pytest.mark.pretend_gpu
@pytest.mark.parametrize("axis", AXES)
def test_a_gpu_cuts_the_same_units(axis: str, places: dict[str, str], tmp_path: Path) -> None:
    def edits(accelerator: str) -> list[Any]:
        callback = pruning(**AXES[axis])
        trainer = fit(places, tmp_path, callback, trainer_accelerator=accelerator)
        assert trainer.strategy.root_device.type == accelerator
        assert callback.finished
        return list(trainer.lightning_module.edits)

    with pretend_gpu():
        found = edits("cuda")
    assert found
    assert found == edits("cpu")


@pytest.mark.pretend_gpu
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("learned", [False, True], ids=["frozen", "learned"])
def test_a_gpu_trains_through_every_format(name: str, learned: bool) -> None:
    """Observed, frozen or learned, and trained for a step: the same losses as on the CPU."""

    def losses(device: str) -> list[float]:
        model = tiny_model().train().to(device)
        batch = {key: value.to(device) for key, value in tiny_batch().items() if isinstance(value, Tensor)}
        apply_edit(model, quantize_decoder(model, format=name))
        answer_logits(model, batch)
        freeze_scales(model)
        if learned:
            apply_edit(model, {"op": "learn_scales", "weights_follow": False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        found = []
        for _ in range(2):
            logits_NV = answer_logits(model, batch)
            loss = F.cross_entropy(logits_NV, answer_labels(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    with pretend_gpu():
        found = losses("cuda")
    assert found[1] < found[0]
    assert found == pytest.approx(losses("cpu"), rel=1e-4)


@pytest.mark.pretend_gpu
@pytest.mark.parametrize("name", ["fp8_e4m3", "int8_static", "int8_g32", "int4_g32_zp"])
def test_a_gpu_calibrates_the_same_scales(name: str) -> None:
    def scales(device: str) -> dict[str, Tensor]:
        model = tiny_model().to(device)
        quantize_after_training(model, [tiny_batch()], formats_by_pattern(model, name, {}))
        return {key: buffer.cpu() for key, buffer in model.named_buffers() if "scale" in key}

    with pretend_gpu():
        found = scales("cuda")
    assert found
    for key, scale in scales("cpu").items():
        torch.testing.assert_close(found[key], scale, rtol=2e-3, atol=0)


@pytest.mark.pretend_gpu
@pytest.mark.parametrize("name", LOSSES)
def test_a_gpu_computes_every_loss(name: str) -> None:
    def gradients(device: str) -> list[Tensor]:
        model, teacher = (tiny_model(seed=seed).to(device) for seed in (0, 1))
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in tiny_batch().items()}
        objective = Objective({name: 1.0}, temperature=2.0, discount=0.5, top_k=4)
        loss, _ = linear_objective(
            answer_hidden(model, batch), head_of(model), FullTargets(answer_hidden(teacher, batch), head_of(teacher)),
            answer_labels(batch), objective, sequence_lengths=answer_lengths(batch), chunk_tokens=5,
        )  # fmt: skip
        loss.backward()
        return [parameter.grad.cpu() for parameter in model.parameters()]

    with pretend_gpu():
        found = gradients("cuda")
    for ours, expected in zip(found, gradients("cpu"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.pretend_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_samples_the_same_answers(family: str) -> None:
    """By every family's decoder: random numbers belong to the sample, not to the device."""

    def answers(device: str) -> Rollout:
        model, batch = tiny_model(family).to(device), tiny_batch()
        prompts = (batch[name].to(device) for name in ("prompt_ids", "prompt_mask"))
        return rollout(
            decoder_for(model, torch.float32), *prompts, max_new_tokens=20, end_tokens=[1, 20, 30], sampling=Sampling(),
            seeds=range(len(batch["index"])),
        )  # fmt: skip

    with pretend_gpu():
        found = answers("cuda")
        tokens_BG, mask_BG = found.tokens_BG.cpu(), found.mask_BG.cpu()
    expected = answers("cpu")
    assert found.lengths == expected.lengths
    assert torch.equal(tokens_BG, expected.tokens_BG)
    assert torch.equal(mask_BG, expected.mask_BG)


@pytest.mark.pretend_gpu
def test_a_gpu_traces_the_graph(tmp_path: Path) -> None:
    with pretend_gpu():
        export_onnx(tiny_model().to("cuda"), tmp_path / "gpu.onnx", precision="fp16")
    export_onnx(tiny_model(), tmp_path / "cpu.onnx", precision="fp16")
    assert (tmp_path / "gpu.onnx.data").read_bytes() == (tmp_path / "cpu.onnx.data").read_bytes()


# Waits --------------------------------------------------------------------------------------------------------------


class Waits(Callback):
    """How often the host waited in each optimizer step, by operation."""

    def __init__(self, gpu: PretendGpu) -> None:
        self.gpu = gpu
        self.of_steps: list[Any] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.before = self.gpu.waits.copy()

    def on_train_batch_end(self, *args: Any) -> None:
        self.of_steps.append(self.gpu.waits - self.before)


TOKENS = 40  # of an answer


@pytest.mark.parametrize("method", ["sft", "distillation", "quantized"])
@pytest.mark.parametrize("precision", [pytest.param("32-true", marks=pytest.mark.pretend_gpu), "bf16-mixed"])
def test_a_step_waits_for_nothing(gpu: PretendGpu, method: str, precision: str) -> None:
    waits, adam = Waits(gpu), partial(torch.optim.AdamW, lr=1e-4)
    callbacks: list[Callback] = [waits]
    if method == "sft":
        module: Any = SFT(student="student", optimizer=adam)
    else:
        never_ends = Sampling(min_tokens=TOKENS)
        on_policy = OnPolicy(start=4, tokens=TOKENS)
        module = Distillation("teacher", student="student", optimizer=adam, on_policy=on_policy, sampling=never_ends)
    if method == "quantized":
        callbacks.append(QuantizationAwareTraining(1, observe_steps=1, format="int8"))
    data = Conversations(tokenizer="student", **CHAT)
    trainer = Trainer(
        max_steps=STEPS, precision=precision, callbacks=callbacks, gradient_clip_val=1.0, logger=False, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=100,
    )  # fmt: skip
    trainer.fit(module, data)
    assert [dict(step) for step in waits.of_steps[3:4]] == [{}]
    looks = -(-TOKENS // 16)
    for step in waits.of_steps[4:]:
        assert dict(step) == ({} if method == "sft" else {"tolist": looks})


class Poison(Callback):
    """After the first step, a weight that makes all that follows nothing."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 1:
            next(pl_module.student.parameters()).data.fill_(float("nan"))


@pytest.mark.parametrize("saves", [False, True], ids=["the end", "a checkpoint"])
def test_a_loss_that_is_none_is_found_out_before_anything_is_kept(gpu: PretendGpu, saves: bool, tmp_path: Path) -> None:
    """Not in its step, for which the host would wait."""
    trainer = Trainer(
        max_steps=4, callbacks=[Poison()], logger=False, limit_val_batches=0, enable_checkpointing=saves, log_every_n_steps=100,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"expected a finite loss at step 1, found nan on the samples \[.*resume from"):
        trainer.fit(SFT(student="student"), Conversations(tokenizer="student", **CHAT))
    assert trainer.global_step > 1
    assert not list(tmp_path.rglob("*.ckpt"))


# What a GPU lacks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments_", "message"),
    [
        (
            {"precision": "16-mixed"},
            r"expected trainer.precision bf16-mixed or 32-true, found 16-mixed: gradients of single",
        ),
        (
            {},
            r"expected 0.0 GiB of free memory of cuda:0 for training, found 0.0; close other programs, take an overlay",
        ),
    ],
    ids=["float16", "memory"],
)
def test_a_gpu_that_cannot_is_refused(
    gpu: PretendGpu, arguments_: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 * 2**30))
    with pytest.raises(ValueError, match=message):
        train.main(arguments("sft", **arguments_))


# The device itself --------------------------------------------------------------------------------------------------


def test_a_model_computes_the_same_on_a_pretend_gpu_and_keeps_its_ties() -> None:
    model, batch = tiny_model(), tiny_batch()
    expected = answer_logits(model, batch)
    parameters = list(model.parameters())
    with pretend_gpu() as gpu:
        model.to("cuda")
        assert all(ours is before for ours, before in zip(model.parameters(), parameters, strict=True))
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        on_gpu = {key: value.to("cuda") if isinstance(value, Tensor) else value for key, value in batch.items()}
        logits_NV = answer_logits(model, on_gpu)
        assert logits_NV.is_cuda
        assert logits_NV.device == torch.device("cuda", 0)
        logits_NV.logsumexp(-1).mean().backward()
        assert all(parameter.grad.is_cuda for parameter in model.parameters())
        gpu.waits.clear()
        torch.testing.assert_close(logits_NV.cpu(), expected)
        assert gpu.waits["cpu"] == 1
    assert all(type(parameter) is not nn.Parameter for parameter in parameters)
    assert all(type(parameter) is nn.Parameter for parameter in model.cpu().parameters())


PLANTED: dict[str, Callable[[Any, Tensor], Any]] = {
    "token ids": lambda model, x_T: model(input_ids=torch.tensor([[1, 2, 3]])),
    "a sum": lambda model, x_T: x_T + torch.ones(3),
    "a scalar among those that are joined": lambda model, x_T: torch.stack([x_T[0], torch.tensor(1.0)]),
    "what is indexed": lambda model, x_T: torch.arange(3)[x_T.long()],
    "a mask": lambda model, x_T: torch.where(torch.ones(3, dtype=torch.bool), x_T, 0),
    "an output": lambda model, x_T: torch.zeros(3).add_(x_T),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_tensor_left_on_the_cpu_is_caught(kind: str) -> None:
    with pretend_gpu():
        model, x_T = tiny_model().to("cuda"), torch.ones(3, device="cuda")
        with pytest.raises(RuntimeError, match="device"):
            PLANTED[kind](model, x_T)
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            x_T.numpy()
        assert (x_T * torch.tensor(2.0) + x_T[torch.tensor([0, 1, 2])]).tolist() == [3, 3, 3]  # as on a real one


WAITING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x_T: x_T[0].item(),
    "__bool__": lambda x_T: bool(x_T[0]),
    "__getitem__": lambda x_T: x_T[x_T > 0],
    "nonzero": lambda x_T: x_T.nonzero(),
    "cpu": lambda x_T: x_T.cpu(),
    "to": lambda x_T: x_T.to("cpu"),
    "copy_": lambda x_T: torch.zeros(3).copy_(x_T),
    "to the GPU": lambda x_T: torch.zeros(3).to("cuda"),
    "tensor the GPU": lambda x_T: torch.tensor([1.0], device="cuda"),
}


@pytest.mark.parametrize("name", WAITING)
def test_a_wait_is_counted(name: str) -> None:
    with pretend_gpu() as gpu:
        x_T = torch.ones(3, device="cuda")
        x_T.masked_fill(x_T > 0, 2).sum().add(1), torch.zeros(3).to("cuda", non_blocking=True)
        assert not gpu.waits
        WAITING[name](x_T)
        assert dict(gpu.waits) == {name: 1}
