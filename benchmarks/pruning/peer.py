"""The units that Torch-Pruning would keep: the peer of the pruning study.

Torch-Pruning (PyPI `torch-pruning`, MIT) finds by tracing which matrices share an axis, scores the channels of such a group, and
lists what it would cut.  Its scores of a neuron, at their defaults, over the rows of the gate and up projections and the column of
the down projection:

| score     | class                      | a neuron's score, up to a factor of the layer |
|-----------|----------------------------|-----------------------------------------------|
| magnitude | `GroupMagnitudeImportance` | sum of squared weights                        |
| taylor    | `GroupTaylorImportance`    | sum of |weight * gradient|                    |

Key/value heads that query heads share are never cut: version 1.6.1 cuts as many query heads of every group, and none where
a group would lose them all.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.harness import MISSING
from datamodules.collate import Batch
from models.architecture import DecoderLayer, decoder_layers
from models.calibration.observe import on_device
from models.forward import answer_hidden, answer_labels
from models.losses import Objective, head_of, linear_objective
from models.pruning.cut import Targets
from models.structure.edits import Edit

_CROSS_ENTROPY = Objective({"cross_entropy": 1.0})


@torch.enable_grad()
def torch_pruning_edits(
    model: PreTrainedModel, batches: Sequence[Batch], targets: Targets, score: Literal["magnitude", "taylor"]
) -> list[Edit]:
    """The edits that keep the neurons which Torch-Pruning would keep, as many in every layer; the model is not changed.

    The calibration batches are for `taylor`: gradients of the cross-entropy over all their answer tokens.

    Raises:
        ModuleNotFoundError: Torch-Pruning is not installed.
        ValueError: Another axis has a target, `taylor` has no batch, or Torch-Pruning keeps another number than the target.
    """
    if find_spec("torch_pruning") is None:
        raise ModuleNotFoundError(MISSING.format("torch-pruning"))
    import torch_pruning

    wanted = {axis: size for axis, size in asdict(targets).items() if size is not None}
    if list(wanted) != ["neurons"]:
        raise ValueError(
            f"expected a target of neurons and no other, found {wanted or 'none'}; leave this cut to Potstill, as Torch-Pruning keeps "
            "all key/value heads that query heads share, and further axes are not compared"
        )
    neurons = wanted["neurons"]
    subject = copy.deepcopy(model).eval().requires_grad_(True)
    layers = decoder_layers(subject)
    if score == "taylor":
        for batch in on_device(batches, subject.device):  # scores are compared within a layer, so a mean ranks the same
            labels = answer_labels(batch)
            loss, _ = linear_objective(answer_hidden(subject, batch), head_of(subject), None, labels, _CROSS_ENTROPY)
            loss.backward()
        importance = torch_pruning.importance.GroupTaylorImportance()
    else:
        importance = torch_pruning.importance.GroupMagnitudeImportance()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unwrapped parameters detected")  # the norms, which nothing here cuts
        pruner = torch_pruning.pruner.BasePruner(
            subject,
            {"input_ids": torch.zeros(1, 8, dtype=torch.long, device=subject.device), "use_cache": False},
            importance,
            pruning_ratio=1 - (neurons + 0.5) / layers[0].num_neurons,  # it rounds what is kept down
            ignored_layers=_all_but_neurons(subject, layers),
            output_transform=lambda output: output.logits,
        )
    cut = {dep.target.module: set(units) for group in pruner.step(interactive=True) for dep, units in group}
    return [_edit(layer, cut.get(layer.down_proj, set()), neurons) for layer in layers]


def _all_but_neurons(model: PreTrainedModel, layers: Sequence[DecoderLayer]) -> list[nn.Module]:
    """The linear layers whose outputs stay; all heads are among them, as some shapes of attention are traced without end."""
    of_neurons = {part.linear for layer in layers for part in (layer.gate, layer.up)}
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module not in of_neurons]


def _edit(layer: DecoderLayer, cut: set[int], neurons: int) -> Edit:
    keep = [neuron for neuron in range(layer.num_neurons) if neuron not in cut]
    if len(keep) != neurons:
        raise ValueError(
            f"expected Torch-Pruning to keep {neurons} neurons of layer {layer.index}, found that it keeps {len(keep)} of "
            f"{layer.num_neurons}; choose another target"
        )
    return {"op": "narrow_mlp", "layer": layer.index, "keep": keep}
