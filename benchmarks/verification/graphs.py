"""Right graphs, the torch models that they compute, and the texts to verify them on.

`right_graphs` are those that verification must not fail, `further_graphs` those for faults that none of these can have.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.chats import calibration_prompts
from datamodules.chat import Conversation, encode
from datamodules.collate import Batch, collate, pad_id_of
from export.calibration import requantized
from export.cpu_graph.head_blocks import with_stored_head
from export.cpu_graph.to_cpu import write_cpu_graph
from export.folders.student import load_student
from export.layout import CPU, GRAPH
from export.onnx_graph.labels import write_labels
from export.onnx_graph.prefill import write_prefill
from export.onnx_graph.to_onnx import Precision, export_onnx, precision_of
from export.verify.rounding import FLOAT16, FLOAT32, Arithmetic
from models.copies import with_rounded_weights
from models.loading.reference import load_tokenizer
from models.post_training.settings import PostTrainingQuantization
from models.quantization.linear import freeze_scales
from models.structure.edits import apply_edit

MODEL = "package:smollm2-135m-instruct"
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 8.0, "sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2},
}
METHOD = PostTrainingQuantization(method="nearest", sensitive=False)
CALIBRATED_ON, LONGEST_PROMPT = 8, 200  # conversations, characters
Texts = tuple[Tensor, Tensor]
"""Left-padded prompts (B, T), and 1 for tokens and 0 for padding."""


@dataclass(frozen=True)
class Right:
    """A right graph, and what it was made from."""

    name: str  # of the format, or of the family
    model: PreTrainedModel  # the torch model that the graph computes, its weights rounded
    path: Path
    of: str  # which model this is
    judged: PreTrainedModel | None = None  # the torch model that a free run is judged against; None: `model`

    @property
    def for_cpu(self) -> bool:
        """Whether it is a graph of `export.cpu_graph.to_cpu`."""
        return self.path.name == CPU

    @property
    def arithmetic(self) -> Arithmetic:
        """Of the numbers between the products."""
        return FLOAT16 if "fp16" in self.name or "half" in self.name else FLOAT32


def right_graphs(
    model: PreTrainedModel, batches: Sequence[Batch], folder: Path, formats: Sequence[Precision], of: str
) -> list[Right]:
    """The graphs of a model in several formats; `fp8` comes also with float16 between the products, `int8` also for the CPU."""
    graphs = []
    for precision in tqdm(formats, desc=f"Graphs of {of}", leave=False):
        plain = precision == "fp16"
        made = model if plain else requantized(model, batches, "fp8_e4m3" if precision == "fp8" else precision, METHOD)
        graphs += _written(made, folder / precision, precision, of)
    return graphs


def _written(model: PreTrainedModel, folder: Path, precision: Precision, of: str) -> list[Right]:
    rounded = with_rounded_weights(model)
    path = export_onnx(model, folder / "model.onnx", precision=precision).path
    graphs = [Right(precision, rounded, path, of)]
    if precision == "fp8":
        half = export_onnx(model, folder / "half.onnx", precision=precision, activations="float16").path
        graphs.append(Right("fp8 half", rounded, half, of))
    if precision == "int8":
        cpu = write_cpu_graph(path)
        stored = with_stored_head(rounded, onnx.load(cpu, load_external_data=False).graph)
        graphs.append(Right("int8 cpu", stored, cpu, of, rounded))
    return graphs


def further_graphs(graphs: Sequence[Right], folder: Path, families: Iterable[str]) -> Iterator[Right]:
    """Graphs for faults that others can't have: of other families, with a quantized cache, of the last position, of labels."""
    by_name = {graph.name: graph for graph in graphs}
    int8, fp16 = by_name["int8"], by_name["fp16"]
    yield Right("int8, prefill", int8.model, write_prefill(int8.path), int8.of)
    yield Right("fp16, labels", fp16.model, write_labels(fp16.path, {"yes": 10, "no": 20}), fp16.of)
    for family in families:
        for graph in _written(tiny(family), folder / family, "fp32", f"tiny {family}"):
            yield replace(graph, name=family)
    cached = tiny("llama")
    apply_edit(cached, {"op": "quantize_cache", "format": "int8"})
    with torch.no_grad():
        cached.train()(torch.arange(3, 123)[None])
    freeze_scales(cached)
    path = export_onnx(cached.eval(), folder / "cached" / "model.onnx", precision="fp32").path
    yield Right("llama, cache in int8", with_rounded_weights(cached), path, "tiny Llama")


def tiny(family: str) -> PreTrainedModel:
    """A small random model of three layers, no parameter of which is at its default."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 128, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": 2}
    settings = sizes | heads | FAMILIES.get(family, {})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1).add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def whole_graphs(model: PreTrainedModel, batches: Sequence[Batch], folder: Path, student: Path) -> list[Right]:
    """FP8 and INT8 of a whole model: of the student in a folder, with its own graph if that lies where the quickstart puts it."""
    if not student.is_dir():
        return right_graphs(model, batches, folder, ("fp8", "int8"), "SmolLM2")
    own, _ = load_student(str(student))
    path, precision = student.parent / GRAPH, precision_of(own)
    if path.is_file():
        graphs = [Right(precision, with_rounded_weights(own), path, f"{student} with its own graph")]
    else:
        graphs = _written(own, folder / "student", precision, str(student))
    return graphs + right_graphs(own, batches, folder, ("int8",), str(student))


def real_texts() -> tuple[list[Batch], list[Tensor]]:
    """Calibration batches, and other prompts (T,) to verify on."""
    tokenizer = load_tokenizer(MODEL)
    asked = [prompt for prompt in calibration_prompts(290) if len(prompt) <= LONGEST_PROMPT]
    conversations = [
        Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": "Yes."}], "prompt")
        for prompt in asked
    ]
    examples = encode(tokenizer, conversations)
    batches = [{**collate(examples[:CALIBRATED_ON], pad_id=pad_id_of(tokenizer))}]
    return batches, [example.input_ids[: example.prompt_length].long() for example in examples[CALIBRATED_ON:]]


def random_texts() -> tuple[list[Batch], list[Tensor]]:
    """The same for tiny models."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 128, (4 + number % 9,), generator=generator) for number in range(40)]
    ids_BT = torch.randint(3, 128, (4, 40), generator=generator)
    return [{"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": ids_BT}], prompts


def drawn(prompts: Sequence[Tensor], draw: random.Random, rows: int, *, padded: bool) -> Texts:
    """Some prompts: padded on the left, or cut to the length of the shortest."""
    some = draw.sample(list(prompts), rows)
    if not padded:
        shortest = min(map(len, some))
        some = [tokens[-shortest:] for tokens in some]
    masks = [torch.ones_like(tokens) for tokens in some]
    ids_BT, mask_BT = (pad_sequence(each, batch_first=True, padding_side="left") for each in (some, masks))
    return ids_BT, mask_BT
