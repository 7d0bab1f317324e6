"""The screen of a command: other libraries' noise is filtered, and an error is one sentence, not a stack.

Importing this module silences torchao, which transformers imports wherever it is installed: its missing kernels of
other GPUs and its own deprecations.  So the packages import this module before anything else.
"""

import errno
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec

for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)

# Known, harmless on purpose, and otherwise the first thing a newcomer reads.
WARNINGS = (
    "The '.*dataloader' does not have many workers",  # batches are tokenised in advance: workers would only cost memory
    "The number of training batches .* is smaller than the logging interval",  # of an epoch; the command line sees to the run's
    "Found .* module.* in eval mode at the start of training",  # torchmetrics and frozen parts are meant to be
    "Precision .* is not supported by the model summary",  # the summary's sizes in MB, not ours
    "The dirpath has changed from",  # a resumed run has a folder of its own
    "Experiment logs directory .* exists and is not empty",  # the quickstart's, which holds its teacher
    "It is recommended to use .*sync_dist=True",  # our metrics are already those of all devices
    "'set_vital' is deprecated",  # torchdata
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # lightning
)
# Lightning's information that says nothing about this run, or that the run's own first and last lines say.
LINES = (
    "Seed set to",
    "Using bfloat16 Automatic Mixed Precision",
    "GPU available",
    "TPU available",
    "Tip: For seamless",
    "`Trainer.fit` stopped: `max_steps",
)


@contextmanager
def quiet_program() -> Iterator[None]:
    """For the time of a program: none of these, no bars of transformers, and log lines above a bar, not in it."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    if "transformers" in sys.modules:  # a program without it need not wait for it
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # of reading and writing weights
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    speakers = [logging.getLogger(name) for name in ("lightning.fabric", "lightning.pytorch", "transformers")]
    for handler in [handler for speaker in speakers for handler in speaker.handlers]:
        handler.addFilter(_is_of_use)
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    with logging_redirect_tqdm(speakers) if sys.stderr.isatty() else nullcontext():
        yield


def _is_of_use(record: logging.LogRecord) -> bool:
    return not any(line in record.getMessage() for line in LINES)


_Arguments = ParamSpec("_Arguments")
USER_ERRORS = (ValueError, OSError, ModuleNotFoundError, MemoryError)
"""What the user can mend, or the machine lacks; anything else is our mistake and shows its stack."""
_TO_DO = {
    errno.EACCES: "choose one that you may use, or change its permissions",
    errno.EPERM: "choose one that you may use, or change its permissions",
    errno.EROFS: "choose one on a disk that can be written to",
    errno.ENOSPC: "free some space, and start again",
    errno.EDQUOT: "free some space, and start again",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "name a folder, not a file",
    errno.ENAMETOOLONG: "choose a shorter one",
}


def as_command(main: Callable[_Arguments, int | None]) -> Callable[_Arguments, int]:
    """Make a main function one for people: quiet, and a user's mistake is one sentence on standard error and exit code 2.

    What returns None ended well.  With `POTSTILL_DEBUG=1` an error shows its stack.
    """

    @wraps(main)
    def run(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> int:
        with quiet_program():
            try:
                return main(*arguments, **named) or 0
            except KeyboardInterrupt:
                return 128 + signal.SIGINT
            except Exception as error:
                if os.environ.get("POTSTILL_DEBUG") or not (isinstance(error, USER_ERRORS) or lacks_memory(error)):
                    raise
                said = sentence(error)
                print(f"error: {said}", file=sys.stderr)
                if not said.startswith("expected"):
                    print("(POTSTILL_DEBUG=1 shows where it comes from)", file=sys.stderr)
                return 2

    return run


def sentence(error: BaseException) -> str:
    """What was expected, what was found and what to do: ours as it is, the system's and the allocator's in our words."""
    said = one_sentence(str(error))
    if lacks_memory(error):
        return f"expected enough memory, found none left ({said[:120]}); take a smaller batch, prompt or model, or a larger machine"
    if isinstance(error, OSError) and error.errno is not None:
        where = f" at {os.fspath(error.filename)!r}" if isinstance(error.filename, str | os.PathLike) else ""
        to_do = _TO_DO.get(error.errno, "check the path")
        return f"expected a file or folder that is usable{where}, found: {error.strerror}; {to_do}"
    return said


def one_sentence(message: str) -> str:
    """A message in one line; ours alone, where a parser lists it among the types that it tried."""
    ours = re.search(r"^ *- (expected .*found .*)$", message, re.MULTILINE)
    return ours[1] if ours else " ".join(message.split())


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is about memory; torch's is a RuntimeError on a CPU, and one of its own on a GPU."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))
    )
