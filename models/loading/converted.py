"""GGUF files as Hugging Face folders: converted once, kept in the cache of packages, and mapped into memory from then on.

A conversion belongs to a file (its path, size and time of change) and to the versions of the two libraries that make it; one that
no longer fits its file is removed when the next is made.  Model and tokenizer are kept apart: a file may lack the second.
"""

import hashlib
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, modeling_gguf_pytorch_utils
from transformers.utils.quantization_config import GgufConfig

from models.loading.contents import check_loaded, check_only_data, tie_equal_head
from program.files import move_into_place, staging_folder
from program.packaged import cache_folder
from program.progress import Bar

modeling_gguf_pytorch_utils.tqdm = Bar  # type: ignore[attr-defined, assignment]  # its own would write a line into a log at every redraw


def converted_model(file: Path) -> Path:
    """A folder with the model of a GGUF file, its weights dequantized.

    Dequantized numbers are a product of a float16 scale and a code, often with a minimum added: neither bfloat16 nor float16 holds
    them exactly.  They are kept in the smallest type that does, most often float32, so that a model is the same in every type it is
    asked for in, from the file or from the cache.
    """

    def write(folder: Path) -> None:
        rank_zero_info(
            f"Converting {file.name} ({file.stat().st_size / 1e6:,.0f} MB) once; kept in {_folder_of(file)}, or elsewhere with "
            "POTSTILL_CACHE"
        )
        check_only_data(str(file.parent), gguf=True, local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        model, report = loaded
        check_loaded(str(file), report)
        _tie_equal_head(model)
        model.to(dtype=_smallest_exact_type(model)).save_pretrained(folder)

    return _kept(file, "model", write)


def converted_tokenizer(file: Path) -> Path:
    """A folder with the tokenizer of a GGUF file."""

    def write(folder: Path) -> None:
        AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)

    return _kept(file, "tokenizer", write)


def _kept(file: Path, what: str, write: Callable[[Path], None]) -> Path:
    """The folder `what` of a file's conversion, written under a temporary name and renamed when it is whole."""
    target = _folder_of(file) / what
    if target.is_dir():
        return target
    with staging_folder(cache_folder() / "gguf") as staging:
        (staging / what).mkdir()
        write(staging / what)
        target.parent.mkdir(parents=True, exist_ok=True)
        for other in target.parent.parent.iterdir():
            if other != target.parent:  # of another content, or of other versions
                shutil.rmtree(other, ignore_errors=True)
        move_into_place(staging / what, target)
    return target


def _folder_of(file: Path) -> Path:
    """One folder for a path, in it one for its present content and the libraries."""
    path = file.resolve()
    state = path.stat()
    present = (state.st_size, state.st_mtime_ns, version("gguf"), version("transformers"))
    return cache_folder() / "gguf" / _digest(str(path)) / _digest(repr(present))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _smallest_exact_type(model: PreTrainedModel) -> torch.dtype:
    """bfloat16 or float16 if it holds all weights as they are, as of files that were not quantized; else float32."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(parameter.to(dtype).float(), parameter) for parameter in model.parameters()):
            return dtype
    return torch.float32


def _tie_equal_head(model: PreTrainedModel) -> None:
    """Some files repeat the embedding as the output head: one of them is enough. If the two differ, say what that costs."""
    head: Any = model.get_output_embeddings()
    if not tie_equal_head(model) and not model.config.tie_word_embeddings:
        rank_zero_info(
            f"The file holds an output head beside the embedding, and their numbers differ: {head.weight.numel():,} weights of "
            f"{model.num_parameters():,} are the head's own"
        )
