"""The real SmolLM2-135M from its package: what random weights cannot show."""

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.chat import Conversation, encode
from datamodules.collate import Batch, collate, pad_id_of
from models.architecture import count_parameters
from models.copies import inference_copy
from models.evaluation.answers import generate_texts
from models.forward import answer_logits
from models.generation.decoder import FusedDecoder, TransformersDecoder
from models.loading.reference import end_token_ids, load_model, load_tokenizer
from models.losses import forward_kl
from models.quantization import freeze_scales
from models.structure.edits import apply_edit, quantize_decoder

REFERENCE = "package:smollm2-135m-instruct"
PAIRS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name three primary colours.", "The three primary colours are red, blue and yellow."),
]

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedModel:
    return load_model(REFERENCE)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(REFERENCE)


@pytest.fixture(scope="module")
def chats(tokenizer: PreTrainedTokenizerBase) -> Batch:
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in PAIRS]
    examples = encode(tokenizer, [Conversation(turn, str(i)) for i, turn in enumerate(turns)])
    return {**collate(examples, pad_id=pad_id_of(tokenizer))}


def test_it_is_the_model_it_says_it_is(
    smollm2: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: Batch
) -> None:
    assert count_parameters(smollm2) == 134_515_008
    for decoder in (TransformersDecoder(smollm2, torch.float32), FusedDecoder(smollm2, torch.float32)):
        texts = generate_texts(decoder, tokenizer, chats, max_new_tokens=24, end_tokens=end_token_ids(smollm2))
        assert "Paris" in texts[0] and "blue" in texts[1].lower()


@torch.no_grad()
def test_bfloat16_decoders_stay_close_to_it(smollm2: PreTrainedModel, chats: Batch) -> None:
    """On average as close as each other: which of two nearly equal tokens comes first is rounding's choice."""
    prompts = chats["prompt_ids"], chats["prompt_mask"], 1
    exact = TransformersDecoder(smollm2, torch.float32).prefill(*prompts)
    for decoder in (TransformersDecoder, FusedDecoder):
        assert 1e-5 < forward_kl(decoder(smollm2, torch.bfloat16).prefill(*prompts), exact).mean() < 0.01


@torch.no_grad()
def test_fp8_and_bfloat16_stay_close_to_it(smollm2: PreTrainedModel, chats: Batch) -> None:
    dense = answer_logits(smollm2, chats)
    assert forward_kl(answer_logits(inference_copy(smollm2, torch.bfloat16), chats), dense).mean() < 0.005
    quantized = inference_copy(smollm2, torch.float32)
    apply_edit(quantized, quantize_decoder(quantized))
    answer_logits(quantized.train(), chats)
    freeze_scales(quantized)
    loss = forward_kl(answer_logits(quantized.eval(), chats), dense).mean()
    assert 1e-4 < loss < 0.1
