"""Local search after a greedy elimination: units that are gone change places with units that are kept (OSSCAR, arXiv 2403.12983)."""

import math

import torch

from models.pruning.scores.osscar import Elimination


def local_search(problem: Elimination, swaps: int, *, classes: int = 1) -> int:
    """Swap units for as long as the error falls; as many are left as before.

    A swap puts back the unit whose return takes most from the error, and then removes the one that is cheapest now.  Where that is
    the same one, no swap of it helps, and the search is over.  (One of a unit that is worth less could still help: to know, all
    pairs would have to be tried.)

    Args:
        problem: After `eliminate`; its `left` and `cost` become those of the better choice.
        swaps: The most that are done.
        classes: As in `eliminate`: a unit changes places with one of its own class, and the search goes on until it is over in all.

    Returns:
        How many swaps were done.
    """
    done = 0
    open_C = torch.ones(classes, dtype=torch.bool)
    while done < swaps:
        gains_CN = problem.gains().unflatten(0, (classes, -1)).masked_fill(~open_C[:, None], -math.inf)
        gain, back = gains_CN.max(), int(gains_CN.argmax())
        if gain <= 0:
            break
        of_class = back // gains_CN.shape[1]
        problem.restore([back])
        costs_N = problem.costs().unflatten(0, (classes, -1))[of_class]
        gone = of_class * len(costs_N) + int(costs_N.argmin())
        if gone != back and costs_N.min() < gain:
            problem.remove([gone])
            done += 1
            open_C[:] = True
        else:
            problem.remove([back])
            open_C[of_class] = False
    return done
