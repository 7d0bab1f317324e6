"""The options of `python -m export`, and what they ask for."""

import argparse
from pathlib import Path
from typing import get_args

from export.calibration import Calibration
from export.onnx_graph.to_onnx import OPSETS, PRECISIONS, UNQUANTIZED, format_for
from export.settings import ExportSettings, StudentType
from models.post_training.format_choice import UNQUANTIZED as NO_FORMAT
from models.post_training.settings import Method, PostTrainingQuantization
from models.quantization.cache import CacheFormat
from models.quantization.formats import FORMATS
from program.options import Parser, positive

_CALIBRATION_OPTIONS = ("--method", "--calibration-conversations", "--layer-formats", "--average-bits", "--kv-cache")


def settings_of(options: argparse.Namespace) -> ExportSettings:
    """What to export."""
    return ExportSettings(
        precision=options.precision,
        formats=("hf", "onnx") if options.engine == "none" else ("hf", "onnx", "engine"),
        plain=options.plain,
        prefill=options.prefill,
        labels=tuple(options.labels),
        cpu=options.cpu,
        student_dtype=options.student_dtype,
        compressed=options.compressed,
        tensorrt="auto" if options.engine == "none" else options.engine,
        compute_capability=tuple(options.compute_capability),
        batch=tuple(options.batch),
        sequence=tuple(options.sequence),
        past=tuple(options.past),
        opset=options.opset,
        decode_steps=options.decode_steps,
        prompt_tokens=options.benchmark_prompt,
        repetitions=options.benchmark_repetitions,
        threads=options.threads,
    )


def calibration_of(options: argparse.Namespace) -> Calibration | None:
    """What to quantize after training, if anything.

    Raises:
        ValueError: Options that do not belong together.
    """
    given = [name for name in _CALIBRATION_OPTIONS if getattr(options, name[2:].replace("-", "_")) is not None]
    if options.calibration is None:
        given += ["--cpu FORMAT"] if isinstance(options.cpu, str) else []
        if given:
            raise ValueError(f"expected --calibration FILE.jsonl beside {given[0]}, found none; name the conversations")
        return None
    for_cpu = isinstance(options.cpu, str)
    if options.precision in UNQUANTIZED and not for_cpu and (options.kv_cache is None or options.method is not None):
        raise ValueError(
            f"expected a quantized precision with {'--calibration' if options.kv_cache is None else '--method'}, found {options.precision}; "
            "choose a format such as int4_g64, or leave the option out"
        )
    choices = [name for name in given if name in ("--layer-formats", "--average-bits")]
    if len(choices) != (1 if options.precision == "mixed" else 0):
        raise ValueError(
            "expected --precision mixed together with one of --layer-formats and --average-bits, found precision "
            f"{options.precision} and {' and '.join(choices) or 'neither'}; choose how formats are given to layers"
        )
    format = format_for(options.precision)
    return Calibration(
        options.calibration,
        formats=dict(options.layer_formats or ()) if format is None else {"*": format},
        kv_cache=options.kv_cache,
        average_bits=options.average_bits,
        settings=PostTrainingQuantization(method=options.method or PostTrainingQuantization.method),
        num_conversations=options.calibration_conversations or Calibration.num_conversations,
    )


def _pattern_and_format(text: str) -> tuple[str, str]:
    pattern, _, format = text.rpartition("=")
    if not pattern or format not in (*FORMATS, NO_FORMAT):
        raise argparse.ArgumentTypeError(
            f"expected PATTERN=FORMAT such as *.down_proj=int8_g64, found {text!r}; formats are {', '.join(FORMATS)} and {NO_FORMAT}"
        )
    return pattern, format


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="python -m export",
        description="Write a trained model as Hugging Face folder, ONNX graph and TensorRT engine, and verify each of them.",
    )
    add = parser.add_argument
    add(
        "model",
        metavar="CHECKPOINT_OR_FOLDER",
        help="a .ckpt file of train.py, a student's folder, or any model reference",
    )
    add(
        "--student",
        metavar="REFERENCE",
        help="model that a .ckpt file was trained from, for configuration and tokenizer (default: the one it names, if that is on "
        "this machine)",
    )
    add("--output", type=Path, required=True, help="folder to write student/, onnx/, engine/ and report.json into")
    add("--precision", choices=PRECISIONS, default="fp32", help="of graph and engine (default: %(default)s)")
    add("--opset", type=int, choices=OPSETS, default=23, help="ONNX operator set (default: %(default)s)")
    add(
        "--engine",
        choices=("auto", "none", "tensorrt", "tensorrt_rtx"),
        default="auto",
        help="which package compiles it",
    )
    add(
        "--compute-capability", nargs="*", default=[], metavar="X.Y", help="target GPUs such as 8.9 (default: portable)"
    )
    for name, default, unit in (
        ("batch", (1, 1, 16), "conversations at a time"),
        ("sequence", (1, 128, 1024), "new tokens a call"),
        ("past", (0, 256, 2048), "tokens in the cache"),
    ):
        text = f"{unit} that the engine takes: smallest, usual, largest (default: {' '.join(map(str, default))})"
        add(f"--{name}", type=int, nargs=3, default=default, metavar=("MIN", "OPT", "MAX"), help=text)
    add(
        "--calibration",
        type=Path,
        metavar="FILE.jsonl",
        help="conversations to find the scales of a quantized format on, for a model that was not trained with it",
    )
    add(
        "--method",
        choices=get_args(Method),
        help="how weights are rounded in calibration: to nearest, or so that what follows is disturbed least (default: "
        f"{PostTrainingQuantization.method})",
    )
    add(
        "--calibration-conversations",
        type=positive,
        metavar="N",
        help=f"how many of them (default: {Calibration.num_conversations})",
    )
    add(
        "--layer-formats",
        type=_pattern_and_format,
        nargs="+",
        metavar="PATTERN=FORMAT",
        help="with precision mixed: formats in calibration by patterns of layer names, such as '*=int4_g64' '*.down_proj=int8_g64'; the "
        f"last pattern that fits decides, {NO_FORMAT} leaves layers as they are; lm_head=int4_g64 for the output head",
    )
    add(
        "--average-bits",
        type=float,
        metavar="BITS",
        help="with precision mixed: share out so many bits a weight, on average, over 4, 8 and 16 bits, by measured sensitivity",
    )
    add(
        "--kv-cache",
        choices=get_args(CacheFormat),
        help="in calibration, find scales for a key/value cache of 8 bits, too; with precision fp32 or fp16 for the cache alone",
    )
    add(
        "--verify-on",
        type=Path,
        metavar="FILE.jsonl",
        help="conversations whose prompts are verified, and on whose answers free runs are judged; without them, prompts that come with Potstill",
    )
    add("--prompts", type=positive, default=4, metavar="N", help="number of verified prompts (default: %(default)s)")
    add("--decode-steps", type=int, default=64, metavar="N", help="verified tokens after each (default: %(default)s)")
    add("--benchmark-prompt", type=int, default=128, metavar="N", help="prompt of the benchmark, tokens")
    add("--benchmark-repetitions", type=int, default=5, metavar="N", help="0: no benchmark (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="threads in ONNX Runtime (default: its choice)")
    text = (
        "write also onnx/prefill.onnx: the same weights, and logits of the last position only (ranking, first tokens)"
    )
    add("--prefill", action="store_true", help=text)
    text = "write also onnx/labels.onnx (the same weights), and an engine, that return the log-probabilities of these labels, such as no yes"
    add("--labels", nargs="+", default=[], metavar="LABEL", help=text)
    text = (
        "write also onnx/cpu.onnx, for ONNX Runtime on CPUs only: cache and products as they are fastest there; with a FORMAT, of the "
        "model without its quantizers, if it has some, quantized anew in this format (such as int8) after --calibration, and compressed/ holds the same"
    )
    add("--cpu", nargs="?", const=True, default=False, choices=list(FORMATS), metavar="FORMAT", help=text)
    add("--plain", action="store_true", help="refuse a student whose folder plain transformers would not load")
    text = "write a quantized student as codes, for vLLM and SGLang, as well (default: where that form can hold it)"
    add("--compressed", action=argparse.BooleanOptionalAction, default="auto", help=text)
    text = "floating point type of student/ and compressed/, to which weights are rounded before anything is written (default: %(default)s)"
    add("--student-dtype", choices=get_args(StudentType), default="bfloat16", help=text)
    add("--overwrite", action="store_true", help="replace an earlier export in the output folder, and nothing else")
    return parser
