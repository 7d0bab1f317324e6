"""Small random models and a tokenizer, for tests of the export."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from models.quantization.linear import freeze_scales
from models.structure.edits import apply_edit, quantize_decoder
from models.structure.shape import shape_of

VOCAB = 128


def tiny_model(family: str = "llama", layers: int = 3, seed: int = 0, **settings: object) -> PreTrainedModel:
    """Two query heads for each key/value group; norms and projections are far from their initial values."""
    torch.manual_seed(seed)
    defaults = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(defaults | settings))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    return model


def quantized(
    model: PreTrainedModel,
    seed: int = 1,
    format: str | None = "fp8_e4m3",
    kv_cache: str | None = None,
    head: str | None = None,
) -> PreTrainedModel:
    """The same model with frozen quantizers in all decoder layers, of projections, of keys and values, or both, and of the head."""
    if format is not None:
        apply_edit(model, quantize_decoder(model, format))
    if head is not None:
        apply_edit(model, {"op": "fake_quantize", "format": head, "modules": ["lm_head"]})
    if kv_cache is not None:
        apply_edit(model, {"op": "quantize_cache", "format": kv_cache})
    with torch.no_grad():
        model.train()(torch.randint(0, VOCAB, (8, 24), generator=torch.Generator().manual_seed(seed)))
    freeze_scales(model)
    return model.eval()


def left_padded_prompts(seed: int = 0) -> dict[str, Tensor]:
    """Three prompts of 9, 4 and 7 tokens."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :5] = 0
    mask[2, :2] = 0
    return {"prompt_ids": torch.randint(3, VOCAB, (3, 9), generator=generator) * mask, "prompt_mask": mask}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(code): code - 29 for code in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return fast


def is_uniform(model: PreTrainedModel) -> bool:
    """Whether all decoder layers have the same sizes, as one `config.json` can express."""
    return len(set(shape_of(model).layers)) == 1
