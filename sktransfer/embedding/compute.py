"""Compute resources, resolved from the parameters of an estimator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sktransfer.engines.choice import ENGINES, choose_engine
from sktransfer.store.session import resolve_store
from sktransfer.store.store import EmbeddingStore
from sktransfer.transforms.preprocessing import check_image_size
from sktransfer.utils.errors import check_choice, check_verbose
from sktransfer.utils.processes import ALONE, Processes
from sktransfer.utils.runtime import resolve_device, resolve_precision, resolve_threads


@dataclass(frozen=True)
class ComputeConfig:
    """Compute resources, resolved in the process that uses them.

    Parameters
    ----------
    device : torch.device
    engine : str
        `"auto"` or the name of an engine.
    precision : torch.dtype
        Compute dtype of the frozen blocks.
    threads : int
        Threads that decode images.
    store : EmbeddingStore or None
    chosen_engine : str or None
        The engine of all parts of a job; None chooses one for each part.
    processes : Processes
        The processes that take part in a fit, and share its work.
    """

    device: torch.device
    engine: str
    precision: torch.dtype
    threads: int
    store: EmbeddingStore | None
    chosen_engine: str | None = None
    processes: Processes = ALONE

    @property
    def device_decodes(self) -> bool:
        """Whether a CUDA device decodes JPEGs.

        In float32 the CPU does, so that both compute, and share in the store, the same embeddings.
        """
        return self.precision != torch.float32

    @classmethod
    def of(cls, estimator: Any) -> ComputeConfig:
        """Resolve the parameters of an estimator."""
        device = resolve_device(estimator.device)
        return cls(
            device,
            estimator.engine,
            resolve_precision(estimator.precision, device),
            resolve_threads(estimator.n_jobs, device),
            resolve_store(estimator.cache),
        )

    def for_job(self, n_images: int, *, from_library: bool) -> ComputeConfig:
        """Choose one engine for all parts of a job.

        Parameters
        ----------
        n_images : int
            Images of the whole job, stored or not.
        from_library : bool
            Whether a library built the network.
        """
        chosen = choose_engine(
            self.engine, self.device, self.precision, n_images, from_library=from_library
        )
        return replace(self, chosen_engine=chosen)


def check_shared_parameters(estimator: Any) -> None:
    """Check the parameters that all estimators of this package have in common.

    Raises
    ------
    ValueError, TypeError, NotADirectoryError
        If a parameter has a value that it cannot have.
    """
    check_choice("engine", estimator.engine, ["auto", *ENGINES])
    check_image_size(estimator.image_size, options=("auto",))
    check_verbose(estimator.verbose)
    compute = ComputeConfig.of(estimator)
    if compute.device.type == "meta":  # its tensors have no values
        raise ValueError("Got device='meta', but expected 'auto', 'cpu', 'cuda', 'cuda:0' or 'mps'")
    if compute.engine != "auto":
        choose_engine(compute.engine, compute.device, compute.precision, n_images=1)
