"""Memory of a training step, counted by running it on tensors that have shapes and no data.

The step is the real one: transformers' model, this project's attention, loss and chunks, torch's autograd.  What is alive is counted at
every operation (`torch._subclasses.FakeTensorMode` computes shapes only), so a new family or a new loss needs no formula.  Parts that
a step does not show, such as the optimizer's moments or a rollout's cache, are counted from sizes.

What it does not know: workspaces of kernels, fragmentation, and other processes; on a GPU, 1 to 2 GB for CUDA itself.

Legend: B samples, T tokens.
"""

import copy
import weakref
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from datamodules.collate import IGNORE_INDEX
from models.architecture import decoder_layers
from models.forward import answer_hidden, answer_labels, checkpoint_activations
from models.hardware import attention
from models.losses import FullTargets, Objective, head_of, linear_objective
from models.losses.chunked import default_chunk_tokens
from models.losses.output_head import LOGITS_AT_ONCE
from models.structure.adapters import insert_adapters, projections

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Bytes of an optimizer's state for each byte-free parameter, by class; torchao's 8 bits share a scale among 256.
MOMENTS = {"SGD": 0.0, "AdamW8bit": 2 + 8 / 256, "AdamW4bit": 1 + 8 / 128, "AdamWFp8": 2 + 8 / 256}
#: What comes and goes takes more than is alive: glibc's heap has holes, and oneDNN lays matrices out anew (`benchmarks.planner`).
HEAP = {"cpu": 1.4}
_ADAM = 2.0  # moments of the parameter's own type
#: Layers at which a deep model is run; with checkpoints, the peak of shallow ones is in the loss, and of deep ones in the backward pass.
DEPTHS, CHECKPOINTED_DEPTHS = (3, 5), (8, 12)


@dataclass(frozen=True)
class StepSettings:
    """What decides about the memory of a step.

    Attributes:
        batch_size: Samples of a micro-batch.
        length: Tokens of each, the longest.
        answer_share: Share of them that are answers.
        mixed: Autocast to bfloat16.
        student_dtype: float32 or bfloat16.
        teacher_dtype: float32, bfloat16 or int8; without meaning where there is no teacher.
        optimizer: Its class's name.
        checkpointing: Whether layers are computed again in the backward pass.
        lora_rank: Of adapters; 0: all weights are trained.
        chunk_tokens: As in recipes.
        objective: What is learned.
        device: cpu or cuda: attention, chunks and what an optimizer holds in between differ.
    """

    batch_size: int
    length: int
    answer_share: float = 0.5
    mixed: bool = True
    student_dtype: str = "float32"
    teacher_dtype: str = "bfloat16"
    optimizer: str = "AdamW"
    checkpointing: bool = False
    lora_rank: int = 0
    chunk_tokens: int = 0
    objective: Objective = field(default_factory=Objective)
    device: str = "cuda"


class Tally(TorchDispatchMode):
    """Bytes of tensors that are alive now, and at most since the last `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: set[int] = set()

    def note(self, *trees: Any) -> None:
        """Count tensors that were made before."""
        for tensor in tree_leaves(trees):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._alive:
                    self._alive.add(key)
                    self.now += size
                    weakref.finalize(storage, self._forget, key, size)
        self.most = max(self.most, self.now)

    def restart(self) -> int:
        """Bytes at most so far; counting of the most begins again."""
        most, self.most = self.most, self.now
        return most

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and count what comes out."""
        result = func(*args, **(kwargs or {}))
        self.note(result)
        return result


@dataclass(frozen=True)
class Sizes:
    """Of one model, from its configuration."""

    parameters: int
    trained: int
    head: int  # rows times columns of the output matrix
    tied: bool
    layers: int
    hidden: int
    largest_layer: int  # parameters
    grams: int  # numbers of a layer's statistics in a pruning event
    cached: int  # numbers that a token leaves in the cache of all layers
    attended: int  # query heads times their width, of all layers


_counted: dict[tuple[str, int], Sizes] = {}


def sizes_of(config: PretrainedConfig, lora_rank: int = 0) -> Sizes:
    """Count a model without its weights, once."""
    key = config.to_json_string(), lora_rank
    if key not in _counted:
        _counted[key] = _count(config, lora_rank)
    return _counted[key]


def _count(config: PretrainedConfig, lora_rank: int) -> Sizes:
    model = _on_meta(config, torch.float32)
    adapted = _on_meta(config, torch.float32, lora_rank) if lora_rank else model
    layers = decoder_layers(model)
    blocks: Any = model.get_submodule("model.layers")
    squares = [
        sum(size**2 for linear in (layer.o_proj, layer.down_proj) for size in linear.weight.shape) for layer in layers
    ]
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        head=model.get_output_embeddings().weight.numel(),
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        layers=len(layers),
        hidden=config.get_text_config().hidden_size,
        largest_layer=max(sum(p.numel() for p in block.parameters()) for block in blocks),
        grams=max(squares),
        cached=sum(2 * layer.num_kv_groups * layer.head_dim for layer in layers),
        attended=sum(layer.num_query_heads * layer.head_dim for layer in layers),
    )


def state_bytes(ours: Sizes, theirs: Sizes | None, settings: StepSettings) -> dict[str, int]:
    """Bytes that are there all the time, and gradients: of one device that holds everything."""
    itemsize = FLOATS[settings.student_dtype].itemsize
    teacher = 0
    if theirs is not None:
        floats = FLOATS.get(settings.teacher_dtype)
        in_bytes = theirs.parameters + theirs.head * (1 if theirs.tied else 2)  # embedding and head stay in bfloat16
        teacher = in_bytes if floats is None else theirs.parameters * floats.itemsize
    return {
        "weights": (ours.parameters + (ours.trained if settings.lora_rank else 0)) * itemsize,
        "teacher": teacher,
        "moments": round(ours.trained * MOMENTS.get(settings.optimizer, _ADAM * itemsize)),
        "gradients": ours.trained * itemsize,
    }


def step_bytes(student: PretrainedConfig, teacher: PretrainedConfig | None, settings: StepSettings) -> dict[str, int]:
    """Bytes of one training step on one device that holds everything, by part, and `peak`: the most at any moment.

    Parts: those of `state_bytes`, activations (what the forward pass keeps for the backward pass) and logits (what the loss adds to these
    at most).  They are not all there at once, so the peak is less than their sum.

    Args:
        student: Configuration of the model that is trained.
        teacher: That of its teacher; None for none.
        settings: Of the step.
    """
    state = state_bytes(sizes_of(student, settings.lora_rank), sizes_of(teacher) if teacher else None, settings)
    layers, (low, high) = student.num_hidden_layers, CHECKPOINTED_DEPTHS if settings.checkpointing else DEPTHS
    if layers <= high:
        kept, in_loss, most = _passing_bytes(student, teacher, settings)
    else:  # every layer adds the same
        few, more = (
            _passing_bytes(_of_depth(student, depth), teacher and _of_depth(teacher, DEPTHS[0]), settings)
            for depth in (low, high)
        )
        steps = (layers - high) / (high - low)
        kept, in_loss, most = (round(b + steps * (b - a)) for a, b in zip(few, more, strict=True))
    # torch's optimizers on a GPU take all parameters at once, with a temporary of their size.
    updating = state["gradients"] * (2 if settings.device == "cuda" else 1)
    passing = round(HEAP.get(settings.device, 1.0) * max(most, updating))
    peak = state["weights"] + state["teacher"] + state["moments"] + passing
    return state | {"activations": kept, "logits": in_loss - kept, "peak": peak}


def _of_depth(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def _passing_bytes(
    student: PretrainedConfig, teacher: PretrainedConfig | None, settings: StepSettings
) -> tuple[int, int, int]:
    """Bytes beside weights and moments: after the forward pass, at most in the loss, and at most in all of the step."""
    dtypes = FLOATS[settings.student_dtype], FLOATS.get(settings.teacher_dtype, torch.bfloat16)
    meta, told_meta = _on_meta(student, dtypes[0], settings.lora_rank), teacher and _on_meta(teacher, dtypes[1])
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(attention, "LONGEST", attention.LONGEST if settings.device == "cpu" else 0),
        # Nobody can look at what labels say, only at where they are.
        mock.patch("models.losses.chunked._check_tokens"),
        mock.patch("models.forward._asks_labels", return_value=False),
    ):
        model = _on_fake_cpu(meta).train()
        if settings.checkpointing:
            checkpoint_activations(model)
        told = _on_fake_cpu(told_meta).eval().requires_grad_(False) if told_meta else None
        with Tally() as tally:
            tally.note(list(model.parameters()), list(told.parameters()) if told else [])
            before = tally.now
            kept, in_loss = _forward(model, told, _batch(settings), settings, tally)
            return kept - before, in_loss - before, tally.most - before


def rollout_bytes(sizes: Sizes, rows: int, length: int, dtype: torch.dtype) -> int:
    """Bytes that sampling adds: a copy of the weights, and keys and values of all positions."""
    return (sizes.parameters + rows * length * sizes.cached) * dtype.itemsize


def event_bytes(sizes: Sizes) -> int:
    """Bytes that a pruning event adds: float64 statistics of all layers, and a copy of the student as it was, for the repair."""
    return 8 * sizes.grams * sizes.layers + 4 * sizes.parameters


def evaluation_bytes(sizes: Sizes) -> int:
    """Bytes that an evaluation adds: some copies of a piece of the logits, and of the student in bfloat16 for its answers."""
    return 6 * 4 * LOGITS_AT_ONCE + 2 * sizes.parameters


def _on_meta(config: PretrainedConfig, dtype: torch.dtype, lora_rank: int = 0) -> PreTrainedModel:
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        model.tie_weights()
        attention.use_attention(model)
        if lora_rank:
            insert_adapters(model, modules=projections(model), rank=lora_rank, alpha=lora_rank, dropout=0.0)
    return model


def _on_fake_cpu(model: PreTrainedModel) -> PreTrainedModel:
    """The same inside a `FakeTensorMode`, on its CPU: tensors on meta cannot meet autocast."""
    made: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    return copy.deepcopy(model, made)  # ties included


def _batch(settings: StepSettings) -> dict[str, Any]:
    ids_BT = torch.zeros(settings.batch_size, settings.length, dtype=torch.long)
    start = round(settings.length * (1 - settings.answer_share))
    labels_BT = torch.full_like(ids_BT, IGNORE_INDEX)
    labels_BT[:, start:] = 0
    spans = [((start, settings.length),)] * settings.batch_size
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": labels_BT, "answer_spans": spans}


def _forward(
    model: PreTrainedModel, teacher: PreTrainedModel | None, batch: dict[str, Any], settings: StepSettings, tally: Tally
) -> tuple[int, int]:
    """The step; bytes alive after the forward pass, and at most in the loss."""
    vocabulary = len(model.get_output_embeddings().weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.mixed):
        targets = None
        if teacher is not None:
            vocabulary = min(vocabulary, len(teacher.get_output_embeddings().weight))
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                targets = FullTargets(answer_hidden(teacher, batch), head_of(teacher))
        hidden_ND = answer_hidden(model, batch)
        kept = tally.now
        tally.restart()
        chunk_tokens = settings.chunk_tokens or default_chunk_tokens(
            len(hidden_ND), vocabulary, hidden_ND.shape[1], settings.device
        )
        labels_N = answer_labels(batch)
        total, _ = linear_objective(
            hidden_ND,
            head_of(model),
            targets,
            labels_N,
            settings.objective,
            vocabulary=vocabulary,
            chunk_tokens=chunk_tokens,
        )
        loss_most = tally.most
    total.backward()
    return kept, loss_most
