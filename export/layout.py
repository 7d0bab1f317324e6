"""Where an export puts its files.

OUTPUT/student/                    Hugging Face folder, see `models/folder.py` for students of unequal layers
OUTPUT/compressed/                 only if asked for: the same student as codes and scales, see `export/compressed.py`
OUTPUT/onnx/model.onnx (+ .data)   graph with the cache in and out
OUTPUT/onnx/prefill.onnx           only if asked for: the same weights, logits of the last position
OUTPUT/onnx/cpu.onnx (+ .data)     only if asked for: the same student for ONNX Runtime on a CPU, see `export/for_cpu.py`
OUTPUT/onnx/engine-source.onnx     only for quantized engines: the same graph with float16 between the matrix products
OUTPUT/engine/model-*.engine       compiled, one for each package and target
"""

from export.for_cpu import CPU, CPU_PREFILL
from export.label_graph import LABELS
from export.prefill import PREFILL

STUDENT, COMPRESSED = "student", "compressed"
GRAPH, PREFILL_GRAPH, ENGINE_SOURCE = "onnx/model.onnx", f"onnx/{PREFILL}", "onnx/engine-source.onnx"
LABEL_GRAPH = f"onnx/{LABELS}"
CPU_GRAPH, CPU_PREFILL_GRAPH = f"onnx/{CPU}", f"onnx/{CPU_PREFILL}"
WRITTEN = (STUDENT, COMPRESSED, "onnx/*.onnx", "onnx/*.onnx.data", "engine/model-*.engine", "report.json", "report.md")
"""Patterns of all that an export writes, its reports included."""
