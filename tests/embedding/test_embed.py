"""Each image is embedded once, as counted by the backbone, independently of the store."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from activation_helpers import TINY, compute_config, views_of
from helpers import (
    CountingTiny,
    Tiny,
    counted,
    images,
    make_classifier,
    make_search,
    save_images,
    workers,
)
from PIL import Image
from sklearn.base import clone
from sklearn.ensemble import VotingClassifier
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV, ShuffleSplit, cross_val_score
from sklearn.pipeline import make_pipeline, make_union

from sktransfer import FineTunedImageClassifier, ImageError, PretrainedFeatureExtractor
from sktransfer.backbones import loading
from sktransfer.data import decoding
from sktransfer.data.images import Images
from sktransfer.embedding import embed as embedding
from sktransfer.embedding.recipe import Recipe
from sktransfer.store.session import session_store
from sktransfer.utils.memory import MemoryCache

N = 60
X = images(N)
y = np.arange(N) % 3


def extract(n):
    return PretrainedFeatureExtractor(Tiny, cache=None, verbose=1).fit_transform(images(n))


def in_a_pipeline():
    return make_pipeline(PretrainedFeatureExtractor(Tiny, cache=None, verbose=1), RidgeClassifier())


X_MANY, Y_MANY = images(200), np.arange(200) % 2


@pytest.mark.parametrize(
    ("job", "n_bars"),
    [
        (lambda: extract(64), 1),
        (lambda: extract(63), 0),
        (lambda: extract(1), 0),
        (lambda: in_a_pipeline().fit(X_MANY, Y_MANY).predict(X_MANY), 2),
        (lambda: in_a_pipeline().fit(X_MANY, Y_MANY).predict(X_MANY[:5]), 1),
        (lambda: cross_val_score(in_a_pipeline(), X_MANY, Y_MANY, cv=2), 0),
        (
            lambda: GridSearchCV(in_a_pipeline(), {"ridgeclassifier__alpha": [1, 9]}, cv=2).fit(
                X_MANY, Y_MANY
            ),
            0,
        ),
        (lambda: VotingClassifier([("a", in_a_pipeline())]).fit(X_MANY, Y_MANY), 0),
        (lambda: make_classifier(verbose=1, unfreeze=0, augment=None).fit(X_MANY, Y_MANY), 1),
        (lambda: make_classifier(verbose=1, unfreeze=0).fit(X_MANY, Y_MANY), 2),  # it decides first
        (lambda: make_classifier(verbose=0, unfreeze=(0,)).fit(X_MANY, Y_MANY), 0),
    ],
)
def test_bar_is_shown_for_many_images_of_a_single_job(job, n_bars, capsys):
    job()
    opened = re.findall(r"Embedding with [^\r\n]*:   0%", capsys.readouterr().err)
    assert len(opened) == n_bars


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["auto", "kept"])
def test_searches_embed_each_image_once(log, tmp_path, cache):
    cache = tmp_path / "kept" if cache == "kept" else cache
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=cache)
    fitted = make_search(extractor).fit(X, y)
    assert counted(log) == N
    make_search(clone(extractor), seed=1).fit(X, y)
    shuffled = np.random.RandomState(0).permutation(N)
    make_search(clone(extractor)).fit(X[shuffled], y[shuffled])
    cross_val_score(fitted.best_estimator_, X, y, cv=ShuffleSplit(3, random_state=0))
    assert counted(log) == N
    fitted.predict(images(5, seed=1))
    assert counted(log) == N + 5


def test_search_without_a_store_embeds_each_image_31_times(log):
    """Without a store, a search embeds 30 x (4/5 + 1/5) N images, and N for the refit."""
    make_search(PretrainedFeatureExtractor(CountingTiny(log), cache=None)).fit(X, y)
    assert counted(log) == 31 * N


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["auto", "kept"])
@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_parallel_search_embeds_each_image_about_once(log, tmp_path, backend, cache):
    import joblib

    cache = tmp_path / "kept" if cache == "kept" else cache
    backbone = CountingTiny(log, n_workers=2)
    extractor = PretrainedFeatureExtractor(backbone, cache=cache, batch_size=4)
    with joblib.parallel_backend(backend):
        make_search(extractor, n_jobs=2).fit(X, y)
    assert N <= counted(log) <= 1.05 * N
    assert len(workers(log)) == 2


@pytest.mark.slow
def test_cache_directory_serves_a_second_process(log, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from helpers import CountingTiny, make_search, images\n"
        "from sktransfer import PretrainedFeatureExtractor\n"
        "X, y = images(60), [row % 3 for row in range(60)]\n"
        "log, cache = sys.argv[1:]\n"
        "make_search(PretrainedFeatureExtractor(CountingTiny(log), cache=cache)).fit(X, y)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(helpers.__file__).parent)}
    for _ in range(2):
        subprocess.run(
            [sys.executable, script, log, tmp_path / "kept"], check=True, env=environment
        )
        assert counted(log) == N


@pytest.mark.parametrize(
    "change",
    [
        {"layer": "0"},
        {"pooling": "max"},
        {"image_size": 24},
        {"precision": "bfloat16"},
        {"batch_norm": "adapt"},
    ],
)
def test_parameters_that_change_the_embedding_change_the_key(log, store, change):
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=store)
    extractor.fit_transform(X)
    before = counted(log)
    extractor.set_params(**change).fit(X)
    fitted = counted(log)  # adapting runs the images through the network once more
    extractor.transform(X)
    assert counted(log) == fitted + N >= before + N


@pytest.mark.parametrize("change", [{"batch_size": 7}, {"n_jobs": 3}, {"device": "cpu"}])
def test_parameters_that_keep_the_embedding_keep_the_key(log, store, change):
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=store)
    extractor.fit_transform(X)
    extractor.set_params(**change).fit_transform(X)
    assert counted(log) == N


def test_repeated_image_is_embedded_once(log, store):
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=store)
    embedded = extractor.fit_transform(np.concatenate([X, X[::-1]]))
    assert counted(log) == N
    np.testing.assert_array_equal(embedded[:N], embedded[N:][::-1])


def test_fingerprint_of_an_image_is_computed_once_for_all_its_views(monkeypatch):
    rows, fingerprint = [], Images.fingerprint

    def record(images, row):
        rows.append(row)
        return fingerprint(images, row)

    monkeypatch.setattr(Images, "fingerprint", record)
    views = views_of(3, n_views=4)
    recipe = Recipe(TINY, views.preprocessing)
    embedded = embedding.embed(views, recipe, compute_config(session_store()))
    assert len(np.unique(embedded.embeddings, axis=0)) == 15
    assert rows == [0, 1, 2]


def test_changed_file_is_embedded_again(log, store, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(X[0]).save(path)
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=store)
    before = extractor.fit_transform([path])
    Image.fromarray(X[1]).save(path)
    after = extractor.transform([path])
    assert counted(log) == 2
    assert not np.allclose(before, after)


def test_copies_and_contents_of_a_file_are_embedded_once(log, store, tmp_path, monkeypatch):
    paths = [Path(path) for path in save_images(X[:9], tmp_path / "images")]
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=store)
    expected = extractor.fit_transform([*paths, paths[0], paths[0]])
    assert counted(log) == 9
    copies = shutil.copytree(tmp_path / "images", tmp_path / "copies")
    moved = tmp_path / "another name"
    paths[3].rename(moved)
    os.utime(paths[4])
    paths[3] = moved
    monkeypatch.chdir(copies)
    for again in (
        paths,
        [str(path) for path in paths],
        [f"{row}.png" for row in range(9)],
        [path.read_bytes() for path in paths],
        [paths[0], Image.open(copies / "1.png"), *paths[2:]],
    ):
        embedded = extractor.transform(again)
        np.testing.assert_allclose(embedded, expected[:9], rtol=1e-6)
    assert counted(log) == 10  # the pixels of the PIL image


def test_known_file_is_not_read(log, store, tmp_path, monkeypatch):
    paths = save_images(X[:9], tmp_path / "images")
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=store, n_jobs=2)
    extractor.fit_transform(paths)
    read = []
    honest = decoding._read_file
    monkeypatch.setattr(decoding, "_read_file", lambda path: read.append(path) or honest(path))
    extractor.transform(paths[::-1])
    assert read == []
    os.utime(paths[5])
    extractor.transform([*paths, paths[5]])
    assert read == [paths[5]]
    extractor.transform(paths)
    assert read == [paths[5]]


def test_file_that_changes_after_it_was_hashed_is_not_stored(log, store, tmp_path, monkeypatch):
    paths = save_images(X[:5], tmp_path / "images")
    honest = decoding.content_digest

    def hash_and_change(path, *settings):
        digest = honest(path, *settings)
        if path == paths[3]:
            Image.fromarray(X[9]).save(path)
            os.utime(path, (1, 1))
        return digest

    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=store).fit(X[:2])
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "content_digest", hash_and_change)
        with pytest.raises(ImageError, match=r"3\.png.*has changed while it was embedded"):
            extractor.transform(paths)
    before = Path(tmp_path, "before.png")
    Image.fromarray(X[3]).save(before)  # the old content
    expected = PretrainedFeatureExtractor(Tiny, cache=None).fit(X[:2]).transform([before, paths[3]])
    np.testing.assert_allclose(extractor.transform([before, paths[3]]), expected, rtol=1e-6)


def test_session_store_reads_no_file_for_its_key(log, tmp_path, monkeypatch):
    paths = save_images(X[:9], tmp_path / "images")
    read = []
    monkeypatch.setattr(decoding, "content_digest", lambda *given: read.append(given))
    extractor = PretrainedFeatureExtractor(CountingTiny(log))
    extractor.fit_transform(paths)
    extractor.transform(paths[::-1])
    assert read == []
    assert counted(log) == 9
    os.utime(paths[5])
    extractor.transform(paths)
    assert counted(log) == 10


def test_background_of_a_file_is_in_its_key(log, store, tmp_path):
    image = Image.fromarray(X[0]).convert("RGBA")
    image.putalpha(128)
    image.save(tmp_path / "a.png")
    for count, background in ((1, "white"), (2, "black"), (2, "white")):
        extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=store)
        extractor.set_params(background=background).fit_transform([tmp_path / "a.png"])
        assert counted(log) == count


def test_unreadable_and_broken_copies_are_named_by_their_own_paths(store, tmp_path, monkeypatch):
    paths = save_images(X[:6], tmp_path)
    for row in (1, 4):
        Path(paths[row]).write_bytes(b"no image")
    honest = decoding._read_file

    def read(path):
        if path == paths[2]:
            raise PermissionError(13, "Permission denied")
        return honest(path)

    monkeypatch.setattr(decoding, "_read_file", read)
    extractor = PretrainedFeatureExtractor(Tiny, cache=store, on_error="nan").fit(paths[:1])
    extractor.transform([*paths, paths[2]])
    named = [(error.row, error.source) for error in extractor.errors_]
    assert named == [(row, paths[row]) for row in (1, 2, 4)] + [(6, paths[2])]
    assert "Permission denied" in str(extractor.errors_[1])


@pytest.mark.slow
@pytest.mark.parametrize("augment", [None, "light"])
def test_store_of_another_machine_serves_copies_of_its_files(tmp_path, augment):
    """Two processes have different homes, stores, and folders of the same images."""
    script = """
import sys
from pathlib import Path
from helpers import Y, CountingTiny, counted, make_classifier
from sktransfer import EmbeddingStore, PretrainedFeatureExtractor

root, log, augment, file = sys.argv[1:]
store = EmbeddingStore("~/embeddings")
if Path(file).exists():
    print(store.absorb(file))
paths = [str(Path(root, f"{row}.png")) for row in range(60)]
backbone = CountingTiny(log)
if augment == "None":
    PretrainedFeatureExtractor(backbone, cache=store).fit_transform(paths)
else:
    make_classifier(backbone, cache=store, augment=augment, max_epochs=1).fit(paths, Y)
print(counted(Path(log)), store.directory)
if not Path(file).exists():
    print(store.export(file))
"""
    save_images(helpers.X, tmp_path / "images")
    printed = []
    for host in ("a", "b"):
        (tmp_path / host).mkdir()
        root = shutil.copytree(
            tmp_path / "images", tmp_path / host / f"of {host}", copy_function=shutil.copyfile
        )
        environment = {**os.environ, "HOME": str(tmp_path / host)}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        # The log is an attribute of the network, and so in the key.
        arguments = [root, "log", str(augment), tmp_path / "embeddings"]
        run = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env=environment,
            cwd=tmp_path / host,
            capture_output=True,
            text=True,
            check=True,
        )
        printed.append(run.stdout.split())
    (computed, first, exported), (absorbed, computed_by_b, second) = printed
    assert int(computed) >= 60
    assert int(exported) == int(absorbed) >= 60
    assert computed_by_b == "0"
    assert (first, second) == (str(tmp_path / "a/embeddings"), str(tmp_path / "b/embeddings"))


# Many models in one process


@pytest.fixture
def builds(monkeypatch):
    """Count the engines and backbones that are built, in a process that has none yet."""
    monkeypatch.setattr(embedding, "_engines", MemoryCache(at_least=2))
    monkeypatch.setattr(loading, "_backbones", MemoryCache(at_least=3))
    counted = Counter()

    def count(name, module):
        function = getattr(module, name)

        def counting(*arguments, **options):
            counted[name] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, counting)

    count("create_engine", embedding)
    count("_assemble", loading)
    return counted


class Seeded(Tiny):
    """Networks that differ in their weights."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.no_grad():
            self[0][0].weight += seed / 10


def tiny(seed=0, **parameters):
    return PretrainedFeatureExtractor(Seeded(seed), **{"cache": None, **parameters})


def serve(models, X=X[:2]):
    """Use fitted models in turn, as a server does."""
    for model in models:
        model.fit(X)
    for _ in range(3):
        for model in models:
            model.transform(X)


def lite(**parameters):
    return PretrainedFeatureExtractor(image_size=32, cache=None, **parameters)


def union():
    features = make_union(*(tiny(seed) for seed in range(4))).fit(X[:6])
    for _ in range(3):
        features.transform(X[:6])


def vote():
    models = [(str(seed), make_pipeline(tiny(seed), RidgeClassifier())) for seed in range(4)]
    voting = VotingClassifier(models).fit(X[:9], y[:9])
    for _ in range(3):
        voting.predict(X[:9])


def search():
    model = make_pipeline(tiny(), RidgeClassifier())
    backbones = [Seeded(seed) for seed in range(5)]
    grid = {"pretrainedfeatureextractor__backbone": backbones}
    GridSearchCV(model, grid, cv=3, error_score="raise").fit(X[:12], y[:12])


def classify():
    common = {"unfreeze": (0, 1), "max_epochs": 1, "augment": None, "random_state": 0}
    models = [
        FineTunedImageClassifier(Seeded(seed), cache=None, **common).fit(X[:12], y[:12])
        for seed in range(4)
    ]
    for _ in range(3):
        for model in models:
            model.predict(X[:3])


def serve_in_threads():
    models = [tiny(seed).fit(X[:2]) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: models[number % 4].transform(X[:2]), range(24)))


@pytest.mark.parametrize(
    ("use", "engines", "networks"),
    [
        (lambda: serve([tiny(seed) for seed in range(3)]), 3, 3),
        (lambda: serve([tiny(seed) for seed in range(8)]), 8, 8),
        (lambda: serve([tiny(image_size=size) for size in (16, 24, 32, 40)]), 4, 1),
        (lambda: serve([tiny(layer=layer) for layer in ("0", "1", None, "logits")]), 4, 1),
        (lambda: serve([tiny(pooling=name) for name in ("avg", "max", "avgmax", None)]), 4, 1),
        (lambda: serve([tiny(seed, batch_norm="adapt") for seed in range(3)]), 3, 3),
        (lambda: serve([lite(layer=layer) for layer in ("block0", "block1", "block2")]), 3, 1),
        (lambda: serve([tiny() for _ in range(4)]), 1, 1),
        (union, 4, 4),
        (vote, 4, 4),
        (search, 5, 5),
        (classify, 4, 4),  # fit and predictions share an engine
        (serve_in_threads, 4, 4),
    ],
)
def test_models_in_turn_are_built_once(builds, use, engines, networks):
    use()
    assert builds == {"create_engine": engines, "_assemble": networks}


def test_models_beyond_the_memory_are_built_again(builds, monkeypatch):
    monkeypatch.setattr(embedding, "_engines", MemoryCache(at_least=2, limit=lambda device: 0))
    serve([tiny(seed) for seed in range(3)])
    assert builds == {"create_engine": 9, "_assemble": 3}


def test_engine_takes_the_memory_of_its_frozen_blocks(builds):
    sizes = []
    monitored = MemoryCache(at_least=2, limit=lambda device: sizes.append(device) or 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "_engines", monitored)
        tiny(layer="0", device="cpu").fit_transform(X[:2])
    (entry,) = monitored._entries.values()
    block = Tiny()[0]
    assert entry.n_bytes == sum(tensor.nbytes for tensor in block.state_dict().values())
    assert entry.device == torch.device("cpu")
