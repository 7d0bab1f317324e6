"""Keys and values as a cache of 8 bits holds them: rounded once, when they are written, after rotary angles.

transformers hands new keys and values to a cache object inside every attention.  Here a hook puts another one in front of it, which
rounds what passes; so it works for every family, with and without a cache, in training and in `torch.export`.

One calibrated scale for the keys of a layer and one for its values, which is what engines, ONNX Runtime and vLLM take.  Rotary angles
turn pairs of key channels, so at positions beyond those of calibration a channel can become as large as its pair: that is the
magnitude that counts for keys.

Legend: B samples, G key/value groups, T new tokens, K head width.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from models.architecture import CACHE, decoder_layers
from models.quantization.formats import Grid
from models.quantization.quantizers import InputQuantizer

CacheFormat = Literal["fp8_e4m3", "int8"]
CACHE_GRIDS: dict[str, Grid] = {"fp8_e4m3": Grid("fp8_e4m3"), "int8": Grid("int8")}
_NAME = "cache_quantizer"


class KeyQuantizer(InputQuantizer):
    """Quantizer of keys behind rotary angles: it observes the largest magnitude that any position could lead to.

    Args:
        grid: Its grid.
        turned: How many channels of a head the angles turn, in pairs of a first and a second half; the others follow them.
    """

    def __init__(self, grid: Grid, turned: int) -> None:
        super().__init__(grid)
        self.turned = turned

    def _largest(self, x: Tensor) -> Tensor:
        turned, others = x.float().tensor_split([self.turned], dim=-1)
        pairs = torch.hypot(*turned.chunk(2, dim=-1))
        return torch.cat([pairs, others.abs()], dim=-1).amax()


class CacheQuantizer(nn.Module):
    """Quantizers of one layer's keys and values.

    Args:
        format: `fp8_e4m3` or `int8`.
        turned: See `KeyQuantizer`.
    """

    def __init__(self, format: str, turned: int) -> None:
        super().__init__()
        self.format = format
        self.key = KeyQuantizer(CACHE_GRIDS[format], turned)
        self.value = InputQuantizer(CACHE_GRIDS[format])

    def forward(self, key_BGTK: Tensor, value_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Both on their grids."""
        return self.key(key_BGTK), self.value(value_BGTK)


class _RoundingCache:
    """Stands in front of a cache, or of none, for one call of an attention."""

    def __init__(self, quantizer: CacheQuantizer, cache: Any) -> None:
        self._quantizer, self._cache = quantizer, cache

    def update(self, key_BGTK: Tensor, value_BGTK: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention then sees: all keys and values, the new ones rounded."""
        key_BGTK, value_BGTK = self._quantizer(key_BGTK, value_BGTK)
        if self._cache is None:
            return key_BGTK, value_BGTK
        seen: tuple[Tensor, Tensor] = self._cache.update(key_BGTK, value_BGTK, *args, **kwargs)
        return seen


def insert_cache_quantizers(model: PreTrainedModel, optimizers: Sequence[Optimizer] = (), *, format: str) -> None:
    """Let every attention of a decoder round its new keys and values, in place; the quantizers observe at first.

    Raises:
        ValueError: No such format, or a model that has such quantizers.
    """
    if format not in CACHE_GRIDS:
        raise ValueError(
            f"expected a format of the key/value cache among {', '.join(CACHE_GRIDS)}, found {format!r}; choose one"
        )
    if cache_quantizers(model):
        raise ValueError(
            f"expected a model whose key/value cache is in floating point, found one in {cache_format(model)}; give it one format"
        )
    share = (model.config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    for layer in decoder_layers(model):
        attention: Any = layer.attention
        quantizer = CacheQuantizer(format, int(share * layer.head_dim)).train(attention.training)
        setattr(attention, _NAME, quantizer.to(layer.keys.linear.weight.device))
        attention.register_forward_pre_hook(_round_what_is_cached, with_kwargs=True)


def _round_what_is_cached(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    quantizer: Any = getattr(attention, _NAME)
    return args, kwargs | {CACHE: _RoundingCache(quantizer, kwargs.get(CACHE))}


def remove_cache_quantizers(model: PreTrainedModel) -> None:
    """Take the quantizers of keys and values out again, in place."""
    for layer in decoder_layers(model):
        attention: Any = layer.attention
        if hasattr(attention, _NAME):
            delattr(attention, _NAME)
            hooks = attention._forward_pre_hooks
            for number in [number for number, hook in hooks.items() if hook is _round_what_is_cached]:
                del hooks[number], attention._forward_pre_hooks_with_kwargs[number]


def cache_quantizers(model: nn.Module) -> dict[str, CacheQuantizer]:
    """Every layer's by its qualified name; empty where keys and values are not rounded."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CacheQuantizer)}


def cache_format(model: nn.Module) -> str | None:
    """The format of keys and values in the cache; None: floating point."""
    return next((quantizer.format for quantizer in cache_quantizers(model).values()), None)


def cache_scales(model: nn.Module) -> list[float]:
    """Key, value, key, value, ... of one layer after another; empty where they are not rounded."""
    return [
        float(part.scale) for quantizer in cache_quantizers(model).values() for part in (quantizer.key, quantizer.value)
    ]
