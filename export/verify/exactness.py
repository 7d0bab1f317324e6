"""Exactness: a graph computes what the torch model computes, layer by layer, with every product and quantizer fed from torch.

Compared at each step of a run (prompts, then tokens with the cache, one at a time): what each linear layer and each quantizer of keys
and values reads, each product, new cache entries, and the logits.  The distance of a token's features is divided by what rounding explains at
this place (`rounding.py`); a graph fails beyond `LIMIT` times that.  A right graph stays below 1, wherever it runs: nothing here
is chance, see docs/verification.md for what was measured.

Torch and the graph take turns: torch runs the prompts, or a few tokens behind them at once, then the graph the same, one token at a time.
So the values of a few tokens are all that is held.

Letters: B batch, T new tokens, S all tokens so far, L positions with logits, N tokens, G key/value groups, E head width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from export.cpu_graph.head_blocks import with_stored_head
from export.onnx_graph.labels import LABEL_TOKENS, LOG_PROBS
from export.onnx_graph.layer_kinds import layer_kinds
from export.onnx_graph.metadata import metadata_of, read_graph
from export.onnx_graph.trace import cache_names
from export.sessions.onnx_session import OnnxSession, new_entries
from export.sessions.session import Output
from export.verify.checks import Check, Comparison
from export.verify.rounding import operands
from export.verify.taps import FED, Entrance, FedGraph, Product, coarser_types, fed_graph, layer_of
from export.verify.torch_run import Run, Step
from models.architecture import head_name
from models.copies import with_rounded_weights
from models.quantization.cache import cache_quantizers, cache_scales
from models.quantization.quantizers import InputQuantizer

LIMIT = 4.0
NOTE = "products and quantizers were fed what entered them in torch; see docs/verification.md"
_LOGITS_AT_ONCE = 2**24  # values: 64 MB


def verify(
    model: PreTrainedModel,
    path: Path,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    *,
    decode_steps: int = 64,
    for_cpu: bool = False,
) -> list[Check]:
    """Compare an ONNX file with its model on a batch of left-padded prompts, `decode_steps` tokens behind them, and each prompt alone.

    Args:
        model: The torch model, with the quantizers that were exported.
        path: Written by `export_onnx`, or made from such a file.
        input_ids_BT: Left-padded prompts, int64.
        attention_mask_BT: 1 for tokens, 0 for padding, int64.
        decode_steps: Tokens behind the prompts.
        for_cpu: A graph of `export.cpu_graph.to_cpu`.
    """
    model = with_rounded_weights(model)
    graph = read_graph(path)
    if for_cpu:
        model = with_stored_head(model, graph.graph)
    name = f"onnx {metadata_of(graph)['precision']}"
    runs, session = [Run(model, input_ids_BT, attention_mask_BT, decode_steps)], FedSession(path, for_cpu=for_cpu)
    checks = compare_graph(name, runs, session)
    return [*checks, compare_alone(name, runs, session)] if len(input_ids_BT) > 1 else checks


def compare_graph(
    name: str, runs: Sequence[Run], session: "FedSession", *, on_token: Callable[[], None] = lambda: None
) -> list[Check]:
    """Compare a graph with torch: one check of prompts, one of tokens behind them if there are any.

    Args:
        name: Of the artefact.
        runs: Prompts in groups.
        session: Runs the graph.
        on_token: Called once for the prompts of a run, and once for each token behind them.
    """
    parts = {"prefill": Comparison(), "decode": Comparison()}
    for run in runs:
        explained, cache = run.explained(half=session.fed.half), None
        for step in run.steps():
            part = parts["prefill" if step.first else "decode"]
            cache = session.compare(part, run.model, step, cache, explained, on_token)
    return [part.check(f"{name}, {title}", LIMIT, note=NOTE) for title, part in parts.items() if part.places]


def compare_alone(name: str, runs: Sequence[Run], session: "FedSession") -> Check:
    """Compare a graph with torch on each prompt by itself, without padding; see `compare_graph`."""
    comparison = Comparison()
    for run in runs:
        explained = run.explained(half=session.fed.half)
        for ids_T, valid_T in zip(run.prompt_ids_BT, run.prompt_mask_BT.bool(), strict=True):
            ids_1T = ids_T[valid_T][None]
            alone = Run(run.model, ids_1T, torch.ones_like(ids_1T))
            session.compare(comparison, run.model, next(alone.steps()), None, explained)
    return comparison.check(f"{name}, one prompt at a time", LIMIT, note=NOTE)


def compare_longest(
    name: str, model: PreTrainedModel, ids_1T: Tensor, path: Path, *, threads: int | None = None
) -> Check:
    """Compare one layer of each kind with torch on one long prompt, in one call, without the head.

    What the length of a prompt can spoil are angles, masks and windows, which all layers of a kind share.
    """
    kinds = layer_kinds(model)
    layers = sorted({kinds.index(kind) for kind in kinds} | {len(kinds) - 1})
    run = Run(model, ids_1T, torch.ones_like(ids_1T), layers=layers)
    session, comparison = FedSession(path, threads, layers=layers), Comparison()
    session.compare(comparison, model, next(run.steps()), None, run.explained(half=session.fed.half))
    return comparison.check(f"{name}, longest prompt ({ids_1T.shape[1]} tokens)", LIMIT, note=NOTE)


class FedSession:
    """A fed graph, ready to run beside torch.

    Args:
        path: Written by `export_onnx`, or made from such a file.
        threads: Threads in ONNX Runtime; None: its choice.
        layers: Decoder layers to compute, without the head; None: all, and the head.
        for_cpu: A graph of `export.cpu_graph.to_cpu`: keys behind padding are turned by their place in the cache, and left out.
    """

    def __init__(
        self, path: Path, threads: int | None = None, *, layers: Sequence[int] | None = None, for_cpu: bool = False
    ) -> None:
        self.fed: FedGraph = fed_graph(path, layers)
        self._session = OnnxSession(path, threads=threads, graph=self.fed.model, exact=True, packed=for_cpu)
        self._coarser = coarser_types(self.fed)
        stored = {each.name: each for each in self.fed.model.graph.initializer}
        self._looked_up = onnx.numpy_helper.to_array(stored[LABEL_TOKENS]).tolist() if LABEL_TOKENS in stored else []
        self._layers, self._padded_keys = layers, not for_cpu

    @torch.no_grad()
    def compare(
        self,
        comparison: Comparison,
        model: PreTrainedModel,
        step: Step,
        cache: list[Any] | None,
        explained: dict[str, float],
        on_token: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        """Run one step and compare all of it; returns the cache for the next one."""
        modules = dict(model.named_modules())
        rounds_unseen = self._rounds_unseen(model)
        output = self._run(modules, step, cache, on_token)
        when = (
            "in the prompts"
            if step.first
            else f"behind {step.attention_mask.shape[1] - step.input_ids.shape[1]} tokens"
        )

        def add(place: str, ours: Tensor, theirs: Tensor, valid_BT: Tensor = step.valid) -> None:
            if valid_BT.any():
                ours_ND, theirs_ND = _at_tokens(ours.reshape(theirs.shape), valid_BT), _at_tokens(theirs, valid_BT)
                comparison.add(f"{place} {when}", ours_ND, theirs_ND, explained[place])

        if self._coarser:
            comparison.reject(f"values in {' and '.join(self._coarser)}, a coarser type than the graph's own")
        for entrance in self.fed.entrances:
            if entrance.value in self.fed.compared and not (rounds_unseen and entrance.module.endswith("o_proj")):
                theirs, valid_BT = self._read(entrance.module, step)
                add(f"{entrance.module} reads", output.others[entrance.value], theirs, valid_BT)
        for product in self.fed.products:
            ours = output.logits if product.value == "logits" else output.others[product.value]
            for module, first, last in _columns(product, modules):
                place = f"{module} gives"
                if module in step.gives:
                    add(place, ours[..., first:last], step.gives[module])
                    continue
                reads, valid_BT = self._read(module, step)
                for part in _pieces(reads, modules[module].weight.shape[0]):
                    theirs = F.linear(*operands(modules[module], reads[:, part]))
                    add(place, ours[:, part, first:last], theirs, valid_BT[:, part])
        if not rounds_unseen:
            for name, (ours, theirs) in self._entries(model, step, output).items():
                padded = self._padded_keys or name.endswith("value")
                valid_BT = step.valid if padded else step.valid & step.attention_mask.all(dim=1, keepdim=True)
                add(name, ours, theirs, valid_BT)
        if step.logits is not None:
            self._compare_logits(comparison, when, step.logits, output, explained, head_name(model))
        return output.cache

    def _run(
        self, modules: dict[str, nn.Module], step: Step, cache: list[Any] | None, on_token: Callable[[], None]
    ) -> Output:
        """The graph on the prompts, or on one token after the other; what it gives for them is put together."""
        num_new, past = step.input_ids.shape[1], step.attention_mask.shape[1] - step.input_ids.shape[1]
        feeds = {entrance: self._fed(entrance, modules, step) for entrance in self.fed.entrances}
        outputs = []
        for first in (0,) if step.first else range(num_new):
            some = slice(first, num_new if step.first else first + 1)
            fed = {
                entrance.value + FED: (whole[..., some, :].flatten(0, -2) if entrance.rows else whole[..., some, :])
                for entrance, whole in feeds.items()
            }
            mask_BS = step.attention_mask[:, : past + some.stop]
            outputs.append(self._session.run(step.input_ids[:, some], mask_BS, cache, fed))
            cache = outputs[-1].cache
            on_token()
        batch = len(step.input_ids)
        others = {
            name: _joined([_with_tokens(output.others[name], batch) for output in outputs])
            for name in outputs[0].others
        }
        return Output(_joined([output.logits for output in outputs]), outputs[-1].cache, others)

    def _fed(self, entrance: Entrance, modules: dict[str, nn.Module], step: Step) -> Tensor:
        """What a product or quantizer of the graph is fed."""
        module: Any = modules[entrance.module]
        value, _ = self._read(entrance.module, step)
        if self.fed.half:  # half way to the grid: float16 can't decide the rounding, and a missing quantizer shows
            quantizer = module if isinstance(module, InputQuantizer) else getattr(module, "input_quantizer", None)
            value = (value if quantizer is None else (value + quantizer.quantize(value)) / 2).half()
        return value

    def _read(self, module: str, step: Step) -> tuple[Tensor, Tensor]:
        """What a module read in torch, at the positions that the graph computes, and which of them are tokens."""
        value = step.reads[module]
        if self.fed.last_only and layer_of(module) is None:
            return value[:, -1:], step.valid[:, -1:]
        return value, step.valid

    def _rounds_unseen(self, model: PreTrainedModel) -> bool:
        """Whether keys and values are rounded inside an operator, which can't be fed: a free run judges what that does."""
        places = any("cache_quantizer" in entrance.module for entrance in self.fed.entrances)
        return bool(cache_quantizers(model)) and not places

    def _entries(self, model: PreTrainedModel, step: Step, output: Output) -> dict[str, tuple[Tensor, Tensor]]:
        """New entries of the cache, the graph's and torch's, by name."""
        layers = range(len(step.cache) // 2) if self._layers is None else self._layers
        at = [2 * layer + kind for layer in layers for kind in (0, 1)]
        names, scales = cache_names("present", len(step.cache) // 2), cache_scales(model)
        ours = new_entries(output.cache, step.input_ids.shape[1], [scales[index] for index in at] if scales else ())
        return {names[index]: (mine, step.cache[index]) for index, mine in zip(at, ours, strict=True)}

    def _compare_logits(
        self,
        comparison: Comparison,
        when: str,
        theirs_BLV: Tensor,
        output: Output,
        explained: dict[str, float],
        head: str,
    ) -> None:
        """Compare logits, all and each, or the log-probabilities of labels that a graph returns in their place."""
        whole, worst = 2 * explained[f"{head} gives"], 2 * explained[f"{head} gives at most"]
        if not self._session.labels:
            ours_NV = output.logits[:, -theirs_BLV.shape[1] :].float().flatten(0, 1)
            theirs_NV = theirs_BLV.flatten(0, 1)
            comparison.add(f"logits {when}", ours_NV, theirs_NV, whole)
            comparison.add(f"worst logit {when}", ours_NV, theirs_NV, worst, order=torch.inf)
            comparison.add_distributions(ours_NV, theirs_NV)
            return
        if self._looked_up != list(self._session.labels.values()):  # neighbours may be as probable
            comparison.reject(f"labels of the tokens {self._looked_up}, which are not those of its metadata")
        # A label's log-probability is the difference of a logit and a mean of logits: each may be off by the error of one.
        theirs_BV = theirs_BLV[:, -1]
        error = whole * theirs_BV.square().mean(-1).sqrt()
        theirs_BC = theirs_BV.log_softmax(-1)[:, list(self._session.labels.values())]
        allowed = float((error / theirs_BC.square().mean(-1).sqrt()).amax())
        comparison.add("log-probabilities of labels", output.others[LOG_PROBS].flatten(0, -2), theirs_BC, allowed)


def _joined(parts: list[Tensor]) -> Tensor:
    """Values of one token after the other as one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _with_tokens(x: Tensor, batch: int) -> Tensor:
    """A value of a graph with a dimension of tokens before the last one: rows (B * T, features) get it back."""
    return x.unflatten(0, (batch, -1)) if x.dim() == 2 else x


def _at_tokens(x: Tensor, valid_BT: Tensor) -> Tensor:
    """The rows (N, features) of tokens; keys and values come as (B, G, T, E)."""
    return (x.transpose(1, 2).flatten(2) if x.dim() == 4 else x)[valid_BT]


def _columns(product: Product, modules: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """The linear layers whose outputs a product computes, each with its first column and the one behind its last."""
    begin = -product.start
    for module in product.modules:
        end = begin + modules[module].weight.shape[0]
        if begin >= 0 and (product.size is None or end <= product.size):
            yield module, begin, end
        begin = end


def _pieces(reads_BTD: Tensor, outputs: int) -> Iterator[slice]:
    """Some tokens at a time, so that their results stay small."""
    size = max(1, _LOGITS_AT_ONCE // (len(reads_BTD) * outputs))
    return (slice(start, start + size) for start in range(0, reads_BTD.shape[1], size))
