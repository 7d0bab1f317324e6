"""A graph of the same student for ONNX Runtime on a CPU, faster there and readable nowhere else: `cpu.onnx`.

| change                                              | why                                                                    |
|-----------------------------------------------------|------------------------------------------------------------------------|
| products that read the same tensor are one          | fewer, wider products: `export/cpu_graph/merge_products.py`                      |
| cache and rotary angles lie inside attention        | appended to in place, not copied: `export/cpu_graph/cached_attention.py`         |
| a residual sum and its norm are one operator        | fewer operators: `export/cpu_graph/skip_norms.py`                                |
| `int8`, `int8_static`: products of whole numbers    | AMX and VNNI; the same codes and scales: `export/cpu_graph/integer_products.py`  |
| a quantized student: head and embedding in 8 bits   | a small model's head is most of its bytes: `export/cpu_graph/head_blocks.py`     |
| an input says how many logits are wanted            | a prompt needs those of its last token: `export/onnx_graph/last_logits.py`        |

The inputs and outputs are those of `model.onnx`, without `position_ids` where attention turns queries and keys itself; keys behind padding
are then turned by their place in the cache; `logits_to_keep` may be fed or not.  `export/sessions/shared_cache.py` runs it with one buffer for past and present.
"""

from pathlib import Path

import onnx_ir as ir

from export.cpu_graph.cached_attention import cache_in_attention
from export.cpu_graph.head_blocks import store_embedding, store_head
from export.cpu_graph.integer_products import integer_products
from export.cpu_graph.merge_products import merge_products
from export.cpu_graph.skip_norms import norms_with_sums
from export.layout import CPU
from export.onnx_graph.last_logits import ask_for_logits
from export.onnx_graph.to_onnx import check_cpu
from program.files import move_into_place, staging_folder


def write_cpu_graph(graph: Path) -> Path:
    """Write `cpu.onnx`, its weights in `cpu.onnx.data`, beside a graph of `export_onnx`.

    Args:
        graph: The file, its weights beside it, with float32 between the products.

    Raises:
        ValueError: A graph with float16 between the products, with FP8 in them, or below opset 23.
    """
    model = ir.load(graph)
    _check(model)
    quantized = model.metadata_props["precision"] != "fp32"
    if quantized:
        store_head(model)
        store_embedding(model)
    merge_products(model)
    cache_in_attention(model)
    _drop_unused_positions(model.graph)
    if quantized:
        integer_products(model)
    norms_with_sums(model)
    ask_for_logits(model)
    target = graph.with_name(CPU)
    data = f"{CPU}.data"
    with staging_folder(graph.parent) as folder:
        ir.save(model, folder / CPU, external_data=data)
        move_into_place(folder / data, graph.with_name(data))
        move_into_place(folder / CPU, target)
    return target


def _drop_unused_positions(graph: ir.Graph) -> None:
    """Attention that turns queries and keys itself counts positions itself."""
    positions = next(value for value in graph.inputs if value.name == "position_ids")
    if not positions.uses():
        graph.inputs.remove(positions)


def _check(model: ir.Model) -> None:
    precision, half = model.metadata_props["precision"], model.metadata_props["activations"] == "float16"
    check_cpu("fp16" if half else precision, int(model.metadata_props["opset"]), model.metadata_props["cache"])
