"""Networks whose weights came in the file of a saved model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sktransfer.backbones.sources import LoadedNetwork, build_named, load_user_network
from sktransfer.backbones.weights import digest_tensors, to_tensors
from sktransfer.transforms.preprocessing import Preprocessing


@dataclass(frozen=True, eq=False)
class SavedWeights:
    """All weights of a network, and what its source knows about them.

    Parameters
    ----------
    name : str
        Name of the backbone.
    state : dict of str to ndarray
        The state dict of the whole network, from `to_arrays`.
    preprocessing : Preprocessing
    categories : tuple of str
    pretrained : bool
        See `LoadedNetwork`.
    given : str or None
        The weights that the fitted estimator was given, such as `"default"` or a path.
    """

    name: str
    state: dict[str, np.ndarray]
    preprocessing: Preprocessing
    categories: tuple[str, ...]
    pretrained: bool
    given: str | None

    @cached_property
    def fingerprint(self) -> bytes:
        """Digest of the weights alone, whatever network they are for."""
        return digest_tensors(to_tensors(self.state).items())

    def fill(self, backbone: Any) -> LoadedNetwork:
        """Build a network with these weights.

        Parameters
        ----------
        backbone : str, Module or callable
            A name of the catalogue, `"PREFIX:NAME"`, a module, or a function that builds one.

        Raises
        ------
        ValueError
            If the weights do not fit the network.
        """
        state = {name: tensor.clone() for name, tensor in to_tensors(self.state).items()}
        if isinstance(backbone, str):
            model = build_named(backbone, state, pretrained=self.pretrained)
        else:
            model = copy.deepcopy(load_user_network(backbone, "default").model)
            try:
                model.load_state_dict(state)
            except RuntimeError as error:  # names or shapes differ
                raise ValueError(
                    f"Got weights that do not fit the backbone {self.name}: {error}"
                ) from error
        return LoadedNetwork(self.name, model, self.preprocessing, self.categories, self.pretrained)
