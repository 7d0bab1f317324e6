"""`python -m export CHECKPOINT_OR_FOLDER --output DIR --precision fp8`: export, verify and measure a trained model."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from export.calibration import calibrate
from export.huggingface import load_student
from export.pipeline import check_output_free, export_all
from export.progress import Phases
from export.report import write_report
from export.settings import ExportSettings, check_settings
from export.to_onnx import OPSETS, PRECISIONS, UNQUANTIZED, check_exportable, format_for
from export.verify import VerificationError, raise_on_failure
from models.architecture import decoder_layers
from models.quantization.post_training import Method, PostTrainingQuantization

PROMPTS = (
    "What is 7 plus 5?",
    "Name the capital of France.",
    "Write one short sentence about rain.",
    "Is the statement 'all cats are animals' true or false? Answer with one word and then give the reason for your answer.",
    "List three colours.",
    "A train leaves at 9:40 and arrives at 11:05. How long does the journey take? Think step by step, then answer.",
    "Translate 'good morning' into Spanish.",
    "Summarize in one sentence: the sun warms the sea, water rises as vapour, cools down, forms clouds and falls as rain.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    transformers_logging.disable_progress_bar()
    settings = ExportSettings(
        precision=options.precision,
        formats=("hf", "onnx") if options.engine == "none" else ("hf", "onnx", "engine"),
        plain=options.plain,
        prefill=options.prefill,
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
    try:
        check_settings(settings)
        if not options.overwrite:
            check_output_free(options.output)
        print(f"Loading {options.model}", flush=True)
        model, tokenizer = load_any(options.model)
        format = format_for(options.precision)
        if options.calibration is not None and format is not None:
            quantization = PostTrainingQuantization(format=format, method=options.method)
            with Phases().phase(f"Quantizing after {options.calibration}", len(decoder_layers(model))) as on_layer:
                number = options.calibration_conversations
                calibrate(
                    model, tokenizer, options.calibration, quantization, num_conversations=number, on_layer=on_layer
                )
        if options.precision not in UNQUANTIZED:
            check_exportable(model, precision=options.precision, opset=options.opset)
        prompts = tokenize_prompts(tokenizer, PROMPTS[: options.prompts])
        report = export_all(model, tokenizer, options.output, settings, prompts, overwrite=options.overwrite)
        write_report(options.output, report)
        for check in report["verification"]:
            print(f"{check['status']:>8}  {check['name']}" + (f": {check['reason']}" if check["reason"] else ""))
        for artefact in report["artefacts"]:
            print(f"{artefact['bytes'] / 1e6:7.1f} MB  {options.output / artefact['path']}")
        raise_on_failure(report["verification"])
    except (ValueError, FileNotFoundError, ModuleNotFoundError, VerificationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def load_any(reference: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model on the CPU with its tokenizer, from a checkpoint of `train.py`, an exported folder or any model reference.

    Raises:
        FileNotFoundError: There is nothing that loads.
        ValueError: The checkpoint is not one of a student.
    """
    path = Path(reference).expanduser()
    if path.suffix == ".ckpt":
        if not path.is_file():
            raise FileNotFoundError(f"expected a checkpoint at {reference!r}, found none; check the path")
        from models.checkpoint import load_student_checkpoint  # heavy: the whole of Lightning

        return load_student_checkpoint(path)
    return load_student(reference)


def tokenize_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts as a left-padded batch, through the chat template if there is one."""
    texts = list(prompts)
    if tokenizer.chat_template:
        conversations = [[{"role": "user", "content": text}] for text in prompts]
        texts = [
            str(tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)) for c in conversations
        ]
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=not tokenizer.chat_template)["input_ids"]  # type: ignore[assignment]
    width = max(len(row) for row in rows)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return {
        "prompt_ids": torch.tensor([[padding] * (width - len(row)) + row for row in rows]),
        "prompt_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Write a trained model as Hugging Face folder, ONNX graph and TensorRT engine, and verify each of them.",
    )
    add = parser.add_argument
    add(
        "model",
        metavar="CHECKPOINT_OR_FOLDER",
        help="a .ckpt file of train.py, a student's folder, or any model reference",
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
        default=PostTrainingQuantization.method,
        help="how weights are rounded in calibration: to nearest, or so that what follows is disturbed least (default: %(default)s)",
    )
    add(
        "--calibration-conversations",
        type=int,
        default=128,
        metavar="N",
        help="how many of them (default: %(default)s)",
    )
    add(
        "--prompts",
        type=int,
        choices=range(1, len(PROMPTS) + 1),
        default=4,
        metavar="N",
        help="verified prompts, 1 to 8",
    )
    add("--decode-steps", type=int, default=64, metavar="N", help="verified tokens after each (default: %(default)s)")
    add("--benchmark-prompt", type=int, default=128, metavar="N", help="prompt of the benchmark, tokens")
    add("--benchmark-repetitions", type=int, default=5, metavar="N", help="0: no benchmark (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="threads in ONNX Runtime (default: its choice)")
    text = (
        "write also onnx/prefill.onnx: the same weights, and logits of the last position only (ranking, first tokens)"
    )
    add("--prefill", action="store_true", help=text)
    add("--plain", action="store_true", help="refuse a student whose folder plain transformers would not load")
    add("--compressed", action="store_true", help="write a quantized student as codes, for vLLM and SGLang, as well")
    add("--overwrite", action="store_true", help="replace an earlier export in the output folder, and nothing else")
    return parser


if __name__ == "__main__":
    sys.exit(main())
