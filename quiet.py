"""What other libraries say on a user's screen, and what of it stays unsaid: a program's own words come through.

Importing this module silences torchao: kernels of other GPUs that it has not got, and its own deprecations.  transformers imports
it wherever it is installed, so every program of this project would begin with these lines.  The packages import this module before
anything else does.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

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
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # of reading and writing weights
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    speakers = [logging.getLogger(name) for name in ("lightning.fabric", "lightning.pytorch", "transformers")]
    for speaker in speakers:
        for handler in speaker.handlers:
            handler.addFilter(_is_of_use)
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    with logging_redirect_tqdm(speakers) if sys.stderr.isatty() else nullcontext():
        yield


def _is_of_use(record: logging.LogRecord) -> bool:
    return not any(line in record.getMessage() for line in LINES)
