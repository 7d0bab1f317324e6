"""Exact cost of a student's shape, without building it: parameters and FLOPs.

`parameters(shape_of(model))` is `count_parameters(model)`; `flops` is what torch's own counter finds in a forward pass.  The third
cost, seconds, has to be measured: `models/pruning/budget/latency.py`.
"""

from collections.abc import Callable

from models.structure.shape import LayerShape, Shape

Measure = Callable[[Shape], float]


def parameters(shape: Shape) -> int:
    """Number of parameters, tied ones once."""
    ends = shape.vocabulary * shape.hidden * (1 if shape.wiring.tied else 2) + shape.hidden  # with the last norm
    return ends + sum(_weights(shape, layer) + _vectors(shape, layer) for layer in shape.layers)


def flops(shape: Shape, *, batch: int, new: int, past: int = 0) -> int:
    """Floating point operations of one forward pass with logits at all new positions, two for each multiply-add.

    Matrix products only.  Attention counts every pair of a new token and a token up to the last one, as kernels with a mask compute
    it; norms, activations and softmax are left out.

    `batch` rows have `new` tokens each, and `past` ones that are already in the cache.
    """
    tokens = batch * new
    weights = shape.vocabulary * shape.hidden + sum(_weights(shape, layer) for layer in shape.layers)
    heads = sum(layer.query_heads for layer in shape.layers)
    scores_and_values = 2 * tokens * (past + new) * heads * shape.head_dim
    return 2 * (tokens * weights + scores_and_values)


def _weights(shape: Shape, layer: LayerShape) -> int:
    """Entries of a layer's matrices."""
    heads = 2 * layer.query_heads + 2 * layer.kv_groups  # queries and outputs; keys and values
    return shape.hidden * (heads * shape.head_dim + 3 * layer.neurons)


def _vectors(shape: Shape, layer: LayerShape) -> int:
    """Entries of a layer's biases and norms."""
    wiring = shape.wiring
    biases = wiring.qkv_bias * (layer.query_heads + 2 * layer.kv_groups) * shape.head_dim
    biases += wiring.gate_up_bias * 2 * layer.neurons + (wiring.o_bias + wiring.down_bias) * shape.hidden
    return biases + wiring.norms * shape.hidden + wiring.head_norms * shape.head_dim
