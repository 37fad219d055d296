"""All functions and estimators that read images name all broken files at once."""

import functools
from pathlib import Path

import numpy as np
import pytest
from helpers import Tiny, colored_images, make_classifier, save_images
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from sktransfer import (
    AugmentationDisplay,
    ImageError,
    PretrainedFeatureExtractor,
    SelfTrainedImageClassifier,
    estimate_cost,
    find_leaks,
    load_image_folder,
    rank_backbones,
    recommend_strategy,
)

N, BROKEN = 60, [1, 31, 52]
DOMAIN = np.repeat([1, -2], [30, 30])
extractor = functools.partial(PretrainedFeatureExtractor, Tiny, cache=None)


@pytest.fixture
def files(tmp_path):
    """Save images in folders of their classes; break one in each of the ways; return X and y."""
    X, y = colored_images(N)
    for label in np.unique(y):
        save_images(X[y == label], tmp_path / "photos" / label)
    photos = load_image_folder(tmp_path / "photos")
    Path(photos.data[1]).write_bytes(b"no image")
    Path(photos.data[31]).unlink()
    Path(photos.data[52]).write_bytes(Path(photos.data[52]).read_bytes()[:300])
    return photos.data, photos.labels


@pytest.fixture(autouse=True)
def parents(tmp_path):
    (tmp_path / "photos").mkdir()


def pipeline():
    return make_pipeline(extractor(), LogisticRegression())


def self_train(estimator, X, y):
    SelfTrainedImageClassifier(estimator).fit(X, y, sample_domain=DOMAIN)


FUNCTIONS = {
    "extractor": lambda X, y: extractor().fit_transform(X),
    "extractor adapted": lambda X, y: extractor(batch_norm="adapt").fit(X),
    "pipeline": lambda X, y: pipeline().fit(X, y),
    "classifier": lambda X, y: make_classifier().fit(X, y),
    "classifier adapted": lambda X, y: make_classifier(batch_norm="adapt").fit(X, y),
    "classifier adapted to a target": lambda X, y: make_classifier(
        batch_norm="adapt", unfreeze=(0,)
    ).fit(X, y, sample_domain=DOMAIN),
    "recommend_strategy": lambda X, y: recommend_strategy(X, y, extractor=extractor()),
    "rank_backbones": lambda X, y: rank_backbones(X, y, [Tiny], extractor=extractor()),
    "find_leaks": lambda X, y: find_leaks(X, y, extractor=extractor()),
    "estimate_cost of a classifier": lambda X, y: estimate_cost(
        make_classifier(unfreeze="auto"), X, y
    ),
    "estimate_cost of an extractor": lambda X, y: estimate_cost(extractor(), np.roll(X, -1), y),
    "AugmentationDisplay": lambda X, y: AugmentationDisplay.from_images(
        X, backbone=Tiny, n_images=N
    ),
    "self-training": lambda X, y: self_train(make_classifier(unfreeze=(0,)), X, y),
    "self-training of a pipeline": lambda X, y: self_train(pipeline(), X, y),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:Got batch_norm='adapt' with:UserWarning")
def test_all_broken_files_are_named_at_once(name, files):
    X, y = files
    rolled = 1 if "extractor" in name and "cost" in name else 0
    warns = name == "find_leaks"
    context = (
        pytest.warns(UserWarning, match="cannot be read") if warns else pytest.raises(ImageError)
    )
    with context as caught:
        FUNCTIONS[name](X, y)
    message = str(caught[0].message if warns else caught.value)
    assert message.startswith("Got 3 images that cannot be read")
    for row in BROKEN:
        assert f"- Image in row {row - rolled} ({X[row]}): " in message
    if warns:
        assert "unreadable lists all" in message
    else:
        assert "`error.errors` lists all of them" in message
        assert [error.row + rolled for error in caught.value.errors] == BROKEN


def test_cost_of_estimators_that_leave_out_broken_images_is_estimated(files):
    X, y = files
    for estimator in (extractor(on_error="nan"), make_classifier(unfreeze="auto", on_error="skip")):
        assert estimate_cost(estimator, X, y).images_embedded > 0


def test_self_training_leaves_out_what_its_classifier_leaves_out(files):
    X, y = files
    classifier = SelfTrainedImageClassifier(
        make_classifier(unfreeze=(0,), on_error="skip"), shares=[0.5]
    )
    with pytest.warns(UserWarning, match="that cannot be read"):
        classifier.fit(X, y, sample_domain=DOMAIN)
    assert len(classifier.pseudo_rows_)
    assert not set(BROKEN) & set(classifier.pseudo_rows_)
    with pytest.warns(UserWarning, match="Got 3 of 60 images"):
        assert np.flatnonzero(np.isnan(classifier.predict_proba(X)).any(axis=1)).tolist() == BROKEN
    with pytest.raises(ImageError) as caught, pytest.warns(UserWarning, match="Got 3 of 60"):
        classifier.predict(X)
    assert [error.row for error in caught.value.errors] == BROKEN
