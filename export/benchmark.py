"""Speed of exported graphs in ONNX Runtime on the CPU: time to first token and tokens per second, one conversation.

The graphs take turns in every repetition, so that a change of the machine's load meets all of them; medians are reported with
the smallest and largest value.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from export.files import folder_bytes
from export.runtime import OnnxSession


def benchmark_onnx(
    paths: Mapping[str, Path],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repetitions: int = 5,
    threads: int | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Measure graphs in turns, after one repetition that is not counted.

    Args:
        paths: Graphs written by `export_onnx`, by the name that a row shall carry.
        prompt_tokens: Length of the prompt, tokens.
        new_tokens: Tokens decoded after the first one.
        repetitions: Counted repetitions.
        threads: Threads of one operator; None: ONNX Runtime's choice.
        on_step: Called after each measurement of one graph.

    Returns:
        One row a graph: sizes in bytes, times in milliseconds, speeds in tokens/s.
    """
    sessions = {name: OnnxSession(path, threads=threads) for name, path in paths.items()}
    first: dict[str, list[float]] = {name: [] for name in paths}
    speed: dict[str, list[float]] = {name: [] for name in paths}
    for repetition in range(repetitions + 1):
        for name, session in sessions.items():
            seconds, tokens_per_second = _measure(session, prompt_tokens, new_tokens)
            if repetition:
                first[name].append(1000 * seconds)
                speed[name].append(tokens_per_second)
            on_step()
    return [
        {
            "name": name,
            "path": path.as_posix(),
            "bytes": folder_bytes(path) + folder_bytes(path.with_name(path.name + ".data")),
            "threads": threads,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "repetitions": repetitions,
            **_spread("time_to_first_token_ms", first[name]),
            **_spread("tokens_per_second", speed[name]),
        }
        for name, path in paths.items()
    ]


def _measure(session: OnnxSession, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt up to its next token, and tokens/s after it."""
    start = time.perf_counter()
    output = session.run(torch.ones(1, prompt_tokens, dtype=torch.long), torch.ones(1, prompt_tokens, dtype=torch.long))
    token = output.logits[:, -1:].argmax(dim=-1)
    prompt_done = time.perf_counter()
    for step in range(1, new_tokens + 1):
        output = session.run(token, torch.ones(1, prompt_tokens + step, dtype=torch.long), output.cache)
        token = output.logits[:, -1:].argmax(dim=-1)
    return prompt_done - start, new_tokens / (time.perf_counter() - prompt_done)


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
