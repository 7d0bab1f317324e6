"""Where training starts from after a solver has chosen the codes of a weight.

A weight that lies on its grid is half a step away from every other code, and an optimizer with small steps never gets there: training
would change nothing.  What the solver rounded off is put back as far as the code stays the same, so the model computes what it computed, and
a weight whose code was a close decision is close to the other one again.

Legend: O outputs, I inputs.
"""

import torch
from torch import Tensor

from models.quantization.quantizers import FakeQuantizer

_HALVINGS = 8


@torch.no_grad()
def within_cells(quantizer: FakeQuantizer, values_OI: Tensor, wanted_OI: Tensor) -> Tensor:
    """The point between values on the grid and wanted ones that is nearest to the latter and still rounds to the former.

    A value on the largest or smallest code stays there if a larger or smaller one was wanted: it could be far from every other code.

    Args:
        quantizer: Frozen.
        values_OI: On its grid.
        wanted_OI: What was to be rounded.
    """
    change_OI = wanted_OI - values_OI
    far = 2 * (values_OI.abs().amax() + wanted_OI.abs().amax())
    is_last_OI = quantizer.quantize(values_OI + far * change_OI.sign()) == values_OI
    change_OI = change_OI.masked_fill(is_last_OI, 0.0)

    def stays(share_OI: Tensor) -> Tensor:
        return quantizer.quantize(values_OI + share_OI * change_OI) == values_OI

    whole_OI = torch.ones_like(change_OI)
    low_OI, high_OI = torch.where(stays(whole_OI), 1.0, 0.0), whole_OI
    for _ in range(_HALVINGS):
        middle_OI = (low_OI + high_OI) / 2
        same_OI = stays(middle_OI)
        low_OI, high_OI = torch.where(same_OI, middle_OI, low_OI), torch.where(same_OI, high_OI, middle_OI)
    return values_OI + low_OI * change_OI
