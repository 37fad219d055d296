"""Fits in two processes that train together. Run as a program, this is one of the processes."""

import functools
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import warnings
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from helpers import (
    BOTH,
    DOMAIN,
    X_TEST,
    Y_TEST,
    CountingTiny,
    X,
    Y,
    all_outputs,
    domain_labels,
    make_classifier,
    net_state,
    paths_with_broken,
)
from PIL import Image
from sklearn.model_selection import GridSearchCV
from skorch.callbacks import Callback

from sktransfer import FineTunedImageClassifier
from sktransfer.integrations.accelerate import data_parallel

# An odd number of images, so that batches have different sizes, most of which are odd, too.
N = 57
WEIGHTS = np.linspace(0.5, 2, N)

# SGD: Adam divides by the size of gradients, so it enlarges the rounding of those that are zero.
_COMMON = {"optimizer": "sgd", "lr": 1e-3, "max_epochs": 2, "early_stopping": False}
_COMMON["averaging"] = 1.0
FITS = {
    "all stages": {
        "unfreeze": (0, 1, "all"),
        "class_weight": {"cat": 1, "dog": 3, "owl": 2},
        "label_smoothing": 0.1,
        "lr": 1e-4,
    },
    "early stopping": {"unfreeze": (1, "all"), "early_stopping": True, "n_iter_no_change": 1},
    "validation images": {"unfreeze": (1, "all"), "lr": 1e-4},
    "mixup": {"unfreeze": (1, "all"), "mixup": 0.3},
    "new views in each epoch": {"unfreeze": (1, "all"), "n_views": None},
    "averaging is chosen": {"unfreeze": (0, 1), "averaging": "auto", "lr": 1e-4},
    "averaging is given": {"unfreeze": (0, 2), "averaging": 0.5, "lr": 1e-4},
    # The share of one process is empty in every batch.
    "one image in a batch": {"unfreeze": (1,), "batch_size": 1, "dropout": 0.0},
    "adapted statistics": {"unfreeze": (1,), "batch_norm": "adapt"},
    "decided from the images": {"unfreeze": "auto", "augment": "auto", "max_epochs": "auto"},
    "two classes": {"unfreeze": (1,)},
}


def fit(name):
    """Fit a classifier as `FITS` says."""
    labels = np.where(Y == "cat", "cat", "other") if name == "two classes" else Y
    classifier = make_classifier(**{**_COMMON, **FITS[name]})
    valid = {"X_val": X_TEST[:13], "y_val": Y_TEST[:13]} if name == "validation images" else {}
    return classifier.fit(X[:N], labels[:N], sample_weight=WEIGHTS, **valid)


KINDS = ("train", "valid")


def describe(classifier, X_test=X_TEST):
    """Return everything that a fitted classifier knows and computes, as plain values."""
    return {
        "probabilities": classifier.predict_proba(X_test),
        "outputs": all_outputs(classifier, X_test),
        "weights": {name: tensor.numpy() for name, tensor in net_state(classifier).items()},
        "losses": [[row.get(f"{kind}_loss", 0.0) for kind in KINDS] for row in classifier.history_],
        "best_epochs": [stage["best_epoch"] for stage in classifier.stages_],
        "averaging": (classifier.averaging_, classifier.temperature_),
        "decision": str(classifier.decision_),
        "pickle": pickle.dumps(classifier),
        "n_errors": len(classifier.errors_),
    }


# --- scenarios -----------------------------------------------------------------------------------


def all_fits(accelerator, folder):
    """Run all fits, each from a checkpoint of its own, and a search."""
    results = {}
    for name in FITS:
        with data_parallel(accelerator):
            results[name] = describe(fit(name))
    with data_parallel(accelerator):
        results["search"] = search().best_params_
    results["checkpoint"] = resumed(accelerator, folder)
    return results


def search():
    classifier = make_classifier(**_COMMON, unfreeze=(1,))
    grid = {"dropout": [0.0, 0.9]}
    return GridSearchCV(classifier, grid, cv=2, error_score="raise").fit(X[:N], Y[:N])


def resumed(accelerator, folder):
    """Interrupt a fit, and resume it from the checkpoint of the main process."""
    options = {**_COMMON, **FITS["all stages"], "random_state": None}
    folder = Path(folder) / f"checkpoints-{accelerator.process_index}"
    folder.mkdir()
    with data_parallel(accelerator):
        first = make_classifier(
            **options, checkpoint_dir=folder, callbacks=[FailsIn(epoch=4, rank=1)]
        )
        outcome(lambda: first.fit(X[:N], Y[:N]))
        classifier = make_classifier(**options, checkpoint_dir=folder).fit(X[:N], Y[:N])
    return len(list(folder.iterdir())), len(classifier.history_), describe(classifier)


def failures(accelerator, folder):
    """Return how fits fail, and how long it takes; all of them in one block."""
    rank, results = accelerator.process_index, {}
    paths, labels = paths_with_broken(Path(folder) / f"images-{rank}")
    # Both processes have the paths of the first one.
    paths = [path.replace(f"images-{rank}", "images-0") for path in paths]
    accelerator.wait_for_everyone()

    def shuffled():
        rows = np.random.default_rng(rank).permutation(N)[:40]
        return make_classifier().fit(X[rows], Y[rows])

    def callback(classifier_callback, **options):
        return make_classifier(callbacks=[classifier_callback], **options).fit(X[:N], Y[:N])

    def adversarial():
        classifier = make_classifier(domain_adversarial=0.1)
        return classifier.fit(BOTH, domain_labels("cat"), sample_domain=DOMAIN)

    fits = {
        "error": lambda: callback(FailsIn(epoch=2, rank=1)),
        "interrupt": lambda: callback(FailsIn(epoch=2, rank=1, error=KeyboardInterrupt)),
        "all fail": lambda: callback(FailsIn(epoch=2, rank=None)),
        "one stops early": lambda: callback(StopsEarly(rank=1)),
        "diverges": lambda: make_classifier(
            lr=9.0, optimizer="sgd", unfreeze=("all",), **_NO_VALID
        ).fit(X[:N], Y[:N]),
        "other data": shuffled,
        "other parameters": lambda: make_classifier(dropout=0.1 * rank).fit(X[:N], Y[:N]),
        "adversarial": adversarial,
        "learned statistics": lambda: make_classifier(batch_norm="train").fit(X[:N], Y[:N]),
        "broken images": lambda: make_classifier(**_NO_VALID).fit(paths, labels),
        "broken images in each epoch": lambda: make_classifier(
            n_views=None, unfreeze=("all",), **_NO_VALID
        ).fit(paths, labels),
    }
    with data_parallel(accelerator):
        for name, run in fits.items():
            results[name] = outcome(run)
        results["skipped"] = describe(fit_readable(paths, labels))

    def fails_before_its_fit():
        with data_parallel(accelerator):
            if rank == 1:
                raise ValueError("the disk is on fire")
            make_classifier().fit(X[:N], Y[:N])

    results["error outside of a fit"] = outcome(fails_before_its_fit)
    return results


def fit_readable(paths, labels):
    return make_classifier(**_COMMON, unfreeze=(1,), on_error="skip").fit(paths, labels)


_NO_VALID = {"early_stopping": False, "averaging": 1.0}


def killed(accelerator, folder):
    """Return how a fit fails when the other process ends without a word."""
    classifier = make_classifier(callbacks=[FailsIn(epoch=2, rank=1, error=None)])

    def run():
        with data_parallel(accelerator):
            classifier.fit(X[:N], Y[:N])

    return outcome(run)


def counted_fit(accelerator, folder):
    """Fit twice on images of files, with a backbone that counts the images of all processes."""
    backbone = functools.partial(CountingTiny, Path(folder) / "images.log")
    classifier = make_classifier(backbone, cache="auto")
    with data_parallel(accelerator):
        classifier.fit(X[:N], Y[:N])
        classifier.fit(X[:N], Y[:N])
    return classifier.score(X_TEST, Y_TEST)


def real_network(accelerator, folder):
    """Fit the default network on crops of photographs."""
    with data_parallel(accelerator):
        return describe(fit_on_photographs(verbose=1), crops(10, seed=1)[0])


def fit_on_photographs(**options):
    X_train, y_train = crops(7, seed=0)
    classifier = FineTunedImageClassifier(
        unfreeze=(0, 2), augment="standard", max_epochs=2, random_state=0, image_size=96, **options
    )
    return classifier.fit(X_train, y_train)


def crops(n, seed):
    """Cut `n` squares out of each of five photographs; each of them is a class."""
    rng, X_crops, y = np.random.default_rng(seed), [], []
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"):
        with Image.open(str(resources.files("skimage") / "data" / name)) as file:
            image = np.asarray(file.convert("RGB"))
        for _ in range(n):
            top, left = (int(rng.integers(side - 128)) for side in image.shape[:2])
            X_crops.append(image[top : top + 128, left : left + 128])
            y.append(name.partition(".")[0])
    return np.stack(X_crops), np.array(y)


class FailsIn(Callback):
    """Raises an error in the middle of an epoch, counted over all stages.

    `rank=None` fails in all processes. A KeyboardInterrupt is a signal, None ends the process.
    """

    def __init__(self, epoch, rank, error=ValueError):
        self.epoch, self.rank, self.error = epoch, rank, error
        self.epochs = 0

    def on_epoch_begin(self, net, **kwargs):
        self.epochs += 1

    def on_batch_end(self, net, **kwargs):
        if self.epochs < self.epoch or self.rank not in (None, int(os.environ["RANK"])):
            return
        if self.error is None:
            os._exit(3)
        if self.error is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        raise self.error("the disk is on fire")


class StopsEarly(Callback):
    """Ends a stage after its first epoch, in one process."""

    def __init__(self, rank):
        self.rank = rank

    def on_epoch_end(self, net, **kwargs):
        if int(os.environ["RANK"]) == self.rank:
            raise KeyboardInterrupt


def outcome(run):
    """Return name, message and seconds of the error that a function raises."""
    start = time.monotonic()
    try:
        run()
    except BaseException as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return None


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (all_fits, failures, killed, counted_fit, real_network)
}


# --- processes -----------------------------------------------------------------------------------


def run_together(scenario, folder, n_processes=2):
    """Run a scenario in several processes; return the result of each, None if it has ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(n_processes),
        "LOCAL_WORLD_SIZE": str(n_processes),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, scenario, str(folder)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(n_processes)
    ]
    try:
        outputs = [process.communicate(timeout=250)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    results = []
    for rank, process in enumerate(processes):
        path = Path(folder) / f"{scenario}-{rank}.pickle"
        assert path.exists() or process.returncode == 3, outputs[rank]
        results.append(pickle.loads(path.read_bytes()) if path.exists() else None)
    return results, outputs


def main():
    from accelerate import Accelerator

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    scenario, folder = sys.argv[1:]
    accelerator = Accelerator(cpu=True)
    result = SCENARIOS[scenario](accelerator, folder)
    path = Path(folder) / f"{scenario}-{accelerator.process_index}.pickle"
    path.write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main()
