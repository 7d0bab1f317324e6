"""`python -m models.offline --config configs/<recipe>.yaml --output DIR`: capture the teacher of a recipe once, for many trainings.

It takes the files and settings that `python train.py fit` takes, reads teacher, tokenizer and data from them, and nothing else.
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as in train.py

import torch
from jsonargparse import SUPPRESS, Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

import callbacks  # noqa: F401  # registers short class names, as does the next line
import models  # noqa: F401
from datamodules import ChatDataModule
from models.offline.capture import CaptureReport, CaptureSettings, capture
from models.offline.teacher import PREFIX, is_offline, open_offline_teacher
from program.recipes import ConfigFile, Parser
from program.screen import as_command

# Recipes have them and a capture does not need them; of the trainer, only its precision.
UNUSED = ("seed_everything", "name", "root", "run_dir", "ckpt_path", "weights_only", "verbose", "checkpoint")


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(None if arguments is None else list(arguments))
    reference, dtype, device = _teacher_of(options), _dtype_of(options), _device_of(options.device)
    settings = CaptureSettings(options.form, options.top_k, options.batch_size, options.shard_tokens)
    datamodule = parser.instantiate(Namespace(data=options.data)).data
    splits = options.splits or (["train", "val"] if datamodule.has_split("val") else ["train"])
    print(f"Capturing {reference} in {str(dtype).removeprefix('torch.')} over {', '.join(splits)}", flush=True)
    report = capture(
        reference,
        datamodule,
        options.output,
        settings,
        splits=splits,
        dtype=dtype,
        device=device,
        trust_remote_code=bool(options.model.init_args.get("trust_remote_code")),
    )
    open_offline_teacher(options.output, datamodule, splits)
    _print_report(report, options.output)
    return 0


def _teacher_of(options: Namespace) -> str:
    reference = options.model.init_args.get("teacher")
    if not reference or is_offline(reference):
        raise ValueError(
            f"expected a model as model.init_args.teacher, found {reference!r}; give the model to capture, for example with "
            "--model.init_args.teacher"
        )
    return str(reference)


def _dtype_of(options: Namespace) -> torch.dtype:
    """The type in which a live teacher would compute in the recipe's training, unless another one is asked for."""
    if options.dtype == "auto":
        precision = str(options.trainer.precision or "32-true")
        return torch.float32 if precision.startswith(("32", "64")) else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[options.dtype]


def _device_of(name: str) -> torch.device:
    """Where the teacher computes: a GPU if there is one, unless another place is asked for."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) and (name == "cpu" or (int(name[5:] or 0) < torch.cuda.device_count())):
        return torch.device(name)
    raise ValueError(
        f"expected --device auto, cpu, or cuda:N of the {torch.cuda.device_count()} GPUs here, found {name!r}; leave it out for auto"
    )


def _print_report(report: CaptureReport, folder: Path) -> None:
    if report.captured_tokens:
        print(
            f"{report.captured_answer_tokens:,} answer tokens in {report.seconds:.1f} s: "
            f"{report.captured_answer_tokens / report.seconds:,.0f} a second "
            f"(the teacher read {report.captured_tokens / report.seconds:,.0f} tokens a second)"
        )
    else:
        print("Nothing to do: the capture was complete")
    print(
        f"{report.total_bytes / 1e6:,.1f} MB in all: {report.answer_tokens:,} answer tokens of {report.bytes_per_token:,} bytes, "
        f"{report.total_bytes / report.answer_tokens:,.1f} with head, samples and index"
    )
    print(f"Train with --model.init_args.teacher {PREFIX}{folder}")


def _parser() -> LightningArgumentParser:
    parser = Parser(
        prog="python -m models.offline",
        description="Capture a teacher's answers to the data of a recipe once; training then needs its body no more. "
        "A capture that was stopped goes on when the same command is given again.",
    )
    add = parser.add_argument
    add("--config", action=ConfigFile, help="Recipe or overlay, as for train.py; may be given several times.")
    add("--output", type=Path, required=True, help="Folder of the capture.")
    add(
        "--form",
        type=Literal["exact", "top_k"],
        default="exact",
        help="exact: hidden states; top_k: the most probable tokens.",
    )
    add("--top_k", type=int, default=64, help="Tokens kept for each answer token in the form top_k.")
    add(
        "--splits",
        type=Literal["train", "val", "test"],
        nargs="+",
        help="Parts of the data (default: train, and val if any).",
    )
    add(
        "--dtype",
        type=Literal["auto", "float32", "bfloat16"],
        default="auto",
        help="In which the teacher computes; auto: as in training.",
    )
    add("--batch_size", type=int, default=16, help="Samples that the teacher reads at once.")
    add("--shard_tokens", type=int, default=65536, help="Answer tokens a file, about; a kill loses one file's work.")
    add("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N.")
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    parser.add_subclass_arguments(ChatDataModule, "data", required=True)
    parser.link_arguments("model.init_args.student", "data.init_args.tokenizer")
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    for name in UNUSED:
        add(f"--{name}", type=dict[str, Any] if name == "checkpoint" else Any)
    for action in parser._actions:
        if action.dest.partition(".")[0] in ("trainer", *UNUSED):
            action.help = SUPPRESS
    return parser


if __name__ == "__main__":
    sys.exit(main())
