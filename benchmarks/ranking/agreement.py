"""Differences between the ways to score the same pairs.

Letters: W ways, N candidates, C labels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.ranking.ways import Score


def agreement(ways: Mapping[str, Score], pairs: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Largest absolute differences in the log-probability of a label, in nats.

    Args:
        ways: By name; the first is what the others are compared with.
        pairs: Candidates by prefix.

    Returns:
        `pairs`, the difference of every other way from the first by its name, and `max_difference` between any two.
    """
    first, *others = ways
    differences = dict.fromkeys([*others, "max_difference"], 0.0)
    for prefix, candidates in tqdm(pairs.items(), desc="Agreement", unit="prefix", leave=False):
        scores_WNC = torch.stack([score(prefix, candidates).double() for score in ways.values()])
        from_first_W = (scores_WNC - scores_WNC[0]).abs().amax(dim=(1, 2))
        widest = (scores_WNC.amax(dim=0) - scores_WNC.amin(dim=0)).max()
        for name, found in zip(differences, [*from_first_W[1:], widest], strict=True):
            differences[name] = max(differences[name], float(found))
    return {"pairs": sum(map(len, pairs.values())), "compared_with": first, **differences}
