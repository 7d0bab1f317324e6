"""Tiny doubles that all tests share: random models, a folder a recipe could name, batches, a JSONL file, a GGUF file.

Nothing is downloaded.  The tokenizer is the byte-level one of `chat_doubles` (260 tokens); models have 300 rows in their head,
so, as with many real ones, the head is larger than the vocabulary.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from datamodules.chat import Conversation, encode
from datamodules.collate import Batch, collate, pad_id_of
from tests.helpers.chat_doubles import byte_tokenizer

VOCAB = 300
PAIRS = [("2+2?", "Four."), ("Capital of France?", "Paris"), ("Say hi twice", "hi hi"), ("a", "bcd"), ("xyz" * 5, "no")]
# What makes a family more than a Llama with other names.
QUIRKS: dict[str, dict[str, object]] = {
    "gemma2": {
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 8.0,
        "query_pre_attn_scalar": 16,
        "sliding_window": 4,  # in every other layer
    },
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 4, "sliding_window_pattern": 2},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}


def tiny_model(family: str = "llama", *, seed: int = 0, **settings: object) -> PreTrainedModel:
    """Two layers, four query heads on two key/value groups, 48 neurons; weights, norms and biases far from their defaults."""
    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **(defaults | QUIRKS.get(family, {}) | settings))
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1).add_(0.2 * torch.randn_like(parameter))
    return model


def tiny_folder(folder: Path, family: str = "llama", *, seed: int = 0, **settings: object) -> str:
    """A Hugging Face folder with a tiny model and its tokenizer: what `student:` and `teacher:` name in a recipe."""
    tiny_model(family, seed=seed, **settings).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_batch(pairs: Sequence[tuple[str, str]] = PAIRS, tokenizer: PreTrainedTokenizerBase | None = None) -> Batch:
    """Prompts and answers as the loaders give them."""
    tokenizer = tokenizer or byte_tokenizer()
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    examples = encode(tokenizer, [Conversation(turn, f"pair {i}") for i, turn in enumerate(turns)])
    return {**collate(examples, pad_id=pad_id_of(tokenizer))}


def tiny_jsonl(path: Path, pairs: Sequence[tuple[str, str]] = PAIRS) -> str:
    """A file of `prompt` / `response` lines."""
    path.write_text("".join(json.dumps({"prompt": q, "response": a}) + "\n" for q, a in pairs))
    return str(path)


def tiny_gguf(path: Path, model: PreTrainedModel) -> str:
    """A llama as a GGUF file in float32, weights only (no tokenizer)."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        stem = name.removesuffix(".weight")
        layer, tail = "", stem
        if stem.startswith("model.layers."):
            number, tail = stem.removeprefix("model.layers.").split(".", 1)
            layer = f"blk.{number}."
        target = names[tail]
        weight = _interleaved(parameter.detach(), heads[target]) if target in heads else parameter.detach()
        writer.add_tensor(f"{layer}{target}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """GGUF keeps the two halves of a rotary pair side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def sums(folder: Path, count: int) -> dict[str, str]:
    """A student, its teacher, and so many questions with their answers."""
    tiny_jsonl(folder / "data.jsonl", [(f"{n} plus {n}?", f"It is {2 * n}") for n in range(count)])
    return {
        "student": tiny_folder(folder / "student", seed=1),
        "teacher": tiny_folder(folder / "teacher", seed=2),
        "data": str(folder / "data.jsonl"),
    }
