"""A backbone that is cut at a boundary, into frozen blocks and a trained suffix.

Shapes: N images, B in a batch, W values at a boundary, K classes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from sktransfer.backbones.loading import Backbone
from sktransfer.data.images import Images
from sktransfer.embedding.compute import ComputeConfig
from sktransfer.embedding.embed import embed, engine_for
from sktransfer.embedding.recipe import Recipe, map_shape, output_width, recipe_at
from sktransfer.engines.batch_size import auto_batch_size, in_parts
from sktransfer.finetuning.suffix import TrainedSuffix
from sktransfer.transforms.device_feed import DeviceFeed, Forward
from sktransfer.transforms.loader import ImageErrors, ImageReader
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import ImageError
from sktransfer.utils.runtime import training_precision

# Images whose activations are in memory at once when predicting.
_IMAGES_PER_CHUNK = 512


@dataclass(frozen=True)
class Network:
    """A backbone, cut at the last boundary of a fine-tuning.

    Parameters
    ----------
    backbone : Backbone
    preprocessing : Preprocessing
    boundary : int
        Number of blocks before it.
    n_outputs : int
    dropout : float
    learn_statistics : bool
        Whether trained BatchNorm layers update their statistics.
    """

    backbone: Backbone
    preprocessing: Preprocessing
    boundary: int
    n_outputs: int
    dropout: float
    learn_statistics: bool

    def recipe(self, boundary: int, compute: ComputeConfig) -> Recipe:
        """Build the recipe of the activations at a boundary, which is at least 1."""
        return recipe_at(self.backbone, self.preprocessing, boundary, compute.precision)

    def shape_at(self, boundary: int, compute: ComputeConfig) -> tuple[int, ...]:
        """Return the shape of one image's activations at a boundary."""
        if boundary == 0:
            return (3, *self.preprocessing.crop)
        return map_shape(self.recipe(boundary, compute))

    def suffix(self, boundaries: set[int], compute: ComputeConfig) -> TrainedSuffix:
        """Build the trained part after the boundary, for activations at some boundaries."""
        end = len(self.backbone.block_list.blocks)
        shapes = {boundary: self.shape_at(boundary, compute) for boundary in {0, *boundaries}}
        suffix = TrainedSuffix(
            self.backbone.block_list,
            self.boundary,
            self.n_outputs,
            output_width(self.recipe(end, compute)),
            shapes,
            self.dropout,
            self.learn_statistics,
            training_precision(compute.precision, compute.device),
        )
        return suffix.to(compute.device).to(memory_format=torch.channels_last)

    def accepts(self, boundary: int, shape: tuple[int, ...], compute: ComputeConfig) -> bool:
        """Return whether the blocks after a boundary accept activations of another shape.

        Those of a network with a layer for a fixed number of positions do not.
        """
        if self.backbone.block_list.image_size is not None:
            return False
        suffix = self.suffix({boundary}, compute).train(False)
        suffix.move_boundary(boundary, ())
        try:
            with torch.no_grad():
                suffix(torch.zeros(1, *shape, device=compute.device))
        except Exception:  # of the user's module
            return False
        return True

    def runner(
        self, boundary: int, compute: ComputeConfig, n_images: int
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Build a function from uint8 pixels (B, 3, H, W) to float32 activations on the device."""
        device = compute.device
        if boundary == 0:
            return lambda batch: self.preprocessing.normalize(batch.to(device))
        engine = engine_for(self.recipe(boundary, compute), compute, n_images)
        if engine.on_device:
            return lambda batch: engine.forward(batch.to(device))
        return lambda batch: torch.from_numpy(engine.run(batch)).to(device)

    def apply(
        self,
        images: Images,
        layer: Callable[[torch.Tensor], torch.Tensor],
        compute: ComputeConfig,
        verbose: int,
    ) -> np.ndarray:
        """Send images through the frozen blocks and a part of the suffix.

        Parameters
        ----------
        images : Images of length N
        layer : callable
            Maps activations at the boundary to a tensor (B, ...), such as logits.
        compute : ComputeConfig
        verbose : int

        Returns
        -------
        ndarray of shape (N, ...)
            float32.

        Raises
        ------
        ImageError
            If images are broken; names all of them.
        """
        if compute.chosen_engine is None:
            compute = compute.for_job(len(images), from_library=self.backbone.from_library)
        if len(images) == 1:
            compute = replace(compute, store=None)  # its embeddings are of padded batches
        blocks = self._frozen_on_device(compute, len(images))
        if blocks is not None:
            return self._apply_on_device(images, blocks, layer, compute)
        size = auto_batch_size(compute.device, self.preprocessing.crop)
        outputs: list[np.ndarray] = []
        broken: list[ImageError] = []
        is_stored = compute.store is not None and self.boundary > 0

        @torch.inference_mode()
        def run(part: torch.Tensor) -> torch.Tensor:
            return layer(part.to(compute.device).float()).float().cpu()

        for start in range(0, len(images), _IMAGES_PER_CHUNK):
            views = Views(images[start : start + _IMAGES_PER_CHUNK], self.preprocessing)
            try:
                if broken and not is_stored:  # the outputs are not needed any more
                    self._read(views, size, compute)
                    continue
                for x in self._activations(views, len(images), size, compute, verbose):
                    outputs.append(in_parts(run, x)[0].numpy())
            except ImageError as error:
                broken.append(error)
        if broken:
            raise ImageError.of(broken)
        return np.concatenate(outputs)

    def _apply_on_device(
        self,
        images: Images,
        blocks: Forward,
        layer: Callable[[torch.Tensor], torch.Tensor],
        compute: ComputeConfig,
    ) -> np.ndarray:
        """Compute the outputs of `apply`; activations stay on the device and are not stored."""

        def forward(pixels: torch.Tensor, exact: bool) -> torch.Tensor:
            return in_parts(layer, blocks(pixels, exact))[0].float()

        feed = DeviceFeed(
            Views(images, self.preprocessing),
            compute.threads,
            ImageErrors("raise"),
            compute.device,
            decodes=compute.device_decodes,
        )
        size = auto_batch_size(compute.device, self.preprocessing.crop)
        batches = [
            range(start, min(start + size, len(images))) for start in range(0, len(images), size)
        ]
        outputs: np.ndarray | None = None
        for rows, values in feed.map(forward, batches):
            if outputs is None:
                outputs = np.empty((len(images), *values.shape[1:]), np.float32)
            outputs[rows] = values
        assert outputs is not None
        return outputs

    def _frozen_on_device(self, compute: ComputeConfig, n_images: int) -> Forward | None:
        """Return the frozen blocks as a function on a CUDA device; None if they run elsewhere."""
        if compute.device.type != "cuda":
            return None
        if self.boundary == 0:
            return lambda pixels, exact: self.preprocessing.normalize(pixels)
        engine = engine_for(self.recipe(self.boundary, compute), compute, n_images)
        return engine.forward if engine.on_device else None

    def _read(self, views: Views, size: int, compute: ComputeConfig) -> None:
        """Read images, which raises an error for the broken ones."""
        reader = ImageReader(views, compute.threads, ImageErrors("raise"))
        deque(reader.batches(range(len(views)), size), maxlen=0)

    def _activations(
        self, views: Views, n_images: int, size: int, compute: ComputeConfig, verbose: int
    ) -> Iterator[torch.Tensor]:
        if self.boundary == 0:
            run = self.runner(0, compute, n_images)
            reader = ImageReader(views, compute.threads, ImageErrors("raise"))
            yield from (run(batch) for _, batch in reader.batches(range(len(views)), size))
            return
        values, *_ = embed(
            views,
            self.recipe(self.boundary, compute),
            compute,
            n_images=n_images,
            verbose=verbose,
            # Predictions do not depend on the store or on the other images. A single image, such as
            # that of a request, is not padded: it would take several times as long.
            pad_batches=n_images > 1,
        )
        for start in range(0, len(values), 4 * size):
            yield torch.from_numpy(values[start : start + 4 * size])
