"""For all tests: one thread, no network, no account; and tiny doubles as fixtures."""

import functools
import gc
import logging
import os

import program.screen  # noqa: F401

gc.disable()  # until the tests are collected: what is imported stays
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch
from onnxscript.values import TracedOnnxFunction
from transformers import PreTrainedModel

from datamodules.collate import Batch
from export.verify import faithfulness
from tests.helpers.tiny import tiny_batch, tiny_folder, tiny_model

torch.set_num_threads(1)

# Answers for the free run of tiny models, which differ by 1e-4 nats: ten seconds of every export in the place of two.
faithfulness.TOKENS = 384

# `torch.onnx.export` parses the sources of its 497 operators every time: a seventh of what tracing a tiny model takes.
TracedOnnxFunction.function_ir = property(functools.cache(TracedOnnxFunction.function_ir.fget))  # type: ignore[assignment]


def pytest_collection_finish() -> None:
    """Look for garbage less often, and never in what was imported: that took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000)


@pytest.fixture(autouse=True)
def lightning_log_level() -> None:
    """Lightning's own, before every test: a program sets its process's level, and tests and their fixtures run programs."""
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)


@pytest.fixture
def model() -> PreTrainedModel:
    """A tiny llama of one's own: tests may cut it to pieces."""
    return tiny_model()


@pytest.fixture
def batch() -> Batch:
    return tiny_batch()


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny llama and its tokenizer; shared, so read only."""
    return tiny_folder(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another llama with the same tokenizer, wider than the student; shared, so read only."""
    path: Path = tmp_path_factory.mktemp("teacher")
    return tiny_folder(path, seed=7, hidden_size=40, intermediate_size=64)
