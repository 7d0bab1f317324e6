"""The cuts of the pruning study, and the ways to make each of them."""

from dataclasses import asdict, dataclass
from typing import Literal

from models.pruning.cut import PruningSettings, Targets


@dataclass(frozen=True)
class Arm:
    """One way to prune, as `models.pruning.cut.PruningSettings` says."""

    score: str
    repair: str = "none"
    allocation: str = "uniform"
    depth: str = "block_influence"
    swaps: int = 0

    @property
    def name(self) -> str:
        """For files and tables."""
        score = self.score if self.depth == "block_influence" else f"{self.score} (block search)"
        score += " (local search)" if self.swaps else ""
        return f"{score}, {self.repair} repair, {self.allocation}".replace("none repair", "no repair")

    @property
    def settings(self) -> PruningSettings:
        """The arm as settings."""
        return PruningSettings(**asdict(self))


@dataclass(frozen=True)
class Peer:
    """Torch-Pruning's choice of the same number of units, cut by our surgery, since its own leaves no loadable model."""

    score: Literal["magnitude", "taylor"]

    @property
    def name(self) -> str:
        """For files and tables."""
        return f"Torch-Pruning {self.score}"


CUTS = {
    "mlp 25 %": Targets(neurons=1152),
    "mlp 37.5 %": Targets(neurons=960),
    "mlp 50 %": Targets(neurons=768),
    "kv 1 of 3": Targets(kv_groups=2),
    "mlp 25 % and kv 1 of 3": Targets(neurons=1152, kv_groups=2),
    "depth 20 %": Targets(layers=24),
    "hidden 11 %": Targets(hidden=512),
}
BASELINE = Arm("activation")
QUICK_CUTS = ("mlp 37.5 %", "kv 1 of 3")
QUICK_ARMS = (BASELINE, Arm("osscar", "sequential"), Arm("osscar", "sequential", "per_layer"))

_WIDTHS = (
    *QUICK_ARMS,
    Arm("osscar"),
    Arm("osscar", "layerwise"),
    Arm("activation", "sequential"),
    Arm("taylor"),
    Arm("wanda"),
    Arm("magnitude"),
    Arm("random"),
)
_PEERS = (Peer("magnitude"), Peer("taylor"))  # they never cut key/value heads that query heads share
_MORE = (
    Arm("osscar", "sequential", swaps=256),
    Arm("activation", "layerwise"),
    Arm("taylor", "sequential"),
    Arm("random", "sequential"),
)
ARMS: dict[str, tuple[Arm | Peer, ...]] = {
    "mlp 25 %": (*_WIDTHS, *_PEERS),
    "mlp 37.5 %": (*_WIDTHS, *_PEERS, *_MORE),
    "mlp 50 %": (*_WIDTHS, *_PEERS),
    "kv 1 of 3": (*_WIDTHS, *_MORE),
    "mlp 25 % and kv 1 of 3": _WIDTHS,
    # Depth goes by block influence or by search, whatever the score of the widths is.
    "depth 20 %": tuple(
        Arm("osscar", repair, depth=depth)
        for depth in ("block_influence", "search")
        for repair in ("none", "layerwise", "sequential")
    ),
    "hidden 11 %": (
        BASELINE,
        Arm("activation", "sequential"),
        Arm("taylor"),
        Arm("taylor", "sequential"),
        Arm("magnitude"),
        Arm("random"),
    ),
}
