import os

import onnx_ir as ir
import pytest
import torch

from export.cpu_graph.cached_attention import cache_in_attention
from export.cpu_graph.merge_products import merge_products
from export.cpu_graph.to_cpu import norms_with_sums
from export.onnx_graph.last_logits import ask_for_logits
from export.onnx_graph.to_onnx import export_onnx
from export.sessions.onnx_session import OnnxSession
from export.sessions.shared_cache import SharedCacheSession, whole_scores
from export.verify import verify
from tests.helpers.tiny_models import left_padded_prompts, tiny_model

FAMILIES = {
    "llama": {},
    "qwen2": {},  # biases of query, key and value
    "qwen3": {},  # norms between the projections and the rotary angles
    "mistral": {"sliding_window": 4},
}


def rewritten(path, target, *, asks=False):
    model = ir.load(path)
    merge_products(model)
    counts = cache_in_attention(model), norms_with_sums(model)
    if asks:
        ask_for_logits(model)
    ir.save(model, target, external_data=f"{target.name}.data")
    return counts, [node.op_type for node in model.graph]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_with_its_cache_computes_what_torch_does(family, tmp_path):
    model = tiny_model(family, **FAMILIES[family])
    export_onnx(model, tmp_path / "plain.onnx", precision="fp32")
    counts, operators = rewritten(tmp_path / "plain.onnx", tmp_path / "model.onnx")
    assert counts == (3, 6)
    assert "Attention" not in operators
    assert "Concat" not in operators or operators.count("Concat") < 6  # none of a cache
    assert "RotaryEmbedding" not in operators
    between = family in ("qwen2", "qwen3")  # biases, or norms, lie between a product and the heads
    assert operators.count("Split") == (6 if between else 3)
    prompts = left_padded_prompts()
    checks = verify(model, tmp_path / "model.onnx", *prompts.values(), decode_steps=8, for_cpu=True)
    assert [check.status for check in checks] == ["passed"] * len(checks), [check.reason for check in checks]


def test_a_graph_without_fused_attention_stays_as_it_is(plain_model, tmp_path):
    export_onnx(plain_model, tmp_path / "model.onnx", precision="fp32", opset=21)
    assert cache_in_attention(ir.load(tmp_path / "model.onnx")) == 0


@pytest.fixture(scope="module", params=[False, True], ids=["every logit", "as many as asked for"])
def paths(request, graphs, tmp_path_factory):
    target = tmp_path_factory.mktemp("shared") / "model.onnx"
    rewritten(graphs["fp32"], target, asks=request.param)
    return graphs["fp32"], target


def test_a_shared_cache_takes_padded_prompts_and_then_token_by_token(paths):
    prompts, tokens = left_padded_prompts(), torch.tensor([[5], [6], [7]])
    plain, shared = OnnxSession(paths[0], threads=1), SharedCacheSession(paths[1], length=12, batch=3, threads=1)
    output = plain.run(prompts["prompt_ids"], prompts["prompt_mask"])
    valid = prompts["prompt_mask"].bool()
    close(shared.run(prompts["prompt_ids"], prompts["prompt_mask"])[valid], output.logits[valid])
    mask = prompts["prompt_mask"]
    for _ in range(3):
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        output = plain.run(tokens, mask, output.cache)
        close(shared.run(tokens), output.logits)
    assert shared.num_past == 12
    with pytest.raises(ValueError, match="expected at most 12 tokens, the length of the cache, found 13"):
        shared.run(tokens)
    shared.reset(9)
    with pytest.raises(ValueError, match="expected an empty cache for 3 prompts, found 9 tokens"):
        shared.run(torch.cat([tokens, tokens], dim=1))


def test_a_prompt_in_pieces_gives_the_same_logits(paths):
    prompt = torch.arange(3, 14)[None]
    expected = OnnxSession(paths[0], threads=1).run(prompt, torch.ones_like(prompt)).logits
    logits = SharedCacheSession(paths[1], length=12, threads=1, piece=4).run(prompt)
    assert logits.shape[1] == 3  # those of the last piece
    close(logits, expected[:, -3:])


@pytest.mark.parametrize("piece", [3, 4, 5, 10, 16])
def test_the_last_logits_of_a_prompt_may_be_had_alone(piece, paths):
    prompt, more = torch.arange(3, 14)[None], torch.tensor([[5, 6]])
    plain = OnnxSession(paths[0], threads=1)
    output = plain.run(prompt, torch.ones_like(prompt))
    shared = SharedCacheSession(paths[1], length=14, threads=1, piece=piece)
    logits = shared.run(prompt, last_only=True)
    assert logits.shape[1] == 1 and shared.num_past == 11
    close(logits, output.logits[:, -1:])
    output = plain.run(more, torch.ones(1, 13, dtype=torch.long), output.cache)
    close(shared.run(more, last_only=True), output.logits[:, -1:])
    output = plain.run(more[:, :1], torch.ones(1, 14, dtype=torch.long), output.cache)
    close(shared.run(more[:, :1], last_only=True), output.logits)


def test_the_last_logits_of_several_prompts_are_those_of_the_whole(paths):
    prompts = left_padded_prompts()
    shared = SharedCacheSession(paths[1], length=12, batch=3, threads=1)
    whole = shared.run(prompts["prompt_ids"], prompts["prompt_mask"])[:, -1:].clone()
    shared.reset()
    close(shared.run(prompts["prompt_ids"], prompts["prompt_mask"], last_only=True), whole)


def test_the_head_sees_what_is_asked_for(graphs, tmp_path, monkeypatch):
    rewritten(graphs["fp32"], tmp_path / "model.onnx", asks=True)
    session = SharedCacheSession(tmp_path / "model.onnx", length=20, threads=1, piece=4)
    seen, run = [], session._run

    def recorded(ids, *, keep):
        seen.append(run(ids, keep=keep))
        return seen[-1]

    monkeypatch.setattr(session, "_run", recorded)
    session.run(torch.arange(3, 14)[None])
    assert [logits.shape[1] for logits in seen] == [1, 1, 3]
    session.run(torch.arange(3, 8)[None], last_only=True)
    assert [logits.shape[1] for logits in seen[3:]] == [1, 1]


@pytest.mark.parametrize("chosen", [None, "0", "1"])
def test_scores_are_computed_whole_unless_the_environment_says_how(chosen, monkeypatch):
    name = "ORT_GQA_DISABLE_FLASH_ATTENTION"
    monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv(name, chosen)
    with whole_scores():
        assert os.environ[name] == (chosen or "1")
    assert os.environ.get(name) == chosen


def test_forgotten_tokens_leave_no_trace(paths):
    shared = SharedCacheSession(paths[1], length=8, threads=1)
    first = shared.run(torch.tensor([[3, 4, 5]])).clone()
    shared.run(torch.tensor([[9, 9, 9]]))
    shared.reset(2)
    close(shared.run(torch.tensor([[5]]))[:, -1], first[:, -1])
    shared.reset()
    close(shared.run(torch.tensor([[3, 4, 5]])), first)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


def test_logits_of_one_token_stay_what_they_were(paths):
    session = SharedCacheSession(paths[1], length=12, threads=1)
    session.run(torch.tensor([[3, 4]]))
    first = session.run(torch.tensor([[5]]))
    kept = first.clone()
    second = session.run(torch.tensor([[6]]))
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
