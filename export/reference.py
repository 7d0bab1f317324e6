"""The torch side of verification: one greedy run of the model, recorded step by step.

Every runtime under test is fed the tokens of this run, so that all see the same inputs at every step.

Letters: B batch, T new tokens, S all tokens so far, G key/value groups, E head width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from export.runtime import position_ids
from export.trace import cache_tensors
from models.forward import inference_copy
from models.losses import forward_kl
from models.pruning.observe import hooked
from models.quantization.cache import cache_scales
from models.quantization.formats import format_of
from models.quantization.kernels import kernel_block, rounded_in_blocks
from models.quantization.linear import quantized_linears, rounds_inputs
from models.quantization.quantizers import InputQuantizer, RowQuantizer
from models.renamed import CACHE


@dataclass
class Step:
    """One forward pass: the prompts first, then one token a step.

    Attributes:
        input_ids: (B, T).
        attention_mask: (B, S).
        logits: (B, T, V), float32.
        cache: The T new entries (B, G, T, E) of each layer's keys and values: key, value, key, value, ...
        quantizer_inputs: What entered each activation quantizer, (B, T, features), or (B, G, T, E) for keys and values, by its name.
    """

    input_ids: Tensor
    attention_mask: Tensor
    logits: Tensor
    cache: list[Tensor]
    quantizer_inputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def valid(self) -> Tensor:
        """(B, T): True at tokens, False at padding."""
        return self.attention_mask[:, -self.input_ids.shape[1] :].bool()


@dataclass
class Reference:
    """A recorded run.

    Attributes:
        steps: The prompts, then every decoded token.
        cache_scales: Of quantized keys and values: key, value, key, value, ...; empty where the cache holds no codes.
        sensitivity: Only for models that round inputs: mean KL in nats between the model and itself with embeddings nudged in their
            last float16 digit.  (Smaller nudges down to the last float32 digits end up nearly as far away.)
        kernel_rounding: Only for models with layers of which weights alone are rounded: mean KL in nats between the model and itself with
            the inputs of these layers rounded to 8 bits in blocks, as ONNX Runtime's fast kernels round them.
    """

    steps: list[Step]
    cache_scales: list[float] = field(default_factory=list)
    sensitivity: float | None = None
    kernel_rounding: float | None = None


@torch.no_grad()
def record(
    model: PreTrainedModel,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    *,
    decode_steps: int,
    on_step: Callable[[], None] = lambda: None,
) -> Reference:
    """Run left-padded prompts and `decode_steps` greedy tokens through a model on its own device in its own precision."""
    threads = torch.get_num_threads()
    model = inference_copy(model, model.dtype)
    # Steps are short: a thread that waits for a core held by another process costs more than it brings.
    torch.set_num_threads(max(1, threads - 1))
    cache = DynamicCache()
    input_ids, mask_BS = input_ids_BT, attention_mask_BT
    steps: list[Step] = []
    with _recorded_quantizer_inputs(model) as quantizer_inputs:
        for _ in range(decode_steps + 1):
            num_new = input_ids.shape[1]
            output = model(
                input_ids=input_ids,
                attention_mask=mask_BS,
                position_ids=position_ids(mask_BS, num_new),
                use_cache=True,
                **{CACHE: cache},
            )
            entries = [tensor[:, :, -num_new:].clone() for tensor in cache_tensors(cache)]
            steps.append(Step(input_ids, mask_BS, output.logits.float(), entries, dict(quantizer_inputs)))
            quantizer_inputs.clear()
            input_ids = output.logits[:, -1:].argmax(dim=-1)
            mask_BS = torch.cat([mask_BS, torch.ones_like(input_ids)], dim=1)
            on_step()
    sensitivity = _sensitivity(model, steps) if rounds_inputs(model) else None
    kernel_rounding = _kernel_rounding(model, steps)
    torch.set_num_threads(threads)
    return Reference(steps, cache_scales(model), sensitivity, kernel_rounding)


@contextmanager
def _recorded_quantizer_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    recorded: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            recorded[name] = inputs[0]

        return hook

    with hooked(
        module.register_forward_pre_hook(recorder(name))
        for name, module in model.named_modules()
        if isinstance(module, InputQuantizer | RowQuantizer)
    ):
        yield recorded


def _sensitivity(model: PreTrainedModel, steps: list[Step]) -> float:
    """See `Reference.sensitivity`; the mean over two nudges."""
    embeddings = model.get_input_embeddings()
    generator = torch.Generator(device=embeddings.weight.device).manual_seed(0)  # type: ignore[arg-type]

    def nudge(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)
        return output * (1 + 2.0**-11 * noise)

    exact_NV = _all_logits(model, steps)
    with hooked([embeddings.register_forward_hook(nudge)]):
        return sum(forward_kl(_all_logits(model, steps), exact_NV).mean().item() for _ in range(2)) / 2


def _kernel_rounding(model: PreTrainedModel, steps: list[Step]) -> float | None:
    """See `Reference.kernel_rounding`."""
    weights_alone = {
        linear: kernel_block(format_of(linear.format).weight)
        for linear in quantized_linears(model).values()
        if linear.input_quantizer is None
    }
    if not weights_alone:
        return None

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return rounded_in_blocks(inputs[0], weights_alone[module])  # type: ignore[index]

    exact_NV = _all_logits(model, steps)
    with hooked(linear.register_forward_pre_hook(hook) for linear in weights_alone):
        return forward_kl(_all_logits(model, steps), exact_NV).mean().item()


def _all_logits(model: PreTrainedModel, steps: list[Step]) -> Tensor:
    """Logits (N, V) at all valid tokens of a run, in one pass."""
    input_ids_BS = torch.cat([step.input_ids for step in steps], dim=1)
    mask_BS = steps[-1].attention_mask
    positions = position_ids(mask_BS, mask_BS.shape[1])
    output = model(input_ids=input_ids_BS, attention_mask=mask_BS, position_ids=positions, use_cache=False)
    return output.logits[mask_BS.bool()]
