"""The graphs that `benchmarks/onnx_decode.py` compares: this project's `cpu.onnx`, and those of onnxruntime-genai's model builder.

| graph     | the student                                                        | its head                     |
|-----------|--------------------------------------------------------------------|------------------------------|
| `fp32`    | float32                                                            | float32                      |
| `int8`    | `int8_g128`: 8-bit blocks of 128, smoothed, rounded to nearest     | 8-bit blocks, to nearest     |
| `int4`    | `int4_g128`: 4-bit blocks of 128, QuantEase                        | `int4_g64`, QuantEase        |
| `prefill` | `int8`: products of whole numbers, QuantEase; the last position only | 8-bit blocks, to nearest   |

Students are quantized by `models/post_training/calibrate.py` and written by `export/cpu_graph/to_cpu.py`.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from benchmarks.chats import answered, calibration_prompts
from benchmarks.harness import MISSING
from datamodules.collate import Batch
from export.cpu_graph.to_cpu import write_cpu_graph
from export.layout import CPU
from export.onnx_graph.to_onnx import OnnxExport, Precision, export_onnx
from models.loading.reference import load_model, load_tokenizer
from models.post_training.calibrate import quantize_after_training
from models.post_training.format_choice import UNQUANTIZED, formats_by_pattern
from models.post_training.settings import Method, PostTrainingQuantization

MODEL = "package:smollm2-135m-instruct"
CALIBRATION_SAMPLES, CALIBRATION_BATCHES = 128, 8
Graph = Literal["fp32", "int8", "int4", "prefill"]
GRAPHS: tuple[Graph, ...] = ("fp32", "int8", "int4", "prefill")
_PRECISION: dict[Graph, Precision] = {"fp32": "fp32", "int8": "int8_g128", "int4": "mixed", "prefill": "int8"}
_FORMATS = {"*": "int4_g128", "lm_head": "int4_g64"}  # of `mixed`
_METHOD: dict[Graph, Method] = {"int8": "nearest", "int4": "quantease", "prefill": "quantease"}


def our_graph(name: Graph, folder: Path) -> Path:
    """This project's graph of the model; one that is in the folder already is taken as it is."""
    path = folder / CPU
    if path.is_file():
        return path
    model, precision = load_model(MODEL), _PRECISION[name]
    if name != "fp32":
        settings = PostTrainingQuantization(method=_METHOD[name])
        formats = formats_by_pattern(model, UNQUANTIZED, _FORMATS) if precision == "mixed" else precision
        quantize_after_training(model, _calibration(model), formats, settings)
    return cpu_graph_alone(export_onnx(model, folder / "model.onnx", precision=precision))


def cpu_graph_alone(plain: OnnxExport) -> Path:
    """Write the graph for CPUs in the place of the one it is made from."""
    path = write_cpu_graph(plain.path)
    plain.path.unlink()
    plain.data_path.unlink()
    return path


def genai_graph(name: str, folder: Path, *, threads: int) -> Path:
    """The folder of a graph of onnxruntime-genai's model builder, for so many threads; one that is there already is kept.

    `fp32_last` is `fp32` with logits of the last position only.
    """
    if find_spec("onnxruntime_genai") is None:
        raise ModuleNotFoundError(MISSING.format("onnxruntime-genai"))
    target, source = folder / f"genai_{name}", folder / "source"
    settings = target / "genai_config.json"
    if not settings.is_file():
        if not (source / "config.json").is_file():
            load_model(MODEL).save_pretrained(source)
            load_tokenizer(MODEL).save_pretrained(source)
        precision, _, last = name.partition("_")
        folders = {"-i": source, "-o": target, "-c": folder / "cache"}
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", precision]
        command += [word for option, path in folders.items() for word in (option, str(path))]
        command += ["--extra_options", "prune_lm_head=true"] if last else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not settings.is_file():
            raise RuntimeError(
                f"expected a graph from onnxruntime-genai's model builder, found the error {done.stderr[-500:]!r}; run "
                f"{' '.join(command)!r} to see all of it"
            )
    config = json.loads(settings.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    settings.write_text(json.dumps(config, indent=2))
    return target


def _calibration(model: Any) -> Sequence[Batch]:
    batches = answered(model, load_tokenizer(MODEL), MODEL, calibration_prompts(CALIBRATION_SAMPLES))
    return batches[:: len(batches) // CALIBRATION_BATCHES][:CALIBRATION_BATCHES]
