from pathlib import Path

import pytest
import torch

from export.onnx_graph.prefill import write_prefill
from export.sessions.onnx_session import OnnxSession
from tests.helpers.tiny_models import left_padded_prompts

PROMPTS = left_padded_prompts()


@pytest.mark.parametrize("name", ["fp32", "fp8"])
def test_the_last_logits_of_the_same_weights(name: str, graphs: dict[str, Path]) -> None:
    before = {path: path.stat().st_mtime_ns for path in graphs[name].parent.iterdir()}
    prefill = write_prefill(graphs[name])
    assert prefill.stat().st_size < 1_000_000
    assert set(graphs[name].parent.iterdir()) == {*before, prefill}
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    whole = OnnxSession(graphs[name]).run(PROMPTS["prompt_ids"], PROMPTS["prompt_mask"])
    last = OnnxSession(prefill).run(PROMPTS["prompt_ids"], PROMPTS["prompt_mask"])
    assert last.logits.shape == (3, 1, whole.logits.shape[2])
    torch.testing.assert_close(last.logits, whole.logits[:, -1:])
    mask_BS = torch.cat([PROMPTS["prompt_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
    token_B1 = last.logits[:, -1].argmax(-1, keepdim=True)
    after = [
        s.run(token_B1, mask_BS, o.cache) for s, o in ((OnnxSession(graphs[name]), whole), (OnnxSession(prefill), last))
    ]
    torch.testing.assert_close(after[1].logits, after[0].logits)
