"""The graphs that `benchmarks/onnx_decode.py` compares: this project's, and those of onnxruntime-genai's model builder.

| graph     | weights                                                             | between the products            |
|-----------|---------------------------------------------------------------------|---------------------------------|
| `fp32`    | float32                                                             | float32                         |
| `int8`    | 8-bit blocks of 64, smoothed (SmoothQuant), rounded to nearest       | float32, 8 bits in the products |
| `int4`    | 4-bit blocks of 64, QuantEase; the head rounded to nearest            | as in `int8`                    |
| `prefill` | 8 bits by column, smoothed                                          | 8 bits by token in the products |

All have merged products and the cache inside attention; `prefill` computes the logits of the last position only (a second graph
beside it, `every.onnx`, has all of them, for the KL).
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import Tensor

from benchmarks.chats import answered, calibration_prompts
from export.block_weights import block_weights
from export.cached_attention import cache_in_attention
from export.integer_products import integer_products
from export.last_logits import keep_last_logits
from export.merge_products import merge_products
from export.skip_norms import norms_with_sums
from export.to_onnx import export_onnx
from models.architecture import decoder_layers
from models.forward import Batch
from models.pretrained import load_model, load_tokenizer
from models.pruning.observe import evaluating, hooked
from models.quantization.post_training import quantize_after_training
from models.quantization.smoothing import fold, pairs_of, smoothing_factors

MODEL = "package:smollm2-135m-instruct"
BLOCK = 64
SMOOTHING_STRENGTH = 0.5
CALIBRATION_SAMPLES = 128
Graph = Literal["fp32", "int8", "int4", "prefill"]
GRAPHS: tuple[Graph, ...] = ("fp32", "int8", "int4", "prefill")


def our_graph(name: Graph, folder: Path) -> Path:
    """This project's graph of the model; one that is in the folder already is taken as it is."""
    path = folder / "model.onnx"
    if path.is_file():
        return path
    model: Any = load_model(MODEL)
    if name in ("int8", "prefill"):
        smooth(model, _calibration(model, 2))
    if name == "int4":
        quantize_after_training(model, _calibration(model, 4), "int4_g64")
    plain = export_onnx(model, folder / "plain.onnx", precision="int4_g64" if name == "int4" else "fp32")
    graph = ir.load(plain.path)
    if name in ("int8", "int4"):
        block_weights(graph, bits=4 if name == "int4" else 8, block_size=BLOCK)  # what has no codes yet
    merge_products(graph)
    if name == "prefill":
        integer_products(graph)
    cache_in_attention(graph)
    norms_with_sums(graph)
    every = folder / "every.onnx" if name == "prefill" else path
    ir.save(graph, every, external_data="model.onnx.data")
    if name == "prefill":
        graph = ir.load(every)
        keep_last_logits(graph)
        ir.save(graph, path)  # reads the same weights
    plain.path.unlink()
    plain.data_path.unlink()
    return path


def genai_graph(name: str, folder: Path, *, threads: int) -> Path:
    """The folder of a graph of onnxruntime-genai's model builder, set to so many threads.

    Args:
        name: `fp32`, `int8`, `int4`, or `fp32_last` for logits of the last position only.
        folder: Where to put it, and its source; a graph that is there already is taken as it is.
        threads: Threads of an operator in genai's own runtime.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    if find_spec("onnxruntime_genai") is None:
        raise ModuleNotFoundError(
            "expected the package `onnxruntime-genai` to compare with, found none; run `pip install -e .[bench]`"
        )
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


@torch.no_grad()
def smooth(model: Any, batches: Sequence[Batch], strength: float = SMOOTHING_STRENGTH) -> None:
    """Fold SmoothQuant's factors into a model, in place; it computes what it did, and its products are easier to round."""
    pairs = [pair for layer in decoder_layers(model) for pair in pairs_of(layer)]
    largest: dict[Any, Tensor] = {}

    def note(linear: Any, inputs: tuple[Tensor, ...]) -> None:
        seen_I = inputs[0].abs().flatten(0, -2).amax(0)
        largest[linear] = torch.maximum(largest.get(linear, seen_I), seen_I)

    with evaluating(model), hooked(pair.readers[0].register_forward_pre_hook(note) for pair in pairs):
        for batch in batches:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    for pair in pairs:
        weights_I = torch.cat([reader.weight for reader in pair.readers]).abs().amax(0)
        inputs_I = largest[pair.readers[0]]
        fold(pair, smoothing_factors(pair.largest(inputs_I), pair.largest(weights_I), strength))


def _calibration(model: Any, count: int) -> list[Batch]:
    batches = answered(model, load_tokenizer(MODEL), MODEL, calibration_prompts(CALIBRATION_SAMPLES))
    return batches[:: len(batches) // count][:count]
