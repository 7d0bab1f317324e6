"""A budget as a user writes it, and the limit that it sets for one cut."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Literal

from models.pruning.budget.costs import Measure, flops, parameters
from models.structure.shape import WidthAxis
from program.ranges import Between, Positive, check_fields

Cost = Literal["parameters", "flops", "latency"]
Backend = Literal["torch", "onnxruntime"]

#: The costs on which a setting has an effect; FLOPs of several prompts have the same ratio as those of one.
_COSTS_OF: dict[str, tuple[Cost, ...]] = {
    "batch": ("latency",),
    "length": ("flops", "latency"),
    "backend": ("latency",),
}


@dataclass(frozen=True)
class Budget:
    """What a pruned student may cost, and of what pruning may choose how much goes.

    Args:
        cost: parameters (tied ones once), flops of the prefill of a prompt, or latency: measured seconds of a prefill.
        ratio: The student's cost over the dense student's, 0 to 1 (both excluded).
        axes: What is removed for it: neurons of the MLP, kv_groups (key/value groups, with their query heads), or both.
        batch: Prompts at a time (latency).
        length: Tokens of a prompt (flops and latency).
        backend: What runs the students whose latency is measured: torch, on the device of the run and in bfloat16 if it trains in half
            precision, else float32; or onnxruntime, on the CPU in float32.

    Raises:
        ValueError: A setting is out of range, or was changed and means nothing for this cost.
    """

    cost: Cost
    ratio: Annotated[
        float, Between(0, 1, (0, 1), "it is the share of the dense student's cost that may be left, for example 0.7")
    ]
    axes: tuple[WidthAxis, ...] = ("neurons", "kv_groups")
    batch: Positive = 1
    length: Positive = 128
    backend: Backend = "torch"

    def __post_init__(self) -> None:
        check_fields(self, "budget.")
        if not self.axes or len(set(self.axes)) < len(self.axes) or not set(self.axes) <= {"neurons", "kv_groups"}:
            raise ValueError(
                f"expected budget.axes of neurons, kv_groups or both, each once, found {list(self.axes)}; change them in the recipe"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if self.cost not in _COSTS_OF.get(field.name, (self.cost,)) and value != field.default:
                raise ValueError(
                    f"expected no budget.{field.name} with the cost {self.cost}, on which it has no effect, found {value}; leave it out"
                )

    @property
    def counted(self) -> Literal["parameters", "flops"]:
        """What is counted on shapes: for a latency FLOPs, which stand for it once a shape that meets it is known."""
        return "parameters" if self.cost == "parameters" else "flops"

    @property
    def measure(self) -> Measure:
        """The count, as a function of a shape; of one prompt."""
        return parameters if self.counted == "parameters" else partial(flops, batch=1, new=self.length)


@dataclass(frozen=True)
class Limit:
    """The most that the student may cost after a cut, and the axes along which units go wherever that costs least."""

    axes: Sequence[WidthAxis]
    measure: Measure
    most: float
