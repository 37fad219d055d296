import io
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from edge_helpers import BAD_SHARED, Unread, cases
from helpers import (
    BROKEN_ROWS,
    SIZE,
    CountingTiny,
    Items,
    Tiny,
    cosine,
    count_calls,
    counted,
    encoded,
    images,
    paths_with_broken,
    save_images,
    unreachable,
)
from PIL import Image
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_digits, load_sample_images
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from sktransfer import PretrainedFeatureExtractor
from sktransfer.backbones.loading import load_backbone
from sktransfer.backbones.weights import to_tensors
from sktransfer.utils.errors import ImageError, WeightsNotFoundError

GRAY = images(1)[0, :, :, 0]


def tiny(**parameters):
    return PretrainedFeatureExtractor(Tiny(), **parameters)


# --- the contract of scikit-learn ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "limits"),
    [
        (GRAY, (0, 255)),
        (GRAY.astype(np.uint16) * 257, "auto"),
        (GRAY.astype(np.uint16) * 16, (0, 4080)),
        (GRAY.astype(np.int32) * 1000, (0, 255_000)),
        (GRAY.astype(np.float32) / 255, "auto"),
        (GRAY.astype(np.float32) / 255, (0, 1.05)),
        (GRAY.astype(np.float32) / 127.5 - 1, "auto"),
        (GRAY.astype(np.float32), "auto"),
    ],
)
def test_file_has_the_embedding_of_the_array_in_it(array, limits, tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(array).save(path)
    containers = [array, path, path.read_bytes(), Image.open(path), Image.fromarray(array)]
    embeddings = [
        tiny(pixel_range=limits).fit([container]).transform([container])[0]
        for container in containers
    ]
    np.testing.assert_array_equal(embeddings, [embeddings[0]] * len(embeddings))


def test_background_changes_embeddings_of_transparent_images_only():
    pixels = np.concatenate([images(2), images(2)[..., :1]], axis=-1)
    embeddings = {
        background: tiny(background=background).fit_transform(pixels)
        for background in ("white", "black", "#ffffff", (0, 0, 0))
    }
    np.testing.assert_array_equal(embeddings["white"], embeddings["#ffffff"])
    np.testing.assert_array_equal(embeddings["black"], embeddings[(0, 0, 0)])
    assert (embeddings["white"] != embeddings["black"]).any()
    opaque = [tiny(background=color).fit_transform(images(2)) for color in ("white", "black")]
    np.testing.assert_array_equal(*opaque)


@pytest.mark.parametrize("background", ["whit", None, (1, 2), (0, 0, 300), 0])
def test_invalid_background_is_rejected_before_anything_is_read(background):
    with pytest.raises(ValueError, match=r"Got background=.*, but expected the name of a color"):
        tiny(background=background).fit(["gone.png"])


def test_extractor_passes_check_estimator():
    # The class is a callable that builds the module. A module as a parameter fails one check, which
    # compares the joblib.hash of parameters and of their deep copies: torch tensors differ there.
    extractor = PretrainedFeatureExtractor(Tiny, image_shape=(1, -1))
    results = check_estimator(extractor, on_fail=None, on_skip=None)
    status = [result["status"] for result in results]
    failed = [(r["check_name"], str(r["exception"])) for r in results if r["status"] == "failed"]
    assert failed == []
    assert status.count("xfail") == 0
    assert status.count("passed") >= 45
    # PCA skips the same array API checks, which need another package.
    skipped = {r["check_name"] for r in results if r["status"] == "skipped"}
    assert skipped <= {"check_array_api_input", "check_array_api_input_and_values"}


def test_unfitted_extractor_raises_not_fitted():
    with pytest.raises(NotFittedError, match="not fitted yet"):
        tiny().transform(images(2))
    with pytest.raises(NotFittedError, match="not fitted yet"):
        tiny().get_feature_names_out()


def test_backbone_is_not_loaded_before_fit():
    extractor = clone(PretrainedFeatureExtractor("no_such_network", weights="nor_such_weights"))
    assert "no_such_network" in repr(extractor)
    with pytest.raises(ValueError, match="Got backbone='no_such_network'"):
        extractor.fit(images(2))


def test_repr_of_a_fitted_extractor_shows_the_preprocessing():
    extractor = PretrainedFeatureExtractor(batch_size=3)
    assert repr(extractor) == "PretrainedFeatureExtractor(batch_size=3)"
    shown = repr(extractor.fit(images(1)))
    assert shown.startswith(
        "PretrainedFeatureExtractor(batch_size=3) <resize 256 bicubic, crop 224x224, mean (0.498, "
    )


def test_set_params_applies_at_the_next_fit():
    X = images(3)
    extractor = tiny(cache=None).fit(X)
    before = extractor.transform(X)
    extractor.set_params(backbone="mobilenet_v3_small", weights=None, image_size=64)
    np.testing.assert_array_equal(extractor.transform(X), before)
    after = extractor.fit_transform(X)
    assert after.shape == (3, 1024)
    expected = PretrainedFeatureExtractor(
        "mobilenet_v3_small", weights=None, image_size=64, cache=None
    ).fit_transform(X)
    np.testing.assert_allclose(after, expected, rtol=1e-5)


def test_feature_names_match_the_width_and_set_output():
    X = images(3)
    extractor = tiny(layer=["0", None, "logits"], pooling="avg")
    embeddings = extractor.fit_transform(X)
    names = extractor.get_feature_names_out()
    assert embeddings.shape == (3, len(names)) == (3, 8 + 12 + 5)
    assert len(set(names)) == len(names)
    assert list(names[[0, 8, 20]]) == ["tiny_0_0", "tiny_0", "tiny_logits_0"]
    frame = extractor.set_output(transform="pandas").fit_transform(X)
    assert list(frame.columns) == list(names)
    np.testing.assert_array_equal(frame.to_numpy(), embeddings)
    assert extractor.set_output(transform="polars").transform(X).shape == embeddings.shape


def test_logits_are_named_after_their_categories():
    extractor = PretrainedFeatureExtractor(layer="logits").fit(images(1))
    names = list(extractor.get_feature_names_out())
    assert len(set(names)) == 1000
    assert names[1] == "efficientnet_lite0_logits_goldfish"


def test_extractor_works_on_a_column_of_paths(tmp_path):
    paths = save_images(images(6), tmp_path)
    frame = pd.DataFrame({"path": paths, "age": np.arange(6.0)})
    columns = ColumnTransformer(
        [("image", tiny(), ["path"]), ("number", StandardScaler(), ["age"])]
    )
    embedded = columns.fit_transform(frame)
    assert embedded.shape == (6, 13)
    np.testing.assert_allclose(embedded[:, :12], tiny().fit_transform(paths), rtol=1e-5)
    assert columns.get_feature_names_out()[0] == "image__tiny_0"
    with pytest.raises(ValueError, match="feature names should match those that were passed"):
        tiny().fit(frame[["path"]]).transform(frame[["path"]].rename(columns={"path": "file"}))


def test_flattened_rows_equal_the_images():
    digits = load_digits()
    rows = tiny(image_shape=(8, 8)).fit_transform(digits.data[:20])
    np.testing.assert_array_equal(rows, tiny().fit_transform(digits.images[:20]))
    np.testing.assert_array_equal(
        rows, tiny(image_shape=(-1, 8)).fit_transform(pd.DataFrame(digits.data[:20]))
    )
    with pytest.raises(ValueError, match="image_shape"):
        tiny().fit(digits.data)


def test_pixel_range_is_the_same_in_every_fold():
    digits = load_digits().images
    dark = digits[digits.max(axis=(1, 2)) < 16]
    assert len(dark) > 0
    whole = tiny().fit(digits)
    assert whole.pixel_range_ == tiny().fit(dark).pixel_range_ == (0, 16)


# --- the same image in every container ----------------------------------------------------------


CONTAINERS = {
    "paths": lambda X, paths: paths,
    "Path objects": lambda X, paths: [__import__("pathlib").Path(p) for p in paths],
    "array of paths": lambda X, paths: np.array(paths),
    "series": lambda X, paths: pd.Series(paths, index=range(5, 5 + len(paths))),
    "pandas": lambda X, paths: pd.DataFrame({"path": paths}),
    "polars": lambda X, paths: pl.DataFrame({"path": paths}),
    "PIL": lambda X, paths: [Image.fromarray(x) for x in X],
    "list of arrays": lambda X, paths: list(X),
    "NHWC": lambda X, paths: X,
    "NCHW tensor": lambda X, paths: torch.from_numpy(X).permute(0, 3, 1, 2),
    "list of tensors": lambda X, paths: [torch.from_numpy(x).permute(2, 0, 1) for x in X],
    "floats": lambda X, paths: X / 255,
    "float32 NCHW": lambda X, paths: (X / 255).astype(np.float32).transpose(0, 3, 1, 2),
    "int64": lambda X, paths: X.astype(np.int64),
    "uint16": lambda X, paths: X.astype(np.uint16) * 257,
    "bytes": lambda X, paths: [encoded(Image.fromarray(x)) for x in X],
    "dicts of PIL": lambda X, paths: [{"image": Image.fromarray(x), "label": 1} for x in X],
    "dicts of bytes": lambda X, paths: [
        {"bytes": encoded(Image.fromarray(x)), "path": None} for x in X
    ],
    "torch Dataset": lambda X, paths: Items([torch.from_numpy(x).permute(2, 0, 1) for x in X]),
    "Dataset of PIL": lambda X, paths: Items([Image.fromarray(x) for x in X]),
    "mixture": lambda X, paths: [
        paths[0],
        X[1],
        Image.fromarray(X[2]),
        encoded(Image.fromarray(X[3])),
        *X[4:],
    ],
}


@pytest.fixture(scope="module")
def photographs():
    """Return four different crops of photographs."""
    china, flower = load_sample_images().images
    return np.stack(
        [image[y : y + 240, y : y + 240] for image in (china, flower) for y in (0, 150)]
    )


@pytest.mark.parametrize("container", CONTAINERS)
def test_embedding_does_not_depend_on_the_container(container, photographs, tmp_path):
    reference = PretrainedFeatureExtractor().fit_transform(photographs)
    X = CONTAINERS[container](photographs, save_images(photographs, tmp_path))
    embedded = PretrainedFeatureExtractor().fit_transform(X)
    assert cosine(embedded, reference).min() >= 0.9999
    assert cosine(embedded, reference[::-1]).max() < 0.99


# --- guarantees ----------------------------------------------------------------------------------


def test_large_jpeg_decoded_smaller_has_the_same_embedding():
    large, pixels = [], []
    for photograph in load_sample_images().images:
        image = Image.fromarray(photograph).resize((2560, 1708), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        large.append(buffer.getvalue())
        with Image.open(buffer) as opened:
            pixels.append(np.asarray(opened))
    extractor = PretrainedFeatureExtractor(cache=None)
    decoded_smaller, whole = extractor.fit_transform(large), extractor.transform(pixels)
    assert cosine(decoded_smaller, whole).min() >= 0.999
    assert not np.array_equal(decoded_smaller, whole)


def test_module_is_unchanged_after_fit_transform_and_search(log):
    from sklearn.model_selection import GridSearchCV

    module = Tiny()
    module.train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    X, y = images(12), np.arange(12) % 2
    pipeline = make_pipeline(PretrainedFeatureExtractor(module, cache=None), LogisticRegression())
    GridSearchCV(pipeline, {"logisticregression__C": [1, 2]}, cv=2).fit(X, y)
    PretrainedFeatureExtractor(module).fit(X).transform(X)
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_named_backbone_stays_equal_to_its_file():
    from sktransfer.backbones.efficientnet_lite import efficientnet_lite, weights_path
    from sktransfer.backbones.weights import load_state_dict

    extractor = PretrainedFeatureExtractor(cache=None).fit(images(4))
    extractor.transform(images(4))
    reference = efficientnet_lite(
        "efficientnet_lite0", load_state_dict(weights_path("efficientnet_lite0"))
    ).state_dict()
    block_list = load_backbone("efficientnet_lite0").block_list
    tensors = [t for _, block in block_list.blocks for t in block.state_dict().values()]
    tensors += block_list.logits.state_dict().values()
    assert len(tensors) == len(reference)
    assert all(torch.equal(a, b) for a, b in zip(tensors, reference.values(), strict=True))


def test_embedding_does_not_depend_on_the_batch(photographs):
    X = [*photographs, photographs[0][:100, :50]]
    together = PretrainedFeatureExtractor(cache=None, batch_size=5).fit(X)
    alone = np.concatenate([together.transform([x]) for x in X])
    assert cosine(together.transform(X), alone).min() >= 0.9999


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_embedding_does_not_depend_on_batch_size_and_threads(batch_size):
    X = images(20)
    expected = tiny(cache=None).fit_transform(X)
    got = tiny(cache=None, batch_size=batch_size, n_jobs=4).fit_transform(X)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_pickle_is_small_and_works_in_a_fresh_process(tmp_path, photographs):
    extractor = PretrainedFeatureExtractor().fit(photographs)
    pickled = pickle.dumps(extractor)
    assert len(pickled) < 64 * 1024
    (tmp_path / "extractor.pickle").write_bytes(pickled)
    np.save(tmp_path / "X.npy", photographs)
    script = (
        "import pickle, sys, numpy as np\n"
        "extractor = pickle.load(open('extractor.pickle', 'rb'))\n"
        "extractor.set_params(cache=None)\n"
        "np.save('embeddings.npy', extractor.transform(np.load('X.npy')))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    embeddings = np.load(tmp_path / "embeddings.npy")
    assert cosine(embeddings, extractor.transform(photographs)).min() >= 0.9999


def test_weights_changed_since_fit_raise(tmp_path):
    module = Tiny()
    extractor = PretrainedFeatureExtractor(module).fit(images(2))
    with torch.no_grad():
        module[0][0].weight += 1
    with pytest.raises(ValueError, match=r"they have changed since\. Call fit again"):
        extractor.transform(images(2))


def test_missing_weights_offline_raise_before_the_connection_times_out(tmp_path, monkeypatch):
    import socket

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", unreachable)
    start = time.perf_counter()
    with pytest.raises(WeightsNotFoundError, match=r"resnet50-11ad3fa6\.pth is not in "):
        PretrainedFeatureExtractor("resnet50").fit(images(2))
    assert time.perf_counter() - start < 15, "it waited for the answer"


def test_weights_in_the_hub_folder_are_used(tmp_path, monkeypatch):
    from sktransfer.backbones.torchvision_blocks import build_torchvision, torchvision_weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    member = torchvision_weights("mobilenet_v3_small", "default")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    state = build_torchvision("mobilenet_v3_small", seed=5).state_dict()
    torch.save(state, folder / os.path.basename(member.url))
    X = images(3)
    embeddings = PretrainedFeatureExtractor("mobilenet_v3_small", image_size=64).fit_transform(X)
    file = tmp_path / "own.safetensors"
    __import__("safetensors.torch").torch.save_file(state, file)
    from_file = PretrainedFeatureExtractor("mobilenet_v3_small", weights=file, image_size=64)
    np.testing.assert_allclose(from_file.fit_transform(X), embeddings, rtol=1e-4, atol=1e-5)
    untrained = PretrainedFeatureExtractor("mobilenet_v3_small", weights=None, image_size=64)
    assert cosine(untrained.fit_transform(X), embeddings).max() < 0.5


def test_global_random_states_are_unchanged():
    adapting, X = tiny(batch_norm="adapt"), images(8)
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    PretrainedFeatureExtractor("squeezenet1_1", weights=None, image_size=64).fit_transform(X)
    adapting.fit_transform(X)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


# --- calls per fit -----------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of functions that a fit or a transform should call once."""
    from sktransfer import extractor
    from sktransfer.backbones import loading, source
    from sktransfer.data import images as data_images
    from sktransfer.data import validation
    from sktransfer.embedding import compute

    functions = {
        "source_of": (validation, data_images),
        "check_source": (data_images,),
        "load_backbone": (extractor, source),
        "digest_tensors": (loading,),
        "choose_engine": (compute,),
    }
    return count_calls(monkeypatch, functions)


ONCE = {"source_of", "check_source", "load_backbone", "digest_tensors", "choose_engine"}


@pytest.mark.parametrize("parameters", [{}, {"image_shape": (20, 20, 3)}, {"batch_norm": "adapt"}])
def test_call_resolves_images_backbone_and_engine_once(calls, parameters):
    X = images(6) / 255
    if "image_shape" in parameters:
        X = pd.DataFrame(X.reshape(6, -1))
    extractor = tiny(**parameters)
    extractor.fit(X)
    assert calls == dict.fromkeys(ONCE, 1)
    calls.clear()
    extractor.transform(X)
    assert calls == dict.fromkeys(ONCE, 1)
    calls.clear()
    extractor.fit_transform(X)  # a fit, then a transform
    assert calls == dict.fromkeys(ONCE, 2)


# --- broken images -----------------------------------------------------------------------------


@pytest.fixture
def with_broken(tmp_path):
    paths = save_images(images(6), tmp_path)
    (tmp_path / "2.png").write_bytes(b"no image")
    paths[4] = str(tmp_path / "gone.png")
    return paths


def test_broken_image_is_named(with_broken):
    with pytest.raises(ImageError, match=r"Image in row 2 \(.*2\.png\): ") as caught:
        tiny(batch_size=2, cache=None).fit(with_broken[:4]).transform(with_broken[:4])
    assert caught.value.row == 2
    with pytest.raises(ImageError, match=r"Image in row 4 \(.*gone\.png\): ") as caught:
        tiny().fit(with_broken).transform(with_broken)
    assert [error.row for error in caught.value.errors] == [2, 4]


@pytest.mark.parametrize("cache", [None, "auto"])
def test_broken_images_become_rows_of_nan(with_broken, cache):
    extractor = tiny(on_error="nan", cache=cache, batch_size=2)
    embedded = extractor.fit_transform(with_broken)
    assert np.isnan(embedded).any(axis=1).tolist() == [False, False, True, False, True, False]
    assert [error.row for error in extractor.errors_] == [2, 4]
    assert "2.png" in str(extractor.errors_[0])
    good = [0, 1, 3, 5]
    np.testing.assert_allclose(
        embedded[good], tiny(cache=None).fit_transform([with_broken[i] for i in good]), rtol=1e-5
    )
    extractor.transform(with_broken[:2])
    assert extractor.errors_ == []
    twice = [*with_broken[:3], with_broken[2]]
    assert np.isnan(extractor.transform(twice)).any(axis=1).tolist() == [False, False, True, True]
    assert [error.row for error in extractor.errors_] == [2, 3]


def test_embeddings_of_other_images_are_stored(with_broken, log, store):
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=store, batch_size=1, n_jobs=1)
    with pytest.raises(ImageError):
        extractor.fit_transform(with_broken[:4])
    assert counted(log) == 3
    extractor.set_params(on_error="nan").fit_transform(with_broken[:4])
    assert counted(log) == 3


# --- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"pooling": "mean"}, "pooling='mean', but expected one of 'avg', 'max', 'avgmax', None"),
        ({"layer": []}, r"Got layer=\[\], but expected None, a name, or a list"),
        ({"on_error": "skip"}, "Got on_error='skip', but expected one of 'raise', 'nan'"),
        ({"batch_norm": "ada"}, "Got batch_norm='ada', but expected one of 'frozen', 'adapt'"),
        ({"batch_size": 0}, "Got batch_size=0, but expected 'auto' or an integer from 1 to 65,536"),
        ({"device": "tpu"}, "Got device='tpu', but expected 'auto', 'cpu', 'cuda', 'cuda:0' or"),
        ({"engine": "none"}, "Got engine='none', but expected one of 'auto', 'torch'"),
        ({"precision": "fp8"}, "Got precision='fp8', but expected one of 'auto', 'float32'"),
        ({"image_size": -3}, "Got image_size=-3, but expected a side in pixels such as 224"),
        ({"layer": "7"}, "^Got layer='7', but the backbone has blocks 0, 1"),
        ({"layer": 10}, "^Got layer=10, but the backbone has blocks 0, 1"),
        ({"layer": -1}, "^Got layer=-1, but the backbone has blocks 0, 1"),
        ({"layer": [None, 0]}, "^Got layer=0, but the backbone has blocks 0, 1"),
        ({"layer": True}, "^Got layer=True, but the backbone has blocks 0, 1"),
        ({"layer": 1.5}, r"^Got layer=1\.5, but the backbone has blocks 0, 1"),
        ({"layer": ["0", ["1"]]}, r"^Got layer=\['1'\], but the backbone has blocks 0, 1"),
        (
            {"layer": np.array(["0", "1"])},
            r"^Got layer=array\(.*, but the backbone has blocks 0, 1",
        ),
        ({"layer": ["0", "0"]}, r"^Got layer=\['0', '0'\], but expected None, a name, or a list"),
        ({"pixel_range": (1, 0)}, r"Got pixel_range=\(1, 0\), but expected 'auto' or the values"),
        ({"cache": 3}, "Got cache=3"),
    ],
)
def test_invalid_parameters_are_rejected(parameters, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny(**parameters).fit_transform(images(2) / 255)


def test_image_size_unsupported_by_the_backbone_is_rejected():
    with pytest.raises(ValueError, match="Got image_size=100x100, but vit_b_16 does not accept"):
        PretrainedFeatureExtractor("vit_b_16", weights=None, image_size=100).fit(images(1))


def test_pooling_none_keeps_the_whole_feature_map():
    embedded = tiny(pooling=None).fit_transform(images(2))
    assert embedded.shape == (2, 12 * (SIZE // 4) ** 2)


def test_adapted_statistics_are_those_of_the_images():
    X = images(64)
    extractor = tiny(batch_norm="adapt").fit(X)
    statistics = to_tensors(extractor.batch_norm_.statistics)
    first = Tiny()[0][0]
    preprocessing = Tiny.preprocessing
    batch = torch.stack([preprocessing.prepare(x) for x in X])
    with torch.no_grad():
        maps = first(preprocessing.normalize(batch))
    mean = next(v for name, v in statistics.items() if name.endswith("running_mean"))
    torch.testing.assert_close(mean, maps.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    adapted = extractor.transform(X)
    frozen = tiny().fit_transform(X)
    assert not np.allclose(adapted, frozen, rtol=0.05)
    copied = pickle.loads(pickle.dumps(extractor))
    np.testing.assert_allclose(copied.transform(X), adapted, rtol=1e-5)


def test_batch_norm_adapt_rejects_a_module_without_batch_norm():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ValueError, match="has no BatchNorm layers to adapt"):
        PretrainedFeatureExtractor(module, batch_norm="adapt").fit(images(4))


def test_callable_backbone_builds_the_same_module_every_time():
    embedded = [
        PretrainedFeatureExtractor(random_module, image_size=SIZE, cache=None).fit_transform(
            images(2)
        )
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*embedded)


def random_module():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1))


def test_timm_backbone_is_loaded_by_name(photographs):
    extractor = PretrainedFeatureExtractor("timm:mobilenetv3_small_050", weights=None)
    assert extractor.fit_transform(photographs).shape == (4, 1024)
    with pytest.raises(
        ValueError, match=r"but timm has no such model .*did you mean 'timm:resnet50'"
    ):
        PretrainedFeatureExtractor("timm:resnet5O", weights=None).fit(photographs)


def test_missing_timm_raises_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'sktransfer\[timm\]'"):
        PretrainedFeatureExtractor("timm:resnet18", weights=None).fit(images(1))


BAD = {
    **BAD_SHARED,
    "layer": [[], ["0", "0"], "zz", 3, True, [None, 3], np.array(["0"]), {"0"}],
    "pooling": ["mean", 1, True],
    "batch_size": [0, -1, True, 10**9, 1.5, "16", "Auto", None],
    "on_error": [None, "ignore", True],
}


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_parameter_at_the_edge_is_rejected_before_an_image_is_read(name, value):
    extractor = PretrainedFeatureExtractor(**{"backbone": Tiny, "batch_norm": "adapt", name: value})
    with pytest.raises((ValueError, TypeError, OSError), match=r"^Got "):
        extractor.fit(Unread() if name != "pixel_range" else images(3))


@pytest.mark.parametrize(
    "parameters",
    [
        {"n_jobs": np.int64(2)},
        {"n_jobs": -5},
        {"image_size": np.int64(32)},
        {"image_size": (np.int32(32), 24)},
        {"image_size": [32, 24]},
        {"batch_size": np.int64(3)},
        {"verbose": np.bool_(False)},
        {"layer": (None, "0")},
        {"device": torch.device("cpu")},
        {"cache": Path("none")},
    ],
)
def test_parameter_near_the_edge_works(parameters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert np.isfinite(tiny(**parameters).fit_transform(images(3))).all()


def test_weights_of_torchvision_stand_for_their_name(monkeypatch):
    from torchvision.models import ResNet18_Weights

    from sktransfer.backbones import loading

    loaded = []

    def load_named(name, weights):
        loaded.append((name, weights))
        raise WeightsNotFoundError

    monkeypatch.setattr(loading, "load_named", load_named)
    with pytest.raises(WeightsNotFoundError):
        PretrainedFeatureExtractor("resnet18", weights=ResNet18_Weights.DEFAULT).fit(images(2))
    assert loaded == [("resnet18", "IMAGENET1K_V1")]


@pytest.mark.parametrize("parameters", [{}, {"cache": None}, {"batch_size": 2}, {"n_jobs": 1}])
def test_one_error_names_all_broken_images(parameters, tmp_path):
    paths, _ = paths_with_broken(tmp_path)
    with pytest.raises(ImageError, match="Got 4 images that cannot be read:") as caught:
        tiny(**parameters).fit_transform(paths)
    assert [error.row for error in caught.value.errors] == BROKEN_ROWS
    assert [error.source for error in caught.value.errors] == [paths[row] for row in BROKEN_ROWS]
    assert (caught.value.row, caught.value.source) == (1, paths[1])


def test_one_error_names_all_broken_images_of_adapted_statistics(tmp_path):
    paths, _ = paths_with_broken(tmp_path)
    with pytest.raises(ImageError) as caught:
        tiny(batch_norm="adapt").fit(paths)
    assert [error.row for error in caught.value.errors] == BROKEN_ROWS


def test_duplicates_of_a_broken_image_are_named(tmp_path):
    paths, _ = paths_with_broken(tmp_path)
    with pytest.raises(ImageError) as caught:
        tiny().fit_transform([*paths[:4], paths[1], paths[0], paths[1]])
    assert [error.row for error in caught.value.errors] == [1, 4, 6]


@pytest.mark.parametrize("cached", [True, False])
def test_images_after_a_broken_one_are_embedded_only_for_the_store(tmp_path, log, store, cached):
    paths, _ = paths_with_broken(tmp_path)
    cache = store if cached else None
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=cache, batch_size=1, n_jobs=1)
    with pytest.raises(ImageError):
        extractor.fit_transform(paths)
    assert counted(log) == (8 if cached else 1)
