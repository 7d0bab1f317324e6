"""What to export and how, checked as far as no model is needed for it."""

from dataclasses import dataclass
from typing import Literal

import torch

from export.cpu_graph.to_cpu import check_cpu
from export.engine.to_tensorrt import Flavour, Range, check_target, import_tensorrt
from export.onnx_graph.to_onnx import Precision, check_engine_formats, format_for
from models.quantization.formats import FormatName
from program.ranges import check_ranges

Format = Literal["hf", "onnx", "engine"]
StudentType = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class ExportSettings:
    """What to export and how.

    Attributes:
        precision: Of graph and engine.
        formats: `hf`, `onnx`, `engine` (an engine needs the graph, which is then written as well).
        plain: Refuse to write a folder that plain transformers would not load.
        student_dtype: Floating point type of the folders; weights are rounded to it before anything is written, graphs included.
        compressed: Write a quantized student also in compressed-tensors form, for vLLM and SGLang: yes or an error, no, or `auto`, beside
            the `hf` folder where that form can hold it.
        prefill: Write a second graph on the same weights that returns the logits of the last position only.
        labels: Write a graph on the same weights, and an engine, that return the log-probabilities of these labels, one token each.
        cpu: Write the graph also in the form that ONNX Runtime runs fastest on CPUs; with a format, of the student quantized anew in that
            format, which the compressed folder then holds as well.
        tensorrt: Which package compiles the engine.
        compute_capability: Target GPUs such as "8.9"; none: portable.
        batch: Conversations at a time that the engine takes: smallest, usual, largest.
        sequence: New tokens a call: smallest, usual, largest.
        past: Tokens in the cache: smallest, usual, largest.
        opset: ONNX operator set.
        decode_steps: Tokens after the prompts in the verification.
        prompt_tokens: Prompt length in the benchmark, tokens.
        repetitions: Counted repetitions of the benchmark; 0 leaves it out.
        threads: Threads in ONNX Runtime; None: its choice.
    """

    precision: Precision = "fp32"
    formats: tuple[Format, ...] = ("hf", "onnx", "engine")
    plain: bool = False
    student_dtype: StudentType = "bfloat16"
    compressed: bool | Literal["auto"] = "auto"
    prefill: bool = False
    labels: tuple[str, ...] = ()
    cpu: bool | FormatName = False
    tensorrt: Flavour = "auto"
    compute_capability: tuple[str, ...] = ()
    batch: Range = (1, 1, 16)
    sequence: Range = (1, 128, 1024)
    past: Range = (0, 256, 2048)
    opset: int = 23
    decode_steps: int = 64
    prompt_tokens: int = 128
    repetitions: int = 5
    threads: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the folders."""
        dtype: torch.dtype = getattr(torch, self.student_dtype)
        return dtype

    @property
    def graph(self) -> bool:
        """Whether an ONNX graph is written."""
        return "onnx" in self.formats or "engine" in self.formats

    @property
    def cpu_format(self) -> FormatName | None:
        """The format of a student that is quantized anew for CPUs; None: `cpu.onnx`, if there is one, has the numbers of `model.onnx`."""
        return None if isinstance(self.cpu, bool) else self.cpu


def check_settings(settings: ExportSettings) -> None:
    """Raise for settings that can't work with any model: ranges, target, TensorRT not installed."""
    for name in ("batch", "sequence", "past"):
        low, usual, high = getattr(settings, name)
        if not (0 if name == "past" else 1) <= low <= usual <= high:
            raise ValueError(
                f"expected {name} as smallest, usual and largest number in this order, found {low} {usual} {high}; sort them"
            )
    if not settings.formats:
        raise ValueError("expected formats among hf, onnx and engine, found none; name what to write")
    ranges = {"decode_steps": (0, 1e6), "prompt_tokens": (1, 1e6), "repetitions": (0, 1e4), "threads": (1, 1024)}
    check_ranges("", vars(settings), **ranges)
    further = [name for name in ("prefill", "labels", "cpu") if getattr(settings, name)]
    if further and not settings.graph:
        raise ValueError(
            f"expected onnx or engine among formats for {further[0]}, which asks for a further graph, found {list(settings.formats)}; "
            "add onnx, or leave it out"
        )
    if settings.cpu:
        check_cpu(settings.cpu_format or settings.precision, settings.opset)
    if "engine" in settings.formats:
        format = format_for(settings.precision)
        check_engine_formats([] if format is None else [format])
        check_target(settings.precision, settings.compute_capability)
        import_tensorrt(settings.tensorrt)
