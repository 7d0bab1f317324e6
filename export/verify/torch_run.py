"""The torch side of a comparison: prompts and tokens behind them, with all that a graph is fed and compared with.

Letters: B batch, T new tokens, S all tokens so far, L positions with logits, G key/value groups, E head width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from export.onnx_graph.to_onnx import rope_types
from export.onnx_graph.trace import cache_tensors
from export.sessions.onnx_session import position_ids
from export.verify.rounding import FLOAT16, FLOAT32, explained_by_rounding, fed_modules
from models.architecture import CACHE, head_name
from models.calibration.observe import hooked
from models.losses.output_head import logits_of
from models.quantization.quantizers import InputQuantizer

_EXPLAINED_TOKENS = 256  # of the prompts: enough for every kind of token, few enough to draw errors for in seconds
_TOKENS_AT_ONCE = 8  # of torch behind the prompts: its weights are read once for all of them


@dataclass
class Step:
    """One forward pass of torch: the prompts first, then a few tokens behind them.

    Attributes:
        input_ids: (B, T).
        attention_mask: (B, S).
        reads: What entered each linear layer, (B, T, features), and each quantizer of keys and values, (B, G, T, E).
        gives: The products of linear layers behind the prompts, where torch adds no bias to them, (B, T, features).
        cache: The T new entries (B, G, T, E) of each layer: key, value, key, value, ...
        logits: (B, L, V): of the last position of the prompts, of all T tokens behind them; None without the head.
        first: Whether these are the prompts, which a graph takes at once; other tokens it takes one by one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    reads: dict[str, Tensor]
    gives: dict[str, Tensor]
    cache: list[Tensor]
    logits: Tensor | None
    first: bool

    @property
    def valid(self) -> Tensor:
        """(B, T): True at tokens, False at padding."""
        return self.attention_mask[:, -self.input_ids.shape[1] :].bool()


@dataclass
class Run:
    """Prompts and tokens behind them (those of the prompts, over again), run through torch once for each artefact.

    Attributes:
        model: The torch model in float32, in evaluation mode.
        prompt_ids_BT: Left padded.
        prompt_mask_BT: 1 for tokens, 0 for padding.
        decode_steps: Tokens behind the prompts.
        layers: Decoder layers that are looked at, without the head; None: all, and the head.
    """

    model: PreTrainedModel
    prompt_ids_BT: Tensor
    prompt_mask_BT: Tensor
    decode_steps: int = 0
    layers: Sequence[int] | None = None
    _explained: dict[bool, dict[str, float]] = field(default_factory=dict)

    @torch.no_grad()
    def steps(self) -> Iterator[Step]:
        """Torch's steps."""
        cache, mask_BS = DynamicCache(), self.prompt_mask_BT
        for number, input_ids in enumerate(self._tokens()):
            num_new = input_ids.shape[1]
            if number:
                mask_BS = torch.cat([mask_BS, torch.ones_like(input_ids)], dim=1)
            reads, gives = dict[str, Tensor](), dict[str, Tensor]()
            with _kept(self.model, reads, gives if number else None, self.layers):
                hidden_BTD = self.model.model(
                    input_ids=input_ids,
                    attention_mask=mask_BS,
                    position_ids=position_ids(mask_BS, num_new),
                    use_cache=True,
                    **{CACHE: cache},
                ).last_hidden_state
            logits_BLV = None
            if self.layers is None:
                reads[head_name(self.model)] = hidden_BTD
                logits_BLV = logits_of(self.model, hidden_BTD if number else hidden_BTD[:, -1:]).float()
            entries = [tensor[:, :, -num_new:] for tensor in cache_tensors(cache)]
            yield Step(input_ids, mask_BS, reads, gives, entries, logits_BLV, not number)

    def _tokens(self) -> Iterator[Tensor]:
        """The prompts, then what follows, a few tokens at a time."""
        yield self.prompt_ids_BT
        rows = [ids_T[mask_T] for ids_T, mask_T in zip(self.prompt_ids_BT, self.prompt_mask_BT.bool(), strict=True)]
        behind_BT = torch.stack([row.repeat(-(-self.decode_steps // len(row)))[: self.decode_steps] for row in rows])
        if self.decode_steps:
            # Angles of longrope go by the longest position of a call.
            at_once = 1 if "longrope" in rope_types(self.model) else _TOKENS_AT_ONCE
            yield from behind_BT.split(at_once, dim=1)

    def explained(self, *, half: bool) -> dict[str, float]:
        """What rounding explains at each place, drawn on the prompts."""
        if half not in self._explained:
            rows = max(1, _EXPLAINED_TOKENS // self.prompt_ids_BT.shape[1])
            self._explained[half] = explained_by_rounding(
                self.model,
                self.prompt_ids_BT[:rows],
                self.prompt_mask_BT[:rows],
                FLOAT16 if half else FLOAT32,
                layers=self.layers,
            )
        return self._explained[half]


@contextmanager
def _kept(
    model: PreTrainedModel, reads: dict[str, Tensor], gives: dict[str, Tensor] | None, layers: Sequence[int] | None
) -> Iterator[None]:
    """Keep what enters every linear layer of the decoder and every quantizer of keys and values, and products if they are wanted."""

    def read(name: str) -> Callable[..., None]:
        return lambda module, inputs: reads.__setitem__(name, inputs[0])

    def given(name: str, gives: dict[str, Tensor]) -> Callable[..., None]:
        return lambda module, inputs, output: gives.__setitem__(name, output)

    handles = []
    for name, module in fed_modules(model, layers):
        handles.append(module.register_forward_pre_hook(read(name)))
        if gives is not None and not isinstance(module, InputQuantizer) and module.bias is None:
            handles.append(module.register_forward_hook(given(name, gives)))
    with hooked(handles):
        yield
