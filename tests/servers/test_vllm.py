"""vLLM takes our folders as they are, and predicts what torch predicts from them.

`make test-servers` installs vLLM for CPUs and names it; the model is the real SmolLM2-135M, the questions have gold answers.  A text is
the greedy one of at most 24 tokens.  Two correct programs part where two tokens are nearly as probable, so texts are judged by how often
torch parts from itself when it generates 16 at a time.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from datamodules.reasoning import ReasoningTasks
from export.__main__ import main
from export.folders.student import load_student
from models.copies import inference_copy
from models.generation.decoder import decoder_for
from models.generation.rollout import rollout
from models.loading.reference import end_token_ids, load_model, load_tokenizer
from tests.helpers.vllm_server import serving

pytestmark = [pytest.mark.servers, pytest.mark.timeout(3600)]

MODEL = "package:smollm2-135m-instruct"
TASKS = {
    "word_sequence_reversal": {"min_words": 3, "max_words": 4},
    "number_format": {"min_num_candidates": 2, "max_num_candidates": 2, "min_n": 1000, "max_n": 100000},
    "family_relationships": {"min_family_size": 4, "max_family_size": 4},
}
NUM_QUESTIONS, NEW_TOKENS, BATCH = 50, 24, 16
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


def greedy(model, prompts, batch):
    """The greedy texts of torch in bfloat16, `batch` prompts at a time, padded on the left."""
    decoder, texts = decoder_for(model, torch.bfloat16), []
    for start in range(0, len(prompts), batch):
        rows = [torch.tensor(row).flip(0) for row in prompts[start : start + batch]]
        ids = pad_sequence(rows, batch_first=True, padding_value=-1).flip(1)
        ends = end_token_ids(model)
        found = rollout(decoder, ids.clamp(min=0), (ids >= 0).long(), max_new_tokens=NEW_TOKENS, end_tokens=ends)
        texts += [row[:length] for row, length in zip(found.tokens_BG.tolist(), found.lengths, strict=True)]
    return texts


@torch.no_grad()
def log_probs(model, prompts, answers):
    """Of all tokens of all answers in torch and bfloat16, one conversation at a time."""
    model, found = inference_copy(model, torch.bfloat16), []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits_TV = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        found += logits_TV.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0].tolist()
    return found


def identical(some, others, end_ids):
    """How many texts are the same; whether the token that ends one belongs to it is a matter of taste."""
    stripped = [[[token for token in text if token not in end_ids] for text in texts] for texts in (some, others)]
    return sum(one == other for one, other in zip(*stripped, strict=True))


@pytest.mark.parametrize(
    ("folder", "student"),
    [("int8/student", None), ("int8/compressed", "int8/student"), ("int4_g64/compressed", "int4_g64/student")],
)
def test_a_folder_is_served_as_torch_computes_it(folder, student, python, exports, questions, tmp_path):
    model = load_student(str(exports / student))[0] if student else load_model(str(exports / folder))
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
    our_mean, their_mean = (torch.tensor(values).mean().item() for values in (ours, theirs))
    print(
        f"\n{folder}: {same} of {len(prompts)} greedy texts as in torch (torch at batch {BATCH}: {expected}), mean log-probability of gold "
        f"answers {their_mean:.4f} (torch {our_mean:.4f})"
    )
    assert same >= expected - 5
    assert their_mean == pytest.approx(our_mean, abs=0.02)
