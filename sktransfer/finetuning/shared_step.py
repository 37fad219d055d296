"""A training step that several processes share: random numbers and gradients of the whole batch.

Shapes: B images in the batch of all processes, b in this process's share, K outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sktransfer.utils.processes import Processes, Share

_DROPOUTS = (functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d)


class WholeBatchDraws(TorchFunctionMode):
    """Inside the block, dropout and stochastic depth draw the numbers that one process would draw.

    Each process draws for the whole batch, from generators in the same state, and takes the numbers
    of its own images. So the processes do not repeat the random numbers of each other.

    Parameters
    ----------
    share : Share
        Not empty.

    Examples
    --------
    >>> share = Share(slice(1, 3), 3, Processes())
    >>> with torch.random.fork_rng(), WholeBatchDraws(share):
    ...     _ = torch.manual_seed(0)
    ...     mine = functional.dropout(torch.ones(2, 4))
    >>> with torch.random.fork_rng():
    ...     _ = torch.manual_seed(0)
    ...     torch.equal(mine, functional.dropout(torch.ones(3, 4))[1:])
    True
    """

    def __init__(self, share: Share) -> None:
        super().__init__()
        self._share = share

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Replace the functions that draw random numbers for a batch."""
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return self._drop(func, *args, **kwargs)
        if func is torch.Tensor.bernoulli_:  # stochastic depth
            return self._draw(*args, **kwargs)
        return func(*args, **kwargs)

    def _drop(
        self,
        dropout: Callable[..., torch.Tensor],
        x: torch.Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> torch.Tensor:
        if not training or not p or not self._has_rows(x):
            return dropout(x, p, training, inplace)
        return x * self._part_of(dropout(torch.ones_like(self._whole(x)), p))

    def _draw(self, noise: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self._has_rows(noise):
            return noise.bernoulli_(*args, **kwargs)
        return noise.copy_(self._part_of(self._whole(noise).bernoulli_(*args, **kwargs)))

    def _has_rows(self, x: torch.Tensor) -> bool:
        """Return whether the first axis of a tensor has the same number of rows for each image."""
        return x.ndim > 1 and len(x) % len(self._share) == 0

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        """Build a tensor like `x` (b, ...), but for the whole batch, in the same memory format."""
        rows = len(x) // len(self._share) * self._share.total
        whole = x.new_empty(rows, *x.shape[1:])
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            whole = whole.contiguous(memory_format=torch.channels_last)
        return whole

    def _part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the rows of this process's share."""
        per_image, rows = len(whole) // self._share.total, self._share.rows
        return whole[rows.start * per_image : rows.stop * per_image]


@torch.no_grad()
def add_gradients(
    trained: Sequence[torch.nn.Parameter], loss: torch.Tensor, processes: Processes
) -> torch.Tensor:
    """Replace gradients by their sums over all processes, and return the sum of the losses.

    A parameter that no process has used keeps no gradient, so an optimizer does not step it.
    """
    dtype = functools.reduce(
        torch.promote_types, (weight.dtype for weight in trained), torch.float32
    )
    is_used = torch.tensor([weight.grad is not None for weight in trained])
    gradients = [
        torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in trained
    ]
    parts = [loss.reshape(1), is_used.to(loss.device), *(part.flatten() for part in gradients)]
    total = processes.add(torch.cat([part.to(dtype) for part in parts]))
    n_trained = len(trained)
    sums = total[1 + n_trained :].split([weight.numel() for weight in trained])
    for weight, was_used, part in zip(
        trained, total[1 : 1 + n_trained].tolist(), sums, strict=True
    ):
        weight.grad = part.view_as(weight).to(weight.dtype) if was_used else None
    return total[0]
