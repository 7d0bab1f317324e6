"""The student through a real `fit`: edits in the middle, what a checkpoint holds, and what loads it again."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models import SFT, Distillation, StudentModule
from models.architecture import decoder_layers
from models.forward import answer_labels, answer_logits
from models.generation.decoder import Decoder, decoder_for
from models.loading.checkpoint import load_student_checkpoint
from models.loading.reference import load_model
from models.losses.chunks import ChunkedLogits
from models.quantization import quantized_linears
from tests.helpers.chat_doubles import Words
from tests.helpers.tiny import tiny_batch, tiny_folder, tiny_model
from tests.helpers.training import EDITS, Editing, loader, tiny_trainer

ALL_EDITS = [edit for step in sorted(EDITS) for edit in EDITS[step]]


def sft(student: str, lr: float = 1e-2, **settings: Any) -> SFT:
    return SFT(student, optimizer=partial(torch.optim.AdamW, lr=lr), **settings)


def logits(model: Any, batch: Batch | None = None) -> Tensor:
    with torch.no_grad():
        return answer_logits(model.eval(), batch or tiny_batch())


@pytest.fixture(scope="module")
def run(student_folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[SFT, Path]:
    """Six steps with two pruning edits and quantizers, and the checkpoint after the last."""
    folder = tmp_path_factory.mktemp("run")
    module = sft(student_folder)
    trainer = tiny_trainer(folder, callbacks=[Editing(save_at=6, path=folder / "last.ckpt")])
    trainer.fit(module, loader())
    return module, folder / "last.ckpt"


# Building and training ----------------------------------------------------------------------------------------------


def test_builds_once_in_float32_and_training_mode(student_folder: str) -> None:
    module = StudentModule(student_folder)
    module.configure_model()
    student = module.student
    assert student.training
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    module.configure_model()
    assert module.student is student


def test_unknown_architecture(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "gpt2", n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="expected a model of one of the families .* found model_type 'gpt2'"):
        StudentModule(folder).configure_model()


def test_sft_is_cross_entropy_on_answer_tokens(student_folder: str, tmp_path: Path) -> None:
    """One step of plain SGD equals one written by hand on the whole sequences."""
    module = SFT(student_folder, optimizer=partial(torch.optim.SGD, lr=0.1), lr_schedule="constant")
    tiny_trainer(tmp_path, steps=1).fit(module, loader())

    model, batch = tiny_model(), tiny_batch()
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = F.cross_entropy(output[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for ours, expected in zip(module.student.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distils", [False, True])
def test_chunk_tokens_bounds_the_logits_and_changes_nothing(
    distils: bool, student_folder: str, tmp_path: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(chunk_tokens: int) -> tuple[Tensor, int]:
        sizes: list[int] = []

        def spying(self: ChunkedLogits, rows: slice) -> Tensor:
            logits_CV = of_chunk(self, rows)
            sizes.append(len(logits_CV))
            return logits_CV

        of_chunk = ChunkedLogits.logits
        with monkeypatch.context() as patch:
            patch.setattr(ChunkedLogits, "logits", spying)
            make = partial(Distillation, student_folder) if distils else SFT
            module = make(student=student_folder, optimizer=torch.optim.SGD, chunk_tokens=chunk_tokens)
            tiny_trainer(tmp_path, steps=1).fit(module, loader([batch]))
        return torch.cat([p.detach().flatten() for p in module.student.parameters()]), max(sizes)

    (whole, longest), (parts, bounded) = update(0), update(3)
    assert bounded <= 3 < longest == len(answer_labels(batch))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"expected model.chunk_tokens between 0 and 1,000,000,000, found -1"):
        StudentModule(student_folder, chunk_tokens=-1)


def test_fit_learns_across_edits(run: tuple[SFT, Path], student_folder: str) -> None:
    module, _ = run
    labels = answer_labels(tiny_batch())
    before, after = (F.cross_entropy(logits(model), labels) for model in (load_model(student_folder), module.student))
    assert after < before - 1
    assert module.edits == ALL_EDITS
    layers = decoder_layers(module.student)
    assert [(layer.num_neurons, layer.num_kv_groups) for layer in layers] == [(24, 2), (48, 1)]


def test_edit_slices_the_optimizer_of_the_run(student_folder: str, tmp_path: Path) -> None:
    class Watching(Editing):
        def on_train_batch_end(self, trainer, pl_module, *rest) -> None:
            weight = pl_module.student.model.layers[0].mlp.up_proj.weight
            before = trainer.optimizers[0].state[weight]["exp_avg"].clone()
            super().on_train_batch_end(trainer, pl_module, *rest)
            if trainer.global_step == 2:
                assert weight.shape == (24, 32)
                assert torch.equal(trainer.optimizers[0].state[weight]["exp_avg"], before[::2])
                self.identities = {id(p) for p in pl_module.student.parameters()}

    watching, module = Watching(), sft(student_folder)
    trainer = tiny_trainer(tmp_path, callbacks=[watching])
    trainer.fit(module, loader())
    (optimizer,) = trainer.optimizers
    assert {id(p) for p in module.student.parameters()} == watching.identities
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == watching.identities
    assert all(state["step"] == 6 for state in optimizer.state.values())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    # warm-up from 0 over two steps, then down to 0 at step 6
    [
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, 0.8536, 0.5, 0.1464]),
        ("constant", [0, 0.5, 1, 1, 1, 1]),
    ],
)
def test_learning_rates(student_folder: str, tmp_path: Path, schedule: Any, expected: list[float]) -> None:
    rates = []

    class Recording(Editing):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    module = sft(student_folder, lr=0.01, lr_schedule=schedule, warmup_steps=2)
    tiny_trainer(tmp_path, callbacks=[Recording()]).fit(module, loader([tiny_batch()] * 6))
    assert rates == pytest.approx([0.01 * share for share in expected], rel=1e-3)


def test_a_schedule_needs_a_length(student_folder: str, tmp_path: Path) -> None:
    message = "expected trainer.max_steps for the linear learning rate schedule, found -1; set"
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, steps=-1, max_epochs=1).fit(sft(student_folder), loader())
    module = sft(student_folder, lr_schedule="constant")
    tiny_trainer(tmp_path, steps=-1, max_epochs=1).fit(module, loader())


@pytest.mark.parametrize("fused", [False, True])
def test_clipping_bounds_the_norm(student_folder: str, tmp_path: Path, fused: bool) -> None:
    norms = []

    class Recording(Editing):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            grads = [p.grad for p in pl_module.student.parameters() if p.grad is not None]
            norms.append(torch.cat([g.flatten() for g in grads]).norm().item())

    module = SFT(student_folder, optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=fused))
    tiny_trainer(tmp_path, steps=2, gradient_clip_val=0.1, callbacks=[Recording()]).fit(module, loader())
    assert norms == pytest.approx([0.1] * 2, rel=1e-3)


# A loss that is not finite ------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_its_samples(student_folder: str, tmp_path: Path) -> None:
    """The run stops before the step: weights are as they were."""

    class Poison(Editing):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 1:
                with torch.no_grad():
                    pl_module.student.model.norm.weight[3] = float("nan")
                self.before = {name: p.detach().clone() for name, p in pl_module.student.named_parameters()}

    poison, module = Poison(), sft(student_folder)
    batches = [tiny_batch(), {**tiny_batch([("Why?", "So."), ("How?", "Thus.")]), "index": [41, 17]}]
    trainer = tiny_trainer(tmp_path, callbacks=[poison])
    message = (
        r"expected a finite loss at step 1, found nan on the samples \[41, 17\] \('Why\?', .*; lower .*--ckpt_path"
    )
    with pytest.raises(ValueError, match=message) as error:
        trainer.fit(module, loader(batches))
    assert "\n" not in str(error.value)
    assert trainer.global_step == 1
    for name, parameter in module.student.named_parameters():
        assert torch.equal(parameter.nan_to_num(), poison.before[name].nan_to_num())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_finite(student_folder: str, batch: Batch, value: float) -> None:
    module = StudentModule(student_folder)
    loss = torch.tensor(1.5)
    assert module.finite(loss, batch) is loss
    assert module.stopwatch.tokens == batch["attention_mask"].sum()
    with pytest.raises(ValueError, match=f"found {value} on the samples"):
        module.finite(torch.tensor(value), batch)


# Checkpoints --------------------------------------------------------------------------------------------------------


def test_checkpoint_holds_plain_data(run: tuple[SFT, Path]) -> None:
    module, path = run
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["edits"] == ALL_EDITS
    assert set(checkpoint["state_dict"]) == {f"student.{name}" for name in module.student.state_dict()}
    assert checkpoint["hyper_parameters"]["student"] == module.student_reference


def test_every_way_to_load_gives_the_same_student(run: tuple[SFT, Path]) -> None:
    module, path = run
    expected = logits(module.student)
    loaded = SFT.load_from_checkpoint(path)
    student, tokenizer = load_student_checkpoint(path)
    assert torch.equal(logits(loaded.student), expected)
    assert torch.equal(logits(student), expected)
    assert not student.training
    assert tokenizer.get_vocab() == module.tokenizer.get_vocab()
    assert loaded.edits == ALL_EDITS
    assert all(linear.input_quantizer.frozen for linear in quantized_linears(student).values())
    assert len(quantized_linears(student)) == 2


class Crash(Exception):
    pass


class Crashing(Callback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer, *rest) -> None:
        if trainer.global_step == self.after:
            raise Crash


@pytest.mark.parametrize("save_at", [1, 2, 4, 5])
def test_resume_equals_the_uninterrupted_run(
    run: tuple[SFT, Path], student_folder: str, tmp_path: Path, save_at: int
) -> None:
    """Saved before, at and after the edits, while quantizers observe, and just frozen: the end is the same bit for bit."""
    path = tmp_path / "crash.ckpt"
    with pytest.raises(Crash):
        tiny_trainer(tmp_path, callbacks=[Editing(save_at, path), Crashing(save_at)]).fit(sft(student_folder), loader())
    resumed = sft(student_folder)
    trainer = tiny_trainer(tmp_path, callbacks=[Editing()])
    trainer.fit(resumed, loader(), ckpt_path=path)

    assert resumed.edits == ALL_EDITS
    expected = run[0].student.state_dict()
    ours = resumed.student.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    saved = torch.load(run[1], weights_only=True)["optimizer_states"][0]["state"]
    for number, state in trainer.optimizers[0].state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(saved[number][key])) for key in state)


def test_loading_into_a_module_with_another_history(run: tuple[SFT, Path], student_folder: str) -> None:
    checkpoint = torch.load(run[1], weights_only=True)
    module = StudentModule(student_folder)
    module.configure_model()
    module.edit(ALL_EDITS[:1])
    module.on_load_checkpoint(checkpoint)  # a checkpoint that goes on where this student is
    module.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(logits(module.student), logits(run[0].student))

    other = StudentModule(student_folder)
    other.configure_model()
    other.edit([{"op": "narrow_mlp", "layer": 0, "keep": [1, 2, 3]}])
    with pytest.raises(ValueError, match="continues this student's 1 edits, found one with another history of 3; load"):
        other.on_load_checkpoint(checkpoint)


def test_a_head_that_a_checkpoint_has_apart_from_the_embedding_stays_so(student_folder: str) -> None:
    """GGUF files were loaded with a head of its own before."""
    module = StudentModule(student_folder)
    module.configure_model()
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    weights["student.lm_head.weight"] += 1
    module.on_load_checkpoint({"edits": [], "state_dict": weights})
    module.load_state_dict(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("content", [{}, {"edits": []}, {"hyper_parameters": {"student": "x"}}])
def test_a_file_that_is_no_student_checkpoint(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(
        ValueError, match="expected a checkpoint written by train.py at .*other.ckpt', found one without"
    ):
        load_student_checkpoint(tmp_path / "other.ckpt")


# Evaluation ---------------------------------------------------------------------------------------------------------


def test_validate_logs_the_perplexity(student_folder: str, tmp_path: Path) -> None:
    (figures,) = tiny_trainer(tmp_path).validate(sft(student_folder), loader(), verbose=False)
    loss = F.cross_entropy(logits(tiny_model()), answer_labels(tiny_batch()))
    assert figures == {"val/perplexity": pytest.approx(loss.exp().item(), rel=1e-4)}


class Scored(Words):
    """Data with a score, which asks for generated answers."""

    @property
    def has_score(self) -> bool:
        return True

    def score(self, predictions: list[str], batch: Any, split: str) -> list[float]:
        return [1.0] * len(predictions)


@pytest.mark.parametrize(
    ("data", "tokens", "copies"),
    [(Scored, 2, 1), (Scored, 0, 0), (Words, 2, 0)],
    ids=["score", "no tokens", "no score"],
)
def test_the_student_is_copied_for_generated_answers_only(
    data: type[Words], tokens: int, copies: int, student_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[nn.Module] = []

    def spying(model: PreTrainedModel, dtype: torch.dtype) -> Decoder:
        copied.append(model)
        return decoder_for(model, dtype)

    monkeypatch.setattr("models.evaluation.module.decoder_for", spying)
    tiny = data(student_folder, eval_batch_size=8)
    module = sft(student_folder, generate_tokens=tokens)
    for stage in ("validate", "test"):
        (figures,) = getattr(tiny_trainer(tmp_path), stage)(module, tiny, verbose=False)
        assert any("task_score" in name for name in figures) == bool(copies)
    assert copied == [module.student] * 2 * copies and not module._decoders
    copied.clear()
    distilled = Distillation(student_folder, student=student_folder, generate_tokens=tokens)
    tiny_trainer(tmp_path).validate(distilled, tiny, verbose=False)
    assert copied == [distilled.student, distilled.teacher.model] * copies


def test_predict_gives_rows(student_folder: str, tmp_path: Path, batch: Batch) -> None:
    module = sft(student_folder, generate_tokens=4)
    (rows,) = tiny_trainer(tmp_path).predict(module, loader([batch]))
    assert [row["prompt"] for row in rows] == batch["prompts"]
    assert [row["answer"] for row in rows] == batch["answers"]
    assert any(row["prediction"] for row in rows)
    assert not module._decoders, "the copy is freed"
