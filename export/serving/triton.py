"""A Triton Inference Server model repository made from an export folder.

    python -m export.serving EXPORT_DIR [--output DIR] [--name NAME] [--max-batch-size N] [--threads N] [--overwrite]

    DIR/<name>_onnx/config.pbtxt               for the onnxruntime backend, on the CPU
    DIR/<name>_onnx/tokenizer.json, ...        for clients; the server does not look at them
    DIR/<name>_onnx/1/model.onnx, model.onnx.data
    DIR/<name>_labels/...                      the same with the graph of --labels, which returns their log-probabilities
    DIR/<name>_engine/config.pbtxt             for the tensorrt backend
    DIR/<name>_engine/1/model.plan
    DIR/<name>_labels_engine/...               the same with the engine of --labels

The cache stays a plain input and output, and the client hands it back.  Triton could keep it between calls (implicit state of
its sequence batcher), but such a state starts with one entry where ours starts with none, each request of a sequence then is one
conversation instead of a batch, and a conversation is bound to one instance.  Rankers and classifiers need no cache at all:
they ask for `log_probs`, or for `logits`, only.
"""

import re
import shutil
from pathlib import Path

from google.protobuf import text_format

from export import layout
from export.serving.config import ServedModel, model_config
from models.loading.reference import load_tokenizer
from program.files import move_into_place, only_one, staging_folder

MAX_BATCH_SIZE = 16  # the largest batch of engines built with the settings that `python -m export` starts from
_SOURCES_OF_ENGINES = {
    "engine": (layout.ENGINE_SOURCE, layout.GRAPH),
    "labels_engine": (layout.ENGINE_LABEL_SOURCE, layout.LABEL_GRAPH),
}


def write_triton(
    export_dir: Path,
    *,
    name: str = "student",
    output: Path | None = None,
    max_batch_size: int = MAX_BATCH_SIZE,
    threads: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model repository; graph, weights and engine are copied.

    Args:
        export_dir: Folder written by `python -m export`.
        name: Models are called `<name>_onnx`, `<name>_labels`, `<name>_engine` and `<name>_labels_engine`.
        output: The repository, which may hold other models; None: `triton/` in the export folder.
        max_batch_size: Conversations that Triton may put together; an engine must have been built for as many.
        threads: Threads of one operator in ONNX Runtime; None: its choice.
        overwrite: Replace models of these names.

    Returns:
        The repository.

    Raises:
        FileNotFoundError: There is nothing to serve.
        ModuleNotFoundError: Triton's schema is not installed.
        ValueError: Triton would not take the name or the size, a model of this name is there, or several engines are.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError(f"expected a name of letters, digits, '_', '.' and '-', found {name!r}; choose such a --name")
    if max_batch_size < 1:
        raise ValueError(
            f"expected --max-batch-size of at least 1, found {max_batch_size}; the graph's first dimension is the batch"
        )
    models = served_models(export_dir)
    output = output or export_dir / "triton"
    taken = [target for model in models if (target := output / f"{name}_{model.suffix}").exists()]
    if taken and not overwrite:
        raise ValueError(
            f"expected no model {taken[0].name!r} in {str(output)!r} yet, found one; choose another --name, or replace it with "
            "--overwrite"
        )
    configs = [model_config(model, name, max_batch_size=max_batch_size, threads=threads) for model in models]
    student = export_dir / "student"
    tokenizer = load_tokenizer(str(student)) if (student / "config.json").is_file() else None
    with only_one(output), staging_folder(output) as staging:
        for model, config in zip(models, configs, strict=True):
            folder = staging / config.name
            (folder / "1").mkdir(parents=True)
            (folder / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
            for file, source in model.files.items():
                shutil.copyfile(source, folder / "1" / file)  # onnx refuses weights with hard links
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        for config in configs:
            move_into_place(staging / config.name, output / config.name, ours=layout.TRITON_FILES)
    return output


def served_models(export_dir: Path) -> list[ServedModel]:
    """What of an export Triton can serve.

    Raises:
        FileNotFoundError: Nothing.
        ValueError: Several engines.
    """
    models = []
    graph = export_dir / layout.GRAPH
    if graph.is_file():
        data = graph.with_name(graph.name + ".data")
        weights = {data.name: data} if data.is_file() else {}
        models.append(ServedModel("onnx", {graph.name: graph, **weights}, graph))
        labels = export_dir / layout.LABEL_GRAPH
        if labels.is_file():
            models.append(ServedModel("labels", {graph.name: labels, **weights}, labels))
    for suffix, sources in _SOURCES_OF_ENGINES.items():
        engines = _engines(export_dir, suffix)
        if len(engines) > 1:
            raise ValueError(
                f"expected one engine of tensorrt, found {engines[0].name} and {engines[1].name}; remove all but one"
            )
        if engines:
            found = [path for source in sources if (path := export_dir / source).is_file()]
            if not found:
                raise FileNotFoundError(
                    f"expected {sources[-1]} beside the engine to read its inputs from, found none in {str(export_dir)!r}; export both"
                )
            models.append(ServedModel(suffix, {"model.plan": engines[0]}, found[0]))
    if not models:
        reasons = "".join(f"; {sentence}" for sentence in left_out(export_dir))
        raise FileNotFoundError(
            f"expected an export with {layout.GRAPH} or an engine of tensorrt at {str(export_dir)!r}, found none{reasons}; "
            "check the path, or write one with `python -m export`"
        )
    return models


def left_out(export_dir: Path) -> list[str]:
    """What of an export Triton can not serve: one sentence each."""
    return [
        f"{path.relative_to(export_dir).as_posix()} is left out: Triton's TensorRT backend loads engines of the package tensorrt "
        "only (*-tensorrt-*.engine); build one with --engine tensorrt on the machine that serves"
        for path in sorted(export_dir.glob("engine/*.engine"))
        if not any(path in _engines(export_dir, suffix) for suffix in _SOURCES_OF_ENGINES)
    ]


def _engines(export_dir: Path, suffix: str) -> list[Path]:
    name = layout.MODEL_ENGINE_NAME if suffix == "engine" else layout.LABEL_ENGINE_NAME
    return sorted(export_dir.glob(f"engine/{name}-tensorrt-*.engine"))
