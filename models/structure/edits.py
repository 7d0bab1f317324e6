"""Structure is data: every change to a student's modules is an *edit*, a JSON-able dict in an ordered list.

The module saves its list in the checkpoint and replays it before the weights load.  Resume, `validate`,
`load_from_checkpoint` and export all rebuild a student through `replay`, and through nothing else.

| op                   | fields                                | effect                                                         |
|----------------------|---------------------------------------|----------------------------------------------------------------|
| `narrow_mlp`         | `layer`, `keep` (neurons)             | keeps these neurons of a gated MLP                             |
| `narrow_kv_groups`   | `layer`, `keep` (key/value groups)    | keeps these groups of an attention, with their query heads     |
| `narrow_query_heads` | `layer`, `keep` (query heads)         | keeps these heads, as many in every group                      |
| `narrow_hidden`      | `keep` (channels)                     | keeps these channels of the residual stream, in all layers     |
| `drop_layers`        | `layers`                              | removes these decoder layers; the others move up               |
| `fake_quantize`      | `format`, `modules` (qualified names) | linear layers become `FakeQuantizedLinear`, observing at first |
|                      |                                       | (the output head with a weight of its own)                     |
| `quantize_cache`     | `format`                              | attention rounds new keys and values, observing at first       |
| `learn_scales`       | `weights_follow`                      | scales of quantized weights and calibrated inputs are trained  |
| `lora`               | `rank`, `alpha`, `dropout`, `modules` | adapters beside these projections; all else is frozen          |

Layers, units and names are those of the model as the edits before have left it.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from models.architecture import decoder_layers, head_name
from models.quantization.cache import insert_cache_quantizers
from models.quantization.formats import format_of
from models.quantization.learned_scales import learn_scales
from models.quantization.linear import FakeQuantizedLinear
from models.quantization.output_head import check_head_format, untie_head
from models.structure.adapters import has_adapters, insert_adapters
from models.structure.hidden_size import narrow_hidden
from models.structure.layers import drop_layers, narrow_kv_groups, narrow_mlp, narrow_query_heads

__all__ = ["Edit", "apply_edit", "quantize_decoder", "replay"]

Edit = dict[str, Any]


def apply_edit(model: PreTrainedModel, edit: Edit, optimizers: Sequence[Optimizer] = ()) -> None:
    """Apply one edit to a model in place, and to the optimizer state of the parameters it shrinks.

    Raises:
        ValueError: Unknown op, missing or unknown fields, a layer or module that does not exist, or indices outside the layer.
    """
    if edit.get("op") not in _OPERATIONS:
        raise ValueError(
            f"expected an edit with an 'op' among {', '.join(_OPERATIONS)}, found {edit.get('op')!r}; "
            "the checkpoint may come from a newer version of Potstill"
        )
    if has_adapters(model) and edit["op"] != "lora":
        raise ValueError(
            f"expected a student without LoRA adapters for {edit['op']}, found one that has them; prune or quantize the "
            "student/ folder of the LoRA run instead"
        )
    operation, fields = _OPERATIONS[edit["op"]], {name: value for name, value in edit.items() if name != "op"}
    needed = inspect.getfullargspec(operation).kwonlyargs
    if sorted(fields) != sorted(needed):
        raise ValueError(
            f"expected {edit['op']} with the fields {', '.join(needed) or 'none'}, found {', '.join(fields) or 'none'}; the checkpoint may come "
            "from another version of Potstill"
        )
    operation(model, optimizers, **fields)


def replay(model: PreTrainedModel, edits: Sequence[Edit]) -> None:
    """Apply an ordered list of edits to a freshly built model."""
    for edit in edits:
        apply_edit(model, edit)


def quantize_decoder(model: PreTrainedModel, format: str = "fp8_e4m3") -> Edit:
    """The edit that fake-quantizes every projection of every decoder layer; embeddings, head and norms are left alone."""
    owners = {id(owner): name for name, owner in model.named_modules()}
    names = [f"{owners[id(owner)]}.{child}" for layer in decoder_layers(model) for owner, child in layer.linears()]
    return {"op": "fake_quantize", "format": format, "modules": names}


def _fake_quantize(
    model: PreTrainedModel, optimizers: Sequence[Optimizer], *, format: str, modules: Sequence[str]
) -> None:
    format_of(format)
    linears = dict(model.named_modules())
    for name in modules:
        if not isinstance(linears.get(name), nn.Linear):
            kind = f"a {type(linears[name]).__name__}" if name in linears else "no module"
            raise ValueError(
                f"expected linear layers to quantize, found {name!r}, which is {kind} in this model; "
                "list each linear layer once, by its name in the model"
            )
    if head_name(model) in modules:
        check_head_format(format)
        untie_head(model, optimizers)
    quantized = {name: FakeQuantizedLinear(linears[name], format) for name in modules}  # type: ignore[arg-type]  # checked above
    for name, linear in quantized.items():
        parent, _, child = name.rpartition(".")
        setattr(linears[parent], child, linear.to(linear.weight.device))


_OPERATIONS: dict[str, Callable[..., None]] = {
    "narrow_mlp": narrow_mlp,
    "narrow_kv_groups": narrow_kv_groups,
    "narrow_query_heads": narrow_query_heads,
    "narrow_hidden": narrow_hidden,
    "drop_layers": drop_layers,
    "fake_quantize": _fake_quantize,
    "quantize_cache": insert_cache_quantizers,
    "learn_scales": learn_scales,
    "lora": insert_adapters,
}
