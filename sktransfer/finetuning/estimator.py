"""FineTunedEstimator: the base class of fine-tuned estimators, whatever their task.

Shapes: N images, D features, K outputs.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import _safe_indexing
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sktransfer.adaptation.batch_norm import match_batch_norm
from sktransfer.backbones.batch_norm import BatchNormState
from sktransfer.backbones.loading import Backbone
from sktransfer.backbones.source import BackboneSource
from sktransfer.backbones.weights import to_tensors
from sktransfer.data.images import Images
from sktransfer.data.labels import EncodedLabels
from sktransfer.data.validation import check_images
from sktransfer.embedding.compute import ComputeConfig
from sktransfer.embedding.job import save_embeddings
from sktransfer.embedding.output import BLOCK_SIZE, check_embedding_path
from sktransfer.embedding.recipe import recipe_at
from sktransfer.embedding.workers import SharedEstimator
from sktransfer.finetuning.cut_network import Network
from sktransfer.finetuning.decision import FitDecision, with_decision
from sktransfer.finetuning.export import save_weights, tuned_backbone, tuned_parts
from sktransfer.finetuning.fine_tuning import FineTuning, TunedState
from sktransfer.finetuning.fit_data import FitData, check_enough_left, warn_of_nan, warn_of_skipped
from sktransfer.finetuning.fit_inputs import (
    check_parameters,
    check_same_inputs,
    draw_seed,
    load_fit_backbone,
    make_decision,
    resolve_checkpoint,
    resolve_target,
    resolve_validation,
    train_and_valid,
    uses_target,
)
from sktransfer.finetuning.plan import make_plan
from sktransfer.finetuning.schedule import HEAD
from sktransfer.finetuning.task import Task
from sktransfer.finetuning.train_stage import make_net, restore_history
from sktransfer.finetuning.training_set import TrainingSet, duplicates_in_errors
from sktransfer.transforms.augmentation import resolve_augmentation
from sktransfer.transforms.loader import find_broken
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import ImageError
from sktransfer.utils.processes import Processes, current_processes
from sktransfer.utils.progress import FitProgress, progress_bar
from sktransfer.utils.runtime import differ, resolve_device, resolve_threads

# Minimum number of views of each image that a fit computes. The engine is chosen for this number,
# because the actual one is decided later.
_MIN_VIEWS = 2


class FineTunedEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, SharedEstimator):
    """Base class of fine-tuned estimators; a subclass adds parameters, `fit` and predictions.

    It is a TransformerMixin because scikit-learn wraps `transform` in the class that defines it.
    """

    stages_: list[dict[str, Any]]
    interrupted_: bool
    decision_: FitDecision
    averaging_: float
    temperature_: float
    preprocessing_: Preprocessing
    batch_norm_: BatchNormState | None
    errors_: list[ImageError]
    # Pickles from before this parameter do not have it.
    on_error: str = "raise"
    _source: BackboneSource
    _task: Task
    _boundary: int
    _net: Any
    _tuned: TunedState

    _NOT_PICKLED = ("_net",)

    @abstractmethod
    def _encode(
        self, images: Images, y: Any, sample_weight: Any, sample_domain: Any
    ) -> tuple[EncodedLabels, Task]:
        """Validate the targets of `fit`; return them encoded, and their task."""

    def _fit(self, data: FitData) -> Any:
        processes = current_processes()
        with processes.together(), _warnings_of_main(processes):
            check_parameters(self)
            drawn = draw_seed(self.random_state)
            seed = processes.from_main(lambda: drawn)
            all_images, all_labels = images, labels = self._check_data(data)
        while True:
            valid = resolve_validation(self, data.X_val, data.y_val, self._task, data.rows_val)
            try:
                with (
                    duplicates_in_errors(images),
                    processes.together(),
                    _warnings_of_main(processes),
                ):
                    self._train(data, images, labels, valid, seed, processes)
                break
            except ImageError as error:
                if self.on_error == "raise":
                    raise
                # The fit begins again, so that it does not differ from one on the other images.
                # It finds their embeddings in the store.
                data = data.without(error, images, valid.images if valid else None)
                check_enough_left(data, all_labels, uses_target=uses_target(self))
                images, labels = self._check_data(data)
        self.errors_ = list(data.errors)
        warn_of_skipped(data, len(all_images))
        return self

    def _check_data(self, data: FitData) -> tuple[Images, EncodedLabels]:
        """Check the images of `X` that are used, and encode their labels."""
        y, sample_weight = data.used("y"), data.used("sample_weight")
        images = check_images(
            self, data.X, reset=True, y=y, sample_weight=sample_weight, rows=data.rows
        )
        labels, self._task = self._encode(images, y, sample_weight, data.used("sample_domain"))
        return images, labels

    def _train(
        self,
        data: FitData,
        images: Images,
        labels: EncodedLabels,
        valid: TrainingSet | None,
        seed: int,
        processes: Processes,
    ) -> None:
        """Train on checked images and encoded labels."""
        threads = resolve_threads(self.n_jobs)
        try:
            labeled, target = TrainingSet.of(images, labels), resolve_target(self, images, labels)
            if processes.count > 1:
                check_same_inputs(processes, self, labeled, target, valid)
            fit = self._prepare(labeled, target, valid, seed, processes)
        except ImageError as error:  # up to here, only some of the images have been read
            sets = [images.take(labels.rows)]
            sets += [images.take(labels.target)] if uses_target(self) else []
            sets += [valid.images] if valid else []
            raise ImageError.of([error, *find_broken(sets, threads)]) from error
        verbose = self.verbose if processes.is_main else 0
        with self._progress(data, labels, len(fit.stages), verbose) as progress:
            if self.decision_.parameters:
                progress.note(f"{type(self).__name__}: {self.decision_}")
            net, self.stages_ = fit.run(progress)
        self.interrupted_ = fit.interrupted
        self.averaging_, self.temperature_ = fit.averaging.share, 1 / fit.averaging.factor
        self._net, self._tuned = net, fit.tuned_state(net)
        if target is not None and self.batch_norm == "adapt":
            try:
                self._adapt(labeled.images, target.images, processes)
            except ImageError as error:  # of many images, only some are read
                raise ImageError.of([error, *find_broken([target.images], threads)]) from error

    def _prepare(
        self,
        labeled: TrainingSet,
        target: TrainingSet | None,
        valid: TrainingSet | None,
        seed: int,
        processes: Processes,
    ) -> FineTuning:
        """Load the backbone, decide what is trained, and hold out validation images."""
        backbone, self._source = load_fit_backbone(self, labeled, target, processes)
        self.batch_norm_ = self._source.batch_norm
        self.preprocessing_ = self._source.preprocessing_of(backbone)
        compute = ComputeConfig.of(self).for_job(
            _MIN_VIEWS * len(labeled.y), from_library=backbone.from_library
        )
        compute = replace(compute, processes=processes)
        decision = make_decision(
            self, backbone, self.preprocessing_, labeled, self._task, compute, self.verbose
        )
        self.decision_ = processes.from_main(lambda: decision)
        options = with_decision(self, self.decision_)
        checkpoint, seed = processes.from_main(
            lambda: resolve_checkpoint(options, seed, backbone, labeled, target, valid)
        )
        train, valid = train_and_valid(options, labeled, valid, seed, self._task)
        augmentation = resolve_augmentation(options.augment)
        plan = make_plan(options, backbone.block_list.names, augmentation)
        self._boundary = plan.stages[-1].boundary
        return FineTuning(
            options,
            self._network(backbone),
            self._task,
            plan,
            train,
            valid,
            target=target,
            compute=compute,
            augmentation=augmentation,
            seed=seed,
            checkpoint=checkpoint,
        )

    def _progress(
        self, data: FitData, labels: EncodedLabels, n_stages: int, verbose: int
    ) -> FitProgress:
        """Build the progress of the fit, with the data that callbacks can score."""
        X, y, sample_weight = data.X, data.y, data.sample_weight
        if data.sample_domain is not None or data.rows is not None:
            rows = labels.rows if data.rows is None else data.rows[labels.rows]
            X, y = (partial(_safe_indexing, values, rows) for values in (X, y))
            sample_weight = None if sample_weight is None else labels.sample_weight
        metadata = None if sample_weight is None else {"sample_weight": sample_weight}
        return FitProgress(self, n_stages=n_stages, verbose=verbose, X=X, y=y, metadata=metadata)

    def transform(self, X: Any) -> np.ndarray:
        """Embed images with the tuned network: the penultimate vectors.

        Returns
        -------
        ndarray of shape (N, D)
            float32. With `on_error="skip"`, the rows of images that cannot be read are NaN.
        """
        check_is_fitted(self)
        return self._apply(X, self.net_.module_.embed, self._n_features_out, self.on_error)

    def embed_to(self, X: Any, path: Any, *, block_size: int = BLOCK_SIZE) -> Any:
        """Write the embeddings of images to a file, for embeddings that do not fit in memory.

        They are those of `transform`. Only one block of them is in memory at a time.

        Parameters
        ----------
        X : N images
        path : path
            A `.npy` or `.parquet` file. It appears when it is complete, and replaces an existing
            file.
        block_size : int, default=4096
            Number of images that are embedded and written at a time.

        Returns
        -------
        ndarray of shape (N, D), float32
            Of a `.npy` file: the file as a read-only memory map. With `on_error="skip"`, the rows
            of images that cannot be read are NaN.
        Path
            Of a `.parquet` file: its path. Its columns are `path`, or `row` if `X` has no paths,
            and `embedding`, a list of float32. With `on_error="skip"`, the embeddings of images
            that cannot be read are null, and the column `error` has the reason.

        Raises
        ------
        ImageError
            If images cannot be read and `on_error="raise"`; names those of one block.

        See Also
        --------
        PretrainedFeatureExtractor.embed_to : The same for pretrained networks.
        """
        check_is_fitted(self)
        file = check_embedding_path(path)
        images = check_images(self, X, reset=False)
        backbone = self._source.load()
        # One engine for all blocks.
        compute = ComputeConfig.of(self).for_job(len(images), from_library=backbone.from_library)
        apply = partial(
            self._network(backbone).apply, layer=self.net_.module_.embed, compute=compute, verbose=0
        )
        width, broken = self._n_features_out, list[ImageError]()
        with progress_bar(len(images), self.verbose, f"Embedding with {backbone.name}") as bar:

            def run(block: Images) -> tuple[np.ndarray, list[ImageError]]:
                embeddings, errors = _readable_outputs(apply, block, width, self.on_error)
                broken.extend(errors)
                bar.update(len(block))
                return embeddings, errors

            saved = save_embeddings(
                file,
                images,
                run,
                width=width,
                block_size=block_size,
                with_errors=self.on_error == "skip",
            )
        if broken and isinstance(saved, np.ndarray):  # a table has the reasons
            warn_of_nan(broken, len(images))
        return saved

    @property
    def net_(self) -> Any:
        """The skorch net. It takes activations at the last boundary."""
        if "_tuned" not in vars(self):
            raise AttributeError(f"This {type(self).__name__} is not fitted yet")
        device = resolve_device(self.device)
        if self._net is None or differ(self._net.module_.device, device):
            compute = ComputeConfig.of(self)
            suffix = self._network(self._source.load()).suffix({self._boundary}, compute)
            suffix.restore(to_tensors(self._tuned.weights))
            self._net = make_net(
                suffix, self._task, device=compute.device, optimizer=self.optimizer
            )
            restore_history(self._net, self._tuned.history)
        return self._net

    @property
    def _n_features_out(self) -> int:
        return self._tuned.weights[f"{HEAD}.weight"].shape[1]

    @property
    def history_(self) -> Any:
        """The history of `net_`, one row for each epoch."""
        return self.net_.history_

    def as_backbone(self) -> Backbone:
        """Return the tuned network, for use as the `backbone` of another estimator.

        Raises
        ------
        NotFittedError
        """
        check_is_fitted(
            self,
            msg="Got a %(name)s as backbone that is not fitted. Call fit first; if scikit-learn "
            "clones the estimator around it, as searches do, wrap it in a "
            "sklearn.frozen.FrozenEstimator",
        )
        names = self._task.output_names()
        weights = to_tensors(self._tuned.weights)
        return tuned_backbone(self._source, weights, self.preprocessing_, names)

    def save_weights(self, path: str | os.PathLike[str]) -> None:
        """Save the tuned network as a state dict, for use as `weights` of the same `backbone`.

        Parameters
        ----------
        path : path
            Must end in `.safetensors`. The file has the network's original classification layer,
            and not the fitted head.

        Raises
        ------
        ValueError
            If the name ends in something else.
        """
        save_weights(self.as_backbone(), path)

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        shown = super().__repr__(N_CHAR_MAX)
        fitted = [str(self.preprocessing_)] if "preprocessing_" in vars(self) else []
        if "decision_" in vars(self) and self.decision_.parameters:
            fitted.append(f"decided: {self.decision_.describe()}")
        return f"{shown} <{'; '.join(fitted)}>" if fitted else shown

    def _adapt(self, source: Images, target: Images, processes: Processes) -> None:
        """Match the moments of the target at each BatchNorm layer to those of the source."""
        source_views, target_views = (
            Views(images, self.preprocessing_) for images in (source, target)
        )
        compute = ComputeConfig.of(self)
        self.batch_norm_ = processes.from_main(
            lambda: match_batch_norm(
                self.as_backbone(), source_views, target_views, compute.device, compute.threads
            )
        )
        self._source = replace(self._source, batch_norm=self.batch_norm_)
        statistics, weights = self.batch_norm_.statistics, self._tuned.weights
        weights = {name: statistics.get(name, array) for name, array in weights.items()}
        self._tuned = replace(self._tuned, weights=weights)
        self.net_.module_.restore(to_tensors({**statistics, **weights}))

    def _outputs(self, X: Any, on_error: str = "raise") -> np.ndarray:
        check_is_fitted(self)
        return self._apply(X, self.net_.module_, self._task.n_outputs, on_error)

    def _modules(self) -> list[nn.Module]:
        """Return modules that map normalized images to outputs; the last one is the head."""
        frozen, dtype = self._source.load(), "float32"
        if self._boundary:
            recipe = recipe_at(frozen, self.preprocessing_, self._boundary, torch.float32)
            dtype = recipe.dtype
        return tuned_parts(self.as_backbone(), self._boundary, dtype)

    def _apply(
        self, X: Any, layer: Callable[[torch.Tensor], torch.Tensor], width: int, on_error: str
    ) -> np.ndarray:
        """Compute outputs (N, width); with `on_error="skip"`, those of broken images are NaN."""
        images = check_images(self, X, reset=False)
        network = self._network(self._source.load())
        apply = partial(
            network.apply, layer=layer, compute=ComputeConfig.of(self), verbose=self.verbose
        )
        outputs, errors = _readable_outputs(apply, images, width, on_error)
        if errors:
            warn_of_nan(errors, len(images))
        return outputs

    def _network(self, backbone: Backbone) -> Network:
        return Network(
            backbone,
            self.preprocessing_,
            self._boundary,
            self._task.n_outputs,
            self.dropout,
            # Random weights have no pretrained statistics to keep.
            self.batch_norm == "train" or self.weights is None,
        )


def _readable_outputs(
    apply: Callable[[Images], np.ndarray], images: Images, width: int, on_error: str
) -> tuple[np.ndarray, list[ImageError]]:
    """Compute outputs (N, width); with `on_error="skip"`, those of broken images are NaN."""
    try:
        return apply(images), []
    except ImageError as error:
        if on_error == "raise":
            raise
        readable = images.without(error)
        outputs = np.full((len(images), width), np.nan, np.float32)
        if len(readable):
            outputs[readable] = apply(images.take(readable))
        return outputs, error.errors


@contextlib.contextmanager
def _warnings_of_main(processes: Processes) -> Iterator[None]:
    """Show the warnings of the main process only: all processes have the same."""
    with contextlib.ExitStack() as stack:
        if not processes.is_main:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        yield
