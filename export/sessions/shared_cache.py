"""Running a graph whose attention appends to its cache in place (`export/cpu_graph/cached_attention.py`): nothing is copied from token to token.

Letters: B batch, T new tokens, P past tokens, S = P + T, L length of the cache, V vocabulary.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime import OrtValue
from torch import Tensor

from export.onnx_graph.last_logits import LOGITS_TO_KEEP
from export.sessions.large_pages import on_large_pages
from export.sessions.onnx_session import session_options

_CACHE = "past_key_values."
_NOT_IN_TILES = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


class SharedCacheSession:
    """A conversation (or B of them) in a cache of fixed length, on the CPU.

    The prompt of a single conversation goes in pieces: the scores of a piece cover what it may see, those of a whole prompt also what
    is masked, and smaller tensors stay in the processor's cache.  Where nobody reads logits, the head sees one token of a piece, if the
    graph has the input for it (`export/onnx_graph/last_logits.py`).  The results are the same.  Several prompts go at once, and into an empty cache
    only: the operator appends several tokens to one conversation, or one token to several.

    Args:
        path: Graph from `export.onnx_graph.to_onnx` after `cache_in_attention`, or one of onnxruntime-genai's model builder.
        length: Tokens that fit into the cache.
        batch: Conversations B.
        threads: Threads of one operator; None: ONNX Runtime's choice.
        piece: Most tokens of a single prompt that are run at once.
        head_dim: Width of a head, for a graph that leaves it open, as genai's do.
        large_pages: Move the weights onto large pages of memory, see `export/sessions/large_pages.py`.

    Raises:
        ValueError: The cache is longer than the positions that the model knows.
    """

    def __init__(
        self,
        path: Path,
        *,
        length: int,
        batch: int = 1,
        threads: int | None = None,
        piece: int = 256,
        head_dim: int | None = None,
        large_pages: bool = True,
    ) -> None:
        options = session_options(threads)
        with on_large_pages() if large_pages else nullcontext(), whole_scores():
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        positions = int(self._session.get_modelmeta().custom_metadata_map.get("positions", 0))
        if 0 < positions < length:
            raise ValueError(
                f"expected a cache of at most {positions} tokens, the positions that the model knows, found {length}; choose a smaller length"
            )
        self._binding = self._session.io_binding()
        self._length, self._piece = length, piece
        self._mask_BL = np.zeros((batch, length), np.int64)
        self._num_past, self._keep = 0, 0
        self._bound: dict[str, OrtValue] = {}
        self._inputs = {item.name for item in self._session.get_inputs()}
        self._asks = LOGITS_TO_KEEP in {item.name for item in self._session.get_overridable_initializers()}
        for item in self._session.get_inputs():
            if item.name.startswith(_CACHE):
                empty = np.zeros((batch, item.shape[1], length, head_dim or item.shape[3]), _NUMPY[item.type])
                buffer = OrtValue.ortvalue_from_numpy(empty)
                self._binding.bind_ortvalue_input(item.name, buffer)
                self._binding.bind_ortvalue_output(item.name.replace("past_key_values", "present"), buffer)
        logits = next(item for item in self._session.get_outputs() if item.name == "logits")
        # What one token reads and writes lies in buffers that the runtime sees: to make and bind new ones takes as long as a layer.
        self._bound_for_one_token = False
        self._token_B1 = np.zeros((batch, 1), np.int64)
        self._next_B1V = np.zeros((batch, 1, logits.shape[2]), _NUMPY[logits.type])
        self._of_one_token = [OrtValue.ortvalue_from_numpy(each) for each in (self._token_B1, self._next_B1V)]

    @property
    def num_past(self) -> int:
        """Tokens in the cache."""
        return self._num_past

    def reset(self, num_past: int = 0) -> None:
        """Forget all tokens but the first ones."""
        self._num_past = min(self._num_past, num_past)

    def run(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None, *, last_only: bool = False) -> Tensor:
        """Append T tokens.

        Args:
            input_ids_BT: New tokens, int64; prompts of different lengths are padded on the left.
            attention_mask_BT: 1 for tokens, 0 for padding, int64; None: no padding.
            last_only: Only the logits behind the last token are wanted.

        Returns:
            Logits of the last piece's tokens, (B, T, V) if there is only one; (B, 1, V) after `keep_last_logits` and with `last_only`.

        Raises:
            ValueError: The tokens do not fit into the cache, or are several for each of several conversations under way.
        """
        batch, num_new = input_ids_BT.shape
        if self.num_past + num_new > self._length:
            raise ValueError(
                f"expected at most {self._length} tokens, the length of the cache, found {self.num_past + num_new}; give "
                "the session a greater `length`"
            )
        if batch > 1 and num_new > 1 and self.num_past:
            raise ValueError(
                f"expected an empty cache for {batch} prompts, found {self.num_past} tokens in it; call `reset()` first, or give "
                "one token for each conversation"
            )
        self._mask_BL[:, self.num_past : self.num_past + num_new] = (
            1 if attention_mask_BT is None else attention_mask_BT.numpy()
        )
        piece = self._piece if batch == 1 else num_new
        ids_BT = input_ids_BT.numpy()
        for start in range(0, num_new, piece):
            last = start + piece >= num_new
            logits = self._run(ids_BT[:, start : start + piece], keep=0 if last and not last_only else 1)
        return logits[:, -1:] if last_only else logits

    def _run(self, ids_BT: np.ndarray, *, keep: int) -> Tensor:
        """Logits of the last tokens, `keep` or more of them, 0 for all, behind the next ones; the mask has them already."""
        num_new, start = ids_BT.shape[1], self._num_past
        self._num_past += num_new
        mask_BS = np.ascontiguousarray(self._mask_BL[:, : self._num_past])
        self._bind("attention_mask", mask_BS)
        if "position_ids" in self._inputs:  # graphs may count positions themselves
            before_B1 = mask_BS[:, :start].sum(axis=1, keepdims=True)
            self._bind("position_ids", np.maximum(before_B1 + mask_BS[:, start:].cumsum(axis=1) - 1, 0))
        if self._asks and keep != self._keep:
            self._bind(LOGITS_TO_KEEP, np.array([keep], np.int64))
            self._keep = keep
        if num_new == 1:
            self._token_B1[:] = ids_BT
            if not self._bound_for_one_token:
                token, logits = self._of_one_token
                self._binding.bind_ortvalue_input("input_ids", token)
                self._binding.bind_ortvalue_output("logits", logits)
                self._bound_for_one_token = True
            self._session.run_with_iobinding(self._binding)
            return torch.from_numpy(
                self._next_B1V.copy()
            )  # torch's own copy would wake its threads, which then get in the way
        self._bind("input_ids", np.ascontiguousarray(ids_BT))
        self._bound_for_one_token = False
        self._binding.bind_output("logits")
        self._session.run_with_iobinding(self._binding)
        return torch.from_numpy(self._binding.get_outputs()[-1].numpy())

    def _bind(self, name: str, array: np.ndarray) -> None:
        self._bound[name] = OrtValue.ortvalue_from_numpy(array)  # it keeps the array, the binding does not
        self._binding.bind_ortvalue_input(name, self._bound[name])


@contextmanager
def whole_scores() -> Iterator[None]:
    """Let attention of sessions that are opened inside compute the scores of a piece whole, unless the environment says how.

    ONNX Runtime 1.32 computes them in tiles of a few dozen tokens, which saves memory for whole prompts, and for pieces of 256 takes
    longer: SmolLM2-135M's prompts of 256 to 4096 tokens 1.13 to 1.19 times on two cores of a Xeon.
    """
    if _NOT_IN_TILES in os.environ:
        yield
        return
    os.environ[_NOT_IN_TILES] = "1"
    try:
        yield
    finally:
        del os.environ[_NOT_IN_TILES]
