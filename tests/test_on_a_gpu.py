"""What must hold on a CUDA device; each test runs on an emulated one, and on a real one if any."""

import contextlib
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from emulated_cuda import emulated_cuda
from helpers import Interrupt, cosine
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from sktransfer import FineTunedImageClassifier, PretrainedFeatureExtractor, find_leaks
from sktransfer.store.store import EmbeddingStore

PHOTOGRAPHS = load_sample_images().images
N = 48
Y = np.arange(N) % 2
# With real weights, and the mean taken out, since all images have much in common.
MIN_COSINE, MIN_COSINE_WITHIN_DECODING = 0.999, 0.97
real = pytest.mark.gpu


@pytest.fixture(params=["emulated", pytest.param("real", marks=real)])
def device(request):
    with emulated_cuda() if request.param == "emulated" else contextlib.nullcontext() as emulated:
        yield emulated
        if emulated is not None:
            assert emulated.races == []


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Write distinct JPEGs of two photographs; some that the device may not decode."""
    folder, random = tmp_path_factory.mktemp("jpegs"), np.random.default_rng(0)
    paths = []
    for number in range(N):
        height, width = random.integers(150, 250, 2)
        top, left = random.integers(0, 427 - height), random.integers(0, 640 - width)
        cut = PHOTOGRAPHS[number % 2][top : top + height, left : left + width]
        options = {}
        if number % 12 == 5:
            options["progressive"] = True
        if number % 12 == 7:
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = 6
        mode = "CMYK" if number % 12 == 9 else "L" if number % 12 == 11 else "RGB"
        paths.append(str(folder / f"{number:03}.jpg"))
        Image.fromarray(cut).convert(mode).save(paths[-1], **options)
    return paths


def extractor(**options):
    settings = {"image_size": 48, "cache": None, "device": "cuda"}
    return PretrainedFeatureExtractor(**settings | options)


def classifier(**options):
    settings = {"image_size": 48, "cache": None, "device": "cuda", "random_state": 0}
    return FineTunedImageClassifier(**settings | {"max_epochs": 2, "n_views": 1} | options)


def min_cosine(first, second):
    return cosines(first, second).min()


def cosines(first, second):
    mean = second.mean(0)
    return cosine(first - mean, second - mean)


@pytest.fixture(scope="module")
def on_cpu(paths):
    return extractor(device="cpu", engine="torch").fit_transform(paths)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_embeddings_equal_those_of_the_cpu(device, paths, on_cpu, precision):
    found = extractor(precision=precision).fit_transform(paths)
    assert min_cosine(found, on_cpu) > (
        MIN_COSINE if precision == "float32" else MIN_COSINE_WITHIN_DECODING
    )


def test_embeddings_of_arrays_equal_those_of_the_cpu(device):
    stack = np.stack([PHOTOGRAPHS[i % 2][i : i + 90, i : i + 80] for i in range(40)])
    expected = extractor(device="cpu", engine="torch").fit_transform(stack)
    assert min_cosine(extractor(precision="float32").fit_transform(stack), expected) > MIN_COSINE
    tensors = torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous().to("cuda")
    found = extractor(precision="float32").fit_transform(tensors)
    assert min_cosine(found, expected) > MIN_COSINE


def test_embeddings_do_not_depend_on_threads_or_repetition(device, paths):
    expected = extractor(n_jobs=1).fit_transform(paths)
    for threads in (1, 4, 16):
        np.testing.assert_array_equal(extractor(n_jobs=threads).fit_transform(paths), expected)


def test_concurrent_threads_get_the_same_embeddings(device, paths):
    if device is not None:
        pytest.skip("the emulated device is turned on for one thread")
    model = extractor().fit(paths)
    expected = model.transform(paths)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(model.transform, [paths] * 8):
            assert min_cosine(found, expected) > MIN_COSINE


@real
def test_too_little_memory_gives_the_same_embeddings(paths, on_cpu):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e9 / torch.cuda.mem_get_info()[1])
    try:
        found = extractor(batch_size=2048, image_size=224).fit_transform(paths * 30)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    expected = extractor(image_size=224).fit_transform(paths)
    assert min_cosine(found[:N], expected) > MIN_COSINE


@pytest.mark.slow_cases("options4")
@pytest.mark.parametrize(
    "options",
    [
        {"unfreeze": 0},
        pytest.param({"unfreeze": (0, 2)}, marks=pytest.mark.slow),
        pytest.param({"unfreeze": (0, 2), "n_views": None}, marks=pytest.mark.slow),
        pytest.param({"unfreeze": (0, 2), "batch_norm": "adapt"}, marks=pytest.mark.slow),
        {"unfreeze": "all", "augment": None, "max_epochs": 1},
    ],
)
def test_same_seed_gives_the_same_classifier(device, paths, options):
    first, second = (classifier(**options).fit(paths, Y).predict_proba(paths) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    if options["unfreeze"] != "all":
        assert (first.argmax(1) == Y).mean() > 0.9


@pytest.mark.slow
def test_predictions_equal_those_of_the_cpu(device, paths):
    fitted = classifier(precision="float32").fit(paths, Y)
    found, embeddings = fitted.predict_proba(paths), fitted.transform(paths)
    fitted.set_params(device="cpu")
    assert abs(fitted.predict_proba(paths) - found).max() < 0.1
    assert (fitted.predict(paths) == found.argmax(1)).mean() > 0.95
    assert min_cosine(fitted.transform(paths), embeddings) > MIN_COSINE


@pytest.mark.slow
def test_adversarial_fit_and_adaptation_run(device, paths):
    domain = np.where(np.arange(N) < N // 2, 1, -1)
    fitted = classifier(domain_adversarial=1.0, unfreeze=(0, 1)).fit(paths, Y, sample_domain=domain)
    assert fitted.score(paths, Y) > 0.8
    adapted = extractor(batch_norm="adapt").fit(paths).transform(paths)
    expected = extractor(batch_norm="adapt", device="cpu").fit(paths).transform(paths)
    # Adapted to few images, some channels have hardly any variance, which amplifies rounding.
    assert np.median(cosines(adapted, expected)) > MIN_COSINE_WITHIN_DECODING


@pytest.mark.slow
def test_interrupted_fit_is_resumed(device, paths, tmp_path):
    options = {"max_epochs": 4, "early_stopping": False}
    expected = classifier(**options).fit(paths, Y).predict_proba(paths)
    with pytest.warns(UserWarning, match="interrupted"):
        classifier(checkpoint_dir=tmp_path, callbacks=[Interrupt()], **options).fit(paths, Y)
    resumed = classifier(checkpoint_dir=tmp_path, **options).fit(paths, Y)
    np.testing.assert_allclose(resumed.predict_proba(paths), expected, atol=1e-6)


def test_find_leaks_finds_identical_images_on_the_device(device, paths):
    report = find_leaks([*paths, *paths[:3]], extractor=extractor())
    assert sum(kind == "identical" for kind in report.kinds) >= 3


def test_store_is_shared_with_the_cpu(device, paths, tmp_path):
    store = EmbeddingStore(tmp_path)
    found = extractor(cache=store, precision="float32").fit_transform(paths)
    again = extractor(cache=store, device="cpu").fit_transform(paths)
    np.testing.assert_array_equal(again, found)
    store.close()


@pytest.mark.slow
def test_pickle_predicts_in_a_process_without_a_gpu(device, paths, tmp_path):
    fitted = classifier(device="auto", precision="float32").fit(paths, Y)
    expected = fitted.predict_proba(paths)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps((fitted, paths, expected)))
    script = (
        "import pickle, sys; fitted, paths, expected = pickle.load(open(sys.argv[1], 'rb'));"
        "print(abs(fitted.predict_proba(paths) - expected).max())"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", script, str(tmp_path / "model.pkl")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.1


@real
def test_two_workers_share_the_device(paths, tmp_path):
    store = EmbeddingStore(tmp_path)
    model = make_pipeline(extractor(cache=store), LogisticRegression(max_iter=1000))
    grid = {"logisticregression__C": [0.01, 0.1]}
    search = GridSearchCV(model, grid, cv=3, n_jobs=2).fit(paths, Y)
    assert search.best_score_ > 0.9
    assert store.info().computed <= 2 * N
    store.close()


@real
def test_forked_process_uses_the_cpu(paths):
    expected = extractor().fit_transform(paths[:8])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def embed():
        found = extractor(device="auto").fit_transform(paths[:8])
        try:
            extractor(device="cuda").fit(paths[:8])
            queue.put((found, "no error"))
        except ValueError as error:
            queue.put((found, str(error)))

    process = context.Process(target=embed)
    process.start()
    found, message = queue.get(timeout=60)
    process.join()
    assert min_cosine(found, expected) > 0.9
    assert "was forked from one that uses CUDA" in message
