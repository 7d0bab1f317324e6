"""File names of an export.

OUTPUT/student/                    Hugging Face folder, see `models/loading/student_folder.py` for students of unequal layers
OUTPUT/compressed/                 of quantized students: the same as codes and scales, see `export/folders/compressed.py`
OUTPUT/onnx/model.onnx (+ .data)   graph with the cache in and out
OUTPUT/onnx/prefill.onnx           only if asked for: the same weights, logits of the last position
OUTPUT/onnx/labels.onnx            only if asked for: the same weights, log-probabilities of labels
OUTPUT/onnx/cpu.onnx (+ .data)     only if asked for: the same student for ONNX Runtime on a CPU, see `export/cpu_graph/to_cpu.py`
OUTPUT/onnx/engine-source.onnx     only for quantized engines: the same graph with float16 between the matrix products
OUTPUT/onnx/engine-source-labels.onnx  only for quantized engines with labels: on the weights of engine-source.onnx
OUTPUT/engine/model-*.engine       compiled, one for each package and target
OUTPUT/engine/labels-*.engine      only with labels: the same for labels.onnx
OUTPUT/failed/                     the same once more: what failed its verification and does not replace an earlier export
"""

CPU, LABELS, PREFILL = "cpu.onnx", "labels.onnx", "prefill.onnx"
STUDENT, COMPRESSED, FAILED = "student", "compressed", "failed"
GRAPH, PREFILL_GRAPH, ENGINE_SOURCE = "onnx/model.onnx", f"onnx/{PREFILL}", "onnx/engine-source.onnx"
LABEL_GRAPH, ENGINE_LABEL_SOURCE = f"onnx/{LABELS}", "onnx/engine-source-labels.onnx"
CPU_GRAPH = f"onnx/{CPU}"
MODEL_ENGINE_NAME, LABEL_ENGINE_NAME = "model", "labels"
ENGINES, LABEL_ENGINES = f"engine/{MODEL_ENGINE_NAME}-*.engine", f"engine/{LABEL_ENGINE_NAME}-*.engine"
WRITTEN = (STUDENT, COMPRESSED, "onnx/*.onnx", "onnx/*.onnx.data", ENGINES, LABEL_ENGINES, "report.json", "report.md")
"""Patterns of all that an export writes, its reports included."""

_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    "spiece.model",
)
STUDENT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "potstill.json",
    "potstill/*",
    *_TOKENIZER,
)
FILES = {
    STUDENT: STUDENT_FILES,
    COMPRESSED: (*STUDENT_FILES, "recipe.yaml"),
    "onnx": ("*.onnx", "*.onnx.data"),
    "engine": (f"{MODEL_ENGINE_NAME}-*.engine", f"{LABEL_ENGINE_NAME}-*.engine"),
}
"""Patterns of the files that an export writes into each of its folders; what else lies there is somebody else's."""
TRITON_FILES = ("config.pbtxt", "1/model.*", *_TOKENIZER)
"""The same for a model of the serving folder."""
