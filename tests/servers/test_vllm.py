"""vLLM takes our folders as they are, and predicts what torch predicts from them.

`make test-servers` installs vLLM for CPUs and names it; the model is the real SmolLM2-135M, the questions have gold answers.  A text is
the greedy one of at most 32 tokens.  Two correct programs part where two tokens are nearly as probable, so texts are judged by how often
torch parts from itself when it generates 16 at a time.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from vllm_server import serving

from datamodules.reasoning import ReasoningTasks
from export.__main__ import main
from export.huggingface import load_student
from models.pretrained import end_token_ids, load_model, load_tokenizer

pytestmark = [pytest.mark.servers, pytest.mark.timeout(3600)]

MODEL = "package:smollm2-135m-instruct"
TASKS = {
    "word_sequence_reversal": {"min_words": 3, "max_words": 4},
    "number_format": {"min_num_candidates": 2, "max_num_candidates": 2, "min_n": 1000, "max_n": 100000},
    "family_relationships": {"min_family_size": 4, "max_family_size": 4},
}
NUM_QUESTIONS, NEW_TOKENS, BATCH = 50, 32, 16
QUICK = ["--engine", "none", "--prompts", "1", "--decode-steps", "1", "--benchmark-repetitions", "0"]


@pytest.fixture(scope="module")
def python():
    """The interpreter of the environment that vLLM is in."""
    environment = Path(os.environ.get("SERVERS_VENV", "nowhere"))
    if not (environment / ".installed").is_file():
        reason = environment / "reason.txt"
        pytest.skip(reason.read_text().strip() if reason.is_file() else "make test-servers installs vLLM and runs this")
    torch.set_num_threads(os.cpu_count() or 1)  # other tests have one
    return environment.absolute() / "bin/python"


@pytest.fixture(scope="module")
def questions():
    """Conversations to calibrate on, and 50 others."""
    data = ReasoningTasks(MODEL, TASKS, train_size=16, val_size=3, test_size=NUM_QUESTIONS)
    return {split: [(item.question, item.entry["answer"]) for item in data.items(split)] for split in ("train", "test")}


@pytest.fixture(scope="module")
def exports(python, questions, tmp_path_factory):
    """Where `python -m export` has written a student/ and a compressed/, by precision."""
    root = tmp_path_factory.mktemp("exports")
    lines = [json.dumps({"prompt": question, "response": answer}) for question, answer in questions["train"]]
    (root / "calibration.jsonl").write_text("\n".join(lines))
    for precision in ("int8", "int4_g64"):
        calibrated = ["--precision", precision, "--calibration", str(root / "calibration.jsonl"), "--method", "nearest"]
        assert main([MODEL, "--output", str(root / precision), "--compressed", *calibrated, *QUICK]) == 0
    return root


def in_torch(folder, *, with_quantizers):
    """The same model in torch and bfloat16."""
    model = load_student(str(folder))[0] if with_quantizers else load_model(str(folder))
    return model.to(torch.bfloat16)


def greedy(model, prompts, batch):
    """The greedy texts of torch, `batch` prompts at a time, padded on the left."""
    texts = []
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        found = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts += found[:, longest:].tolist()
    return texts


@torch.no_grad()
def log_probs(model, prompts, answers):
    """Of all tokens of all answers in torch, one conversation at a time."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits_TV = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        found += logits_TV.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0].tolist()
    return found


def identical(some, others, end_ids):
    """How many texts are the same up to their end tokens."""

    def until_end(text):
        return text[: next((place for place, token in enumerate(text) if token in end_ids), len(text))]

    return sum(until_end(one) == until_end(other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize(
    ("folder", "student"),
    [("int8/student", None), ("int8/compressed", "int8/student"), ("int4_g64/compressed", "int4_g64/student")],
)
def test_a_folder_is_served_as_torch_computes_it(folder, student, python, exports, questions, tmp_path):
    model = in_torch(exports / (student or folder), with_quantizers=student is not None)
    tokenizer = load_tokenizer(str(exports / folder))
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question, _ in questions["test"]
    ]
    answers = [
        [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id] for _, answer in questions["test"]
    ]
    alone, together, ours = greedy(model, prompts, 1), greedy(model, prompts, BATCH), log_probs(model, prompts, answers)
    with serving(python, exports / folder, tmp_path / "vllm.log") as server:
        served, theirs = server.greedy(prompts, NEW_TOKENS), server.log_probs(prompts, answers)
    same, expected = (identical(alone, others, end_token_ids(model)) for others in (served, together))
    ours, theirs = torch.tensor(ours).mean().item(), torch.tensor(theirs).mean().item()
    print(
        f"\n{folder}: {same} of {len(prompts)} greedy texts as in torch (torch at batch {BATCH}: {expected}), mean log-probability of gold "
        f"answers {theirs:.4f} (torch {ours:.4f})"
    )
    assert same >= expected - 5
    assert theirs == pytest.approx(ours, abs=0.02)
