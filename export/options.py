"""The options of `python -m export`, and what they ask for."""

import argparse
from pathlib import Path
from typing import Any, get_args

import docstring_parser

from export.calibration import Calibration
from export.engine.to_tensorrt import Flavour
from export.onnx_graph.to_onnx import OPSETS, PRECISIONS, UNQUANTIZED, format_for
from export.settings import ExportSettings, Format, StudentType
from models.post_training.format_choice import UNQUANTIZED as NO_FORMAT
from models.post_training.settings import Method, PostTrainingQuantization
from models.quantization.cache import CacheFormat
from models.quantization.formats import FORMATS
from program.options import Parser, positive

_CALIBRATION_OPTIONS = ("--method", "--calibration-conversations", "--layer-formats", "--average-bits", "--kv-cache")


def settings_of(options: argparse.Namespace) -> ExportSettings:
    """What to export."""
    given = {name: value for name, value in vars(options).items() if name in ExportSettings.__dataclass_fields__}
    wanted: tuple[Format, ...] = ("hf", "onnx") if options.engine == "none" else ("hf", "onnx", "engine")
    return ExportSettings(**given, formats=wanted, tensorrt="auto" if options.engine == "none" else options.engine)


def calibration_of(options: argparse.Namespace) -> Calibration | None:
    """What to quantize after training, if anything.

    Raises:
        ValueError: Options that do not belong together.
    """
    given = [name for name in _CALIBRATION_OPTIONS if getattr(options, name[2:].replace("-", "_")) is not None]
    for_cpu = isinstance(options.cpu, str)
    if options.calibration is None:
        given += ["--cpu FORMAT"] if for_cpu else []
        if given:
            raise ValueError(f"expected --calibration FILE.jsonl beside {given[0]}, found none; name the conversations")
        return None
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
        cpu_format=options.cpu if for_cpu else None,
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


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "none"
    return {None: "none", False: "no", True: "yes"}.get(default, str(default))


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
    said = {param.arg_name: param.description for param in docstring_parser.parse(ExportSettings.__doc__ or "").params}

    def setting(name: str, **options: Any) -> None:
        """An option for a setting: its default, and what is said about it there."""
        default = getattr(ExportSettings, name)
        text = " ".join((said[name] or "").split()).replace("%", "%%")
        add(f"--{name.replace('_', '-')}", default=default, help=f"{text} (default: {_shown(default)})", **options)

    setting("precision", choices=PRECISIONS)
    setting("opset", type=int, choices=OPSETS)
    add(
        "--engine",
        choices=(*get_args(Flavour), "none"),
        default="auto",
        help=f"{said['tensorrt']} none: no engine (default: auto)",
    )
    setting("compute_capability", nargs="*", metavar="X.Y")
    for name in ("batch", "sequence", "past"):
        setting(name, type=int, nargs=3, metavar=("MIN", "OPT", "MAX"))
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
    setting("decode_steps", type=int, metavar="N")
    setting("benchmark_prompt", type=int, metavar="N")
    setting("benchmark_repetitions", type=int, metavar="N")
    setting("threads", type=int, metavar="N")
    setting("prefill", action="store_true")
    setting("labels", nargs="+", metavar="LABEL")
    setting("cpu", nargs="?", const=True, choices=list(FORMATS), metavar="FORMAT")
    setting("plain", action="store_true")
    setting("compressed", action=argparse.BooleanOptionalAction)
    setting("student_dtype", choices=get_args(StudentType))
    add("--overwrite", action="store_true", help="replace an earlier export in the output folder, and nothing else")
    return parser
