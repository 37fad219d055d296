"""Small backbones, images, classifiers and processes that several test files share."""

import collections
import contextlib
import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline
from skorch.callbacks import Callback
from torch import nn
from torchvision.transforms.v2.functional import resize

import sktransfer
from sktransfer import FineTunedImageClassifier
from sktransfer.transforms.preprocessing import Preprocessing

SIZE = 16


def seeded(module):
    """Fill a module with fixed random values, BatchNorm statistics included."""
    generator = torch.Generator().manual_seed(0)
    for tensor in module.state_dict().values():
        if tensor.dtype.is_floating_point:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.1)
    return module


class Tiny(nn.Sequential):
    """Two convolutional blocks with BatchNorm, 12 features, 5 logits."""

    preprocessing = Preprocessing(resize=SIZE, crop=(SIZE, SIZE))

    def __init__(self):
        super().__init__(
            nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(12, 5),
        )
        seeded(self)

    def embed(self, x):
        """Compute the penultimate vector in plain torch."""
        for module in list(self)[:5]:
            x = module(x)
        return x


class Bfloat16Tiny(Tiny):
    """The second block has its weights and BatchNorm statistics in bfloat16."""

    def __init__(self):
        super().__init__()
        self[1] = Bfloat16(self[1])


class Bfloat16(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block.to(torch.bfloat16)

    def forward(self, x):
        return self.block(x.to(torch.bfloat16)).float()


class CountingTiny(Tiny):
    """Appends a line to the file `log` for each batch: its number of images, and the worker.

    Every worker waits in its first batch until `n_workers` workers have computed a batch.

    Every process that runs the backbone writes the log, independently of the store. The log leaves
    out the probes with which `fit` finds the structure (outside inference mode) and the width (a
    blank image).
    """

    def __init__(self, log, n_workers=1):
        super().__init__()
        self[0] = Counter(self[0], log, n_workers)


class Counter(nn.Module):
    def __init__(self, block, log, n_workers):
        super().__init__()
        self.block = block
        self.log = str(log)
        self.n_workers = n_workers

    def forward(self, x):
        shown = int((x.flatten(2).std(dim=2).sum(dim=1) > 0).sum())  # without padding
        if torch.is_inference_mode_enabled() and shown:
            with open(self.log, "a") as file:
                worker = f"{os.getpid()}-{threading.get_ident()}"
                os.write(file.fileno(), f"{shown} {worker}\n".encode())
            end = time.monotonic() + 60
            while len(workers(Path(self.log))) < self.n_workers and time.monotonic() < end:
                time.sleep(0.01)
        return self.block(x)


def counted(log):
    """Return the number of images in a log."""
    return sum(int(line.split()[0]) for line in _lines(log))


def workers(log):
    """Return the processes and threads that computed the images of a log."""
    return {line.split()[1] for line in _lines(log)}


def _lines(log):
    return log.read_text().splitlines() if log.exists() else []


def count_calls(monkeypatch, functions):
    """Count the calls of functions: by name, the modules in which each is replaced."""
    calls = collections.Counter()

    def counting(name, function):
        def count(*arguments, **options):
            calls[name] += 1
            return function(*arguments, **options)

        return count

    for name, modules in functions.items():
        counted_function = counting(name, getattr(modules[0], name))
        for module in modules:
            monkeypatch.setattr(module, name, counted_function)
    return calls


def unreachable(*arguments, **options):
    """Replace `socket.create_connection`: wait for a long time, then fail."""
    time.sleep(30)
    raise OSError("timed out")


def images(n, side=20, seed=0):
    """Draw `n` distinct random images, uint8 NHWC."""
    return np.random.RandomState(seed).randint(0, 256, (n, side, side, 3)).astype(np.uint8)


class Items(torch.utils.data.Dataset):
    """A map-style dataset of items with labels, which records the rows that are read."""

    def __init__(self, items):
        self.items = items
        self.reads = []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        self.reads.append(row)
        return self.items[row], row


def encoded(image, file_type="PNG", **options):
    """Encode a PIL image."""
    file = io.BytesIO()
    image.save(file, file_type, **options)
    return file.getvalue()


def save_images(X, folder):
    """Save images as 0.png, 1.png, ... in a folder, and return their paths."""
    folder.mkdir(exist_ok=True)
    paths = [str(folder / f"{row}.png") for row in range(len(X))]
    for path, image in zip(paths, X, strict=True):
        Image.fromarray(image).save(path)
    return paths


class FlippedImage(ImageFile.ImageFile):
    """A plugin of Pillow for files that are an image, upside down, after the word FLIPPED."""

    format = "FLIPPED"

    def _open(self):
        self.fp.seek(0)
        content = self.fp.read()
        if not content.startswith(b"FLIPPED"):
            raise SyntaxError("not flipped")
        with Image.open(io.BytesIO(content[7:])) as image:
            flipped = ImageOps.flip(image.convert("RGB"))
        self._mode, self._size, self.im = flipped.mode, flipped.size, flipped.im
        self.tile = []


def starts_with_flipped(prefix):
    return prefix.startswith(b"FLIPPED")


BROKEN_ROWS = [1, 4, 5, 10]


def paths_with_broken(folder, n=12):
    """Save images, and break some: no image, missing, cut off, a folder; return paths, labels."""
    paths = save_images(images(n, side=40), folder)
    Path(paths[1]).write_bytes(b"no image")
    Path(paths[4]).unlink()
    Path(paths[5]).write_bytes(Path(paths[5]).read_bytes()[:600])
    Path(paths[10]).unlink()
    Path(paths[10]).mkdir()
    return paths, np.arange(n) % 2


def pixel_batch(n=5, side=SIZE):
    """Draw distinct random images as a batch, uint8 (N, 3, H, W)."""
    return torch.from_numpy(images(n, side)).permute(0, 3, 1, 2)


def smooth_image(height=64, width=80, seed=0):
    """Build a smooth colorful image, uint8 (3, H, W)."""
    coarse = np.random.RandomState(seed).randint(0, 256, (3, 6, 6)).astype(np.uint8)
    smooth = resize(torch.from_numpy(coarse), [max(height, 8), max(width, 8)])
    return smooth[:, :height, :width].contiguous()


def flat_image(value, height=64, width=64):
    """Build an image of one gray value, uint8 (3, H, W)."""
    return torch.full((3, height, width), value, dtype=torch.uint8)


def cosine(a, b):
    """Compute the cosine between the rows of two arrays."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


NAMES = np.array(["cat", "dog", "owl"])


def colored_images(n=60, seed=0):
    """Draw noisy images of three classes that differ in color, and their labels."""
    y = np.arange(n) % 3
    X = images(n, seed=seed).astype(np.int64)
    X[np.arange(n), :, :, y] += 90
    return X.clip(0, 255).astype(np.uint8), NAMES[y]


def make_classifier(backbone=Tiny, **parameters):
    defaults = {"unfreeze": (0, 1, 2), "max_epochs": 3, "n_views": 2, "early_stopping": True}
    defaults["random_state"] = 0
    return FineTunedImageClassifier(backbone, **{**defaults, "cache": None, **parameters})


def all_outputs(estimator, X):
    """Return what the methods of a fitted estimator compute, by name; nothing if it is not fitted.

    Rows of attributes that only some estimators have are added as arrays.
    """
    outputs = {}
    for name in ("transform", "predict", "predict_proba", "decision_function"):
        with contextlib.suppress(AttributeError, NotFittedError):
            outputs[name] = getattr(estimator, name)(X)
    for name in ("classes_", "digest_", "pixel_range_", "stages_", "history_", "errors_"):
        if hasattr(estimator, name):
            outputs[name] = np.array(str(getattr(estimator, name)))
    return outputs


def net_state(classifier):
    return {name: tensor.clone() for name, tensor in classifier.net_.module_.state_dict().items()}


def equal_states(state, expected):
    return state.keys() == expected.keys() and all(
        torch.equal(state[key], expected[key]) for key in state
    )


X, Y = colored_images()
X_TEST, Y_TEST = colored_images(30, seed=1)


# The target domain: other images of the same classes, darker and with less contrast.
X_TARGET = (colored_images(40, seed=2)[0] * 0.4).astype(np.uint8)
BOTH = np.concatenate([X, X_TARGET])
DOMAIN = np.repeat([1, -2], [60, 40])


def domain_labels(garbage):
    return np.concatenate([Y, np.full(40, garbage)])


class Interrupt(Callback):
    """Raises KeyboardInterrupt in the third epoch."""

    epochs = 0

    def on_epoch_begin(self, net, **kwargs):
        self.epochs += 1

    def on_batch_end(self, net, **kwargs):
        if self.epochs == 3:
            raise KeyboardInterrupt


class PowerCut(Callback):
    """Raises an error after more than `n_validated` validation batches."""

    def __init__(self, n_validated):
        self.left = n_validated

    def on_batch_end(self, net, training=False, **kwargs):
        self.left -= not training
        if self.left < 0:
            raise RuntimeError("power cut")


# Imports the store without the rest of the package, which it does not need. It is a function, so
# that it can be sent to a worker.
PREAMBLE = f"""
def light():
    import sys, types
    package = types.ModuleType("sktransfer")
    package.__path__ = [{str(Path(sktransfer.__file__).parent)!r}]
    sys.modules.setdefault("sktransfer", package)

light()
"""


def start_python(script, *arguments, **options):
    """Start Python on a script, with pipes for its standard input and output."""
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def finish_python(process):
    """Wait for a process, and return its output."""
    with process:
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    return output


def make_search(extractor, n_jobs=1, seed=0):
    """Build a search of 6 candidates in 5 shuffled folds: 31 fits."""
    return GridSearchCV(
        Pipeline([("embed", extractor), ("classify", RidgeClassifier())]),
        {"classify__alpha": np.logspace(-3, 2, 6)},
        cv=StratifiedKFold(5, shuffle=True, random_state=seed),
        n_jobs=n_jobs,
        error_score="raise",
    )
