"""Winograd's minimal filtering: several outputs of a filter from fewer products than outputs times taps.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016), section 3, in one dimension.
"""

import torch
from torch import Tensor

_POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 4.0, -4.0, 0.25, -0.25)
ONE = 1
"""Index of the product that is a summand of every output."""


def minimal_filtering(outputs: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices A [outputs, n], G [n, taps] and B [n, n] with n = outputs + taps - 1, all float64.

    For inputs d [n] and a filter g [taps] the outputs sum_k g[k] d[i + k] are A @ ((G @ g) * (B @ d)).
    """
    n = outputs + taps - 1
    if outputs == 1:
        return torch.ones(1, n, dtype=torch.float64), *torch.eye(n, dtype=torch.float64).expand(2, n, n)
    return _values(n, outputs).T, _values(n, taps), torch.linalg.inv(_values(n, n)).T


def _values(n: int, coefficients: int) -> Tensor:
    """Evaluates a polynomial at n - 1 points and infinity: a matrix [n, coefficients]."""
    points = torch.tensor(_POINTS[: n - 1], dtype=torch.float64)[:, None] ** torch.arange(coefficients)
    return torch.cat([points, torch.eye(coefficients, dtype=torch.float64)[-1:]])
