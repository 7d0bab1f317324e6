"""The same sizes in every layer, as large as a limit allows."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise, product

from models.pruning.budget.costs import Measure
from models.structure.shape import Shape, WidthAxis, levels

Sizes = dict[WidthAxis, int]


def smallest(shape: Shape, axes: Sequence[WidthAxis], *, multiple: int) -> Sizes:
    """The least that every layer may keep: one multiple of neurons, or all if there are fewer, and one key/value group."""
    least = {"neurons": multiple, "kv_groups": 1}
    return {axis: min(least[axis], shape.widest(axis)) for axis in axes}


def evenly_sparse(
    shape: Shape,
    sparsity: float,
    axes: Sequence[WidthAxis] = ("neurons", "kv_groups"),
    *,
    measure: Measure,
    multiple: int,
) -> Shape:
    """A shape with layers of the same sizes whose cost falls evenly with the sparsity.

    The sparsity is the share removed of all the cost that may be removed along the axes, from 0 to 1.  Neurons kept are
    a multiple of `multiple`, or all.
    """
    least = smallest(shape, axes, multiple=multiple)
    whole = measure(shape)
    most = whole - sparsity * (whole - measure(shape.evenly(least)))
    return shape.evenly(largest_within(shape, axes, measure, most, multiple=multiple, least=least))


def largest_within(
    shape: Shape,
    axes: Sequence[WidthAxis],
    measure: Measure,
    most: float,
    *,
    multiple: int,
    least: Mapping[WidthAxis, int],
) -> Sizes:
    """The sizes of every layer with which a shape comes up to a limit, and not above it.

    Key/value groups come in few whole steps, so neurons fill what each number of groups leaves of the limit.  Of all numbers of groups
    with which they come within one step of it, the one is taken at which both axes keep the most alike shares.

    Neurons kept are a multiple of `multiple`, or all; `least` is kept at least, see `smallest`.

    Raises:
        ValueError: The least is above the limit.
    """
    steps: dict[WidthAxis, int] = {"kv_groups": 1, "neurons": multiple}
    *coarse, fine = [axis for axis in steps if axis in axes]
    choices = {axis: levels(shape.widest(axis), steps[axis], least[axis]) for axis in axes}

    def cost(sizes: Mapping[WidthAxis, int]) -> float:
        return measure(shape.evenly(sizes))

    fitting: list[Sizes] = []
    for units in product(*(choices[axis] for axis in coarse)):
        rest = dict(zip(coarse, units, strict=True))
        whole: list[Sizes] = [{**rest, fine: level} for level in choices[fine]]  # descending
        fitting += whole[bisect_left(whole, -most, key=lambda sizes: -cost(sizes)) :][:1]
    if not fitting:
        raise ValueError(
            f"expected a limit that the smallest layers keep, found {most:g} where they leave {cost(least):g}; raise it"
        )
    costs = [cost({fine: level}) for level in choices[fine]]
    step = max((more - fewer for more, fewer in pairwise(costs)), default=0)
    close = [sizes for sizes in fitting if most - cost(sizes) < step] or [max(fitting, key=cost)]

    def unevenness(sizes: Sizes) -> float:
        shares = [sizes[axis] / shape.widest(axis) for axis in axes]
        return max(shares) - min(shares)

    return min(close, key=unevenness)
