"""Run every image format, container, kind of label, meta-estimator and edge of a parameter.

A broad, shallow check beside the tests: it prints each combination whose outcome is neither right
nor a clear error, and exits with 1 if there is one.

    python tests/sweep.py [formats] [containers] [labels] [meta] [parameters]
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from helpers import Tiny
from PIL import Image
from sklearn import (
    calibration,
    ensemble,
    feature_selection,
    inspection,
    model_selection,
    multiclass,
    multioutput,
    semi_supervised,
)
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_sample_image
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion, make_pipeline

from sktransfer import (
    AugmentationDisplay,
    EmbeddingStore,
    FineTunedImageClassifier,
    ImageError,
    Preprocessing,
    PretrainedFeatureExtractor,
    SelfTrainedImageClassifier,
    estimate_cost,
    find_leaks,
    list_backbones,
    load_image_folder,
    rank_backbones,
    recommend_strategy,
    resolve_augmentation,
)
from sktransfer.data.images import as_images

# A name, and what is wrong with it; None if nothing is.
Outcomes = Iterator[tuple[str, str | None]]

CHINA = load_sample_image("china.jpg")
EXTRACTOR = PretrainedFeatureExtractor(Tiny)


def outcome(action: Callable[[], str | None]) -> str | None:
    """Run an action: return what it finds wrong, or an error that is not clear."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return action()
        except Exception as error:
            return None if is_clear(error) else f"{type(error).__name__}: {str(error)[:150]}"


def is_clear(error: Exception) -> bool:
    """Return whether an error is one of the package, or a known one of scikit-learn."""
    text = str(error)
    known = isinstance(error, ImageError | ValueError | TypeError | OSError)
    return known and (text.startswith(CLEAR) or "requires y to be passed" in text)


CLEAR = (
    "Got ",
    "Image in row",
    "Found array with",
    "Found no class folders",
    "Found input variables",
    "Expected 2D array",
    "Input y contains",
    "The 'sample_weight' parameter of",
    "This solver needs samples of at least 2 classes",
    "Unknown label type",
    "y should be a 1d array",
)


# Formats


def formats() -> Outcomes:
    """Save an image in every mode and format of Pillow, and compare the pixels that are read."""
    Image.init()
    rgb = Image.fromarray(CHINA[100:148, 100:164])
    modes = [*"1LPFI", "LA", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "LAB"]
    modes += ["HSV", "I;16", "I;16B"]
    with tempfile.TemporaryDirectory() as folder:
        for mode, file_format in itertools.product(modes, sorted(Image.SAVE)):
            image = in_mode(rgb, mode)
            path = Path(folder, f"{mode.replace(';', '')}.{file_format.lower()}")
            try:
                image.save(path, file_format)
                with Image.open(path) as saved:
                    saved.load()
                    expected = rendered(saved)
            except Exception:  # Pillow does not write or read this mode in this format
                continue
            yield f"{mode} as {file_format}", outcome(lambda: differ(path, expected))  # noqa: B023


def in_mode(rgb: Image.Image, mode: str) -> Image.Image:
    if mode in ("LA", "PA", "RGBA", "RGBa", "La"):
        rgba = rgb.convert("RGBA")
        rgba.putalpha(Image.linear_gradient("L").resize(rgb.size))
        straight = {"RGBa": "RGBA", "La": "LA"}.get(mode, mode)
        return rgba.convert(straight).convert(mode)
    if mode.startswith("I;16"):
        wide = (np.asarray(rgb.convert("L")).astype(np.uint16) * 257).astype(
            ">u2" if mode.endswith("B") else "<u2"
        )
        return Image.frombytes(mode, rgb.size, wide.tobytes())
    if mode == "F":
        return Image.fromarray(np.asarray(rgb.convert("L")).astype(np.float32) / 255)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(rgb, *profiles, outputMode="LAB")
    return rgb.convert(mode)


def rendered(image: Image.Image) -> np.ndarray:
    """Render an image in numpy: composited on white, wide gray scaled to 0-255."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(float)
        limit = next(limit for limit in (1, 16, 255, 65535) if values.max() <= limit)
        if image.mode.startswith("I"):
            limit = max(limit, 255) if image.mode == "I" else 65535
        return np.repeat(np.rint(values / limit * 255)[..., None], 3, axis=2)
    if image.mode == "La":
        image = image.convert("LA")
    rgba = np.asarray(image.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def differ(path: Path, expected: np.ndarray) -> str | None:
    pixels = as_images([path])[0].astype(float)
    if pixels.shape != expected.shape:
        return f"shape {pixels.shape} instead of {expected.shape}"
    difference = np.abs(pixels - expected).max()
    return None if difference <= 1.5 else f"pixels differ by up to {difference:.0f}"


# Containers


def containers() -> Outcomes:
    """Embed the same images in every container."""
    images = [np.ascontiguousarray(CHINA[y : y + 40, y : y + 40]) for y in (0, 90, 180, 270)]
    extractor = PretrainedFeatureExtractor(Tiny, cache=None)
    expected = extractor.fit_transform(images)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [str(folder / f"{number}.png") for number in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            Image.fromarray(image).save(path)
        for container, build in container_table(images, paths).items():
            yield container, outcome(lambda: compare(extractor, build(), expected))  # noqa: B023


def compare(extractor: Any, X: Any, expected: np.ndarray) -> str | None:
    embeddings = clone(extractor).fit_transform(X)
    if embeddings.shape != expected.shape:
        return f"shape {embeddings.shape}"
    error = float(np.abs(embeddings - expected).max())
    return None if error < 1e-4 else f"embeddings differ by up to {error:.2g}"


def container_table(images: list[np.ndarray], paths: list[str]) -> dict[str, Callable[[], Any]]:
    stack = np.stack(images)
    encoded = [Path(path).read_bytes() for path in paths]
    table: dict[str, Callable[[], Any]] = {
        "list of paths": lambda: paths,
        "tuple of paths": lambda: tuple(paths),
        "list of Path": lambda: [Path(path) for path in paths],
        "list of bytes paths": lambda: [path.encode() for path in paths],
        "array of paths": lambda: np.array(paths),
        "object array of paths": lambda: np.array(paths, dtype=object),
        "column vector of paths": lambda: np.array(paths)[:, None],
        "Series": lambda: pd.Series(paths),
        "string Series": lambda: pd.Series(paths, dtype="string"),
        "categorical Series": lambda: pd.Series(paths, dtype="category"),
        "Series with another index": lambda: pd.Series(paths, index=[7, 3, 5, 1]),
        "Index": lambda: pd.Index(paths),
        "DataFrame of one column": lambda: pd.DataFrame({"file": paths}),
        "DataFrame of two columns": lambda: pd.DataFrame({"file": paths, "label": paths}),
        "Series of arrays": lambda: pd.Series(images),
        "Series of bytes": lambda: pd.Series(encoded),
        "list of arrays": lambda: images,
        "stack": lambda: stack,
        "stack, channels first": lambda: stack.transpose(0, 3, 1, 2),
        "stack of floats": lambda: stack / 255,
        "stack of float16": lambda: (stack / 255).astype(np.float16).astype(np.float64),
        "stack of int64": lambda: stack.astype(np.int64),
        "stack, Fortran order": lambda: np.asfortranarray(stack),
        "stack, not writable": lambda: read_only(stack),
        "object array of arrays": lambda: object_array(images),
        "masked array": lambda: np.ma.masked_array(stack),
        "tensor": lambda: torch.from_numpy(stack).permute(0, 3, 1, 2),
        "tensor that needs a gradient": lambda: (
            torch.from_numpy(stack).permute(0, 3, 1, 2) / 255
        ).requires_grad_(),
        "list of tensors": lambda: list(torch.from_numpy(stack).permute(0, 3, 1, 2)),
        "TensorDataset": lambda: torch.utils.data.TensorDataset(
            torch.from_numpy(stack).permute(0, 3, 1, 2)
        ),
        "Subset": lambda: torch.utils.data.Subset(
            list(zip(images, range(4), strict=True)), range(4)
        ),
        "PIL images": lambda: [Image.fromarray(image) for image in images],
        "bytes": lambda: encoded,
        "bytearrays": lambda: [bytearray(data) for data in encoded],
        "memoryviews": lambda: [memoryview(data) for data in encoded],
        "buffers of an encoder": lambda: [np.frombuffer(data, np.uint8) for data in encoded],
        "open files": lambda: [open(path, "rb") for path in paths],  # noqa: SIM115
        "dicts of bytes": lambda: [{"bytes": data, "path": None} for data in encoded],
        "dicts of paths": lambda: [{"bytes": None, "path": path} for path in paths],
        "image and label": lambda: [(image, 0) for image in images],
        "mixture": lambda: [paths[0], images[1], encoded[2], Image.fromarray(images[3])],
        "generator": lambda: (path for path in paths),
        "set": lambda: set(paths),
        "dict": lambda: dict(enumerate(paths)),
        "dict values": lambda: dict(enumerate(paths)).values(),
        "DataLoader": lambda: torch.utils.data.DataLoader(images),
        "a path": lambda: paths[0],
        "an image": lambda: images[0],
        "None": lambda: None,
        "empty list": list,
        "URLs": lambda: in_memory(paths),
        "URLs of files": lambda: [f"file://{path}" for path in paths],
        "a missing URL": lambda: [*in_memory(paths[:3]), "memory://nowhere.png"],
        "a missing file": lambda: [*paths[:3], "nowhere.png"],
    }
    optional = {
        "polars": polars_containers,
        "pyarrow": pyarrow_containers,
        "zarr": zarr_containers,
        "h5py": h5py_containers,
        "dask": dask_containers,
        "datasets": huggingface_containers,
        "xarray": xarray_containers,
    }
    for library, build in optional.items():
        try:
            module = __import__(library)
        except ImportError:
            print(f"  {library} is not installed, so its containers are left out")
            continue
        table |= build(module, stack, paths)
    return table


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def in_memory(paths: list[str]) -> list[str]:
    """Copy files to fsspec's filesystem in memory; return their URLs."""
    import fsspec

    for path in paths:
        fsspec.filesystem("memory").pipe_file(path, Path(path).read_bytes())
    return [f"memory://{path}" for path in paths]


def object_array(items: list[Any]) -> np.ndarray:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def polars_containers(polars: Any, stack: np.ndarray, paths: list[str]) -> dict[str, Any]:
    return {
        "polars Series": lambda: polars.Series(paths),
        "polars DataFrame": lambda: polars.DataFrame({"file": paths}),
        "polars Categorical": lambda: polars.Series(paths, dtype=polars.Categorical),
        "polars LazyFrame": lambda: polars.LazyFrame({"file": paths}),
    }


def pyarrow_containers(pyarrow: Any, stack: np.ndarray, paths: list[str]) -> dict[str, Any]:
    encoded = [Path(path).read_bytes() for path in paths]
    return {
        "pyarrow Array": lambda: pyarrow.array(paths),
        "pyarrow ChunkedArray": lambda: pyarrow.chunked_array([paths[:1], paths[1:]]),
        "pyarrow binary": lambda: pyarrow.array(encoded),
        "pyarrow struct": lambda: pyarrow.array([{"bytes": data, "path": ""} for data in encoded]),
        "pyarrow Table": lambda: pyarrow.table({"file": paths}),
    }


def zarr_containers(zarr: Any, stack: np.ndarray, paths: list[str]) -> dict[str, Any]:
    return {"zarr": lambda: zarr.array(stack, chunks=(1, *stack.shape[1:]))}


def h5py_containers(h5py: Any, stack: np.ndarray, paths: list[str]) -> dict[str, Any]:
    file = h5py.File("memory.h5", "w", driver="core", backing_store=False)
    file["images"], file["paths"] = stack, [path.encode() for path in paths]
    return {"h5py images": lambda: file["images"], "h5py paths": lambda: file["paths"]}


def dask_containers(dask: Any, stack: np.ndarray, paths: list[str]) -> dict[str, Any]:
    from dask import array

    return {"dask array": lambda: array.from_array(stack, chunks=1)}


def huggingface_containers(datasets: Any, stack: np.ndarray, paths: list[str]) -> dict[str, Any]:
    features = datasets.Features({"image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": paths}, features=features)
    return {"Dataset": lambda: dataset, "Dataset column": lambda: dataset["image"]}


def xarray_containers(xarray: Any, stack: np.ndarray, paths: list[str]) -> dict[str, Any]:
    return {"xarray DataArray": lambda: xarray.DataArray(stack)}


# Labels


def labels() -> Outcomes:
    """Pass every kind of labels to every function that takes labels."""
    images = np.random.RandomState(0).randint(0, 256, (12, 20, 20, 3)).astype(np.uint8)
    names, numbers = ["cat", "dog", "cat"] * 4, [0, 1, 0] * 4
    kinds: dict[str, Any] = {
        "strings": names,
        "object array": np.array(names, dtype=object),
        "string array": np.array(names),
        "integers": numbers,
        "int8": np.array(numbers, dtype=np.int8),
        "negative integers": [-1, 5, -1] * 4,
        "booleans": [True, False, True] * 4,
        "whole floats": [1.0, 2.0, 1.0] * 4,
        "fractions": [0.5, 1.25, 0.75] * 4,
        "Series": pd.Series(names),
        "categorical": pd.Series(names, dtype="category"),
        "categorical with an unused category": pd.Series(
            pd.Categorical(names, categories=["cat", "dog", "owl"])
        ),
        "nullable integers": pd.Series(numbers, dtype="Int64"),
        "pandas strings": pd.Series(names, dtype="string"),
        "column vector": np.array(names)[:, None],
        "DataFrame": pd.DataFrame({"label": names}),
        "tensor": torch.tensor(numbers),
        "empty string": ["", "dog", ""] * 4,
        "one class": ["cat"] * 12,
        "None among strings": [None, "dog", "cat"] * 4,
        "NaN among strings": [float("nan"), "dog", "cat"] * 4,
        "NaN among floats": [float("nan"), 1.0, 2.0] * 4,
        "NA in nullable integers": pd.Series([pd.NA, 1, 2] * 4, dtype="Int64"),
        "NA in strings": pd.Series([pd.NA, "dog", "cat"] * 4, dtype="string"),
        "NaT": [pd.NaT, "dog", "cat"] * 4,
        "missing category": pd.Series([None, "dog", "cat"] * 4, dtype="category"),
        "masked array": np.ma.masked_array([0, 1, 2] * 4, mask=[True, False, False] * 4),
        "mixed types": [1, "dog", "cat"] * 4,
        "several columns": np.zeros((12, 2), dtype=int),
        "too few": names[:11],
        "too many": [*names, "cat"],
        "None": None,
    }
    takers = {
        "FineTunedImageClassifier": fit_labels,
        "SelfTrainedImageClassifier": lambda X, y: discard(
            SelfTrainedImageClassifier(LogisticRegression()).fit(
                X.reshape(12, -1), y, sample_domain=[1] * 6 + [-1] * 6
            )
        ),
        "rank_backbones": lambda X, y: discard(rank_backbones(X, y, [EXTRACTOR])),
        "recommend_strategy": lambda X, y: discard(recommend_strategy(X, y, extractor=EXTRACTOR)),
        "find_leaks": lambda X, y: discard(find_leaks(X, y, extractor=EXTRACTOR)),
    }
    for (kind, y), (name, run) in itertools.product(kinds.items(), takers.items()):
        yield f"{kind}, {name}", outcome(lambda: run(images, y))  # noqa: B023


def fit_labels(images: np.ndarray, y: Any) -> str | None:
    """Fit a classifier; no class is a missing value, and predictions are classes."""
    classifier = FineTunedImageClassifier(
        Tiny, unfreeze=(0,), augment=None, cache=None, random_state=0
    ).fit(images, y)
    classes = classifier.classes_.tolist()
    if any(value is None or value != value or str(value) in ("nan", "<NA>") for value in classes):
        return f"classes_ is {classes}"
    predicted = classifier.predict(images)
    return None if set(predicted.tolist()) <= set(classes) else f"predicts {set(predicted)}"


# Meta-estimators


def meta() -> Outcomes:
    """Run scikit-learn's meta-estimators on paths, as lists, arrays, Series and flattened rows."""
    random = np.random.RandomState(0)
    images = random.randint(0, 200, (24, 16, 16, 3)).astype(np.uint8)
    y = np.arange(24) % 2
    images[y == 1, :, :, 0] += 55
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, f"{number}.png")) for number in range(24)]
        for path, image in zip(paths, images, strict=True):
            Image.fromarray(image).save(path)
        forms = {
            "list of paths": (paths, {}),
            "array of paths": (np.array(paths), {}),
            "Series": (pd.Series(paths), {}),
            "DataFrame": (pd.DataFrame({"file": paths}), {}),
            "flattened rows": (images.reshape(24, -1), {"image_shape": (16, 16, 3)}),
        }
        for (name, run), (form, (X, options)) in itertools.product(META.items(), forms.items()):
            extractor = PretrainedFeatureExtractor(Tiny, **options)
            model = make_pipeline(extractor, LogisticRegression(max_iter=2000))
            problem = outcome(lambda: run(model, X, y))  # noqa: B023
            is_documented = form in REFUSED.get(name, ())
            yield f"{name}, {form}", None if problem and is_documented else problem


def score(estimator: Any, X: Any, y: Any) -> str | None:
    accuracy = estimator.fit(X, y).score(X, y)
    return None if accuracy > 0.7 else f"training accuracy {accuracy:.2f}"


# Forms that a meta-estimator refuses: docs/recipes.md, "Which form of X for which meta-estimator".
REFUSED = {
    "BaggingClassifier": ("list of paths", "array of paths", "Series"),
    "OneVsOneClassifier": ("list of paths", "array of paths", "Series", "DataFrame"),
    "SelfTrainingClassifier": ("list of paths", "array of paths", "Series", "DataFrame"),
    "permutation_importance": ("list of paths", "array of paths", "Series"),
}

META: dict[str, Callable[[Any, Any, Any], str | None]] = {
    "Pipeline": score,
    "cross_val_score": lambda m, X, y: discard(model_selection.cross_val_score(m, X, y, cv=3)),
    "cross_val_predict": lambda m, X, y: discard(model_selection.cross_val_predict(m, X, y, cv=3)),
    "learning_curve": lambda m, X, y: discard(model_selection.learning_curve(m, X, y, cv=3)),
    "permutation_test_score": lambda m, X, y: discard(
        model_selection.permutation_test_score(m, X, y, cv=3, n_permutations=3)
    ),
    "GridSearchCV": lambda m, X, y: score(
        model_selection.GridSearchCV(m, {"logisticregression__C": [0.1, 1]}, cv=3), X, y
    ),
    "RandomizedSearchCV": lambda m, X, y: score(
        model_selection.RandomizedSearchCV(m, {"logisticregression__C": [0.1, 1]}, n_iter=2, cv=3),
        X,
        y,
    ),
    "HalvingGridSearchCV": lambda m, X, y: score(
        model_selection.HalvingGridSearchCV(m, {"logisticregression__C": [0.1, 1]}, cv=2), X, y
    ),
    "CalibratedClassifierCV": lambda m, X, y: score(
        calibration.CalibratedClassifierCV(m, cv=3), X, y
    ),
    "TunedThresholdClassifierCV": lambda m, X, y: score(
        model_selection.TunedThresholdClassifierCV(m, cv=3), X, y
    ),
    "VotingClassifier": lambda m, X, y: score(
        ensemble.VotingClassifier([("a", m), ("b", clone(m))], voting="soft"), X, y
    ),
    "StackingClassifier": lambda m, X, y: score(
        ensemble.StackingClassifier([("a", m), ("b", clone(m))], cv=3), X, y
    ),
    "BaggingClassifier": lambda m, X, y: score(ensemble.BaggingClassifier(m, 3), X, y),
    "AdaBoostClassifier": lambda m, X, y: score(
        make_pipeline(m[0], ensemble.AdaBoostClassifier(LogisticRegression(), n_estimators=3)), X, y
    ),
    "OneVsRestClassifier": lambda m, X, y: score(multiclass.OneVsRestClassifier(m), X, y),
    "OneVsOneClassifier": lambda m, X, y: score(multiclass.OneVsOneClassifier(m), X, y),
    "MultiOutputClassifier": lambda m, X, y: discard(
        multioutput.MultiOutputClassifier(m).fit(X, np.c_[y, 1 - y]).predict(X)
    ),
    "SelfTrainingClassifier": lambda m, X, y: score(
        semi_supervised.SelfTrainingClassifier(m), X, y
    ),
    "SequentialFeatureSelector": lambda m, X, y: score(
        make_pipeline(
            m[0],
            feature_selection.SequentialFeatureSelector(m[1], n_features_to_select=2, cv=2),
            m[1],
        ),
        X,
        y,
    ),
    "permutation_importance": lambda m, X, y: discard(
        inspection.permutation_importance(m.fit(X, y), X, y, n_repeats=2)
    ),
    "FeatureUnion": lambda m, X, y: score(
        make_pipeline(FeatureUnion([("a", m[0]), ("b", clone(m[0]))]), m[1]), X, y
    ),
    "ColumnTransformer": lambda m, X, y: (
        score(make_pipeline(make_column_transformer((m[0], ["file"])), m[1]), X, y)
        if isinstance(X, pd.DataFrame)
        else None
    ),
    "FrozenEstimator": lambda m, X, y: score(
        make_pipeline(FrozenEstimator(clone(m[0]).fit(X)), m[1]), X, y
    ),
}


def discard(result: Any) -> None:
    """Take any result for a right one."""


# Parameters


EDGES: list[Any] = [
    0,
    -1,
    1,
    2,
    10**9,
    10**30,
    0.0,
    0.5,
    1.0,
    -0.5,
    1e-300,
    1e300,
    float("inf"),
    float("nan"),
    True,
    False,
    None,
    "",
    "auto",
    "none",
    "all",
    "no such value",
    [],
    (),
    {},
    [0],
    (1, 2),
    (0, 5),
    [None],
    np.int64(1),
    np.float32(0.5),
    object(),
]
# Values that are slow or large rather than wrong.
SLOW = {("max_epochs", 10**9), ("max_epochs", 10**30), ("n_views", 10**9), ("n_views", 10**30)}


def parameters() -> Outcomes:
    """Set every parameter to values at its edges: it works, or there is a clear error."""
    images = np.random.RandomState(0).randint(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    y = np.arange(8) % 2
    extractor = PretrainedFeatureExtractor(Tiny, cache=None)
    classifier = FineTunedImageClassifier(
        Tiny, unfreeze=(0, 1), augment="light", n_views=1, max_epochs=1, cache=None, random_state=0
    )
    for estimator in (extractor, classifier):
        names = [name for name in estimator.get_params(deep=False) if name != "verbose"]
        for name, value in itertools.product(names, EDGES):
            if (name, value if isinstance(value, int | float) else None) in SLOW:
                continue
            label = f"{type(estimator).__name__}({name}={value!r})"
            yield label, outcome(lambda: fits(estimator, name, value, images, y))  # noqa: B023
    for function, (call, names) in functions(images, y, extractor, classifier).items():
        for name, value in itertools.product(names, EDGES):
            if (name, value if isinstance(value, int | float) else None) in SLOW:
                continue
            yield (
                f"{function}({name}={value!r})",
                outcome(lambda: discard(call(**{name: value}))),  # noqa: B023
            )


def functions(
    images: np.ndarray, y: np.ndarray, extractor: Any, classifier: Any
) -> dict[str, tuple[Callable[..., Any], list[str]]]:
    """Return each function and the names of its optional parameters."""
    folder = Path("images")
    for number, label in enumerate("abab"):
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).save(folder / label / f"{number}.png")
    domain = np.array([1, 1, 1, 1, -1, -1, -1, -1])
    self_trained = SelfTrainedImageClassifier(LogisticRegression())
    numbers = images.reshape(8, -1)[:, :4].astype(float)
    fitted = clone(classifier).fit(images, y)
    defaults: dict[str, Any] = {"extractor": extractor}
    calls: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "find_leaks": (find_leaks, lambda **o: find_leaks(images, **{"y": y, **defaults, **o})),
        "rank_backbones": (
            rank_backbones,
            lambda **o: rank_backbones(images, **{"y": y, "backbones": [extractor], **o}),
        ),
        "recommend_strategy": (
            recommend_strategy,
            lambda **o: recommend_strategy(images, **{"y": y, **defaults, **o}),
        ),
        "estimate_cost": (
            estimate_cost,
            lambda **o: estimate_cost(**{"estimator": classifier, "X": images, "y": y, **o}),
        ),
        "AugmentationDisplay.from_images": (
            AugmentationDisplay.from_images,
            lambda **o: AugmentationDisplay.from_images(images[:2], **{"backbone": Tiny, **o}),
        ),
        "AugmentationDisplay.plot": (
            AugmentationDisplay.plot,
            AugmentationDisplay.from_images(images[:2], backbone=Tiny).plot,
        ),
        "load_image_folder": (
            load_image_folder,
            lambda **o: load_image_folder(**{"root": folder, **o}),
        ),
        "list_backbones": (list_backbones, list_backbones),
        "resolve_augmentation": (resolve_augmentation, resolve_augmentation),
        "EmbeddingStore": (
            EmbeddingStore,
            lambda **o: EmbeddingStore(**{"directory": "store", **o}),
        ),
        "Preprocessing": (Preprocessing, Preprocessing),
        "SelfTrainedImageClassifier": (
            SelfTrainedImageClassifier,
            lambda **o: clone(self_trained).set_params(**o).fit(numbers, y, sample_domain=domain),
        ),
        "SelfTrainedImageClassifier.fit": (
            SelfTrainedImageClassifier.fit,
            lambda **o: clone(self_trained).fit(numbers, **{"y": y, "sample_domain": domain, **o}),
        ),
        "FineTunedImageClassifier.fit": (
            FineTunedImageClassifier.fit,
            lambda **o: clone(classifier).fit(images, **{"y": y, **o}),
        ),
        "FineTunedImageClassifier.score": (
            FineTunedImageClassifier.score,
            lambda **o: fitted.score(images, **{"y": y, **o}),
        ),
        "FineTunedImageClassifier.save_weights": (
            FineTunedImageClassifier.save_weights,
            fitted.save_weights,
        ),
    }
    return {
        name: (
            call,
            [each for each in inspect.signature(function).parameters if each not in ("self", "X")],
        )
        for name, (function, call) in calls.items()
    }


def fits(estimator: Any, name: str, value: Any, images: np.ndarray, y: np.ndarray) -> str | None:
    fitted = clone(estimator).set_params(**{name: value}).fit(images, y)
    result = fitted.transform(images)
    return None if np.isfinite(result).all() else "embeddings that are not finite"


SECTIONS = {
    section.__name__: section for section in (formats, containers, labels, meta, parameters)
}


def main() -> int:
    names = sys.argv[1:] or [*SECTIONS]
    unknown = set(names) - set(SECTIONS)
    if unknown:
        print(f"Got {', '.join(sorted(unknown))}, but expected some of {', '.join(SECTIONS)}")
        return 2
    n_wrong = 0
    for name in names:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            outcomes = list(SECTIONS[name]())
        wrong = [(label, problem) for label, problem in outcomes if problem]
        print(f"{name}: {len(outcomes)} tried, {len(wrong)} wrong")
        for label, problem in wrong:
            print(f"  {label}: {problem}")
        n_wrong += len(wrong)
    return int(n_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
