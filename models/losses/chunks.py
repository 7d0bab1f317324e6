"""Building blocks of the chunked loss: a model's logits a chunk at a time, and gradients that are summed over chunks.

Matrix products run in autocast's dtype where autocast is on, else in the hidden states' own; logits and their gradient are
float32 (float64 for float64), and gradients of weight and bias are summed in that.

Legend: N answer tokens, C tokens of a chunk, V vocabulary, D hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.losses.output_head import Head

ROWS = 2048  # of the weight's gradient, at a time, where products are in half precision


class ChunkedLogits:
    """Logits of one model over the first tokens of its vocabulary, a chunk at a time; nothing is differentiable.

    Args:
        hidden_ND: Final hidden states.
        head: The model's head.
        vocabulary: Tokens that take part.
    """

    def __init__(self, hidden_ND: Tensor, head: Head, vocabulary: int) -> None:
        device, dtype = hidden_ND.device.type, hidden_ND.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        self.dtype = dtype
        self.exact_dtype = torch.promote_types(dtype, torch.float32)
        self.hidden_ND = hidden_ND.detach()
        with torch.no_grad():
            self.head = head.cut(vocabulary, dtype)

    def hidden(self, rows: slice) -> Tensor:
        """Hidden states of a chunk in the dtype of matrix products."""
        return self.hidden_ND[rows].to(self.dtype)

    def logits(self, rows: slice) -> Tensor:
        """Logits of a chunk, shape (C, V), float32 or float64."""
        with torch.no_grad(), torch.autocast(self.hidden_ND.device.type, enabled=False):
            products_CV = F.linear(self.hidden(rows), self.head.weight_VD, self.head.bias_V)
            return self.head.shape_logits(products_CV.to(self.exact_dtype))


class Gradients:
    """d/d hidden, d/d weight and d/d bias; only those wanted.

    Args:
        student: Where the chunks come from.
        head: The student's head as the optimizer sees it, with all rows and in its own dtype.
        wanted: Whether the gradient of hidden states, weight and bias is wanted.
    """

    def __init__(self, student: ChunkedLogits, head: Head, wanted: Sequence[bool]) -> None:
        self.student = student
        self.inputs = (student.hidden_ND, head.weight_VD, head.bias_V)
        dtypes = (student.hidden_ND.dtype, student.exact_dtype, student.exact_dtype)
        self.hidden_ND, self.weight_VD, self.bias_V = (
            torch.zeros_like(tensor, dtype=dtype) if want and tensor is not None else None
            for tensor, dtype, want in zip(self.inputs, dtypes, wanted, strict=True)
        )

    def add(self, rows: slice, gradient_CV: Tensor) -> None:
        """Take in d/d matrix product of one chunk."""
        student, vocabulary = self.student, gradient_CV.shape[1]
        with torch.no_grad(), torch.autocast(gradient_CV.device.type, enabled=False):
            if self.bias_V is not None:
                self.bias_V[:vocabulary] += gradient_CV.sum(0)
            gradient_CV = gradient_CV.to(student.dtype)
            if self.hidden_ND is not None:
                self.hidden_ND[rows] = gradient_CV @ student.head.weight_VD
            if self.weight_VD is None:
                return
            hidden_CD = student.hidden(rows)
            if student.dtype == self.weight_VD.dtype:
                self.weight_VD[:vocabulary].addmm_(gradient_CV.T, hidden_CD)
                return
            for start in range(0, vocabulary, ROWS):  # so that the product, before it is added, stays in cache
                part = slice(start, min(start + ROWS, vocabulary))
                self.weight_VD[part] += gradient_CV[:, part].T @ hidden_CD

    def of_inputs(self) -> list[Tensor | None]:
        """Gradients of hidden states, weight and bias, each in its input's dtype."""
        sums = (self.hidden_ND, self.weight_VD, self.bias_V)
        return [
            None if total is None or tensor is None else total.to(tensor.dtype)
            for total, tensor in zip(sums, self.inputs, strict=True)
        ]


class KnownGradients(torch.autograd.Function):
    """A scalar whose gradients are known; `backward` scales them in place, so it can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: Sequence[Tensor | None], *inputs: Tensor | None) -> Tensor:
        """The scalar, connected to its inputs."""
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times the incoming one."""
        if ctx.gradients is None:
            raise RuntimeError(
                "expected one backward pass through linear_objective, found a second; add losses up and call backward once"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if total is None else total.mul_(upstream) for total in gradients)
