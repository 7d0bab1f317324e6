"""Scores of candidates: the same with and without sharing, in torch and ONNX Runtime, whatever the batch."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.label_prompts import encode_prompts, frame_of, label_token_ids
from export.onnx_graph.to_onnx import export_onnx
from export.serving.scorer import Scorer
from export.sessions.onnx_session import OnnxSession
from export.sessions.torch_session import TorchSession
from tests.helpers.chat_doubles import byte_tokenizer
from tests.helpers.tiny_models import tiny_model

PREFIX = "Member 7, 31 years, likes: Alien (1979), Brazil (1985)"
CANDIDATES = ["Toy Story", "Heat", "A much longer title, The Return, Part 3 (1999)", "Heat", "Up", "?"]
LABELS = ("n", "y")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return tiny_model(vocab_size=len(tokenizer) + 4)


@pytest.fixture(scope="module")
def graph(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scorer") / "model.onnx"
    export_onnx(model, path, precision="fp32")
    return path


@torch.no_grad()
def from_scratch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Every whole prompt alone, without a cache."""
    pairs = [(PREFIX, candidate) for candidate in CANDIDATES]
    rows = []
    for prompt in encode_prompts(tokenizer, frame_of(tokenizer), pairs):
        logits_V = model(input_ids=torch.tensor([prompt.ids]), use_cache=False).logits[0, -1]
        rows.append(logits_V.log_softmax(-1)[label_token_ids(tokenizer, LABELS)])
    return torch.stack(rows)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_sharing_and_batching_change_no_score(
    runtime: str, batch_size: int, model: PreTrainedModel, graph: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    session = TorchSession(model) if runtime == "torch" else OnnxSession(graph)
    scorer = Scorer(session, tokenizer, LABELS, batch_size=batch_size)
    expected = from_scratch(model, tokenizer)
    assert expected.std() > 0.01
    torch.testing.assert_close(scorer.score(PREFIX, CANDIDATES), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(scorer.score(PREFIX, CANDIDATES), expected, atol=1e-4, rtol=0)  # hot


class Counting(TorchSession):
    """Notes the sizes of what is run."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.sizes: list[tuple[int, int]] = []

    def run(self, input_ids_BT, attention_mask_BS, cache=None):
        self.sizes.append(tuple(input_ids_BT.shape))
        return super().run(input_ids_BT, attention_mask_BS, cache)


def test_a_prefix_is_computed_once_while_it_is_remembered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    session = Counting(model)
    scorer = Scorer(session, tokenizer, LABELS, max_prefixes=1)
    scorer.score(PREFIX, CANDIDATES)
    (prefix, suffixes) = session.sizes
    assert prefix[0] == 1 and prefix[1] > len(PREFIX) // 2
    assert suffixes[0] == 5  # two candidates are the same
    scorer.score(PREFIX, ["New"])
    assert len(session.sizes) == 3
    scorer.score("Somebody else, who likes nothing at all", ["New"])
    scorer.score(PREFIX, ["New"])
    assert len(session.sizes) == 7
    scorer.forget()
    scorer.score(PREFIX, ["New"])
    assert len(session.sizes) == 9


def test_duplicates_and_empty_lists(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    scorer = Scorer(TorchSession(model), tokenizer, LABELS)
    assert scorer.score(PREFIX, []).shape == (0, 2)
    scores = scorer.score(PREFIX, ["Heat", "Up", "Heat"])
    assert torch.equal(scores[0], scores[2])
    assert not torch.equal(scores[0], scores[1])
    alone = scorer.score("", ["Heat"])  # the chat template still is a common beginning
    assert alone.shape == (1, 2)


def test_labels_that_are_no_single_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="every label as one token"):
        Scorer(TorchSession(model), tokenizer, ("no", "yes"))
    with pytest.raises(ValueError, match="expected batch_size between 1 and 1,000,000,000, found 0"):
        Scorer(TorchSession(model), tokenizer, LABELS, batch_size=0)
