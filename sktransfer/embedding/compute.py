"""Compute resources, resolved from the parameters of an estimator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sktransfer.store.session import resolve_store
from sktransfer.store.store import EmbeddingStore
from sktransfer.utils.runtime import resolve_device, resolve_precision, resolve_threads


@dataclass(frozen=True)
class ComputeConfig:
    """Compute resources, resolved in the process that uses them.

    Parameters
    ----------
    device : torch.device
    engine : str
    precision : torch.dtype
        Compute dtype of the frozen blocks.
    threads : int
        Threads that decode images.
    store : EmbeddingStore or None
    """

    device: torch.device
    engine: str
    precision: torch.dtype
    threads: int
    store: EmbeddingStore | None

    @classmethod
    def of(cls, estimator: Any) -> ComputeConfig:
        """Resolve the parameters of an estimator."""
        device = resolve_device(estimator.device)
        return cls(
            device,
            estimator.engine,
            resolve_precision(estimator.precision, device),
            resolve_threads(estimator.n_jobs),
            resolve_store(estimator.cache),
        )
