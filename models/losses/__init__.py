"""Objectives: plain functions on tensors, without a Trainer and without configuration.

`divergences`, `policy_gradient` and `hidden_states` define losses; `objective` mixes them; `chunked` computes the mix from hidden
states without holding all logits, with the gradients of `closed_form`.
"""

from models.losses.chunked import (
    FullTargets,
    Targets,
    TopKTargets,
    check_stored_top_k,
    default_chunk_tokens,
    linear_objective,
)
from models.losses.divergences import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    top_k_kl,
    total_variation,
)
from models.losses.hidden_states import hidden_state_loss
from models.losses.objective import LOSSES, Objective
from models.losses.output_head import Head, check_head, head_of, logits_of
from models.losses.policy_gradient import advantages, policy_gradient

__all__ = [
    "LOSSES",
    "FullTargets",
    "Head",
    "Objective",
    "Targets",
    "TopKTargets",
    "advantages",
    "check_head",
    "check_stored_top_k",
    "default_chunk_tokens",
    "forward_kl",
    "generalized_jsd",
    "head_of",
    "hidden_state_loss",
    "linear_objective",
    "logits_of",
    "policy_gradient",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "top_k_kl",
    "total_variation",
]
