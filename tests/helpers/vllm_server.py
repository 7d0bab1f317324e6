"""vLLM in an environment of its own, as a server on this machine that ends with the test, whatever happens."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

START_SECONDS, REQUEST_SECONDS, END_SECONDS, LONGEST_SECONDS = 600, 600, 20, 1800
_OPTIONS = ["--dtype", "bfloat16", "--max-model-len", "512", "--enforce-eager", "--host", "127.0.0.1"]
_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_INT4_W4A8": "0",  # its default rounds inputs to 8 bits, which the format does not ask for
}


class Server:
    """What is asked of a running server: prompts and continuations are token ids."""

    def __init__(self, port: int, model: Path) -> None:
        self._url, self._model = f"http://127.0.0.1:{port}", str(model)

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The most probable continuation of each prompt, all prompts in one request."""
        choices = self._complete(prompts, max_tokens=new_tokens, temperature=0, return_token_ids=True)
        return [choice["token_ids"] for choice in choices]

    def log_probs(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
        """Of all tokens of all answers, in nats."""
        tokens = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        found = [choice["prompt_logprobs"] for choice in self._complete(tokens, max_tokens=1, prompt_logprobs=0)]
        return [
            place[str(token)]["logprob"]
            for places, answer in zip(found, answers, strict=True)
            for place, token in zip(places[-len(answer) :], answer, strict=True)
        ]

    def _complete(self, prompts: Sequence[Sequence[int]], **settings: Any) -> list[dict[str, Any]]:
        body = json.dumps({"model": self._model, "prompt": list(map(list, prompts)), **settings}).encode()
        request = urllib.request.Request(f"{self._url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
            return json.load(response)["choices"]

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/health", timeout=5) as response:
                return response.status == 200
        except OSError:
            return False


@contextmanager
def serving(python: Path, model: Path, log: Path) -> Iterator[Server]:
    """A server of a model folder.

    Raises:
        RuntimeError: It does not come up; with the last lines of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    bounded = [
        "timeout",
        f"--kill-after={END_SECONDS}",
        str(LONGEST_SECONDS),
    ]  # even where this process is killed and cannot
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | _SETTINGS
    with log.open("w") as output:
        process = subprocess.Popen(
            [*bounded, *command, *_OPTIONS], stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        server, started = Server(port, model), time.monotonic()
        while not server.is_up():
            if process.poll() is not None or time.monotonic() - started > START_SECONDS:
                last = "\n".join(log.read_text().splitlines()[-15:])
                raise RuntimeError(f"expected vLLM to serve {model.name}, found it ended or silent:\n{last}")
            time.sleep(1)
        yield server
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """End a server and all that it started, which is in its process group: ask, wait, then kill what is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
