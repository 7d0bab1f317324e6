"""Objectives: plain functions on tensors, without a Trainer and without configuration."""

from models.losses.divergences import Divergence, divergence, forward_kl, generalized_jsd, reverse_kl

__all__ = ["Divergence", "divergence", "forward_kl", "generalized_jsd", "reverse_kl"]
