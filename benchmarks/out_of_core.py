"""Learn linear classifiers from embeddings in a file, without reading the file into memory.

Three sets of rows, each in a .npy file of float32; the last 10,000 rows are for testing:

clothes  60,000 images of clothes, embedded by EfficientNet-Lite0 at 32 x 32: 1,280 features
million  1,000,000 synthetic rows of 128 features: class centers and correlated noise
many     10,000,000 rows of the same kind

The variants, each in a fresh process:

memory        LogisticRegression on an array in memory
mapped        LogisticRegression on a memory map of scaled rows
sample_N      LogisticRegression on a sample of N rows
pca           IncrementalPCA to a smaller memory map, and LogisticRegression on it in memory
blocks        MLPClassifier without hidden layers, by partial_fit on blocks of rows
parquet       the same from a Parquet file
sgd           SGDClassifier, by partial_fit on blocks of rows
sgd_averaged  the same with a constant learning rate and averaged weights

Features are scaled to unit variance; for `blocks` and `parquet` they are divided by one number.

Seconds and memory are those of learning, the scaling included. Memory is the peak of RssAnon in
/proc/self/status (Linux), minus its value before: pages of mapped files do not count, since the
system drops them if other programs need memory. The files are dropped from the page cache first.

The run fails if `blocks` is more than 0.01 less accurate than LogisticRegression on all rows, or if
it needs more than 300 MB.

    python benchmarks/out_of_core.py [--rows 1000000,10000000] [--clothes 70000] [--folder PATH]
        [--threads 2] [--json PATH]
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
from _common import PeakMemory, command_line, finish, in_fresh_process, make_classifier
from _sets import all_clothes
from sklearn.decomposition import IncrementalPCA
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor

ROWS, N_CLOTHES = "1000000,10000000", 70_000
N_FEATURES, N_CLASSES, N_TESTED = 128, 10, 10_000
# Rows that are read at once; the rows of the files are in random order.
BLOCK = 4096
N_COMPONENTS = 256
MAX_MB, MAX_LOST = 300, 0.01

# The variants of a set and the number of epochs of those that learn from blocks.
CLOTHES_SAMPLES = ["sample_1000", "sample_3000", "sample_10000", "sample_30000"]
SAMPLES = ["sample_10000", "sample_100000"]
SETS = {
    "clothes": (["memory", *CLOTHES_SAMPLES, "pca", "blocks", "sgd", "sgd_averaged"], 5),
    "million": (["memory", "mapped", *SAMPLES, "blocks", "parquet", "sgd"], 2),
    "many": (["blocks", "sgd"], 1),
}

Blocks = Iterator[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Rows:
    """The training rows of a set.

    Parameters
    ----------
    X : memmap of float32, shape (N, D)
    y : memmap of uint8, shape (N,)
    folder : Path
        For further files.
    epochs : int
    """

    X: np.ndarray
    y: np.ndarray
    folder: Path
    epochs: int

    def blocks(self, random: np.random.Generator | None = None) -> Blocks:
        """Yield the blocks of rows in random order, or in that of the file."""
        starts = np.arange(0, len(self.X), BLOCK)
        if random is not None:
            random.shuffle(starts)
        for start in starts:
            rows = slice(start, start + BLOCK)
            yield np.array(self.X[rows]), np.array(self.y[rows])

    def write(self, name: str, width: int, transform: Callable[[np.ndarray], Any]) -> np.ndarray:
        """Transform the rows block by block into another memory map."""
        path, shape = self.folder / name, (len(self.X), width)
        out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        end = 0
        for block, _ in self.blocks():
            start, end = end, end + len(block)
            out[start:end] = transform(block)
        return out


def fit_scaler(blocks: Blocks, *, one_number: bool = False) -> StandardScaler:
    """Fit a scaler from blocks, which divides by each feature's deviation, or by their mean."""
    scaler = StandardScaler()
    for block, _ in blocks:
        scaler.partial_fit(block)
    if one_number:
        scaler.scale_[:] = np.sqrt(scaler.var_).mean()
    return scaler


def logistic_regression() -> LogisticRegression:
    return make_classifier()[-1]


def learn_in_memory(data: Rows) -> Pipeline:
    scaler = fit_scaler(data.blocks())
    X, y = np.array(data.X), np.array(data.y)
    X -= scaler.mean_.astype(np.float32)
    X /= scaler.scale_.astype(np.float32)
    return make_pipeline(scaler, logistic_regression().fit(X, y))


def learn_from_map(data: Rows) -> Pipeline:
    scaler = fit_scaler(data.blocks())
    scaled = data.write("scaled.npy", data.X.shape[1], scaler.transform)
    return make_pipeline(scaler, logistic_regression().fit(scaled, data.y))


def learn_from_sample(data: Rows, count: int) -> Pipeline:
    rows = np.random.default_rng(0).choice(len(data.X), min(count, len(data.X)), replace=False)
    rows.sort()  # rows next to each other are read together
    X, y = np.asarray(data.X[rows]), np.asarray(data.y[rows])
    scaler = fit_scaler(iter([(X, y)]))
    return make_pipeline(scaler, logistic_regression().fit(scaler.transform(X), y))


def learn_components(data: Rows) -> Pipeline:
    pca = IncrementalPCA(N_COMPONENTS, whiten=True)
    for block, _ in data.blocks(np.random.default_rng(0)):
        if len(block) >= N_COMPONENTS:
            pca.partial_fit(block)
    small = np.array(data.write("small.npy", N_COMPONENTS, pca.transform))
    return make_pipeline(pca, logistic_regression().fit(small, data.y))


def learn_from_blocks(data: Rows) -> Pipeline:
    scaler, random = fit_scaler(data.blocks(), one_number=True), np.random.default_rng(0)
    blocks = (block for _ in range(data.epochs) for block in data.blocks(random))
    return partial_fit(scaler, MLPClassifier((), random_state=0), blocks)


def learn_by_sgd(data: Rows, *, averaged: bool = False) -> Pipeline:
    scaler, random = fit_scaler(data.blocks()), np.random.default_rng(0)
    settings: dict[str, Any] = {}
    if averaged:
        # The rate is 1 / mean squared length of the scaled rows.
        rate = 1 / np.count_nonzero(scaler.var_)
        settings = {"average": True, "learning_rate": "constant", "eta0": rate}
        settings["alpha"] = 1 / len(data.X)
    model = SGDClassifier(loss="log_loss", random_state=np.random.RandomState(0), **settings)
    blocks = (block for _ in range(data.epochs) for block in data.blocks(random))
    return partial_fit(scaler, model, blocks)


def partial_fit(scaler: StandardScaler, model: Any, blocks: Blocks) -> Pipeline:
    for block, labels in blocks:
        model.partial_fit(scaler.transform(block), labels, classes=np.arange(N_CLASSES))
    return make_pipeline(scaler, model)


def write_parquet(data: Rows) -> None:
    """Write the rows to a file with a row group for each block."""
    width = data.X.shape[1]
    kinds = pa.schema([("embedding", pa.list_(pa.float32())), ("label", pa.uint8())])
    options = {"compression": "none", "use_dictionary": False}
    with pa.parquet.ParquetWriter(data.folder / "rows.parquet", kinds, **options) as file:
        for block, labels in data.blocks():
            offsets = np.arange(0, block.size + 1, width, dtype=np.int32)
            column = pa.ListArray.from_arrays(offsets, block.ravel())
            file.write_table(pa.table([column, labels], schema=kinds))


def read_parquet(path: Path, random: np.random.Generator | None = None) -> Blocks:
    """Yield the row groups in random order, or in that of the file."""
    (fragment,) = pa.dataset.dataset(path).get_fragments()
    groups = fragment.split_by_row_group()
    if random is not None:
        random.shuffle(groups)
    for group in groups:
        table = group.to_table()
        embedding = table["embedding"].combine_chunks()
        yield embedding.flatten().to_numpy().reshape(len(table), -1), table["label"].to_numpy()


def learn_from_parquet(data: Rows) -> Pipeline:
    path, random = data.folder / "rows.parquet", np.random.default_rng(0)
    scaler = fit_scaler(read_parquet(path), one_number=True)
    blocks = (block for _ in range(data.epochs) for block in read_parquet(path, random))
    return partial_fit(scaler, MLPClassifier((), random_state=0), blocks)


LEARN: dict[str, Callable[[Rows], Pipeline]] = {
    "memory": learn_in_memory,
    "mapped": learn_from_map,
    "pca": learn_components,
    "blocks": learn_from_blocks,
    "parquet": learn_from_parquet,
    "sgd": learn_by_sgd,
    "sgd_averaged": lambda data: learn_by_sgd(data, averaged=True),
}


def measure(variant: str, folder: Path, epochs: int) -> dict[str, Any]:
    """Learn from the files in a folder, and measure the classifier on the last rows."""
    X, y = (np.load(folder / name, mmap_mode="r") for name in ("X.npy", "y.npy"))
    data = Rows(X[:-N_TESTED], y[:-N_TESTED], folder, epochs)
    learn = LEARN.get(variant) or partial(learn_from_sample, count=int(variant.split("_")[1]))
    if variant == "parquet":
        write_parquet(data)
    for path in folder.iterdir():
        drop_from_cache(path)
    before = anonymous_bytes()
    start = time.perf_counter()
    with PeakMemory() as memory:
        model = learn(data)
    seconds = time.perf_counter() - start
    probabilities = model.predict_proba(X[-N_TESTED:])
    accuracy = np.mean(probabilities.argmax(axis=1) == y[-N_TESTED:])
    return {
        "seconds": round(seconds, 1),
        "peak_mb": round((memory.bytes - before) / 1e6),
        "accuracy": round(float(accuracy), 4),
        "log_loss": round(float(log_loss(y[-N_TESTED:], probabilities)), 3),
    }


def anonymous_bytes() -> int:
    with PeakMemory() as memory:
        pass
    return memory.bytes


def drop_from_cache(path: Path) -> None:
    """Write a file to the disk, and drop it from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_clothes(folder: Path, count: int) -> None:
    """Embed the last images of clothes."""
    images, y = all_clothes()
    extractor = PretrainedFeatureExtractor(image_size=32, cache=None)
    np.save(folder / "X.npy", extractor.fit_transform(images[-count:]))
    np.save(folder / "y.npy", y[-count:])


def make_rows(folder: Path, count: int) -> None:
    """Draw class centers and noise, which are smaller in each further direction."""
    random = np.random.default_rng(0)
    directions = np.linalg.qr(random.standard_normal((N_FEATURES, N_FEATURES)))[0]
    spread = np.arange(1, N_FEATURES + 1) ** -0.5
    mixing = (spread[:, None] * directions).astype(np.float32)
    centers = random.standard_normal((N_CLASSES, N_FEATURES)) / 4
    y = random.integers(0, N_CLASSES, count, dtype=np.uint8)
    np.save(folder / "y.npy", y)
    shape = (count, N_FEATURES)
    X = np.lib.format.open_memmap(folder / "X.npy", mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, count, BLOCK):
        rows = slice(start, start + BLOCK)
        noise = random.standard_normal((len(y[rows]), N_FEATURES), dtype=np.float32)
        X[rows] = (noise + centers.astype(np.float32)[y[rows]]) @ mixing


def check_disk(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Exit if the files of a set do not fit: a full disk kills a process that has mapped a file."""
    # `mapped` and `parquet` write the rows once more each; `many` has only one copy.
    needed = max(
        4 * n_rows * width * (1 if name == "many" else 3) for name, (n_rows, width) in sizes.items()
    )
    needed += needed // 10
    if (free := shutil.disk_usage(folder).free) < needed:
        raise SystemExit(
            f"Got {free / 1e9:.1f} GB of free disk space in {folder}, but the files take up to "
            f"{needed / 1e9:.1f} GB. Choose another --folder, or fewer --rows"
        )


def run_set(name: str, n_rows: int, width: int, options: Any) -> dict[str, Any]:
    """Make the rows of a set, and run its variants."""
    variants, epochs = SETS[name]
    figures = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:

        def fresh(*arguments: str) -> dict[str, Any]:
            return in_fresh_process("out_of_core.py", *arguments, threads=options.threads)

        fresh("--make", name, folder, str(n_rows))
        print(f"{name}, {n_rows - N_TESTED:,} rows{'':8}seconds     MB  accuracy  log loss")
        for variant in variants:
            row = figures[variant] = fresh("--measure", variant, folder, str(epochs))
            print(
                f"  {variant:24}{row['seconds']:10.1f}{row['peak_mb']:7}{row['accuracy']:10.4f}"
                f"{row['log_loss']:10.3f}",
                flush=True,
            )
            for leftover in ("scaled.npy", "small.npy", "rows.parquet"):
                Path(folder, leftover).unlink(missing_ok=True)
    rows = n_rows - N_TESTED
    array_mb = round(4 * rows * width / 1e6)
    return {"rows": rows, "features": width, "epochs": epochs, "array_mb": array_mb} | {
        "variants": figures
    }


def find_failures(name: str, variants: dict[str, dict[str, float]]) -> list[str]:
    blocks, exact = variants["blocks"], variants.get("memory")
    failures = []
    if blocks["peak_mb"] > MAX_MB:
        failures.append(f"{name}: blocks need {blocks['peak_mb']} MB, but the limit is {MAX_MB}")
    if exact and blocks["accuracy"] < exact["accuracy"] - MAX_LOST:
        failures.append(f"{name}: accuracy {blocks['accuracy']}, exact {exact['accuracy']}")
    return failures


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "--rows",
        default=ROWS,
        help="numbers of synthetic training rows, of `million` and `many`; default: %(default)s",
    )
    parser.add_argument(
        "--clothes", type=int, default=N_CLOTHES, help="number of images; default: %(default)s"
    )
    parser.add_argument(
        "--folder",
        default=tempfile.gettempdir(),
        help="folder on a disk for the temporary files; default: %(default)s",
    )
    parser.add_argument("--make", nargs=3, help="make the rows of a set in a folder")
    parser.add_argument("--measure", nargs=3, help="run a variant on the rows in a folder")
    options = parser.parse_args()
    if options.make:
        name, folder, count = options.make
        (make_clothes if name == "clothes" else make_rows)(Path(folder), int(count))
        print("{}")
        return
    if options.measure:
        variant, folder, epochs = options.measure
        print(json.dumps(measure(variant, Path(folder), int(epochs))))
        return
    million, many = (int(count) + N_TESTED for count in options.rows.split(","))
    sizes = {
        "clothes": (options.clothes, 1280),
        "million": (million, N_FEATURES),
        "many": (many, N_FEATURES),
    }
    check_disk(Path(options.folder), sizes)
    sets = {name: run_set(name, *size, options) for name, size in sizes.items()}
    failures = [
        failure for name, figures in sets.items()
        for failure in find_failures(name, figures["variants"])
    ]  # fmt: skip
    finish({"threads": options.threads, "sets": sets}, failures, options.json)


if __name__ == "__main__":
    main()
