"""The adversary of domain-adversarial training, which classifies the domain of embeddings.

Source: Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 2016.

Shapes: N images of each domain, D features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as nnf

# Width of the hidden layer.
_HIDDEN_WIDTH = 256
# Gamma in the paper: how fast the reversed gradient reaches its full strength.
_REVERSAL_STEEPNESS = 10.0


class _Reversal(torch.autograd.Function):
    """The identity in the forward pass; in the backward pass, gradients times `-strength`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, strength: float) -> torch.Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.strength * gradients[0], None


def reverse_gradient(x: torch.Tensor, strength: float) -> torch.Tensor:
    """Return `x`, and multiply its gradients by `-strength` in the backward pass.

    Examples
    --------
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> y = reverse_gradient(x, 0.5)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([1.0, 2.0], [-0.5, -0.5])
    """
    return _Reversal.apply(x, strength)


def reversal_strength(progress: float) -> float:
    """Compute the strength of the gradient reversal, which rises from 0 to 1.

    It begins at 0 because the adversary is not trained yet.

    Parameters
    ----------
    progress : float
        Completed share of the stage, 0 to 1.

    Examples
    --------
    >>> [round(reversal_strength(progress), 3) for progress in (0, 0.1, 0.5, 1)]
    [0.0, 0.462, 0.987, 1.0]
    """
    return 2 / (1 + math.exp(-_REVERSAL_STEEPNESS * progress)) - 1


class Adversary(nn.Module):
    """A classifier of the domain of embeddings: source or target.

    The layers before it receive its reversed gradient, so they learn embeddings from which it
    cannot tell the domain.

    Parameters
    ----------
    width : int
        Width of the embeddings, D.
    weight : float
        Weight of its loss relative to the classification loss.

    Attributes
    ----------
    strength : float
        Factor of the reversed gradients.
    """

    def __init__(self, width: int, weight: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            # Batch statistics, because the scale of embeddings varies and changes in training.
            nn.BatchNorm1d(width, affine=False, track_running_stats=False),
            nn.Linear(width, _HIDDEN_WIDTH),
            nn.ReLU(),
            nn.Linear(_HIDDEN_WIDTH, 1),
        )
        self.weight, self.strength = weight, 0.0

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the weighted loss of classifying the domain of embeddings (N, D)."""
        both = reverse_gradient(torch.cat([source, target]), self.strength)
        domains = torch.cat([torch.ones(len(source)), torch.zeros(len(target))])
        logits = self.layers(both).squeeze(1).float()
        return self.weight * nnf.binary_cross_entropy_with_logits(logits, domains.to(logits.device))
