"""Least squares over calibration tokens: second moments, damping, and the weights that explain an output best."""

import torch
from torch import Tensor

_UNEXPLAINED = 1e-10  # least share of an input that the others do not explain; with less, rounding errors decide


def moment(left_SP: Tensor, right_SD: Tensor) -> Tensor:
    """Sum over S tokens of x y^T, (P, D), in float32, also under autocast, which would round the factors."""
    with torch.autocast(left_SP.device.type, enabled=False):
        return left_SP.float().T @ right_SD.float()


def damped(gram_PP: Tensor, ridge: float) -> Tensor:
    """H = gram + ridge * mean(diagonal) * I in float64; inputs that are always zero do not count in the mean."""
    hessian_PP = gram_PP.double().clone()
    diagonal_P = hessian_PP.diagonal()
    live_P = diagonal_P > 0
    strength = ridge * diagonal_P[live_P].mean() if live_P.any() else 1.0
    hessian_PP.diagonal().add_(strength)
    return hessian_PP


def refit(hessian_PP: Tensor, product_PD: Tensor, kept_K: Tensor) -> Tensor:
    """Weights (K, D) of the kept inputs that minimise the error: H_KK^-1 (product)_K, where `product` is H W0, or X^T Y + ridge W0.

    Raises:
        ValueError: H is not positive definite.
    """
    return torch.cholesky_solve(product_PD[kept_K], factor(hessian_PP[kept_K][:, kept_K]))


def factor(hessian_PP: Tensor) -> Tensor:
    """Lower Cholesky factor; its squared diagonal is what is left of each input when those before it have explained the rest."""
    factor_PP, failed = torch.linalg.cholesky_ex(hessian_PP)
    if failed or (factor_PP.diagonal().square() < _UNEXPLAINED * hessian_PP.diagonal()).any():
        raise ValueError(
            "expected calibration statistics whose damped Gram matrix is positive definite, found one that is not; raise the "
            "ridge or use more calibration samples"
        )
    return factor_PP
