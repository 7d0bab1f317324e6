"""Settings of an export, checked as far as no model is needed for it."""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

import torch

from export.engine.to_tensorrt import Flavour, Range, check_target, import_tensorrt
from export.onnx_graph.to_onnx import Precision, check_cpu, check_engine_formats, format_for
from models.quantization.formats import FormatName
from program.ranges import Between, check_fields

Format = Literal["hf", "onnx", "engine"]
StudentType = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class ExportSettings:
    """What to export and how: what `ExportOnFitEnd` takes, and the options of `python -m export`.

    Args:
        precision: Of the ONNX graph and the engine: fp32, fp16, or the format of a quantized student (fp8 is short for fp8_e4m3).
        formats: What to write: hf (student/), onnx (onnx/model.onnx), engine (engine/*.engine; includes onnx).
        plain: Refuse a student/ folder that plain transformers would not load, as that of a student of unequal layers.
        student_dtype: Floating point type of student/ and compressed/; weights are rounded to it before anything is written, graphs included.
        compressed: Write a quantized student also as codes and scales, in the form that vLLM and SGLang load (compressed/): true, false,
            or auto, beside student/ where that form can hold it.
        prefill: Write also a graph on the same weights that returns the logits of the last position only, for ranking and first tokens.
        labels: Write also a graph on the same weights, and an engine, that return the log-probabilities of these labels, such as no yes,
            one token each.
        cpu: Write the graph also in the form that ONNX Runtime runs fastest on CPUs (onnx/cpu.onnx), with the numbers of model.onnx; with a
            format such as int8, of the student, requantized in that format, without the quantizers of its training, and compressed/
            holds the same.
        tensorrt: Which package compiles the engine: tensorrt, tensorrt_rtx, or auto for the one that is installed.
        compute_capability: GPU generations the engine must run on, for example 8.9; by default the compiler's choice.
        batch: Smallest, usual and largest number of conversations of the engine.
        sequence: Smallest, usual and largest number of new tokens per call of the engine.
        past: Smallest, usual and largest number of cached tokens of the engine.
        opset: ONNX operator set.
        decode_steps: Verified tokens after each prompt.
        benchmark_prompt: Prompt of the benchmark, tokens.
        benchmark_repetitions: How often the benchmark measures each graph; 0 leaves it out.
        threads: Threads of the benchmark in ONNX Runtime; by default its choice.

    Raises:
        ModuleNotFoundError: There is to be an engine, and the package that compiles it is not installed.
        ValueError: A number out of its range, a null, settings that contradict each other, or a format that the graph for CPUs or the
            engine can't have.
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
    compute_capability: tuple[str | float, ...] = ()
    batch: Range = (1, 1, 16)
    sequence: Range = (1, 128, 1024)
    past: Range = (0, 256, 2048)
    opset: int = 23
    decode_steps: Annotated[int, Between(0, 1e6)] = 64
    benchmark_prompt: Annotated[int, Between(1, 1e6)] = 128
    benchmark_repetitions: Annotated[int, Between(0, 1e4)] = 5
    threads: Annotated[int, Between(1, 1024)] | None = None

    def __post_init__(self) -> None:
        """Lists of YAML and Python become tuples; what can't work with any model is refused."""
        check_fields(self)
        for name in (field.name for field in fields(self) if isinstance(getattr(self, field.name), list)):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check()
        self._check_installed()

    def _check(self) -> None:
        for name in ("batch", "sequence", "past"):
            low, usual, high = getattr(self, name)
            if not (0 if name == "past" else 1) <= low <= usual <= high:
                raise ValueError(
                    f"expected {name} as smallest, usual and largest number in this order, found {low} {usual} {high}; sort them"
                )
        if not self.formats:
            raise ValueError("expected formats among hf, onnx and engine, found none; name what to write")
        further = [name for name in ("prefill", "labels", "cpu") if getattr(self, name)]
        if further and not self.graph:
            raise ValueError(
                f"expected onnx or engine among formats for {further[0]}, which asks for a further graph, found {list(self.formats)}; "
                "add onnx, or leave it out"
            )

    def _check_installed(self) -> None:
        if self.cpu:
            check_cpu(self.cpu_format or self.precision, self.opset)
        if "engine" in self.formats:
            format = format_for(self.precision)
            check_engine_formats([] if format is None else [format])
            check_target(self.precision, self.targets)
            import_tensorrt(self.tensorrt)

    @property
    def targets(self) -> tuple[str, ...]:
        """`compute_capability` as text."""
        return tuple(map(str, self.compute_capability))

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
        """The format of a student that is requantized for CPUs; None: `cpu.onnx`, if there is one, has the numbers of `model.onnx`."""
        return None if isinstance(self.cpu, bool) else self.cpu
