"""The byte-level tokenizer as an object and as a folder: nothing to download, texts survive a round trip."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from tests.helpers.chat_doubles import byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `tokenizer:` names in a recipe: a Hugging Face folder."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(folder)
