"""Exported graphs on the CPU against those of onnxruntime-genai: tokens per second, time to first token, and fidelity.

    python -m benchmarks.onnx_decode [--threads 2] [--folder DIR] [--json FILE]

Both sides run in turns in one process, with as many threads; each comparison has a process of its own.  Ours run in `SharedCacheSession`, its large pages of memory included.
The peer's graphs run twice, in genai's own runtime and in plain onnxruntime (with a cache that is appended to in place, as genai
does); the faster of the two counts.  Fidelity is KL(model || graph)
in nats per token of held-out answers, against the float32 model in torch.

| ratio                     | what is compared                                                             | better |
|---------------------------|------------------------------------------------------------------------------|--------|
| `decode_fp32`, `_int8`, `_int4` | tokens per second with 128 tokens in the cache, ours over the peer's   | higher |
| `ttft_512`                | seconds to the logits behind a prompt of 512, ours over the peer's best graph | lower |
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from benchmarks.chats import answered, held_out_prompts
from benchmarks.harness import interleave, parser, report, spread
from benchmarks.onnx_graphs import GRAPHS, MODEL, Graph, genai_graph, our_graph
from export.sessions.shared_cache import SharedCacheSession
from models.loading.reference import load_model, load_tokenizer
from program.screen import as_command

PAST = 128
PIECE = 256  # tokens that ours runs at once
NEW = 16  # tokens of one repetition
PROMPT = 512
CONVERSATIONS = 40  # held-out answers
HEAD_DIM = 64  # of the model; genai's graphs do not say
PRECISIONS: tuple[Graph, ...] = ("fp32", "int8", "int4")
PEERS = (*PRECISIONS, "fp32_last")
PACKAGES = ["onnxruntime", "onnxruntime-genai", "torch", "transformers"]
Run = Callable[[], Any]


def main() -> None:
    """Build the graphs, measure decoding, the time to the first token, and fidelity."""
    options = parser(__doc__)
    options.add_argument("--threads", type=int, default=2, help="threads of both sides (default: %(default)s)")
    options.add_argument("--folder", type=Path, help="keep the graphs here, and take those that are here already")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        theirs = {name: genai_graph(name, folder, threads=arguments.threads) for name in PEERS}
        ours = {name: our_graph(name, folder / f"ours_{name}") for name in GRAPHS}
        results, ratios = [], {}
        for name in PRECISIONS:
            rows = _in_a_new_process(decode, ours[name], theirs[name], name, arguments.threads, arguments.repetitions)
            results += rows
            best = max(row["tokens_per_second"] for row in rows if row["name"] != "ours")
            ratios[f"decode_{name}"] = rows[0]["tokens_per_second"] / best
        rows = _in_a_new_process(first_token, ours["prefill"], theirs, arguments.threads, arguments.repetitions)
        results += rows
        ratios["ttft_512"] = rows[0]["median_s"] / min(row["median_s"] for row in rows[1:])
        every = {f"ours {name}": path for name, path in ours.items()}
        every |= {f"genai {name}": theirs[name] / "model.onnx" for name in PRECISIONS}
        results += fidelity(every, arguments.threads)
    report(results, ratios, PACKAGES, arguments.json)


def _in_a_new_process(rows: Callable[..., list[dict[str, Any]]], *arguments: Any) -> list[dict[str, Any]]:
    """What a function measures where no session was before: a peer must not get large pages that one of ours has left behind."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(rows, *arguments).result()


def decode(ours: Path, theirs: Path, precision: str, threads: int, repetitions: int) -> list[dict[str, Any]]:
    """Rows of tokens per second behind `PAST` tokens; ours comes first."""
    peers = {  # first, see `_in_a_new_process`
        "genai": _decoding_in_genai(theirs),
        "genai's graph in onnxruntime": decoding(theirs / "model.onnx", threads, large_pages=False),
    }
    sides = {"ours": decoding(ours, threads), **peers}
    rows = []
    for name, seconds in interleave(sides, repetitions=repetitions).items():
        times = spread(seconds)
        row = {"name": name, "what": "decode", "precision": precision, **times}
        rows.append(row | {"tokens_per_second": NEW / times["median_s"]})
    return rows


def first_token(ours: Path, theirs: dict[str, Path], threads: int, repetitions: int) -> list[dict[str, Any]]:
    """Rows of seconds to the logits behind `PROMPT` tokens; ours comes first."""
    peers = {}  # first, see `_in_a_new_process`
    for name, folder in theirs.items():
        peers[f"genai {name}"] = _prefilling_in_genai(folder)
        plain = prefilling(folder / "model.onnx", threads, piece=PROMPT, large_pages=False)
        peers[f"genai {name}, graph in onnxruntime"] = plain
    seconds = interleave({"ours": prefilling(ours, threads, piece=PIECE), **peers}, repetitions=repetitions)
    return [{"name": name, "what": "first token", **spread(times)} for name, times in seconds.items()]


def fidelity(graphs: dict[str, Path], threads: int) -> list[dict[str, Any]]:
    """Rows of the KL of each graph to the float32 model, a mean over the tokens of held-out answers."""
    model = load_model(MODEL)
    batches = answered(model, load_tokenizer(MODEL), MODEL, held_out_prompts())
    answers = [
        (ids_S[mask_S.bool()][None], labels_S[mask_S.bool()])
        for batch in batches
        for ids_S, mask_S, labels_S in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]
    answers = answers[:: max(1, len(answers) // CONVERSATIONS)][:CONVERSATIONS]
    longest = max(ids_1S.shape[1] for ids_1S, _ in answers)
    sessions = {
        name: SharedCacheSession(path, length=longest, threads=threads, piece=longest, head_dim=HEAD_DIM)
        for name, path in graphs.items()
    }
    total, tokens = dict.fromkeys(graphs, 0.0), 0
    for ids_1S, labels_S in tqdm(answers, desc="Fidelity", unit="answer", leave=False):
        with torch.no_grad():
            exact_SV = model(input_ids=ids_1S).logits[0]
        where_S = (labels_S[1:] != -100).nonzero()[:, 0]
        tokens += len(where_S)
        exact_NV = exact_SV[where_S].log_softmax(-1)
        for name, session in sessions.items():
            session.reset()
            total[name] += _divergence(exact_NV, session.run(ids_1S)[0][where_S].log_softmax(-1))
    return [{"name": name, "what": "fidelity", "kl": value / tokens, "tokens": tokens} for name, value in total.items()]


def _divergence(exact_NV: Tensor, other_NV: Tensor) -> float:
    """KL(exact || other) of logarithms of probabilities, summed over N tokens."""
    return float(functional.kl_div(other_NV, exact_NV, reduction="sum", log_target=True))


def decoding(path: Path, threads: int, *, large_pages: bool = True) -> Run:
    """Decodes `NEW` tokens behind `PAST` tokens in one call."""
    length = PAST + NEW
    session = SharedCacheSession(path, length=length, threads=threads, head_dim=HEAD_DIM, large_pages=large_pages)
    session.run(torch.tensor(_prompt(PAST))[None])

    def run() -> None:
        session.reset(PAST)
        token = _prompt(1)[0]
        for _ in range(NEW):
            token = int(session.run(torch.tensor([[token]])).numpy().argmax())

    return run


def _decoding_in_genai(folder: Path) -> Run:
    generator = _generator(folder, PAST + NEW + 1)
    generator.append_tokens(np.array(_prompt(PAST), np.int32))

    def run() -> None:
        generator.rewind_to(PAST)
        generator.append_tokens(np.array(_prompt(1), np.int32))
        for _ in range(NEW):  # computes when it has to: the first one only chooses, what was appended is computed
            generator.generate_next_token()

    return run


def prefilling(path: Path, threads: int, *, piece: int, large_pages: bool = True) -> Run:
    """Computes a prompt of `PROMPT` tokens, `piece` at a time, and chooses a token in one call."""
    sizes = {"length": PROMPT, "piece": piece, "head_dim": HEAD_DIM}
    session = SharedCacheSession(path, threads=threads, large_pages=large_pages, **sizes)
    prompt_1P = torch.tensor(_prompt(PROMPT))[None]

    def run() -> None:
        session.reset()
        session.run(prompt_1P, last_only=True)[:, -1].argmax(-1)

    return run


def _prefilling_in_genai(folder: Path) -> Run:
    generator = _generator(folder, PROMPT + 1)

    def run() -> None:
        generator.rewind_to(0)
        generator.append_tokens(np.array(_prompt(PROMPT), np.int32))
        generator.generate_next_token()

    return run


def _generator(folder: Path, length: int) -> Any:
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=length, min_length=length, do_sample=False)  # no early end
    return genai.Generator(model, settings)


def _prompt(length: int) -> Sequence[int]:
    return np.random.default_rng(0).integers(100, 40_000, length).tolist()


if __name__ == "__main__":
    sys.exit(as_command(main)())
