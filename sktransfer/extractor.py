"""PretrainedFeatureExtractor: the boundary is after the last block, so nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.base import TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted

from sktransfer.adaptation.batch_norm import adapt_batch_norm
from sktransfer.backbones.batch_norm import BatchNormState
from sktransfer.backbones.frozen import POOLINGS, check_layers
from sktransfer.backbones.loading import Backbone, load_backbone
from sktransfer.backbones.source import BackboneSource
from sktransfer.data.images import Images
from sktransfer.data.validation import check_images
from sktransfer.embedding.compute import ComputeConfig, check_shared_parameters
from sktransfer.embedding.embed import engine_name
from sktransfer.embedding.image_module import ImageModule
from sktransfer.embedding.job import EmbeddingJob, save_embeddings
from sktransfer.embedding.output import BLOCK_SIZE, check_embedding_path
from sktransfer.embedding.recipe import Recipe, output_width
from sktransfer.embedding.workers import SharedEstimator
from sktransfer.engines.batch_size import MAX_BATCH_SIZE
from sktransfer.transforms.loader import ImageErrors
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import ImageError, check_choice, check_number
from sktransfer.utils.progress import CallbackSupport, FitProgress, with_callbacks
from sktransfer.utils.runtime import resolve_device, resolve_threads


class PretrainedFeatureExtractor(CallbackSupport, TransformerMixin, SharedEstimator):
    """Embed images with a frozen pretrained network, each image once.

    The embeddings are computed on a GPU if there is one, and cached in a store that clones, folds,
    search candidates and worker processes share, so a search runs each image through the network
    only once.

    Parameters
    ----------
    backbone : str, torch.nn.Module, callable or classifier, default="efficientnet_lite0"
        A name from `list_backbones`, `"timm:NAME"` if timm is installed, your own module (it is
        copied and not modified), a callable that returns a module, or a fitted
        `FineTunedImageClassifier`. Wrap a fitted classifier in a `sklearn.frozen.FrozenEstimator`
        if scikit-learn will clone the extractor, as a search does.
    weights : str, path, torchvision weights or None, default="default"
        `"default"`, a torchvision name such as `"IMAGENET1K_V2"` or its member
        `ResNet50_Weights.IMAGENET1K_V2`, a `.safetensors` or `.pth` file (code in a file is never
        executed), or `None` for random values.
    layer : str, list of str or None, default=None
        Output of the network: `None` for the penultimate vector, the name of a block (an error
        lists them), `"logits"` for the output of the pretrained classifier, or a list of layers,
        whose outputs are concatenated.
    pooling : {"avg", "max", "avgmax"} or None, default="avg"
        How a feature map becomes a vector: mean or maximum over positions, or both. With
        `layer=None`, `"avg"` computes the penultimate vector as the network itself does. `None`
        keeps every value of the map.
    image_size : int, (int, int), "auto" or None, default=None
        Side of the network's input in pixels; a pair (height, width) resizes images to exactly that
        shape. `None` is the size that comes with the weights. `"auto"` is the whole image at 9/7 of
        that size, such as (288, 288) instead of 224, if the weights are torchvision's or those of
        `"efficientnet_lite0"`, were trained with the usual crop (a margin of an eighth), and the
        images are not thumbnails; otherwise it is the same as `None`. `"auto"` is more accurate on
        photographs, at 1.65 times the computation. Source: Touvron et al., "Fixing the train-test
        resolution discrepancy", NeurIPS 2019.
    image_shape : tuple of int or None, default=None
        Shape (H, W) or (H, W, C) of the images in the rows of a 2-D `X`; one of the numbers may
        be -1.
    pixel_range : (float, float) or "auto", default="auto"
        Values of black and white in images that are not 8-bit, whether arrays, PIL images or
        files. `"auto"` learns them in `fit`: the smallest of 0 to 1, -1 to 1, 0 to 16, 0 to 255
        and 0 to 65535 that contains the data (of files, 64 of them), or the minimum and maximum of
        the data if none does.
    background : str or (int, int, int), default="white"
        Color on which transparent images are composited: a name or a code such as "#808080", or
        red, green and blue from 0 to 255.
    batch_norm : {"frozen", "adapt"}, default="frozen"
        `"adapt"` estimates the BatchNorm statistics on the images passed to `fit` (AdaBN), for
        images that look different from those that the network was trained on. For two domains, use
        two extractors, each fitted on the images of one domain.
    device : str or torch.device, default="auto"
        `"auto"` is CUDA, else MPS, else the CPU, on the machine that runs the extractor.
    engine : {"auto", "torch", "openvino"}, default="auto"
        Engine that runs the network. `"auto"` is OpenVINO (``pip install 'sktransfer[openvino]'``)
        for 128 images or more on a CPU, unless the network is your own module; otherwise torch.
        All engines compute the same embeddings, within rounding.
    precision : {"auto", "float32", "bfloat16", "float16"}, default="auto"
        Compute dtype of the network. `"auto"` is float16 on CUDA and float32 elsewhere.
    batch_size : int or "auto", default="auto"
        Number of images per forward pass; halved automatically if GPU memory runs out.
    n_jobs : int or None, default=None
        Number of threads that read images, and that run torch on a CPU. -1 is one per core, and
        `None` is as many as torch uses, but one inside a worker of a parallel search.
    cache : "auto", path, EmbeddingStore or None, default="auto"
        Where embeddings are cached. `"auto"` is one store for this process and the processes that
        it starts, deleted at exit; a directory persists; `None` disables caching.
    on_error : {"raise", "nan"}, default="raise"
        What to do with broken images: embed all others, and then raise an `ImageError` that names
        rows and files, or return rows of NaN and add the errors to `errors_`.
    verbose : int, default=0
        If not 0, show a progress bar for 64 images or more, except inside a search or a
        cross-validation.

    Attributes
    ----------
    preprocessing_ : Preprocessing
        How images are resized, cropped and normalized; it comes with the weights.
    pixel_range_ : (float, float) or None
        Values of black and white in images that are not 8-bit; `None` if the data needed none.
    batch_norm_ : BatchNormState or None
        Statistics that `batch_norm="adapt"` estimated.
    layers_ : list of str
        Names of the network's blocks, from input to output; `layer` accepts them.
    digest_ : str
        Identifier of the network and its weights.
    engine_ : str
        Engine of the last run; right after `fit`, the engine for the number of images in `fit`.
    errors_ : list of ImageError
        Broken images of the last `transform` if `on_error="nan"`.
    n_features_in_ : int
        Number of columns seen in `fit` if `X` was 2-D.
    feature_names_in_ : ndarray of str
        Column names seen in `fit` if `X` had them.

    See Also
    --------
    list_backbones : List the names that `backbone` accepts.
    load_image_folder : Load the paths and labels of a folder of images.

    Notes
    -----
    `X` can contain paths, PIL images, arrays of one or several sizes (uint8 or float; NHWC, NHW or
    NCHW), tensors, encoded bytes, open binary files, or the dicts of Hugging Face `datasets`. It
    can also be a one-column DataFrame or pyarrow Table of these, a torch or Hugging Face Dataset,
    an array of HDF5 or Zarr, or flattened rows (see `image_shape`). An image has the same embedding
    in every container and in every batch.

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer import PretrainedFeatureExtractor
    >>> images = load_sample_images().images
    >>> extractor = PretrainedFeatureExtractor()
    >>> extractor.fit_transform(images).shape
    (2, 1280)
    >>> print(extractor.preprocessing_)
    resize 256 bicubic, crop 224x224, mean (0.498, 0.498, 0.498), std (0.502, 0.502, 0.502)
    >>> extractor.layers_[-2:]
    ['block15', 'conv_head']
    """

    def __init__(
        self,
        backbone: Any = "efficientnet_lite0",
        *,
        weights: Any = "default",
        layer: Any = None,
        pooling: str | None = "avg",
        image_size: Any = None,
        image_shape: Any = None,
        pixel_range: Any = "auto",
        background: Any = "white",
        batch_norm: str = "frozen",
        device: Any = "auto",
        engine: str = "auto",
        precision: str = "auto",
        batch_size: Any = "auto",
        n_jobs: int | None = None,
        cache: Any = "auto",
        on_error: str = "raise",
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.layer = layer
        self.pooling = pooling
        self.image_size = image_size
        self.image_shape = image_shape
        self.pixel_range = pixel_range
        self.background = background
        self.batch_norm = batch_norm
        self.device = device
        self.engine = engine
        self.precision = precision
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.cache = cache
        self.on_error = on_error
        self.verbose = verbose

    @with_callbacks
    def fit(self, X: Any, y: Any = None) -> PretrainedFeatureExtractor:
        """Load the network, and learn the pixel range and the adapted BatchNorm statistics.

        Parameters
        ----------
        X : images in any container listed in the Notes
        y : ignored

        Returns
        -------
        self
        """
        self._check_parameters()
        with FitProgress(self, n_stages=0, X=X, y=y):
            self._learn(check_images(self, X, reset=True, y=y))
        return self

    def _learn(self, images: Images) -> None:
        self.errors_: list[ImageError] = []
        backbone = load_backbone(self.backbone, self.weights)
        layers = self._layers()
        check_layers(layers, backbone.block_list)
        size = backbone.image_size_for(self.image_size, images)
        views = Views(images, backbone.preprocessing.with_image_size(size))
        self.batch_norm_ = self._adapt(backbone, views)
        self._plan = ExtractionPlan(
            source=BackboneSource(
                self.backbone, self.weights, size, self.batch_norm_, backbone.digest
            ),
            layers=layers,
            pooling=self.pooling,
        )
        self.layers_ = backbone.block_list.names
        self.digest_ = backbone.digest.hex()
        compute = ComputeConfig.of(self)
        recipe = self._plan.recipe(self._plan.source.adapted(backbone), compute.precision)
        self.preprocessing_ = recipe.preprocessing
        self._widths = [output_width(replace(recipe, layers=(layer,))) for layer in recipe.layers]
        self.engine_ = engine_name(recipe, compute, len(images))

    def transform(self, X: Any) -> np.ndarray:
        """Embed images, or read their embeddings from the store.

        Parameters
        ----------
        X : images in any container listed in the Notes

        Returns
        -------
        ndarray of shape (N, D)
            float32.

        Raises
        ------
        ImageError
            If images are broken and `on_error="raise"`, after all others have been embedded: their
            embeddings stay in the store. The error names the first ten broken images, and its
            `errors` are all of them.
        """
        check_is_fitted(self)
        self._check_parameters()
        images = check_images(self, X, reset=False)
        job = self._job(len(images))
        with job.bar(len(images), self.verbose) as bar:
            embeddings, self.errors_, self.engine_ = job.run(images, self.on_error, bar)
        return embeddings

    def embed_to(self, X: Any, path: Any, *, block_size: int = BLOCK_SIZE) -> Any:
        """Write the embeddings of images to a file, for embeddings that do not fit in memory.

        They are those of `transform`. Only one block of them is in memory at a time.

        Parameters
        ----------
        X : N images in any container listed in the Notes
        path : path
            A `.npy` file, which `numpy.load` reads, or a `.parquet` file, for which pyarrow must be
            installed (``pip install 'sktransfer[parquet]'``). It appears when it is complete, and
            replaces an existing file.
        block_size : int, default=4096
            Number of images that are embedded and written at a time.

        Returns
        -------
        ndarray of shape (N, D), float32
            Of a `.npy` file: the file as a read-only memory map.
        Path
            Of a `.parquet` file: its path. The file has a row for each image, in order. The column
            `path` is the path or URL of the image, or `row` its row if `X` has no paths;
            `embedding` is a list of float32.

        Raises
        ------
        ImageError
            If images are broken and `on_error="raise"`, after the other images of the same block
            have been embedded. With `on_error="nan"`, the embeddings of broken images are NaN in a
            `.npy` file. In a `.parquet` file they are null, and the column `error` has the reason.
        ValueError, TypeError
            If `path` or `block_size` are invalid.
        OSError
            If the file cannot be written, as on a full disk; an existing file stays as it was.

        Examples
        --------
        >>> import tempfile
        >>> from sklearn.datasets import load_sample_images
        >>> images = load_sample_images().images
        >>> extractor = PretrainedFeatureExtractor(image_size=64).fit(images)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     embeddings = extractor.embed_to(images, f"{folder}/embeddings.npy")
        ...     print(embeddings.shape, embeddings.dtype)
        (2, 1280) float32
        """
        check_is_fitted(self)
        self._check_parameters()
        file = check_embedding_path(path)
        images = check_images(self, X, reset=False)
        job = self._job(len(images))
        self.errors_ = []
        with job.bar(len(images), self.verbose) as bar:

            def run(block: Images) -> tuple[np.ndarray, list[ImageError]]:
                embeddings, errors, self.engine_ = job.run(block, self.on_error, bar)
                self.errors_ += errors
                return embeddings, errors

            return save_embeddings(
                file,
                images,
                run,
                width=job.width,
                block_size=block_size,
                with_errors=self.on_error == "nan",
            )

    def _job(self, n_images: int, *, pad_batches: bool = False) -> EmbeddingJob:
        compute = ComputeConfig.of(self)
        recipe = self._plan.recipe(self._plan.source.load(), compute.precision)
        batch_size = None if self.batch_size == "auto" else self.batch_size
        return EmbeddingJob(recipe, compute, n_images, batch_size, pad_batches)

    def to_module(self) -> ImageModule:
        """Return the fitted extractor as one torch module, from images to embeddings.

        Returns
        -------
        nn.Module
            Maps images, uint8 (N, 3, height, width) of any one size, to embeddings (N, D), float32.
            It is a copy, frozen, on the CPU, and computes in float32.

        See Also
        --------
        to_module : The same for classifiers and pipelines.

        Examples
        --------
        >>> from sklearn.datasets import load_sample_images
        >>> images = load_sample_images().images
        >>> module = PretrainedFeatureExtractor().fit(images).to_module()
        >>> module(torch.tensor(images[0]).permute(2, 0, 1)[None]).shape
        torch.Size([1, 1280])
        """
        check_is_fitted(self)
        recipe = self._plan.recipe(self._plan.source.load(), torch.float32)
        return ImageModule(recipe.preprocessing, recipe.prefix())

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the column names of the embeddings.

        Parameters
        ----------
        input_features : ignored

        Returns
        -------
        ndarray of str
            Such as `"resnet50_0"`, `"resnet50_layer3_0"`, or `"resnet50_logits_goldfish"` if the
            categories of the weights are known.
        """
        check_is_fitted(self)
        return self._plan.feature_names(self._widths)

    def _adapt(self, backbone: Backbone, views: Views) -> BatchNormState | None:
        if self.batch_norm == "frozen":
            return None
        return adapt_batch_norm(
            backbone,
            views,
            resolve_device(self.device),
            resolve_threads(self.n_jobs),
            ImageErrors(self.on_error),
        )

    def _check_parameters(self) -> None:
        check_choice("batch_norm", self.batch_norm, ["frozen", "adapt"])
        check_choice("on_error", self.on_error, ["raise", "nan"])
        check_choice("pooling", self.pooling, [*POOLINGS, None])
        check_shared_parameters(self)
        layers = self._layers()
        no_names = [layer for layer in layers if not isinstance(layer, str | None)]
        if no_names:  # the error lists the names
            check_layers(no_names, load_backbone(self.backbone, self.weights).block_list)
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(
                f"Got layer={self.layer!r}, but expected None, a name, or a list of different "
                "names that is not empty"
            )
        if not (isinstance(self.batch_size, str) and self.batch_size == "auto"):
            check_number(
                "batch_size", self.batch_size, Integral, 1, MAX_BATCH_SIZE, besides="'auto'"
            )

    def _layers(self) -> tuple[str | None, ...]:
        return tuple(self.layer) if isinstance(self.layer, (list, tuple)) else (self.layer,)

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        text = super().__repr__(N_CHAR_MAX)
        if "engine_" not in vars(self):  # not fitted yet
            return text
        return f"{text} <{self.preprocessing_}, {self.engine_}>"

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def check_extractor(extractor: PretrainedFeatureExtractor) -> Backbone:
    """Check the parameters of an extractor that is not fitted yet, and load its backbone.

    Raises
    ------
    ValueError, TypeError, OSError
        As in `fit`, before any image is read.
    """
    extractor._check_parameters()
    backbone = load_backbone(extractor.backbone, extractor.weights)
    check_layers(extractor._layers(), backbone.block_list)
    return backbone


def embedding_job(extractor: PretrainedFeatureExtractor, n_images: int) -> EmbeddingJob:
    """Build the job of a fitted extractor, whose parts several processes may compute.

    The embedding of an image does not depend on the part that it is in: bit for bit on a CPU, and
    within rounding on other devices.
    """
    return extractor._job(n_images, pad_batches=True)


@dataclass(frozen=True)
class ExtractionPlan:
    """What to compute, as decided in `fit`; without the network, so that pickles stay small."""

    source: BackboneSource
    layers: tuple[str | None, ...]
    pooling: str | None

    def recipe(self, backbone: Backbone, precision: torch.dtype) -> Recipe:
        """Build the recipe for a backbone that `source` loaded."""
        preprocessing = self.source.preprocessing_of(backbone)
        return Recipe(backbone, preprocessing, self.layers, self.pooling, precision)

    def feature_names(self, widths: list[int]) -> np.ndarray:
        """Return the names of the columns; `widths` are the numbers of columns of the layers."""
        backbone = self.source.load()
        names = []
        for layer, width in zip(self.layers, widths, strict=True):
            prefix = backbone.name if layer is None else f"{backbone.name}_{layer}"
            has_categories = layer == "logits" and len(set(backbone.categories)) == width
            labels = backbone.categories if has_categories else range(width)
            names += [f"{prefix}_{label}" for label in labels]
        return np.asarray(names, dtype=object)
