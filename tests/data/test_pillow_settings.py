"""Workers decode as their parent does, whatever it has told Pillow; no other process is changed."""

import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import joblib
import numpy as np
import pytest
from helpers import FlippedImage, Tiny, images, save_images, starts_with_flipped
from PIL import GifImagePlugin, Image, ImageFile, PngImagePlugin, TiffImagePlugin
from sklearn.base import clone
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from sktransfer import FineTunedImageClassifier, ImageError, PretrainedFeatureExtractor
from sktransfer.data import pillow_settings
from sktransfer.data.pillow_settings import adopt_pillow_settings, share_pillow_settings
from sktransfer.store import session

X, y = images(8, side=24), np.arange(8) % 2

SETTINGS = [
    (Image, "MAX_IMAGE_PIXELS", None),
    (Image, "MAX_IMAGE_PIXELS", 1000),
    (Image, "MAX_IMAGE_PIXELS", 10**10),
    (ImageFile, "LOAD_TRUNCATED_IMAGES", True),
    (GifImagePlugin, "LOADING_STRATEGY", GifImagePlugin.LoadingStrategy.RGB_ALWAYS),
    (PngImagePlugin, "MAX_TEXT_CHUNK", 2**24),
    (PngImagePlugin, "MAX_TEXT_MEMORY", 2**30),
    (TiffImagePlugin, "READ_LIBTIFF", True),
]
NAMES = [f"{name}={value}" for _, name, value in SETTINGS]


@pytest.fixture(autouse=True)
def _restored():
    """Restore Pillow and the workers after each test."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, _ in pillow_settings._SWITCHES:
            module = importlib.import_module(module)
            patch.setattr(module, name, getattr(module, name))
        openers, names = dict(Image.OPEN), list(Image.ID)
        yield
        Image.OPEN.clear()
        Image.OPEN.update(openers)
        Image.ID[:] = names
        share_pillow_settings()  # replaces the file that a test has left


def become_worker(monkeypatch):
    """Let this process believe that it is a worker of itself."""
    parent = SimpleNamespace(pid=os.getpid())
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)


def test_usual_values_are_those_of_pillow():
    for module, name, usual in pillow_settings._SWITCHES:
        assert getattr(importlib.import_module(module), name) == usual


@pytest.mark.parametrize(("module", "name", "value"), SETTINGS, ids=NAMES)
def test_worker_adopts_a_setting_and_its_reset(monkeypatch, module, name, value):
    usual = getattr(module, name)
    setattr(module, name, value)
    share_pillow_settings()
    setattr(module, name, usual)
    become_worker(monkeypatch)
    adopt_pillow_settings()
    assert getattr(module, name) == value
    setattr(module, name, usual)
    share_pillow_settings()  # the parent has reset it
    setattr(module, name, value)
    adopt_pillow_settings()
    assert getattr(module, name) == usual


def value_in_worker(extractor, module, name):
    return getattr(importlib.import_module(module), name)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name", "value"), SETTINGS, ids=NAMES)
def test_setting_reaches_a_worker_that_runs_already(module, name, value):
    arguments = (PretrainedFeatureExtractor(), module.__name__, name)
    usual = getattr(module, name)
    with joblib.parallel_backend("loky", n_jobs=2):
        for expected in (usual, value, usual):
            setattr(module, name, expected)
            job = joblib.delayed(value_in_worker)(*arguments)
            assert joblib.Parallel()([job, job]) == [expected] * 2


def truncated(folder):
    paths = save_images(X, folder)
    for path in paths[:3]:
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) - 200])
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    return paths


def huge(folder):
    Image.MAX_IMAGE_PIXELS = None
    path = folder / "huge.gif"  # more pixels than Pillow's limit, in a small file
    Image.new("1", (9500, 9500)).save(path)
    return [*save_images(X[1:], folder), str(path)]


def small(folder):
    Image.MAX_IMAGE_PIXELS = 24 * 24 - 1  # all images are refused
    return save_images(X, folder)


def long_text(folder):
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2**21, zip=True)
    Image.fromarray(X[0]).save(folder / "text.png", pnginfo=text)
    PngImagePlugin.MAX_TEXT_CHUNK = 2**22
    return [*save_images(X[1:], folder), str(folder / "text.png")]


def plugin(folder):
    Image.register_open("FLIPPED", FlippedImage, starts_with_flipped)
    return flipped_files(folder)


def plugin_of_a_notebook(folder):
    def starts(prefix):
        return prefix.startswith(b"FLIPPED")

    class LocalImage(FlippedImage):
        format = "LOCAL"

    Image.register_open("LOCAL", LocalImage, starts)
    return flipped_files(folder)


def plugin_without_a_test(folder):
    Image.register_open("FLIPPED", FlippedImage)
    return flipped_files(folder)


def plugin_for_png(folder):
    """A plugin of the user may replace one of Pillow."""
    Image.init()
    Image.register_open("PNG", FlippedPng, lambda prefix: prefix.startswith(b"\x89PNG"))
    return save_images(X, folder)


class FlippedPng(PngImagePlugin.PngImageFile):
    def load_end(self):
        super().load_end()
        self.im = self.im.transpose(Image.Transpose.FLIP_TOP_BOTTOM)


def flipped_files(folder):
    paths = []
    for path in map(Path, save_images(X, folder)):
        paths.append(str(path.with_suffix(".flipped")))
        Path(paths[-1]).write_bytes(b"FLIPPED" + path.read_bytes())
    return paths


CASES = [truncated, huge, small, long_text, plugin, plugin_of_a_notebook, plugin_without_a_test]
CASES += [plugin_for_png]


def extractor():
    return make_pipeline(PretrainedFeatureExtractor(Tiny, cache=None), RidgeClassifier())


def classifier():
    options = {"unfreeze": (0,), "augment": None, "random_state": 0, "cache": None}
    return FineTunedImageClassifier(Tiny, **options)


def scores(model, paths, n_jobs):
    """Return the scores, or the text of the error without the row, which depends on the fold."""
    try:
        return cross_val_score(model, paths, y, cv=2, n_jobs=n_jobs, error_score="raise").tolist()
    except ImageError as error:
        return error.reason


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "make"),
    [*((extractor, make) for make in CASES), (classifier, truncated), (classifier, plugin)],
)
def test_result_is_the_same_for_any_number_of_jobs(tmp_path, model, make):
    paths = make(tmp_path)
    expected = scores(model(), paths, None)
    assert isinstance(expected, str) == (make is small)
    assert scores(model(), paths, 2) == expected  # in workers that are older than the settings


@pytest.mark.slow
def test_settings_of_a_parent_reach_the_workers_of_a_worker(tmp_path):
    ImageFile.LOAD_TRUNCATED_IMAGES = True

    def nested(extractor):
        with joblib.parallel_backend("loky", n_jobs=2):
            job = joblib.delayed(value_in_worker)
            return joblib.Parallel()(
                job(extractor, "PIL.ImageFile", "LOAD_TRUNCATED_IMAGES") for _ in range(2)
            )

    (values,) = joblib.Parallel(n_jobs=2)([joblib.delayed(nested)(PretrainedFeatureExtractor())])
    assert values == [True, True]


@pytest.mark.parametrize("make", [plugin, truncated, huge, long_text])
def test_pickle_and_hash_do_not_depend_on_settings(tmp_path, make):
    fitted = PretrainedFeatureExtractor(Tiny, cache=None).fit(X)
    before = pickle.dumps(fitted), joblib.hash(fitted)
    make(tmp_path)
    assert (pickle.dumps(fitted), joblib.hash(fitted)) == before
    assert clone(fitted).get_params() == fitted.get_params()


@pytest.mark.slow
def test_pickle_changes_no_other_process(tmp_path):
    fitted = PretrainedFeatureExtractor(cache=None)
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = True, None
    Image.register_open("FLIPPED", FlippedImage, starts_with_flipped)
    (tmp_path / "fitted.pkl").write_bytes(pickle.dumps(fitted))
    script = (
        "import pickle\n"
        "from PIL import Image, ImageFile\n"
        "pickle.load(open('fitted.pkl', 'rb'))\n"
        "assert Image.MAX_IMAGE_PIXELS and not ImageFile.LOAD_TRUNCATED_IMAGES\n"
        "assert 'FLIPPED' not in Image.OPEN\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_copy_changes_nothing_in_the_same_process():
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    pickled = pickle.dumps(PretrainedFeatureExtractor())
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    pickle.loads(pickled)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_settings_of_a_worker_stay_if_the_parent_shares_none(monkeypatch):
    become_worker(monkeypatch)
    session._shared_file("pillow", os.getpid()).unlink(missing_ok=True)
    share_pillow_settings()
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # as an initializer of workers may do
    adopt_pillow_settings()
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_plugin_that_a_worker_lacks_is_left_out(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lost_plugin.py").write_text("def opener(file, name):\n    raise SyntaxError\n")
    Image.register_open("LOST", importlib.import_module("lost_plugin").opener)
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    share_pillow_settings()
    (tmp_path / "lost_plugin.py").unlink()
    del sys.modules["lost_plugin"], Image.OPEN["LOST"]
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    become_worker(monkeypatch)
    importlib.invalidate_caches()
    adopt_pillow_settings()
    assert ImageFile.LOAD_TRUNCATED_IMAGES
    assert "LOST" not in Image.OPEN


@pytest.mark.slow
def test_file_is_private_and_removed_at_exit(tmp_path):
    script = (
        "import os, pickle\n"
        "from PIL import ImageFile\n"
        "from sktransfer import PretrainedFeatureExtractor\n"
        "from sktransfer.store import session\n"
        "ImageFile.LOAD_TRUNCATED_IMAGES = True\n"
        "pickle.dumps(PretrainedFeatureExtractor(cache=None))\n"
        "path = session._shared_file('pillow', os.getpid())\n"
        "assert path.stat().st_mode & 0o77 == path.parent.stat().st_mode & 0o77 == 0\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert not [path for path in tmp_path.rglob("*") if "pillow" in path.name]
