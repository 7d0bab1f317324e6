"""Checks in seconds, before the first step, what would otherwise fail after hours."""

import copy
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import psutil
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel

from callbacks.export import ExportOnFitEnd
from callbacks.pruning.gradual_pruning import GradualPruning
from callbacks.quantization import QuantizationAwareTraining
from export.folders.compressed import check_compressible_formats
from export.onnx_graph.layer_kinds import layer_kinds, slice_layers
from export.onnx_graph.to_onnx import export_onnx
from export.plan import check_cpu_model, check_output, is_compressed
from export.settings import ExportSettings
from models.architecture import DecoderLayer, count_parameters, decoder_layers, head_name
from models.post_training.format_choice import formats_by_pattern, quantization_edits
from models.pruning.cut import Targets
from models.quantization import FORMATS, freeze_scales
from models.quantization.cache import CacheFormat
from models.structure.adapters import merge_adapters
from models.structure.edits import Edit, apply_edit, quantize_decoder, replay
from models.student import StudentModule
from models.teacher import Teacher

GIB = 2**30


class Preflight(Callback):
    """Always on: tokenizers, planned shapes, the export of one layer of each kind in the wanted precision, disk and memory.

    (Tokenizers and model families are checked where the models are built, just before.)
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise `ValueError` if the run could not end well."""
        assert isinstance(pl_module, StudentModule)
        started = time.perf_counter()
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        pruning = next((c for c in callbacks if isinstance(c, GradualPruning)), None)
        quantization = next((c for c in callbacks if isinstance(c, QuantizationAwareTraining)), None)
        export = next((c for c in callbacks if isinstance(c, ExportOnFitEnd)), None)
        _check_steps(trainer, pruning, quantization)
        if (pruning or quantization or export) and all(
            edit["op"] == "lora" for edit in pl_module.edits
        ):  # a resumed student has had part of this done to it
            layers = merge_adapters(_one_of_each_kind(pl_module.student))
            _rehearse_pruning(layers, pruning)
            if quantization is not None:
                formats = formats_by_pattern(pl_module.student, quantization.format, quantization.exceptions)
                _rehearse_quantization(layers, set(formats.values()), quantization.kv_cache)
            if export is not None and "onnx" in export.settings.formats:
                _rehearse_export(layers, export)
            if export is not None:
                _check_compressed(layers, pl_module.student, quantization, export.settings)
        if export is not None:
            check_output(Path(export.output or trainer.default_root_dir), overwrite=False)
            check_cpu_model(pl_module.student, export.settings)
        _check_resources(trainer, pl_module, export)
        rank_zero_info(f"Preflight passed in {time.perf_counter() - started:.1f} s")


def _check_steps(
    trainer: Trainer, pruning: GradualPruning | None, quantization: QuantizationAwareTraining | None
) -> None:
    last = max([0] + ([pruning.last_step] if pruning else []) + ([quantization.freeze_step] if quantization else []))
    if 0 < trainer.max_steps < last or (trainer.max_steps > 0 and trainer.max_steps == last and quantization):
        raise ValueError(
            f"expected trainer.max_steps beyond the last planned change of the student (step {last}), found "
            f"{trainer.max_steps}; raise max_steps or move the callbacks' steps"
        )


def _one_of_each_kind(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with its first layer of each kind, on the CPU: exports in seconds, and may be edited freely."""
    kinds = layer_kinds(model)
    layers = slice_layers(model, sorted({kind: kinds.index(kind) for kind in kinds}.values()))
    return copy.deepcopy(layers).cpu()  # type: ignore[call-arg]  # transformers' decorator hides the signature


def _rehearse_pruning(model: PreTrainedModel, pruning: GradualPruning | None) -> None:
    """Every planned size; which layers go changes no shape, and layers of unequal sizes are rehearsed at their mean."""
    for targets in pruning.targets if pruning else ():
        for layer in decoder_layers(model):
            for edit in _planned_edits(layer, targets):
                apply_edit(model, edit)
        if targets.hidden is not None:
            apply_edit(model, {"op": "narrow_hidden", "keep": list(range(targets.hidden))})
        _forward(model)


def _planned_edits(layer: DecoderLayer, targets: Targets) -> Iterator[Edit]:
    if targets.neurons is not None:
        yield {"op": "narrow_mlp", "layer": layer.index, "keep": list(range(targets.neurons))}
    if targets.kv_groups is not None:
        yield {"op": "narrow_kv_groups", "layer": layer.index, "keep": list(range(round(targets.kv_groups)))}
    if targets.query_heads is not None:  # of the groups that are left: the view sees the edit before
        groups = layer.num_kv_groups
        each, kept = layer.num_query_heads // groups, round(targets.query_heads) // groups
        heads = [group * each + head for group in range(groups) for head in range(kept)]
        yield {"op": "narrow_query_heads", "layer": layer.index, "keep": heads}


def _rehearse_quantization(model: PreTrainedModel, formats: set[str], kv_cache: CacheFormat | None) -> None:
    """Every format in some projection: which one has which makes no difference to what can go wrong."""
    names = quantize_decoder(model)["modules"]
    replay(model, quantization_edits(dict(zip(names, cycle(sorted(formats)), strict=False)), kv_cache))
    _forward(model.train())
    freeze_scales(model)
    _forward(model.eval())


def _check_compressed(
    layers: PreTrainedModel,
    student: PreTrainedModel,
    quantization: QuantizationAwareTraining | None,
    settings: ExportSettings,
) -> None:
    """What the compressed folder of the trained student cannot hold, or that the package for it is missing."""
    kv_cache = None
    if settings.cpu_format is not None:
        formats = formats_by_pattern(student, settings.cpu_format, {})
    elif quantization is not None:
        formats = formats_by_pattern(student, quantization.format, quantization.exceptions)
        kv_cache = quantization.kv_cache
    else:
        return
    names = [*quantize_decoder(layers)["modules"], head_name(layers)]
    kinds = {(name.rpartition(".")[2], format) for name, format in formats.items() if format in FORMATS}
    planned = [(name, format) for name in names for kind, format in kinds if name.endswith(kind)]
    is_compressed(settings, partial(check_compressible_formats, layers, planned, kv_cache))


def _rehearse_export(model: PreTrainedModel, export: ExportOnFitEnd) -> None:
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(
            model, Path(folder) / "model.onnx", precision=export.settings.precision, opset=export.settings.opset
        )


@torch.no_grad()
def _forward(model: PreTrainedModel) -> None:
    model(input_ids=torch.arange(1, 9).reshape(1, 8), use_cache=False)


def _check_resources(trainer: Trainer, module: StudentModule, export: ExportOnFitEnd | None) -> None:
    exported = 4 * count_parameters(module.student)
    weights = sum(p.numel() * p.element_size() for p in module.student.parameters())
    trained = sum(p.numel() * p.element_size() for p in module.student.parameters() if p.requires_grad)
    # A checkpoint holds weights and two moments, and the new one is complete before the old one goes; an export writes the
    # folder, one or two graphs and an engine, or two with labels.
    written = (4 + bool(export.settings.labels) + bool(export.settings.cpu)) * exported if export else 0
    disk = 2 * (weights + 2 * trained) + written
    free_disk = shutil.disk_usage(_existing_parent(Path(trainer.default_root_dir))).free
    if free_disk < disk:
        raise ValueError(
            f"expected {disk / GIB:.1f} GiB of free disk at {trainer.default_root_dir}, found {free_disk / GIB:.1f}; free some, "
            "or choose another --root"
        )
    # Gradients and two moments are still to come; they are free again when the export begins, on the host.
    training, exporting = 3 * trained, _export_bytes(module, export) if export else 0
    if module.device.type == "cpu":
        _check_free(max(training, exporting), psutil.virtual_memory().available, "free memory for training and export")
    else:
        _check_free(exporting, psutil.virtual_memory().available, "free memory of the host for the export")
        _check_free(training, torch.cuda.mem_get_info(module.device)[0], f"free memory of {module.device} for training")


def _check_free(wanted: int, found: int, what: str) -> None:
    if found < wanted:
        raise ValueError(
            f"expected {wanted / GIB:.1f} GiB of {what}, found {found / GIB:.1f}; close other programs, take an overlay that needs less "
            "(configs/checkpointing.yaml, adam8bit.yaml, lora.yaml), or choose a smaller student"
        )


def _export_bytes(module: StudentModule, export: ExportOnFitEnd) -> int:
    """The most that an export needs beside the student and the teacher as they are.

    For the student: its graph while it is written, a session with its weights, packed for the processor, and what these are made from;
    another copy in a format for CPUs; logits of the longest prompt, and pieces of them.  For the teacher: float32 weights, a graph.
    """
    settings, student = export.settings, 4 * count_parameters(module.student)
    teacher = getattr(module, "teacher", None)
    compared = (
        6 * count_parameters(teacher.model) if export.compare_with_teacher and isinstance(teacher, Teacher) else 0
    )
    if not settings.graph:
        return student
    positions = getattr(module.student.config, "max_position_embeddings", None) or settings.sequence[2]
    logits = 4 * min(settings.sequence[2], positions) * len(module.student.get_output_embeddings().weight)
    copies = 3 + (settings.cpu_format is not None)
    return max(copies * student + logits + min(logits, GIB), compared)


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
