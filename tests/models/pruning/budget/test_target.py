"""What a user may ask of a budget."""

from typing import Any

import pytest

from models.pruning.budget.costs import flops, parameters
from models.pruning.budget.target import Budget
from models.structure.shape import LayerShape, Shape

SHAPE = Shape(hidden=32, head_dim=8, vocabulary=300, layers=(LayerShape(48, 4, 2),) * 2)


def test_what_is_counted() -> None:
    assert Budget("parameters", 0.5).measure(SHAPE) == parameters(SHAPE)
    assert Budget("flops", 0.5, length=9).measure(SHAPE) == flops(SHAPE, batch=1, new=9)
    assert Budget("latency", 0.5, length=9, batch=4).measure(SHAPE) == flops(SHAPE, batch=1, new=9)
    assert [Budget(cost, 0.5).counted for cost in ("parameters", "flops", "latency")] == [
        "parameters",
        "flops",
        "flops",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, "budget.ratio between 0 and 1"),
        ({"ratio": 1.0}, "budget.ratio between 0 and 1"),
        ({"axes": ()}, "budget.axes of neurons, kv_groups or both, each once"),
        ({"axes": ("neurons", "neurons")}, "budget.axes of"),
        ({"axes": ("hidden",)}, "budget.axes of"),
        ({"batch": 0}, "budget.batch between 1 and"),
        ({"length": 0}, "budget.length between 1 and"),
        (
            {"cost": "parameters", "length": 7},
            "no budget.length with the cost parameters, on which it has no effect, found 7",
        ),
        ({"cost": "parameters", "backend": "onnxruntime"}, "no budget.backend with the cost parameters"),
        ({"cost": "flops", "backend": "onnxruntime"}, "no budget.backend with the cost flops"),
        ({"cost": "flops", "batch": 2}, "no budget.batch with the cost flops"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**{"cost": "latency", "ratio": 0.7} | settings)
