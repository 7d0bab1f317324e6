"""A torch model with the interface of `OnnxSession`: what scores or decodes in ONNX Runtime does so in torch.

Letters as in `export/sessions/session.py`.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from export.onnx_graph.trace import cache_tensors
from export.sessions.session import Output, position_ids
from models.architecture import CACHE


class TorchSession:
    """Runs a model, on any device and in any type, in evaluation mode, with the logits of the last position only."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()

    @torch.inference_mode()
    def run(self, input_ids_BT: Tensor, attention_mask_BS: Tensor, cache: list[Tensor] | None = None) -> Output:
        """Process T new tokens; see `OnnxSession.run`.  `logits` is (B, 1, V), on the model's device."""
        ids_BT, mask_BS = input_ids_BT.to(self.model.device), attention_mask_BS.to(self.model.device)
        past = [] if cache is None else list(zip(cache[::2], cache[1::2], strict=True))
        output = self.model(
            input_ids=ids_BT,
            attention_mask=mask_BS,
            position_ids=position_ids(mask_BS, ids_BT.shape[1]),
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: DynamicCache(past)},
        )
        return Output(output.logits, cache_tensors(output[CACHE]), {})

    def repeat(self, cache: list[Tensor], batch: int) -> list[Tensor]:
        """The cache of one conversation for B conversations; nothing is copied before it is continued."""
        return [tensor.expand(batch, -1, -1, -1) for tensor in cache]
