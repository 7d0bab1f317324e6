"""The last step of a language model, from final hidden states to logits, as data.

Legend: N tokens, V vocabulary, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from models.calibration.observe import evaluating
from models.quantization.linear import FakeQuantizedLinear

#: Logits that are held at once where their gradients are not needed in closed form: 32 MiB in float32, and a few copies of that.
LOGITS_AT_ONCE = 2**23


@dataclass(frozen=True)
class Head:
    """logits = soft_cap * tanh(scale * (hidden W^T + bias) / soft_cap), without the parts that a model lacks.

    Attributes:
        weight_VD: The output matrix; a tied one is the embedding's own `Parameter`, so both uses add their gradients.  Of a quantized head
            it is the rounded one, which passes its gradient on.
        bias_V: Its bias.
        scale: Factor on the logits (Cohere, Granite).
        soft_cap: Bound on the logits' magnitude (Gemma).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def logits(self, hidden_ND: Tensor, vocabulary: int | None = None) -> Tensor:
        """Logits of the first `vocabulary` tokens (default: all), shape (N, V), in the dtype of the hidden states."""
        head = self.cut(vocabulary, hidden_ND.dtype)
        return head.shape_logits(F.linear(hidden_ND, head.weight_VD, head.bias_V))

    def cut(self, vocabulary: int | None, dtype: torch.dtype) -> "Head":
        """The head of the first `vocabulary` tokens in another dtype; a view where the dtype is the same."""
        bias_V = None if self.bias_V is None else self.bias_V[:vocabulary].to(dtype)
        return Head(self.weight_VD[:vocabulary].to(dtype), bias_V, self.scale, self.soft_cap)

    def shape_logits(self, products_NV: Tensor) -> Tensor:
        """Scale and soft cap: from the matrix product (with bias) to logits."""
        logits_NV = products_NV if self.scale == 1 else products_NV * self.scale
        return logits_NV if self.soft_cap is None else self.soft_cap * torch.tanh(logits_NV / self.soft_cap)

    def slope(self, logits_NV: Tensor) -> Tensor | float | None:
        """Derivative of each logit with respect to its matrix product; None where it is 1."""
        if self.soft_cap is None:
            return None if self.scale == 1 else self.scale
        return (logits_NV / self.soft_cap).square_().neg_().add_(1).mul_(self.scale)


@dataclass(frozen=True)
class LazyLogits:
    """Logits (N, V) that are computed some rows at a time: those of 16,384 tokens of a vocabulary of 151,936 are 10 GB in float32.

    Attributes:
        hidden_ND: Final hidden states.
        of: Logits of some of them.
        vocabulary: Tokens that take part: the first so many, of which there may be fewer.
    """

    hidden_ND: Tensor
    of: Callable[[Tensor], Tensor]
    vocabulary: int

    def __len__(self) -> int:
        return len(self.hidden_ND)

    def __getitem__(self, rows: slice) -> Tensor:
        """Logits of some rows, (rows, V)."""
        return self.of(self.hidden_ND[rows])[:, : self.vocabulary]


def pieces_of(num_rows: int, vocabulary: int) -> list[slice]:
    """Rows of logits that are held at once, see `LOGITS_AT_ONCE`."""
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    return [slice(start, start + size) for start in range(0, num_rows, size)]


def head_of(model: PreTrainedModel) -> Head:
    """The head of a model: its output embedding, and the scale and soft cap that its config names.

    Known are `final_logit_softcapping` (Gemma and kin), `logit_scale` (Cohere: multiplies) and `logits_scaling` (Granite:
    divides).  A family that treats logits in another way is found by `check_head`.

    Raises:
        ValueError: The output embedding is not a linear layer, with its weight quantized or not.
    """
    output: Any = model.get_output_embeddings()
    config = model.config.get_text_config()
    if type(output) is nn.Linear:
        weight_VD = output.weight
    elif isinstance(output, FakeQuantizedLinear) and output.input_quantizer is None:
        weight_VD = output.weight_quantizer(output.weight)
    else:
        raise ValueError(
            f"expected a linear layer as output embedding, with its weight quantized or not, found {type(output).__name__}; leave the head "
            "unwrapped and its inputs unquantized, since the loss multiplies with its weight"
        )
    scale = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)
    return Head(weight_VD, output.bias, scale, getattr(config, "final_logit_softcapping", None))


def logits_of(model: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
    """Logits (N, V) of final hidden states, through the model's own output layer."""
    return head_of(model).shape_logits(model.get_output_embeddings()(hidden_ND))


@torch.no_grad()
def check_head(model: PreTrainedModel, head: Head, *, tolerance: float = 1e-2) -> None:
    """Compare the head's logits with the model's own on a two-token input, relative to the largest logit.

    Raises:
        ValueError: They differ: the family treats its logits in a way that `Head` does not know.
    """
    tokens_BT = torch.tensor([[0, 1]], device=head.weight_VD.device)
    with evaluating(model):
        expected_TV = model(input_ids=tokens_BT, use_cache=False).logits[0].float()
        found_TV = head.logits(model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state[0]).float()
    difference = float((expected_TV - found_TV).abs().max() / expected_TV.abs().max().clamp(min=1e-6))
    if not difference <= tolerance:
        raise ValueError(
            f"expected the logits of {model.config.model_type} to be its head's product with the final hidden states, found a "
            f"relative difference of {difference:.1e}; this family needs a case in models/losses/output_head.py"
        )
