"""Faithfulness: a graph that runs freely, as a server runs it, is as good as the torch model; a paired test of equivalence on held-out text.

A model that rounds its inputs is chaotic: one rounding that falls to the other side moves everything behind it, so two right runs give
different predictions, and no bound on their distance tells a fault from chance.  What must agree is how good they are.  Both are judged
on the same answers by the same judge (the teacher, or the model without rounded inputs): D = KL(judge || artefact) - KL(judge || torch)
for each answer token, and the difference of their task scores for each question.

| verdict               | when the 95 % interval of the mean difference                        | status  |
|-----------------------|----------------------------------------------------------------------|---------|
| equivalent            | lies within the margin (two one-sided tests, Schuirmann 1987)        | passed  |
| different             | lies outside of the margin altogether                                | failed  |
| too few tokens to say | neither: it is wider than that                                       | not_run |

Tokens of one answer depend on each other, so the interval is that of a ratio over conversations (`clustered_mean`).  `TOKENS` is chosen so
that the third verdict is rare: see docs/verification.md.

Letters: N answer tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.collate import IGNORE_INDEX, Batch
from export.onnx_graph.labels import LOG_PROBS
from export.sessions.torch_session import TorchSession
from export.verify.checks import Check, Status, Verdict
from export.verify.served import HeldOut, Served, clustered_mean
from models.calibration.observe import hooked
from models.copies import shared_copy
from models.forward import answer_hidden
from models.generation.decoder import decoder_for
from models.generation.rollout import rollout, rollout_batch
from models.generation.sampling import Sampling
from models.loading.reference import end_token_ids
from models.losses import forward_kl, head_of
from models.post_training.kernels import kernel_block, rounded_in_blocks
from models.quantization.cache import remove_cache_quantizers
from models.quantization.formats import format_of
from models.quantization.linear import quantized_linears, rounds_inputs

MARGIN, MARGIN_UNROUNDED = 0.02, 0.001  # nats per token; the second of models that round nothing
SCORE_MARGIN = 0.05
TOKENS, TOKENS_UNROUNDED = 512, 256  # a run that rounds nothing is not chaotic
_SAMPLED, _ROUNDS = 64, 64  # tokens of an answer that is sampled, and answers to the same prompt
_STATUS: dict[Verdict, Status] = {"equivalent": "passed", "too few tokens to say": "not_run", "different": "failed"}


class ModelJudge:
    """A model as a judge; the hidden states of the last batch are remembered."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._head = model, head_of(model)
        self._number, self._hidden_ND = -1, torch.empty(0)

    @torch.no_grad()
    def __call__(self, number: int, batch: Batch, positions_n: Tensor) -> Tensor:
        """See `TeacherLogits`."""
        if number != self._number:
            self._number, self._hidden_ND = number, answer_hidden(self._model, batch)
        return self._head.logits(self._hidden_ND[positions_n])


@torch.no_grad()
def sampled(model: PreTrainedModel, prompts: Mapping[str, Tensor], num_tokens: int) -> HeldOut:
    """Answers that a model samples, for an export without held-out data, or with too few.

    Args:
        model: Samples answers at temperature 1, the same ones every time.
        prompts: `prompt_ids` (B, P), left padded, and `prompt_mask` (B, P).
        num_tokens: At least so many answer tokens; a model that says next to nothing gives fewer in `_ROUNDS` answers to each prompt.
    """
    decoder, count = decoder_for(model, model.dtype), len(prompts["prompt_ids"])
    batches: list[Batch] = []
    while not batches or (answer_tokens(HeldOut(batches)) < num_tokens and len(batches) < _ROUNDS):
        seeds = list(range(len(batches) * count, (len(batches) + 1) * count))
        answers = rollout(
            decoder,
            prompts["prompt_ids"],
            prompts["prompt_mask"],
            max_new_tokens=_SAMPLED,
            end_tokens=end_token_ids(model),
            sampling=Sampling(temperature=1.0),
            seeds=seeds,
        )
        batches.append(rollout_batch({**prompts, "index": seeds}, answers))
    return HeldOut(batches)


def judged_by(model: PreTrainedModel, held_out: HeldOut) -> HeldOut:
    """The same conversations with a judge: the model without rounded inputs, where there is no teacher."""
    return (
        held_out if held_out.judge is not None else replace(held_out, judge=ModelJudge(without_rounded_inputs(model)))
    )


def check_tokens(num_tokens: int, what: str) -> None:
    """Raise `ValueError` for fewer answer tokens than it takes to tell a model that rounds from a wrong one."""
    if num_tokens < TOKENS:
        raise ValueError(
            f"expected {TOKENS} answer tokens or more to judge what is served, found {num_tokens} in {what}; ask more questions, or set "
            "served_questions to 0"
        )


def answer_tokens(held_out: HeldOut) -> int:
    """How many answer tokens there are."""
    return sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in held_out.batches)


def without_rounded_inputs(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, on the same tensors, without quantizers of inputs, keys and values: the judge where there is no teacher."""
    plain = shared_copy(model)
    for linear in quantized_linears(plain).values():
        linear.input_quantizer = None
    remove_cache_quantizers(plain)
    return plain


def num_tokens_for(model: PreTrainedModel) -> int:
    """How many answer tokens it takes to tell."""
    return TOKENS if _rounds(model) else TOKENS_UNROUNDED


def _rounds(model: PreTrainedModel) -> bool:
    """Whether inputs, or keys and values, are rounded: by the model, or by fast kernels where weights alone are quantized."""
    return bool(quantized_linears(model)) or rounds_inputs(model)


def torch_served(model: PreTrainedModel, held_out: HeldOut, on_batch: Callable[[], None]) -> Served:
    """The torch model, judged: with inputs rounded as ONNX Runtime's fast kernels do it where weights alone are quantized."""
    with hooked(
        linear.register_forward_pre_hook(_kernel_rounding(kernel_block(format_of(linear.format).weight)))
        for linear in quantized_linears(model).values()
        if linear.input_quantizer is None
    ):
        return held_out.measure(TorchSession(model), end_token_ids(model), on_batch)


def _kernel_rounding(block: int) -> Callable[..., Tensor]:
    return lambda module, inputs: rounded_in_blocks(inputs[0], block)


def compare_served(name: str, model: PreTrainedModel, artefact: Served, reference: Served) -> Check:
    """The verdict about an artefact, see the table above; the reference is torch, whose rounding decides the margin."""
    margin = MARGIN if _rounds(model) else MARGIN_UNROUNDED
    differences_N = artefact.kl_N.double() - reference.kl_N.double()
    mean, low, high = clustered_mean(differences_N.nan_to_num(nan=torch.inf), reference.conversation_N)
    verdicts = [_verdict(low, high, margin)]
    found = f"{mean:+.3g} nats per token ({low:.3g} to {high:.3g}), margin {margin:g}"
    if reference.scores:
        differences = torch.tensor(artefact.scores) - torch.tensor(reference.scores)
        score, least, most = clustered_mean(differences, torch.arange(len(differences)))
        verdicts.append(_verdict(least, most, SCORE_MARGIN))
        found += f"; task score {score:+.3g} ({least:.3g} to {most:.3g}), margin {SCORE_MARGIN:g}"
    verdict = max(verdicts, key=list(_STATUS).index)
    return Check(
        f"{name}, free run",
        _STATUS[verdict],
        reason=None if verdict == "equivalent" else f"{verdict}: {found}",
        bound=margin,
        verdict=verdict,
        difference=mean,
        interval=(low, high),
        tokens=len(differences_N),
        note=f"KL(judge || artefact) - KL(judge || torch): {found}",
    )


def _verdict(low: float, high: float, margin: float) -> Verdict:
    if -margin < low and high < margin:
        return "equivalent"
    overlaps = low < margin and high > -margin
    return "too few tokens to say" if overlaps else "different"


def compare_labels(name: str, session: Any, model: PreTrainedModel, prompts: Mapping[str, Tensor]) -> Check:
    """Compare log-probabilities of labels with torch's behind the prompts: mean KL over the labels and one bucket for all other tokens."""
    ids_BT, mask_BT = prompts["prompt_ids"], prompts["prompt_mask"]
    ours_BC = session.run(ids_BT, mask_BT).others[LOG_PROBS]
    logits_BV = TorchSession(model).run(ids_BT, mask_BT).logits[:, -1].float()
    theirs_BC = logits_BV.log_softmax(-1)[:, list(session.labels.values())]
    kl, margin = forward_kl(_with_rest(ours_BC), _with_rest(theirs_BC)).mean().item(), MARGIN
    passed = kl <= margin
    reason = None if passed else f"KL {kl:.3g} nats above {margin:g}"
    return Check(name, "passed" if passed else "failed", reason=reason, bound=margin, kl=kl, tokens=len(ids_BT))


def _with_rest(log_probs_BC: Tensor) -> Tensor:
    """Log-probabilities (B, C + 1): those of the labels, and of all other tokens together."""
    rest_B1 = (1 - log_probs_BC.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(torch.float32).eps).log()
    return torch.cat([log_probs_BC, rest_B1], dim=-1)
