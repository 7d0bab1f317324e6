"""Fingerprints of teacher, tokenizer, chat template and data.

Every fingerprint is a SHA-256 with figures that a person can compare.  They say *what* was hashed, not where it lay: a model that
was moved, or saved again in other shards, keeps its fingerprint, and another seed of generated data changes it.

Legend: B samples, T tokens.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.chat import Example
from datamodules.collate import IGNORE_INDEX, Batch

Fingerprint = dict[str, Any]
# Settings that say nothing about what the model computes.
VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def teacher_fingerprint(model: PreTrainedModel) -> Fingerprint:
    """Configuration, and name, type, shape and bytes of every tensor in the model's order."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in VOLATILE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return {
        "sha256": digest.hexdigest(),
        "family": model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
    """Every token with its id.  How texts are split is part of the data's fingerprint: there, the resulting ids are hashed."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return {"sha256": _sha256(json.dumps(vocabulary).encode()), "tokens": len(vocabulary)}


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
    """The chat template's text."""
    template = json.dumps(tokenizer.chat_template)
    return {"sha256": _sha256(template.encode()), "characters": len(template)}


def data_fingerprint(examples: Sequence[Example]) -> Fingerprint:
    """Token ids, answer spans and positions of all samples of a split, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.index}:{example_identity(example)} ".encode())
    return {
        "sha256": digest.hexdigest(),
        "samples": len(examples),
        "tokens": sum(len(example) for example in examples),
        "answer_tokens": sum(num_answer_tokens(example) for example in examples),
    }


def num_answer_tokens(example: Example) -> int:
    """Tokens of the sample that a batch gives labels to."""
    return sum(end - start for start, end in example.answer_spans)


def example_identity(example: Example) -> int:
    """A 63-bit hash of the sample's token ids and of which of them are answers."""
    is_answer = torch.zeros(len(example), dtype=torch.uint8)
    for start, end in example.answer_spans:
        is_answer[start:end] = 1
    return _identity(example.input_ids, is_answer)


def row_identities(batch: Batch) -> list[int]:
    """`example_identity` of the sample in every row of a batch."""
    ids_BT, labels_BT = batch["input_ids"].cpu(), batch["labels"].cpu()
    lengths = batch["attention_mask"].sum(1).tolist()
    return [
        _identity(ids_T[:length], (labels_T[:length] != IGNORE_INDEX).to(torch.uint8))
        for ids_T, labels_T, length in zip(ids_BT, labels_BT, lengths, strict=True)
    ]


def readable(fingerprint: Any) -> str:
    """For error messages: a short hash and the figures."""
    if not isinstance(fingerprint, dict) or "sha256" not in fingerprint:
        return str(fingerprint)
    figures = [f"{name} {value}" for name, value in fingerprint.items() if name != "sha256"]
    return f"{fingerprint['sha256'][:12]} ({', '.join(figures)})"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as bytes, whatever its type."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def combined(parts: Iterable[Any]) -> str:
    """One hash for JSON-able parts."""
    return _sha256(json.dumps(list(parts), sort_keys=True).encode())


def _identity(ids: Tensor, is_answer: Tensor) -> int:
    digest = hashlib.blake2b(tensor_bytes(ids.to(torch.int32)), digest_size=8)
    digest.update(tensor_bytes(is_answer))
    return int.from_bytes(digest.digest(), "big") >> 1


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
