"""Questions to exported graphs at the terminal: the answers are those of the model in torch."""

import pytest
import torch

from export import chat
from export.__main__ import main as export_main
from export.folders.student import save_student
from models.loading.reference import load_model, load_tokenizer
from tests.helpers.tiny_models import tiny_model, tiny_tokenizer

QUESTION = "What is 2 plus 2?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float32 export with both graphs."""
    root = tmp_path_factory.mktemp("chat")
    save_student(tiny_model(layers=1, seed=5, max_position_embeddings=256), tiny_tokenizer(), root / "model")
    command = [str(root / "model"), "--output", str(root / "out"), "--engine", "none", "--cpu"]
    assert export_main([*command, "--decode-steps", "2", "--prompts", "1", "--benchmark-repetitions", "0"]) == 0
    return root / "out"


def _expected(folder, turns, new_tokens):
    """Greedy tokens of `generate` behind a conversation."""
    tokenizer, model = load_tokenizer(str(folder / "student")), load_model(str(folder / "student"))
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids_1P = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    tokens = model.generate(ids_1P, max_new_tokens=new_tokens, do_sample=False)[0, ids_1P.shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("graph", ["cpu.onnx", "model.onnx"])
def test_a_question_gets_the_models_answer(graph, folder, tmp_path, capsys):
    (tmp_path / "onnx").symlink_to(folder / "onnx") if graph == "cpu.onnx" else _only_portable(folder, tmp_path)
    (tmp_path / "student").symlink_to(folder / "student")
    assert chat.find_graph(tmp_path)[0].name == graph
    assert chat.main([str(tmp_path), "--prompt", QUESTION, "--max-new-tokens", "12"]) == 0
    expected = _expected(folder, [{"role": "user", "content": QUESTION}], 12)
    assert len(expected) > 3
    assert capsys.readouterr().out.strip() == expected.strip()


def _only_portable(folder, target):
    (target / "onnx").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (target / "onnx" / name).hardlink_to(folder / "onnx" / name)


def test_a_conversation_goes_on(folder, capsys, monkeypatch):
    typed = iter([QUESTION, "And then?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert chat.main([str(folder), "--max-new-tokens", "5"]) == 0
    first = _expected(folder, [{"role": "user", "content": QUESTION}], 5)
    turns = [("user", QUESTION), ("assistant", first), ("user", "And then?")]
    second = _expected(folder, [{"role": role, "content": text} for role, text in turns], 5)
    assert capsys.readouterr().out.split("\n")[:2] == [first, second]


def test_what_a_prompt_shares_with_the_last_one_is_not_computed_again(folder):
    for graph in ("cpu.onnx", "model.onnx"):
        conversation = chat.Conversation(folder / "onnx" / graph, length=64)
        alone = chat.Conversation(folder / "onnx" / graph, length=64)
        first, second = list(range(10, 30)), [*range(10, 25), 40, 41]
        conversation.next_logits(first)
        conversation.next_logits([*first, 31])
        torch.testing.assert_close(conversation.next_logits(second), alone.next_logits(second), rtol=1e-4, atol=1e-4)
    assert chat.Conversation(folder / "onnx/cpu.onnx", length=4096).length == 256  # the positions that the model knows


def test_an_answer_stops_at_the_end_token(folder):
    conversation = chat.Conversation(folder / "onnx/cpu.onnx", length=64)
    settings = {"sampling": chat.Sampling(temperature=0.0), "seed": 0, "limit": 8}
    tokens = list(chat.answer(conversation, [10, 11, 12], end_tokens=[], **settings))
    assert len(tokens) == 8
    end = tokens[3]
    stopped = list(chat.answer(conversation, [10, 11, 12], end_tokens=[end], **settings))
    assert stopped == tokens[: tokens.index(end)]


def test_the_runs_own_system_prompt_is_taken(tmp_path):
    assert chat.system_prompt_of(tmp_path) is None
    (tmp_path / "config.yaml").write_text("data: {init_args: {system_prompt: ''}}")
    assert chat.system_prompt_of(tmp_path) == ""


def test_a_folder_without_a_graph_gets_one_sentence(tmp_path, folder, capsys):
    assert chat.main([str(tmp_path)]) == 2
    assert "error: expected onnx/cpu.onnx or onnx/model.onnx in" in capsys.readouterr().err
    (tmp_path / "onnx").symlink_to(folder / "onnx")
    assert chat.main([str(tmp_path)]) == 2
    assert "expected student/ or compressed/ with a tokenizer" in capsys.readouterr().err
    assert chat.main([str(folder), "--prompt", "x" * 100, "--length", "20"]) == 2
    assert "expected a conversation of fewer than 20 tokens" in capsys.readouterr().err
