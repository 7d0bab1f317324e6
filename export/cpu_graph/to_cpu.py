"""A graph of the same student for ONNX Runtime on a CPU, faster there and readable nowhere else: `cpu.onnx`.

| change                                              | why                                                                    |
|-----------------------------------------------------|------------------------------------------------------------------------|
| products that read the same tensor are one          | fewer, wider products: `export/cpu_graph/merge_products.py`                      |
| cache and rotary angles lie inside attention        | appended to in place, not copied: `export/cpu_graph/cached_attention.py`         |
| a residual sum and its norm are one operator        | fewer operators: `norms_with_sums`                                                |
| `int8`, `int8_static`: products of whole numbers    | AMX and VNNI; the same codes and scales: `export/cpu_graph/integer_products.py`  |
| a quantized student: head and embedding in 8 bits   | a small model's head is most of its bytes: `export/cpu_graph/head_blocks.py`     |
| an input says how many logits are wanted            | a prompt needs those of its last token: `export/onnx_graph/last_logits.py`        |

The inputs and outputs are those of `model.onnx`, without `position_ids` where attention turns queries and keys itself; keys behind padding
are then turned by their place in the cache; `logits_to_keep` may be fed or not.  `export/sessions/shared_cache.py` runs it with one buffer for past and present.
"""

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.cpu_graph.cached_attention import DOMAIN, cache_in_attention
from export.cpu_graph.head_blocks import store_embedding, store_head
from export.cpu_graph.integer_products import integer_products
from export.cpu_graph.merge_products import merge_products
from export.layout import CPU
from export.onnx_graph.edits import maker, take_place
from export.onnx_graph.last_logits import ask_for_logits
from export.onnx_graph.to_onnx import check_cpu
from program.files import move_into_place, staging_folder


def write_cpu_graph(graph: Path) -> Path:
    """Write `cpu.onnx`, its weights in `cpu.onnx.data`, beside a graph of `export_onnx`.

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


def norms_with_sums(model: ir.Model) -> int:
    """Fuse, in place, every RMSNormalization over the last axis with the sum that it reads; returns how many.

    ONNX Runtime fuses this pair by itself for older forms of the norm, not for RMSNormalization of opset 23.
    """
    graph = model.graph
    fused = 0
    for norm in list(graph):
        read = norm.inputs[0] if norm.op_type == "RMSNormalization" else None
        total = maker(read)
        if read is None or total is None or total.op_type != "Add" or not _over_last_axis(norm):
            continue
        if any(value is None or value.is_initializer() for value in total.inputs):  # a bias, no residual
            continue
        new = ir.Node(
            DOMAIN,
            "SkipSimplifiedLayerNormalization",
            [*total.inputs, norm.inputs[1]],
            [norm.attributes["epsilon"]] if "epsilon" in norm.attributes else [],
            num_outputs=4,
            name=norm.name,
        )
        graph.insert_before(total, new)
        take_place(norm.outputs[0], new.outputs[0])
        take_place(read, new.outputs[3])
        graph.remove([norm, total], safe=True)
        fused += 1
    if fused:
        graph.opset_imports[DOMAIN] = 1
        RemoveUnusedNodesPass()(model)
    return fused


def _over_last_axis(norm: ir.Node) -> bool:
    return "axis" not in norm.attributes or norm.attributes["axis"].as_int() == -1


def _drop_unused_positions(graph: ir.Graph) -> None:
    """Attention that turns queries and keys itself counts positions itself."""
    positions = next(value for value in graph.inputs if value.name == "position_ids")
    if not positions.uses():
        graph.inputs.remove(positions)


def _check(model: ir.Model) -> None:
    precision, half = model.metadata_props["precision"], model.metadata_props["activations"] == "float16"
    check_cpu("fp16" if half else precision, int(model.metadata_props["opset"]), model.metadata_props["cache"])
