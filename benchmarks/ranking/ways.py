"""Ways to score the same candidates: with a shared prefix, from scratch in batches, and prompt by prompt in plain transformers.

All of them begin with texts and end with the log-probabilities of the labels, so that tokenizing is in everybody's time.

Letters: W ways, N candidates, C labels, B batch, S tokens of the longest prompt, T tokens of one prompt, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.label_prompts import encode_prompts, frame_of, label_token_ids
from export.onnx_graph.last_logits import keep_last_logits
from export.onnx_graph.to_onnx import export_onnx
from export.serving.scorer import Scorer
from export.sessions.onnx_session import OnnxSession
from export.sessions.session import SharingSession
from export.sessions.torch_session import TorchSession

RUNTIMES = ("torch", "onnx")
BATCH_SIZE = 8  # whole prompts at a time
Score = Callable[[str, Sequence[str]], Tensor]  # prefix and candidates -> (N, C), float32


def open_session(runtime: str, model: PreTrainedModel, threads: int) -> SharingSession:
    """The model in `torch`, or in `onnx` as a float32 graph with the logits of the last position only.

    The threads are those of ONNX Runtime; torch has its own setting for the whole process.
    """
    if runtime == "torch":
        return TorchSession(model)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, path, precision="fp32")
        graph = ir.load(path)
        keep_last_logits(graph)
        return OnnxSession(path, threads=threads, graph=ir.to_proto(graph))  # keeps the weights without their file


def ways(session: SharingSession, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> dict[str, Score]:
    """What is compared in one runtime: `hot` from the second call with a prefix on, `cold`, and `scratch`."""
    scorer = Scorer(session, tokenizer, labels)

    def cold(prefix: str, candidates: Sequence[str]) -> Tensor:
        scorer.forget()
        return scorer.score(prefix, candidates)

    return {"hot": scorer.score, "cold": cold, "scratch": whole_prompts(session, tokenizer, labels)}


def whole_prompts(session: SharingSession, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> Score:
    """Scores every pair from scratch, in batches of whole prompts of similar lengths."""
    frame, label_ids = frame_of(tokenizer), label_token_ids(tokenizer, labels)

    def batch_scores(prompts: Sequence[Sequence[int]]) -> Tensor:
        width = max(len(ids) for ids in prompts)
        ids_BS = torch.zeros(len(prompts), width, dtype=torch.long)
        mask_BS = torch.zeros_like(ids_BS)
        for row, ids in enumerate(prompts):
            ids_BS[row, width - len(ids) :] = torch.tensor(ids)
            mask_BS[row, width - len(ids) :] = 1
        return session.run(ids_BS, mask_BS).logits[:, -1].float().log_softmax(dim=-1)[:, label_ids]

    def score(prefix: str, candidates: Sequence[str]) -> Tensor:
        prompts = encode_prompts(tokenizer, frame, [(prefix, candidate) for candidate in candidates])
        shortest_first = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
        scores_NC = torch.empty(len(prompts), len(label_ids))
        for start in range(0, len(prompts), BATCH_SIZE):
            part = shortest_first[start : start + BATCH_SIZE]
            scores_NC[part] = batch_scores([prompts[index].ids for index in part])
        return scores_NC

    return score


def transformers_loop(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> Score:
    """Scores one prompt after the other with `model(**inputs)` on the CPU, without cache or batches."""
    frame, label_ids = frame_of(tokenizer), label_token_ids(tokenizer, labels)
    model.eval()

    @torch.inference_mode()
    def score(prefix: str, candidates: Sequence[str]) -> Tensor:
        rows = []
        for candidate in candidates:
            inputs = tokenizer(frame.prompt(prefix, candidate), add_special_tokens=False, return_tensors="pt")
            logits_TV = model(**inputs, use_cache=False).logits[0]
            rows.append(logits_TV[-1].float().log_softmax(dim=-1)[label_ids])
        return torch.stack(rows)

    return score


def agreement(ways: Mapping[str, Score], pairs: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Largest absolute differences in the log-probability of a label, in nats: of every other way from the first, and of any two."""
    first, *others = ways
    differences = dict.fromkeys([*others, "max_difference"], 0.0)
    for prefix, candidates in tqdm(pairs.items(), desc="Agreement", unit="prefix", leave=False):
        scores_WNC = torch.stack([score(prefix, candidates).double() for score in ways.values()])
        from_first_W = (scores_WNC - scores_WNC[0]).abs().amax(dim=(1, 2))
        widest = (scores_WNC.amax(dim=0) - scores_WNC.amin(dim=0)).max()
        for name, found in zip(differences, [*from_first_W[1:], widest], strict=True):
            differences[name] = max(differences[name], float(found))
    return {"pairs": sum(map(len, pairs.values())), "compared_with": first, **differences}
