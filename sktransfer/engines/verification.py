"""Comparison of a fast path with the network.

Shapes: N images, H x W pixels, D features.
"""

from __future__ import annotations

import torch


def noise(size: tuple[int, int]) -> torch.Tensor:
    """Return a fixed noise image of `size` (height, width): uint8 (1, 3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=generator)


def min_cosine(expected: torch.Tensor, computed: torch.Tensor) -> float:
    """Return the smallest cosine between rows of embeddings (N, D), at any scale.

    Rows that are 0 in both count as equal. Different shapes and NaN values lead to NaN.

    Examples
    --------
    >>> min_cosine(torch.tensor([[1e-30, 0.0]]), torch.tensor([[2e-30, 0.0]]))
    1.0
    """
    if expected.shape != computed.shape:
        return float("nan")
    expected, computed = expected.double(), computed.double()
    norms = expected.norm(dim=1) * computed.norm(dim=1)
    same = (expected == computed).all(dim=1)
    return float(torch.where(same, 1.0, (expected * computed).sum(dim=1) / norms).min())
