"""Verification: exactness layer by layer, and a free run that is as good as the torch model; docs/verification.md derives both."""

from export.verify.everything import Extent, Verification, verify_artefacts
from export.verify.exactness import verify
from export.verify.faithfulness import check_tokens
from export.verify.served import HeldOut

__all__ = ["Extent", "HeldOut", "Verification", "check_tokens", "verify", "verify_artefacts"]
