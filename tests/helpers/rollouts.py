"""A naive rollout, without cache and without padding, and students of every kind to roll out."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.collate import Batch
from models.forward import answer_hidden
from models.generation.decoder import Decoder, FusedDecoder, TransformersDecoder, decoder_for
from models.generation.rollout import Rollout, rollout
from models.generation.sampling import Sampling, uniforms
from models.quantization import freeze_scales
from models.structure.edits import apply_edit, quantize_decoder, replay
from tests.helpers.tiny import tiny_model

STEPS = 12
DECODERS = [TransformersDecoder, FusedDecoder]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
UP_PROJECTIONS = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.k_proj"]
KINDS = [*FAMILIES, "untied", "pruned", "frozen", "observing", "partly quantized", "biased", "llama3 rope"]


def student_of_kind(kind: str, batch: Batch) -> PreTrainedModel:
    """A tiny student; quantized ones have seen the batch."""
    if kind in FAMILIES:
        return tiny_model(kind, sliding_window=None)
    if kind == "untied":
        return tiny_model(tie_word_embeddings=False)
    if kind == "biased":
        return tiny_model(attention_bias=True, mlp_bias=True)
    if kind == "llama3 rope":
        rope = {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        return tiny_model(rope_parameters={**rope, "original_max_position_embeddings": 64})
    if kind == "pruned":
        model = tiny_model(num_attention_heads=8, num_key_value_heads=4, head_dim=4)
        narrow = {"op": "narrow_mlp", "layer": 1, "keep": [7, 9, 40]}
        replay(model, [{"op": "narrow_kv_groups", "layer": 0, "keep": [1, 3]}, narrow])
        return model
    model = tiny_model("qwen2")
    everything = quantize_decoder(model)
    apply_edit(model, {**everything, "modules": UP_PROJECTIONS} if kind == "partly quantized" else everything)
    with torch.no_grad():
        answer_hidden(model.train(), batch)
    if kind != "observing":
        freeze_scales(model)
    return model


def prompts_of(batch: Batch) -> list[list[int]]:
    rows = zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


def roll(
    model: PreTrainedModel | Decoder,
    batch: Batch,
    temperature: float = 0.0,
    *,
    seeds: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    **settings,
) -> Rollout:
    decoder = decoder_for(model, torch.float32) if isinstance(model, PreTrainedModel) else model
    seeds = range(len(batch["prompt_ids"])) if seeds is None else seeds
    settings = {"max_new_tokens": STEPS, "end_tokens": [], "seeds": seeds, **settings}
    sampling = sampling or Sampling(temperature)
    return rollout(decoder, batch["prompt_ids"], batch["prompt_mask"], sampling=sampling, **settings)


def naive_token(logits_V: Tensor, uniform: float, sampling: Sampling, forbidden: Sequence[int] = ()) -> int:
    """One token from one row of logits, by the definitions, in float64."""
    scores_V = logits_V.double().clone()
    scores_V[list(forbidden)] = -torch.inf
    if sampling.temperature == 0:
        return int(scores_V.argmax())
    p_V = (scores_V / sampling.temperature).softmax(0)
    ranked = p_V.argsort(descending=True).tolist()
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    reached, kept = 0.0, []
    within_k = float(p_V[ranked].sum())
    for token in ranked:
        if reached >= sampling.top_p:
            break
        kept.append(token)
        reached += float(p_V[token]) / within_k
    q_V = torch.zeros_like(p_V)
    q_V[kept] = p_V[kept] / p_V[kept].sum()
    return int((q_V.cumsum(0) <= uniform).sum())


@torch.no_grad()
def naive(
    model: PreTrainedModel,
    prompts: list[list[int]],
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
    *,
    end_tokens: Sequence[int] = (),
    max_new_tokens: int = STEPS,
) -> list[list[int]]:
    """Every prompt alone, in full at every step; the answers, each up to its end token."""
    training = model.training
    model.eval()
    uniforms_BG = uniforms(range(len(prompts)) if seeds is None else seeds, max_new_tokens).double().tolist()
    answers: list[list[int]] = []
    for prompt, uniforms_G in zip(prompts, uniforms_BG, strict=True):
        answer: list[int] = []
        for uniform in uniforms_G:
            logits_V = model(torch.tensor([prompt + answer])).logits[0, -1]
            forbidden = end_tokens if len(answer) < sampling.min_tokens else ()
            answer.append(naive_token(logits_V, uniform, sampling, forbidden))
            if answer[-1] in end_tokens:
                break
        answers.append(answer)
    model.train(training)
    return answers


def texts(answers: Rollout) -> list[list[int]]:
    """The tokens of each answer."""
    rows = zip(answers.tokens_BG, answers.mask_BG, strict=True)
    return [tokens[mask.bool()].tolist() for tokens, mask in rows]
