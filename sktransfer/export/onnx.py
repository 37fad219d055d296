"""Export of a fitted model to an ONNX file: `export_onnx`.

Shapes: N images of h x w pixels, H x W after the crop, D features, K classes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline

from sktransfer.data.validation import check_images
from sktransfer.export.onnx_graph import build_graph
from sktransfer.export.onnx_writing import import_onnx
from sktransfer.self_training import SelfTrainedImageClassifier
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import ExportError, check_choice, file_path
from sktransfer.utils.files import complete_file

# Maximum difference between a probability of the graph and of the model, by the type of the weights
# in the file. Embeddings are compared in multiples of their largest value.
_TOLERANCES = {"float32": 1e-3, "float16": 1e-2}
# Sizes of test images (height, width), in multiples of the crop: small, exact, large, long.
_TEST_SIZES = ((0.2, 0.3), (1.0, 1.0), (1.7, 1.3), (0.7, 3.1), (4.6, 1.1), (2.9, 2.3))


@dataclass(frozen=True)
class OnnxExport:
    """An exported model, and how far it is from the original.

    Parameters
    ----------
    path : Path
        The file.
    n_bytes : int
        Its size.
    max_difference : float
        The largest difference of a probability (or, for embeddings, of a value in multiples of the
        largest one) between ONNX Runtime and the model.
    n_images : int
        Images that were compared.
    """

    path: Path
    n_bytes: int
    max_difference: float
    n_images: int

    def __repr__(self) -> str:
        return (
            f"OnnxExport({str(self.path)!r}, {self.n_bytes / 1e6:.1f} MB, largest difference "
            f"{self.max_difference:.1e} on {self.n_images:,} images)"
        )


def export_onnx(
    model: Any,
    path: str | os.PathLike[str],
    *,
    images: Any = None,
    weight_dtype: str = "float32",
) -> OnnxExport:
    """Export a fitted model to a single ONNX file, from image to label.

    The graph resizes, crops and normalizes an image, and runs the network and all other steps.
    Before the file is written, ONNX Runtime runs it, and its results are compared with those of the
    model.

    Parameters
    ----------
    model : fitted estimator
        A `PretrainedFeatureExtractor`, a `FineTunedImageClassifier`, a `SelfTrainedImageClassifier`
        or a scikit-learn `Pipeline` that begins with one of the first two. skl2onnx must know all
        other steps of the pipeline, and its last step must be a classifier with `predict_proba`, or
        a transformer.
    path : path
        Must end in `.onnx`. The file is complete or not written at all.
    images : images in any container that the model takes, default=None
        Images for the comparison. `None` makes 12: noise and smooth colors, of six sizes.
    weight_dtype : {"float32", "float16"}, default="float32"
        How the weights of the network are stored. "float16" halves the size of the file. The graph
        computes in float32 either way, at the same speed.

    Returns
    -------
    OnnxExport
        Its `max_difference` is the result of the comparison.

    Raises
    ------
    NotFittedError
        If the model is not fitted.
    TypeError
        If the model is another one, or `path` is no path.
    ValueError
        If `path` does not end in `.onnx`, if there are no images, or if `weight_dtype` is another
        one.
    ExportError
        If a part of the model cannot be exported, if ONNX Runtime cannot run the graph, if a
        probability differs by more than 0.001 (0.01 with `weight_dtype="float16"`), or if the most
        probable class of an image differs, unless the model's two most probable classes are closer
        than that. A file that was there before is not changed.
    ImportError
        If packages are missing; install them with ``pip install 'sktransfer[onnx]'``.

    Notes
    -----
    The input of the graph is `images`, uint8 RGB of shape (N, height, width, 3), for any N, height
    and width; a single image is a batch of one. The outputs are `probabilities`, float32 (N, K),
    and `label` (N,), with the values of `classes_`; or `embeddings`, float32 (N, D), for an
    extractor or a pipeline without a classifier.

    The file's metadata hold `classes`, `preprocessing` (one entry for each network) and
    `sktransfer_version`, as JSON.

    The parameters `pixel_range` and `background` are not part of the graph: images that are not
    8-bit RGB have to be converted first.

    See Also
    --------
    to_module : The same model as a torch module.

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> from sktransfer import PretrainedFeatureExtractor, export_onnx
    >>> images = load_sample_images().images
    >>> model = make_pipeline(PretrainedFeatureExtractor(), LogisticRegression())
    >>> model = model.fit(images, ["china", "flower"])
    >>> export_onnx(model, "flowers.onnx", images=images)  # doctest: +SKIP
    OnnxExport('flowers.onnx', 13.5 MB, largest difference 2.4e-07 on 2 images)
    """
    path = file_path(path, "export_onnx(model, 'model.onnx')")
    if path.suffix.lower() != ".onnx":
        raise ValueError(f"Got path={str(path)!r}, but expected a file name that ends in '.onnx'")
    check_choice("weight_dtype", weight_dtype, _TOLERANCES)
    for name in ("onnx", "onnxruntime"):
        import_onnx(name)
    content = build_graph(model, weight_dtype).SerializeToString()
    estimator = _image_estimator(model)
    if images is None:
        images = pixels = _test_images(estimator.preprocessing_.crop)
    else:
        views = Views(check_images(estimator, images, reset=False), estimator.preprocessing_)
        pixels = [views.pixels(row)[0] for row in range(len(views))]
    max_difference = _compare(model, images, _run(content, pixels), weight_dtype)
    with complete_file(path) as unfinished:
        unfinished.write_bytes(content)
    return OnnxExport(path, len(content), max_difference, len(pixels))


def _image_estimator(model: Any) -> Any:
    """Return the estimator of a model that takes the images."""
    if isinstance(model, FrozenEstimator):
        return _image_estimator(model.estimator)
    if isinstance(model, Pipeline):
        return _image_estimator(model.steps[0][1])
    if isinstance(model, SelfTrainedImageClassifier):
        return _image_estimator(model.estimators_[0])
    return model


def _test_images(crop: tuple[int, int]) -> list[np.ndarray]:
    """Build images of several sizes, uint8 (h, w, 3): noise and smooth colors."""
    random, images = np.random.RandomState(0), list[np.ndarray]()
    for factors in _TEST_SIZES:
        size = (max(1, round(factors[0] * crop[0])), max(1, round(factors[1] * crop[1])))
        images.append(random.randint(0, 256, (*size, 3)).astype(np.uint8))
        colors = random.randint(0, 256, (4, 5, 3)).astype(np.uint8)
        smooth = Preprocessing(size, size, "bicubic").prepare(colors)
        images.append(np.ascontiguousarray(smooth.permute(1, 2, 0).numpy()))
    return images


def _run(content: bytes, pixels: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Run a graph in ONNX Runtime, image by image; return its outputs by name."""
    onnxruntime = import_onnx("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised anyway
    try:
        session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        rows = [session.run(names, {"images": image[np.newaxis]}) for image in pixels]
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime cannot run the exported graph ({str(error).strip()}), so no file was "
            "written; update onnxruntime, or use to_module"
        ) from error
    return {
        name: np.concatenate(values)
        for name, values in zip(names, zip(*rows, strict=True), strict=True)
    }


def _compare(model: Any, images: Any, outputs: dict[str, np.ndarray], weight_dtype: str) -> float:
    """Return the largest difference between the outputs of a graph and of the model.

    Raises
    ------
    ExportError
        If it is too large.
    """
    if "embeddings" in outputs:
        expected = np.asarray(model.transform(images))
        scale = max(float(np.abs(expected).max()), np.finfo(np.float32).tiny)
        exported = outputs["embeddings"] / scale
        return _checked(exported, expected / scale, weight_dtype, "embeddings", "transform")
    expected = np.asarray(model.predict_proba(images))
    exported = outputs["probabilities"]
    difference = _checked(exported, expected, weight_dtype, "probabilities", "predict_proba")
    classes, labels = model.classes_.tolist(), np.asarray(model.predict(images)).tolist()
    for row, (label, other) in enumerate(zip(labels, outputs["label"].tolist(), strict=True)):
        if other == label:
            continue
        is_close = other in classes and (
            abs(expected[row, classes.index(label)] - expected[row, classes.index(other)])
            <= _TOLERANCES[weight_dtype]
        )
        if not is_close:
            raise ExportError(
                f"Got an ONNX graph that predicts {other!r} for image {row}, but expected "
                f"{label!r}, as predict does; no file was written"
            )
    return difference


def _checked(
    values: np.ndarray, expected: np.ndarray, weight_dtype: str, name: str, method: str
) -> float:
    if values.shape != expected.shape:
        raise ExportError(
            f"Got an ONNX graph with {name} of shape {values.shape}, but expected "
            f"{expected.shape}, as {method} returns; no file was written"
        )
    differences = np.abs(values.astype(np.float64) - expected).max(axis=1)
    row = int(differences.argmax())
    tolerance = _TOLERANCES[weight_dtype]
    if not differences[row] <= tolerance:
        remedy = (
            "On a GPU, set precision='float32' before the export"
            if weight_dtype == "float32"
            else "Export with weight_dtype='float32'"
        )
        raise ExportError(
            f"Got an ONNX graph whose {name} differ by {differences[row]:.2g} from {method} for "
            f"image {row} of {len(differences):,}, but expected at most {tolerance}; no file was "
            f"written. {remedy}"
        )
    return float(differences[row])
