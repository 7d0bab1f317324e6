"""Bounds on the difference between two correct computations of the same layer, derived from the arithmetic of the graph.

Verification feeds every product of a graph with torch's values (`taps.py`), so what is compared is a handful of operators: a norm, an
attention, an activation, a product.  Between them nothing is rounded to a grid, so their result is a smooth function of their inputs, and
rounding moves it by what the standard model of floating point arithmetic says: each operator returns its exact result times
1 + d, |d| <= u, with unit roundoff u = 2^-24 (float32) or 2^-11 (float16), plus half of the smallest positive number where results are
tiny.  A product of n terms reads inputs and weights of the graph's type and adds up in float32; its error grows as sqrt(n) times u
of float32 (Higham and Mary 2019, "A New Approach to Probabilistic Rounding Error Analysis", theorem 2.4: with independent
rounding errors of mean zero, beyond lambda sqrt(n) u with a probability of 2 exp(-lambda^2 (1 - u)^2 / 2) at most).

How these d reach a layer's result depends on the weights and on the data (cancellation, attention scores of 64 and more), so they
are not bounded on paper but drawn: each layer of the torch model runs again with every operator's result multiplied by 1 + u x,
x standard normal (Monte Carlo arithmetic: Parker 1997; Frechtling and Leong 2015).  That is at least 1.7 times too much: a rounding error
within +-u has a standard deviation of u / sqrt(3) at most.  The largest distance over all tokens and draws is what rounding *explains*
at a place; see `exactness.py` for the bound, a multiple of it, and docs/verification.md for measured rates.

Letters: B batch, S tokens, D features.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from export.onnx_graph.trace import cache_names
from export.sessions.onnx_session import position_ids
from export.verify.checks import distances
from models.architecture import CACHE, decoder_layers, head_name
from models.calibration.observe import hooked
from models.quantization.linear import FakeQuantizedLinear
from models.quantization.quantizers import InputQuantizer

DRAWS = 2
_HEAD_TOKENS = 16  # the head is one product: a few tokens say what its errors are
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
# Operators that hand numbers on as they are, or whose results are masks and sizes.
# fmt: off
_EXACT = {
    "_to_copy", "_unsafe_view", "abs", "alias", "amax", "any", "arange", "bitwise_and", "cat", "clone",
    "copy_", "detach", "embedding", "empty", "fill", "full", "gather", "gt", "index", "index_select",
    "lift_fresh", "masked_fill", "max", "neg", "ones", "relu", "repeat", "scalar_tensor", "slice_scatter",
    "stack", "where", "zeros",
}
# fmt: on


@dataclass(frozen=True)
class Arithmetic:
    """The numbers between a graph's products.

    Attributes:
        unit: Unit roundoff.
        smallest: Half of the smallest positive number: the error of a result that is tiny.
    """

    unit: float
    smallest: float


FLOAT32 = Arithmetic(2.0**-24, 0.0)
FLOAT16 = Arithmetic(2.0**-11, 2.0**-25)


@torch.no_grad()
def explained_by_rounding(
    model: PreTrainedModel,
    input_ids_BS: Tensor,
    attention_mask_BS: Tensor,
    arithmetic: Arithmetic,
    *,
    layers: Collection[int] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """The largest relative distance of a token that rounding explains, by place.

    Args:
        model: The torch model in float32, in evaluation mode.
        input_ids_BS: Left-padded texts.
        attention_mask_BS: 1 for tokens, 0 for padding.
        arithmetic: That of the graph.
        layers: Decoder layers to look at, each by itself and without the head; None: all of them on one residual stream, and the head.
        seed: Of the draws.

    Returns:
        `{module} reads` and `{module} gives` (its product, without a bias) of linear layers, `present.{layer}.key|value` of new entries
        in the cache; distances are euclidean over a token's features, relative to torch's own length.  `{head} gives at most` is that of the
        worst logit, relative to the same length.
    """
    run = _NoisyRun(model, attention_mask_BS.bool(), arithmetic, layers, seed)
    with _eager_attention(model), run.watching():
        model.model(
            input_ids=input_ids_BS,
            attention_mask=attention_mask_BS,
            position_ids=position_ids(attention_mask_BS, input_ids_BS.shape[1]),
            use_cache=True,
            **{CACHE: run.cache},
        )
    return run.found


class _NoisyRun:
    """A forward pass in which every decoder layer runs again with rounding errors, fed with the exact pass's values at its products."""

    def __init__(
        self,
        model: PreTrainedModel,
        valid_BS: Tensor,
        arithmetic: Arithmetic,
        layers: Collection[int] | None,
        seed: int,
    ) -> None:
        self.found: dict[str, float] = {}
        self.cache = DynamicCache()
        self._model, self._valid_BS, self._layers = model, valid_BS, layers
        self._errors = _RoundingErrors(arithmetic, torch.Generator(model.device).manual_seed(seed))
        self._streams: list[Tensor] = []
        self._exact: dict[str, Tensor] = {}
        self._again = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook in; the model is as before afterwards."""
        fed = fed_modules(self._model, self._layers)
        handles = [module.register_forward_pre_hook(self._keep(name)) for name, module in fed]
        handles += [
            layer.block.register_forward_hook(self._repeat(layer.index), with_kwargs=True)
            for layer in decoder_layers(self._model)
            if self._layers is None or layer.index in self._layers
        ]
        if self._layers is None:
            handles.append(self._model.model.norm.register_forward_hook(self._end))
        with hooked(handles):
            yield

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not self._again:
                self._exact[name] = inputs[0]

        return hook

    def _repeat(self, index: int) -> Callable[..., None]:
        """Behind a layer: run it again, once for each draw."""

        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if self._layers is not None or not self._streams:
                self._streams = [self._errors.rounded(hidden) for _ in range(DRAWS)]
            self._again = True
            with self._fed(f"model.layers.{index}.", block), self._errors:
                for draw, stream in enumerate(self._streams):
                    again = kwargs | {CACHE: _Entries(self, index)}
                    if args:
                        result = block.forward(stream, *args[1:], **again)
                    else:
                        result = block.forward(**(again | {"hidden_states": stream}))
                    self._streams[draw] = result[0] if isinstance(result, tuple) else result
            self._again = False
            self._exact.clear()

        return hook

    def _end(self, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Behind the last norm: what the head reads, and its product for a few tokens."""
        if self._again:
            return
        self._again = True
        name = head_name(self._model)
        with self._errors:
            for stream in self._streams:
                self.note(f"{name} reads", norm.forward(stream), output)
        self._again = False
        head, some_ND = self._model.get_output_embeddings(), output[self._valid_BS][-_HEAD_TOKENS:]
        for _ in range(DRAWS):
            noisy_NV, exact_NV = self._errors.product(head, some_ND)
            self._note(f"{name} gives", noisy_NV, exact_NV)
            self._note(f"{name} gives at most", noisy_NV, exact_NV, order=torch.inf)

    @contextmanager
    def _fed(self, prefix: str, block: nn.Module) -> Iterator[None]:
        """Let every product of a layer read the exact pass's value; what it would have read is noted."""
        with ExitStack() as stack:
            for full, exact in self._exact.items():
                module = block.get_submodule(full.removeprefix(prefix))
                module.forward = self._reading(full, module, exact)  # type: ignore[method-assign]
                stack.callback(delattr, module, "forward")
            yield

    def _reading(self, name: str, module: Any, exact: Tensor) -> Callable[[Tensor], Tensor]:
        def forward(noisy: Tensor) -> Tensor:
            with self._errors.suspended():
                self.note(f"{name} reads", noisy, exact)
                if isinstance(module, InputQuantizer):
                    return module.quantize(exact)
                ours, theirs = self._errors.product(module, exact)
                self.note(f"{name} gives", ours, theirs)
                return ours if module.bias is None else ours + module.bias

        return forward

    def note(self, name: str, noisy: Tensor, exact: Tensor) -> None:
        """Compare at tokens; keys and values are (B, G, S, E)."""
        with self._errors.suspended():
            if noisy.dim() == 4:
                noisy, exact = (tensor.transpose(1, 2).flatten(2) for tensor in (noisy, exact))
            self._note(name, noisy[self._valid_BS], exact[self._valid_BS])

    def _note(self, name: str, noisy_ND: Tensor, exact_ND: Tensor, order: float = 2.0) -> None:
        self.found[name] = max(self.found.get(name, 0.0), float(distances(noisy_ND, exact_ND, order).amax()))


class _Entries:
    """Takes the place of the cache while a layer runs again."""

    def __init__(self, run: _NoisyRun, index: int) -> None:
        self._run, self._index = run, index

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Compare new entries with those of the exact pass."""
        exact: Any = self._run.cache.layers[self._index]
        names = cache_names("present", self._index + 1)[-2:]
        for name, noisy, theirs in zip(names, (key, value), (exact.keys, exact.values), strict=True):
            self._run.note(name, noisy, theirs)
        return key, value


class _RoundingErrors(TorchDispatchMode):
    """Multiplies the result of every operator by 1 + u x, and the inputs of products as their sums ask for."""

    def __init__(self, arithmetic: Arithmetic, generator: torch.Generator) -> None:
        super().__init__()
        self._arithmetic, self._generator, self._active = arithmetic, generator, True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute exactly, then round."""
        name = func.overloadpacket.__name__
        if self._active and name in _PRODUCTS:
            args = list(args)
            at = 1 if name in ("addmm", "baddbmm") else 0
            args[at] = self._inputs(args[at])
        result = func(*args, **(kwargs or {}))
        if not self._active or func.is_view or name in _EXACT or not isinstance(result, Tensor):
            return result
        return self.rounded(result) if result.is_floating_point() else result

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Compute exactly for a while."""
        before, self._active = self._active, False
        yield
        self._active = before

    def rounded(self, x: Tensor) -> Tensor:
        """A result with the error of its last digit."""
        noise = torch.randn(x.shape, generator=self._generator, device=x.device, dtype=x.dtype)
        rounded = torch.addcmul(x, x, noise, value=self._arithmetic.unit)
        if self._arithmetic.smallest:
            rounded.add_(noise, alpha=self._arithmetic.smallest)
        return rounded.clamp_(min=torch.finfo(x.dtype).min)  # scores of masked positions are there already

    def product(self, linear: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """The product of a layer, without its bias, with rounding errors and without; what it reads lies on its grid."""
        x, weight = operands(linear, x)
        return self.rounded(F.linear(self._inputs(x), weight)), F.linear(x, weight)

    def _inputs(self, x: Tensor) -> Tensor:
        """Inputs with errors that do to a sum what those of inputs, weights and additions do together."""
        size = (2 * self._arithmetic.unit**2 + x.shape[-1] / 2 * FLOAT32.unit**2) ** 0.5
        noise = torch.randn(x.shape, generator=self._generator, device=x.device, dtype=x.dtype)
        return torch.addcmul(x, x, noise, value=size)


def fed_modules(model: PreTrainedModel, layers: Collection[int] | None) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and quantizers of keys and values of these decoder layers (None: all), by name: what is fed."""
    for layer in decoder_layers(model):
        for name, module in layer.block.named_modules() if layers is None or layer.index in layers else ():
            is_fed = isinstance(module, nn.Linear | FakeQuantizedLinear | InputQuantizer)
            if is_fed and not name.endswith("input_quantizer"):
                yield f"model.layers.{layer.index}.{name}", module


def operands(linear: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides of a linear layer's product, on their grids if it has any."""
    if not isinstance(linear, FakeQuantizedLinear):
        return x, linear.weight
    x = x if linear.input_quantizer is None else linear.input_quantizer(x)
    return x, linear.weight_quantizer(linear.weight)


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention operator by operator, so that each one's rounding counts."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before
