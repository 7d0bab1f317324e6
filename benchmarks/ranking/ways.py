"""Ways to score the same candidates: with a shared prefix, from scratch in batches, and prompt by prompt in plain transformers.

All of them begin with texts and end with the log-probabilities of the labels, so that tokenizing is in everybody's time.

Letters: N candidates, C labels, B batch, S tokens of the longest prompt, T tokens of one prompt, V vocabulary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.label_prompts import encode_prompts, frame_of, label_token_ids
from export.onnx_graph.last_logits import keep_last_logits
from export.onnx_graph.to_onnx import export_onnx
from export.serving.scorer import Scorer
from export.sessions.onnx_session import OnnxSession
from export.sessions.session import SharingSession
from export.sessions.torch_session import TorchSession

RUNTIMES = ("torch", "onnx")
Score = Callable[[str, Sequence[str]], Tensor]  # prefix and candidates -> (N, C), float32


def open_session(runtime: str, model: PreTrainedModel, threads: int) -> SharingSession:
    """The model in `torch`, or in `onnx` as a float32 graph with the logits of the last position only.

    Args:
        runtime: One of `RUNTIMES`.
        model: Causal language model in float32; it is not changed.
        threads: Of ONNX Runtime; torch has its own setting for the whole process.
    """
    if runtime == "torch":
        return TorchSession(model)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, path, precision="fp32")
        graph = ir.load(path)
        keep_last_logits(graph)
        return OnnxSession(
            path, threads=threads, graph=ir.to_proto(graph)
        )  # keeps the weights, also without their file


def ways(session: SharingSession, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> dict[str, Score]:
    """What is compared in one runtime.

    Returns:
        `hot`: the prefix's cache is there, from the second call with this prefix on; `cold`: it is computed in the same call;
        `scratch`: every pair is a whole prompt.
    """
    scorer = Scorer(session, tokenizer, labels)

    def cold(prefix: str, candidates: Sequence[str]) -> Tensor:
        scorer.forget()
        return scorer.score(prefix, candidates)

    return {"hot": scorer.score, "cold": cold, "scratch": WholePrompts(session, tokenizer, labels).score}


class WholePrompts:
    """Scores every pair from scratch, in batches of whole prompts of similar lengths.

    Args:
        session: Runs the model.
        tokenizer: Of the model, with its chat template.
        labels: The classes in order.
        batch_size: Prompts at a time.
    """

    def __init__(
        self, session: SharingSession, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], batch_size: int = 8
    ) -> None:
        self.session, self.tokenizer, self.batch_size = session, tokenizer, batch_size
        self._frame, self._label_ids = frame_of(tokenizer), label_token_ids(tokenizer, labels)

    def score(self, prefix: str, candidates: Sequence[str]) -> Tensor:
        """Log-probabilities (N, C) of the labels among all tokens, float32, in the order of the candidates."""
        prompts = encode_prompts(self.tokenizer, self._frame, [(prefix, candidate) for candidate in candidates])
        shortest_first = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
        scores_NC = torch.empty(len(prompts), len(self._label_ids))
        for start in range(0, len(prompts), self.batch_size):
            part = shortest_first[start : start + self.batch_size]
            scores_NC[part] = self._score([prompts[index].ids for index in part])
        return scores_NC

    def _score(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        width = max(len(ids) for ids in prompts)
        ids_BS = torch.zeros(len(prompts), width, dtype=torch.long)
        mask_BS = torch.zeros_like(ids_BS)
        for row, ids in enumerate(prompts):
            ids_BS[row, width - len(ids) :] = torch.tensor(ids)
            mask_BS[row, width - len(ids) :] = 1
        return self.session.run(ids_BS, mask_BS).logits[:, -1].float().log_softmax(dim=-1)[:, self._label_ids]


class TransformersLoop:
    """Scores one prompt after the other with `model(**inputs)`, without cache or batches.

    Args:
        model: Causal language model on the CPU.
        tokenizer: Of the model, with its chat template.
        labels: The classes in order.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self._frame, self._label_ids = frame_of(tokenizer), label_token_ids(tokenizer, labels)

    @torch.inference_mode()
    def score(self, prefix: str, candidates: Sequence[str]) -> Tensor:
        """Log-probabilities (N, C) of the labels among all tokens, float32, in the order of the candidates."""
        rows = []
        for candidate in candidates:
            text = self._frame.prompt(prefix, candidate)
            inputs = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
            logits_TV = self.model(**inputs, use_cache=False).logits[0]
            rows.append(logits_TV[-1].float().log_softmax(dim=-1)[self._label_ids])
        return torch.stack(rows)
