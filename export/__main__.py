"""`python -m export CHECKPOINT_OR_FOLDER --output DIR --precision fp8`: export, verify and measure a trained model."""

import argparse
import gc
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

gc.disable()  # as in train.py: two seconds of seven until the first line

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.calibration import batches_from
from export.calibration import Calibration, calibrate
from export.folders.student import load_student, rounded
from export.options import calibration_of, parser, settings_of
from export.pipeline import export_all
from export.plan import check_cpu_model, check_formats, check_output, results_folder
from export.report import write_report
from export.settings import ExportSettings
from export.verify import HeldOut
from export.verify.checks import raise_on_failure
from export.verify.prompts import check_room, prompts_for_verification
from program.files import only_one
from program.screen import as_command

_HELD_OUT = 256  # conversations of --verify-on whose answers are judged

gc.freeze()
gc.enable()


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    calibration, settings = calibration_of(options), settings_of(options)
    check_output(options.output, overwrite=options.overwrite)
    with only_one(options.output):
        return _export(options, settings, calibration)


def _export(options: argparse.Namespace, settings: ExportSettings, calibration: Calibration | None) -> int:
    print(f"Loading {options.model}", flush=True)
    model, tokenizer = load_any(options.model, options.student)
    prompts = prompts_for_verification(tokenizer, options.verify_on, options.prompts)
    check_room(
        model, prompts, settings.decode_steps, settings.benchmark_prompt if settings.benchmark_repetitions else 1
    )
    held_out = None
    if options.verify_on is not None and tokenizer.chat_template:
        held_out = HeldOut(batches_from(options.verify_on, tokenizer, num_conversations=_HELD_OUT))
    check_cpu_model(model, settings)
    for_cpu = None
    if calibration is not None:
        for_cpu = calibrate(model, tokenizer, calibration, check=partial(check_formats, model, settings))
    model = rounded(model, settings.dtype)  # here, so that the numbers it was loaded with need no memory any more
    report = export_all(
        model,
        tokenizer,
        options.output,
        settings,
        prompts,
        held_out=held_out,
        for_cpu=for_cpu,
        overwrite=options.overwrite,
    )
    output = results_folder(options.output, report["verification"], overwrite=options.overwrite)
    write_report(output, report)
    for check in report["verification"]:
        print(f"{check['status']:>8}  {check['name']}" + (f": {check['reason']}" if check["reason"] else ""))
    for artefact in report["artefacts"]:
        print(f"{artefact['bytes'] / 1e6:7.1f} MB  {output / artefact['path']}")
    raise_on_failure(report["verification"])
    return 0


def load_any(reference: str, student: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model on the CPU with its tokenizer, from a checkpoint of `train.py`, an exported folder or any model reference.

    Args:
        reference: What to load.
        student: For a checkpoint, the model that it was trained from; None: the one that it names, if that is on this machine.

    Raises:
        FileNotFoundError: There is nothing that loads.
        ValueError: The checkpoint is not one of a student, or there is a student without a checkpoint.
    """
    path = Path(reference).expanduser()
    if path.suffix == ".ckpt":
        from models.loading.checkpoint import load_student_checkpoint  # heavy: the whole of Lightning

        return load_student_checkpoint(path, student)
    if student is not None:
        raise ValueError(f"expected a .ckpt file beside --student, found {reference!r}; leave --student out")
    return load_student(reference)


if __name__ == "__main__":
    sys.exit(main())
