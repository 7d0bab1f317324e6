"""Ask an exported graph something at the terminal.

    python -m export.chat runs/quickstart                        # a conversation; an empty line ends it
    python -m export.chat runs/quickstart --prompt "What is 7 plus 5?"

The graph for CPUs is asked if the folder has it, as it would be served: one buffer for past and present, the prompt in pieces.  Prompts
are written by the student's chat template, with the system prompt that the run was trained with.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from export.layout import COMPRESSED, CPU_GRAPH, GRAPH, STUDENT
from export.onnx_graph.metadata import metadata_of
from export.sessions.onnx_session import OnnxSession
from export.sessions.shared_cache import SharedCacheSession
from models.generation.sampling import Sampling, sample, seed_of, uniforms
from models.loading.reference import load_tokenizer
from program.options import Parser, positive, up_to
from program.screen import as_command


class Conversation:
    """A graph with the tokens that it has seen; what a prompt shares with them from the start is not computed again.

    `length` tokens fit, answers included.
    """

    def __init__(self, graph: Path, *, length: int, threads: int | None = None) -> None:
        metadata = metadata_of(graph)
        self.length = min(length, int(metadata.get("positions") or length))
        self._shared = graph.name == Path(CPU_GRAPH).name
        self._session: Any = (
            SharedCacheSession(graph, length=self.length, threads=threads)
            if self._shared
            else OnnxSession(graph, threads=threads)
        )
        self._tokens: list[int] = []
        self._cache: Any = None

    def next_logits(self, tokens: list[int]) -> Tensor:
        """Logits (1, V) behind tokens that begin a conversation, or go on with it."""
        known = 0
        while known < min(len(tokens) - 1, len(self._tokens)) and tokens[known] == self._tokens[known]:
            known += 1
        if not self._shared and known < len(self._tokens):
            known, self._cache = 0, None  # the cache of a portable graph cannot be cut
        self._tokens = list(tokens)
        new_1T = torch.tensor([tokens[known:]])
        if self._shared:
            self._session.reset(known)
            logits: Tensor = self._session.run(new_1T, last_only=True)[:, -1]
            return logits
        output = self._session.run(new_1T, torch.ones(1, len(tokens), dtype=torch.long), self._cache)
        self._cache = output.cache
        return output.logits[:, -1]


def answer(
    conversation: Conversation,
    prompt: list[int],
    *,
    end_tokens: Sequence[int],
    sampling: Sampling,
    seed: int,
    limit: int,
) -> Iterator[int]:
    """Tokens of an answer one by one, without the token that ends it."""
    ends, tokens = torch.tensor(list(end_tokens), dtype=torch.long), list(prompt)
    limit = min(limit, conversation.length - len(prompt))
    uniforms_1G = uniforms([seed_of("chat", seed, len(prompt))], max(limit, 1))
    for position in range(limit):
        logits_1V = conversation.next_logits(tokens)
        token = int(sample(logits_1V, uniforms_1G[:, position], sampling, end_tokens=ends, num_sampled=position))
        if token in end_tokens:
            return
        tokens.append(token)
        yield token


@as_command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if everything went well."""
    options = _parser().parse_args(arguments)
    graph, folder = find_graph(options.folder)
    tokenizer, ends = load_tokenizer(str(folder)), end_tokens_of(folder)
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p)
    conversation = Conversation(graph, length=options.length, threads=options.threads)
    system = system_prompt_of(options.folder) if options.system is None else options.system
    messages = [] if system is None else [{"role": "system", "content": system}]
    for text in [options.prompt] if options.prompt else _typed():
        prompt = _prompt(tokenizer, [*messages, {"role": "user", "content": text}])
        if len(prompt) >= conversation.length:
            raise ValueError(
                f"expected a conversation of fewer than {conversation.length} tokens, found {len(prompt)}; ask for more with --length, "
                "or start again"
            )
        tokens = answer(
            conversation, prompt, end_tokens=ends, sampling=sampling, seed=options.seed, limit=options.max_new_tokens
        )
        said = _stream(tokenizer, tokens)
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]
    return 0


def find_graph(folder: Path) -> tuple[Path, Path]:
    """The graph to ask, and the folder of its tokenizer.

    Raises:
        FileNotFoundError: One of them is missing.
    """
    graph = next((folder / path for path in (CPU_GRAPH, GRAPH) if (folder / path).is_file()), None)
    if graph is None:
        raise FileNotFoundError(
            f"expected {CPU_GRAPH} or {GRAPH} in {str(folder)!r}, found neither; name the folder of a run or of `python -m export --output`"
        )
    names = (STUDENT, COMPRESSED)
    tokenizer = next((folder / name for name in names if (folder / name / "tokenizer_config.json").is_file()), None)
    if tokenizer is None:
        raise FileNotFoundError(
            f"expected {STUDENT}/ or {COMPRESSED}/ with a tokenizer in {str(folder)!r}, found neither; export with hf among the formats"
        )
    return graph, tokenizer


def end_tokens_of(folder: Path) -> list[int]:
    """Tokens that end an answer, as the configuration in a Hugging Face folder names them."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            ids |= set(found if isinstance(found, list) else [] if found is None else [found])
    return sorted(ids)


def system_prompt_of(folder: Path) -> str | None:
    """The system prompt that a run was trained with; None: it had none of its own, or the folder is no run's."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    prompt: str | None = config.get("data", {}).get("init_args", {}).get("system_prompt")
    return prompt


def _typed() -> Iterator[str]:
    """What is typed, up to an empty line or the end of the input."""
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text.strip():
            return
        yield text


def _prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    if not tokenizer.chat_template:
        return list(tokenizer(messages[-1]["content"])["input_ids"])
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _stream(tokenizer: PreTrainedTokenizerBase, tokens: Iterator[int]) -> str:
    """Print tokens as they come, then how fast they came; returns the text."""
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    said: list[int] = []
    started = first = time.perf_counter()
    for token in tokens:
        first = time.perf_counter() if not said else first
        said.append(token)
        streamer.put(torch.tensor([token]))
    streamer.end()
    rest = time.perf_counter() - first
    if len(said) > 1 and sys.stderr.isatty():
        print(
            f"({1000 * (first - started):.0f} ms to the first token, then {(len(said) - 1) / rest:.0f} tokens/s)",
            file=sys.stderr,
        )
    return str(tokenizer.decode(said, skip_special_tokens=True))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m export.chat", description="Ask an exported graph something.")
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="folder of a run, or what `python -m export --output DIR` has written")
    add("--prompt", metavar="TEXT", help="one question (default: a conversation, which an empty line ends)")
    add("--system", metavar="TEXT", help="system prompt (default: that of the run, if it had one)")
    add("--temperature", type=float, default=0.0, help="0 takes the most probable token (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="sample among the tokens that reach this probability (default: all)")
    add("--seed", type=int, default=0, help="of what is sampled (default: %(default)s)")
    add("--max-new-tokens", type=positive, default=256, metavar="N", help="of an answer (default: %(default)s)")
    add("--length", type=positive, default=2048, metavar="N", help="tokens of a conversation (default: %(default)s)")
    add("--threads", type=up_to(1024), metavar="N", help="threads in ONNX Runtime (default: its choice)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
