"""Prediction: what a classifier does with the network that its fit has tuned.

Shapes: N images, D features, K classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from sktransfer.adaptation.batch_norm import match_batch_norm
from sktransfer.backbones.batch_norm import BatchNormState
from sktransfer.backbones.loading import Backbone
from sktransfer.backbones.source import BackboneSource
from sktransfer.data.images import Images
from sktransfer.data.validation import check_images
from sktransfer.embedding.compute import ComputeConfig
from sktransfer.finetuning.cut_network import Network
from sktransfer.finetuning.export import save_weights, tuned_backbone
from sktransfer.finetuning.train_stage import make_net, restore_history
from sktransfer.store.session import share_session
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Views
from sktransfer.utils.runtime import resolve_device


class NetworkPrediction(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """The half of a classifier that predicts; the other half is its parameters and `fit`.

    It is a transformer itself, since scikit-learn wraps `transform` in the class that defines it.
    """

    classes_: np.ndarray
    preprocessing_: Preprocessing
    batch_norm_: BatchNormState | None
    _source: BackboneSource
    _boundary: int
    _net: Any
    _history: list[dict[str, Any]]
    _tuned: dict[str, torch.Tensor]

    def predict(self, X: Any) -> np.ndarray:
        """Give the most probable class of each image.

        Returns
        -------
        ndarray of shape (N,)
            Of `classes_`.
        """
        logits = self._logits(X)
        return self.classes_[logits.argmax(axis=1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Give the probability of each class.

        Returns
        -------
        ndarray of shape (N, K)
            float32; columns in the order of `classes_`.
        """
        return softmax(self._logits(X), axis=1)

    def decision_function(self, X: Any) -> np.ndarray:
        """Give the logits.

        Returns
        -------
        ndarray of shape (N, K), or (N,) for two classes
            float32; for two classes, the log-odds of the second one.
        """
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def transform(self, X: Any) -> np.ndarray:
        """Embed images with the tuned network: the penultimate vectors.

        Returns
        -------
        ndarray of shape (N, D)
            float32.
        """
        check_is_fitted(self)
        return self._apply(X, self.net_.module_.embed)

    @property
    def net_(self) -> Any:
        """The skorch net, which takes activations at the last boundary."""
        if "_tuned" not in vars(self):
            raise AttributeError(f"This {type(self).__name__} is not fitted yet")
        device = resolve_device(self.device)
        if self._net is None or _differ(self._net.module_.device, device):
            machine = ComputeConfig.of(self)
            suffix = self._network().suffix({self._boundary}, machine)
            suffix.restore(self._tuned)
            self._net = make_net(suffix, device=machine.device, optimizer=self.optimizer)
            restore_history(self._net, self._history)
        return self._net

    @property
    def history_(self) -> Any:
        """What every epoch came to: the history of `net_`."""
        return self.net_.history_

    def as_backbone(self) -> Backbone:
        """Give the tuned network: what this classifier is as the `backbone` of another estimator.

        Raises
        ------
        NotFittedError
        """
        check_is_fitted(
            self,
            msg="Got a %(name)s as backbone that is not fitted. Where scikit-learn clones what it "
            "is part of, as searches do, it goes into a sklearn.frozen.FrozenEstimator",
        )
        classes = self.classes_.tolist()
        return tuned_backbone(self._source, self._tuned, self.preprocessing_, classes)

    def save_weights(self, path: str | os.PathLike[str]) -> None:
        """Write the tuned network as a state dict, to be the `weights` of the same `backbone`.

        Parameters
        ----------
        path : path
            Ends in `.safetensors`. The network's own classifying layer is in the file as it was;
            the head is not.

        Raises
        ------
        ValueError
            Where the name ends in something else.
        """
        save_weights(self.as_backbone(), path)

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        shown = super().__repr__(N_CHAR_MAX)
        return f"{shown} <{self.preprocessing_}>" if "preprocessing_" in vars(self) else shown

    def _adapt(self, source: Images, target: Images) -> None:
        """Let the target look to each BatchNorm layer as the source did while it was learned."""
        ours, theirs = (Views(domain, self.preprocessing_) for domain in (source, target))
        machine = ComputeConfig.of(self)
        found = match_batch_norm(self.as_backbone(), ours, theirs, machine.device, machine.threads)
        self.batch_norm_, self._source = found, replace(self._source, batch_norm=found)
        statistics = found.statistics
        self._tuned = {name: statistics.get(name, each) for name, each in self._tuned.items()}
        self.net_.module_.restore({**statistics, **self._tuned})

    def _logits(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return self._apply(X, self.net_.module_)

    def _apply(self, X: Any, layer: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        images = check_images(self, X, reset=False)
        network = self._network()
        return network.apply(images, layer, ComputeConfig.of(self), self.verbose)

    def _network(self) -> Network:
        return Network(
            self._source.load(),
            self.preprocessing_,
            self._boundary,
            len(self.classes_),
            self.dropout,
            # Random weights come with no statistics worth keeping.
            self.batch_norm == "train" or self.weights is None,
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy that is pickled may wake up in a worker, which then looks for this process's store.
        if isinstance(self.cache, str) and self.cache == "auto":
            share_session()
        state = super().__getstate__()
        if "_net" in state:
            state = {**state, "_net": None}
        return state


def _differ(one: torch.device, other: torch.device) -> bool:
    """Whether these are two devices: without a number it is the first."""
    return (one.type, one.index or 0) != (other.type, other.index or 0)
