"""Silence what torchao says when it is imported: kernels of other GPUs that it has not got, and its own deprecations.

transformers imports torchao wherever it is installed, so every program of this project would begin with these lines.  The
packages import this module before anything else does.
"""

import logging

for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
