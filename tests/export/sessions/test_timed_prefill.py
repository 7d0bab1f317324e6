"""The prefill that a budget in ONNX Runtime is about."""

import torch

from export.sessions.timed_prefill import onnx_run
from models.structure.shape import shape_of, sliced
from tests.helpers.tiny import tiny_model


def test_it_runs_the_whole_prefill_of_the_student() -> None:
    """After the files it was loaded from are gone."""
    model = tiny_model()
    student = sliced(model, shape_of(model).evenly({"neurons": 16, "kv_groups": 1}))
    run = onnx_run(student, batch=2, length=5, threads=1)
    run()
    output = run()
    with torch.no_grad():
        expected = student(torch.ones(2, 5, dtype=torch.long)).logits
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    assert [value.shape() for value in output.cache] == [[2, 1, 5, 8]] * 4
