"""The relative error of a tensor, by which checks compare outputs and gradients."""

import torch


def relative_norm(found: torch.Tensor, exact: torch.Tensor) -> float:
    """|found - exact| / |exact|, Euclidean norms in float64; |found| where `exact` is zero."""
    found, exact = found.detach().double(), exact.detach().double()
    size = exact.norm()
    return found.norm().item() if size == 0 else ((found - exact).norm() / size).item()
