"""`python -m export.serving EXPORT_DIR`: write a model repository for Triton Inference Server from an export folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export.serving.triton import MAX_BATCH_SIZE, left_out, served_models, write_triton
from program.options import Parser, up_to
from program.screen import as_command


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if everything went well."""
    options = _parser().parse_args(arguments)
    written = write_triton(**vars(options))
    for model in served_models(options.export_dir):
        print(written / f"{options.name}_{model.suffix}")
    for sentence in left_out(options.export_dir):
        print(sentence)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m export.serving",
        description="Make a model repository for Triton Inference Server from an export folder.",
    )
    add = parser.add_argument
    add(
        "export_dir",
        metavar="EXPORT_DIR",
        type=Path,
        help="what `python -m export --output EXPORT_DIR` or a run has written",
    )
    add("--output", type=Path, metavar="DIR", help="the model repository (default: EXPORT_DIR/triton)")
    add(
        "--name",
        default="student",
        help="models are called NAME_onnx, NAME_labels, NAME_engine and NAME_labels_engine (default: %(default)s)",
    )
    add(
        "--max-batch-size",
        type=int,
        default=MAX_BATCH_SIZE,
        metavar="N",
        help="conversations that Triton may put together; at most what --batch of the export allowed an engine (default: %(default)s)",
    )
    add("--threads", type=up_to(1024), metavar="N", help="threads in ONNX Runtime (default: its choice)")
    add("--overwrite", action="store_true", help="replace models of these names")
    return parser


if __name__ == "__main__":
    sys.exit(main())
