"""Export at the end of `fit`: Hugging Face folder, ONNX, engine, verification, benchmark and report."""

import gc
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import move_data_to_device, rank_zero_only
from torch import Tensor
from transformers import PreTrainedModel

from callbacks.phases import PhaseEvaluation
from callbacks.pruning.gradual_pruning import GradualPruning
from callbacks.quantization import QuantizationAwareTraining
from callbacks.shared.run import check_order, data_of
from datamodules.base import ChatDataModule
from datamodules.chat import Example
from datamodules.collate import Batch
from datamodules.label_prompts import label_token_ids
from export.benchmark.worker import peak_bytes
from export.calibration import requantized
from export.onnx_graph.to_onnx import UNQUANTIZED, format_for
from export.phases import Phases
from export.pipeline import export_all, export_baseline
from export.report import closing, summary, write_report
from export.sessions.onnx_session import OnnxSession
from export.settings import ExportSettings
from export.verify import HeldOut, check_tokens
from export.verify.checks import raise_on_failure
from models.architecture import decoder_layers
from models.hardware.freed_memory import give_back_freed_memory
from models.loading.reference import end_token_ids
from models.losses import head_of
from models.offline import is_offline
from models.post_training.settings import Method, PostTrainingQuantization
from models.student import StudentModule
from models.teacher import Teacher
from program.ranges import Between, Count, Positive, check_arguments

SERVED_BATCH = 16  # fastest on two cores: activations of more leave the processor's cache


class ExportOnFitEnd(Callback):
    """Export the trained student into the run's folder, verify it number by number, and write `report.json` and `report.md`.

    A verification that fails ends the run with an error that names the output and the difference; the files stay for a look.

    Args:
        cpu_method: How weights are rounded for a format of cpu: nearest, gptq or quantease.
        cpu_batches: Training batches on which it is calibrated.
        output: Folder to write into; by default the run's folder.
        verify_prompts: Validation prompts (training prompts if there are none) used for verification.
        compare_with_teacher: Also export the teacher (fp32 ONNX) into baseline/ and measure both side by side.
        served_questions: With compare_with_teacher, held-out conversations (of test data, or of validation data) on which each graph is
            judged as it is served: KL to the teacher, and task score where the data has one; 0 for none.
        **settings: What to export, see `ExportSettings`.

    Raises:
        ValueError: Settings that cannot be exported; found before training starts.
    """

    needs_whole_student = True

    def __init__(
        self,
        cpu_method: Method = "nearest",
        cpu_batches: Positive = 8,
        output: str | None = None,
        verify_prompts: Annotated[int, Between(1, 1e6)] = 4,
        compare_with_teacher: bool = False,
        served_questions: Count = 0,
        **settings: Any,
    ) -> None:
        self.settings = ExportSettings(**settings)
        check_arguments(ExportOnFitEnd.__init__, locals(), "ExportOnFitEnd.")
        if served_questions and not (compare_with_teacher and self.settings.graph):
            raise ValueError(
                f"expected ExportOnFitEnd.served_questions together with compare_with_teacher and a graph, found {served_questions} "
                "without; add them, or set it to 0"
            )
        self.cpu_method = cpu_method
        self.cpu_batches = cpu_batches
        self.served_questions = served_questions
        self._started = 0.0
        self.output = output
        self.verify_prompts = verify_prompts
        self.compare_with_teacher = compare_with_teacher

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what does not need the model, on every rank; the export itself is rank 0's alone."""
        if stage != "fit":
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        check_order(callbacks)
        is_int8 = getattr(pl_module, "teacher_dtype", "auto") == "int8"
        if self.compare_with_teacher and (is_int8 or is_offline(getattr(pl_module, "teacher_reference", ""))):
            raise ValueError(
                "expected a teacher in floating point for ExportOnFitEnd.compare_with_teacher, found a captured one or one with "
                "model.teacher_dtype int8; name the teacher's model with teacher_dtype auto, or leave the comparison out"
            )
        data = data_of(trainer)
        if self.served_questions and not (data.has_split("test") or data.has_split("val")):
            raise ValueError(
                f"expected test or validation data for ExportOnFitEnd.served_questions {self.served_questions}, found neither; set "
                "data.init_args.test, or served_questions to 0"
            )
        if self.served_questions and (self.settings.cpu_format or self.settings.precision not in UNQUANTIZED):
            examples, _ = _questions(data, self.served_questions)
            spans = [span for example in examples for span in example.answer_spans]
            check_tokens(sum(end - begin for begin, end in spans), f"{self.served_questions} questions")
        if self.settings.labels:
            label_token_ids(data.tokenizer, self.settings.labels)
        unequal = any(isinstance(callback, GradualPruning) and callback.makes_layers_unequal for callback in callbacks)
        for name in ("plain", "compressed"):
            if unequal and getattr(self.settings, name) is True:
                raise ValueError(
                    f"expected GradualPruning.allocation uniform for ExportOnFitEnd.{name}, found per_layer: a Hugging Face config.json "
                    f"has one size for all layers; change the allocation, or set {name} to false"
                )
        quantization = next((c for c in callbacks if isinstance(c, QuantizationAwareTraining)), None)
        if self.settings.compressed is True and quantization is None and self.settings.cpu_format is None:
            raise ValueError(
                "expected QuantizationAwareTraining among trainer.callbacks for ExportOnFitEnd.compressed, found none; add it, or set "
                "compressed to auto"
            )
        if self.settings.graph and self.settings.precision not in UNQUANTIZED:
            self._check_format(quantization)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self._started = time.perf_counter()

    def _check_format(self, quantization: QuantizationAwareTraining | None) -> None:
        precision = self.settings.precision
        if quantization is None:
            raise ValueError(
                f"expected QuantizationAwareTraining among trainer.callbacks for an export in {precision}, found none; add it, or "
                "export in fp16 and calibrate later with `python -m export --calibration`"
            )
        trained = "mixed" if quantization.exceptions else quantization.format
        if trained != (format_for(precision) or precision):
            raise ValueError(
                f"expected ExportOnFitEnd.precision {trained} as in QuantizationAwareTraining (mixed, where it has exceptions), found "
                f"{precision}; set both to the same format"
            )

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, verify, report."""
        assert isinstance(pl_module, StudentModule)
        if trainer.interrupted:
            return
        output, phases = Path(self.output or trainer.default_root_dir), Phases()
        phases.seconds["Training"] = time.perf_counter() - self._started
        datamodule = data_of(trainer)
        has_val = datamodule.has_split("val")
        batch = next(iter(datamodule.val_dataloader() if has_val else datamodule.calibration_batches(1, seed=0)))
        prompts = {key: batch[key][: self.verify_prompts] for key in ("prompt_ids", "prompt_mask")}
        release_optimizers(trainer)
        baseline, graphs, held_out, served = [], {}, None, []
        teacher = getattr(pl_module, "teacher", None)
        if isinstance(teacher, Teacher) and self.compare_with_teacher:
            if self.served_questions:
                held_out = held_out_of(datamodule, teacher, self.served_questions, pl_module.generate_tokens)
            baseline = export_baseline(teacher.model.cpu().float(), output, self.settings.opset, phases)
            graphs = {"teacher": output / baseline[0]["path"]}
            if held_out is not None:
                with phases.phase("Teacher, judged as served", len(held_out.batches)) as on_batch:
                    found = held_out.measure(OnnxSession(graphs["teacher"]), end_token_ids(teacher.model), on_batch)
                served = [{"name": "teacher", **found.figures()}]
        del teacher
        if hasattr(pl_module, "teacher"):  # `configure_model` loads it again if it is wanted
            del pl_module.teacher
        gc.collect()
        student = pl_module.student.cpu().float().eval()
        for_cpu = self._for_cpu(student, datamodule, phases)
        report = export_all(
            student,
            pl_module.tokenizer,
            output,
            self.settings,
            prompts,
            held_out=held_out,
            for_cpu=for_cpu,
            compare=graphs,
            phases=phases,
        )
        report["served"] = served + report["served"]
        report["artefacts"] = baseline + report["artefacts"]
        report.update(_training_figures(trainer))
        report["minutes"] = (time.time() - psutil.Process().create_time()) / 60
        report["peak_memory_bytes"] = peak_bytes()
        write_report(output, report)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.save(str(output.absolute() / "report.*"), base_path=str(output.absolute()))
        print(f"\n{summary(report)}\n\n{closing(report, output)}")
        raise_on_failure(report["verification"])

    def _for_cpu(self, student: PreTrainedModel, datamodule: ChatDataModule, phases: Phases) -> PreTrainedModel | None:
        """The student in the format of `cpu`, calibrated on training batches; None if it has no format of its own."""
        if self.settings.cpu_format is None:
            return None
        batches: list[Batch] = list(datamodule.calibration_batches(self.cpu_batches, seed=0))
        title, layers = f"Quantizing to {self.settings.cpu_format} for the CPU", len(decoder_layers(student))
        with phases.phase(title, layers) as on_layer:
            settings = PostTrainingQuantization(method=self.cpu_method)
            return requantized(student, batches, self.settings.cpu_format, settings, on_layer=on_layer)


def _questions(data: ChatDataModule, count: int) -> tuple[list[Example], str]:
    """The first conversations of the test data (validation data where there are none), and their split."""
    split = "test" if data.has_split("test") else "val"
    return data.examples(split)[:count], split


def held_out_of(datamodule: ChatDataModule, teacher: Teacher, questions: int, max_new_tokens: int) -> HeldOut:
    """Held-out conversations, similar lengths together, judged by a teacher that is left on the CPU."""
    first, split = _questions(datamodule, questions)
    examples = sorted(first, key=len)
    starts, device = range(0, len(examples), SERVED_BATCH), teacher.model.device
    batches = [datamodule.collate_fn(examples[start : start + SERVED_BATCH]) for start in starts]
    hidden = [teacher.answer_hidden(move_data_to_device(batch, device)).cpu() for batch in batches]
    head = head_of(teacher.to(torch.device("cpu")).model).cut(None, torch.float32)

    def judge(number: int, batch: Batch, positions_n: Tensor) -> Tensor:
        return head.logits(hidden[number][positions_n].float())

    return HeldOut(
        batches,
        judge,
        tokenizer=datamodule.tokenizer,
        scorer=(lambda texts, batch: datamodule.score(texts, batch, split) or []) if datamodule.has_score else None,
        max_new_tokens=max_new_tokens,
    )


def release_optimizers(trainer: Trainer) -> None:
    """Free gradients and the optimizers' states, which the last checkpoint has."""
    for optimizer in trainer.optimizers:
        optimizer.zero_grad()
        optimizer.state.clear()
    gc.collect()
    give_back_freed_memory()


def _training_figures(trainer: Trainer) -> dict[str, Any]:
    """What `PhaseEvaluation` and `GradualPruning` found, if they took part."""
    figures: dict[str, Any] = {"teacher": {}, "phases": [], "constant_answer_score": None, "pruning": []}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, PhaseEvaluation):
            figures["teacher"] = callback.teacher_figures
            figures["phases"] = callback.phases
            figures["constant_answer_score"] = callback.constant_answer_score
        if isinstance(callback, GradualPruning):
            figures["pruning"] = callback.history
    return figures
