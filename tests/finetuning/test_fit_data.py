"""`on_error="skip"`: a fit on images some of which are broken is the fit on the others."""

import functools
import pickle
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    NAMES,
    PowerCut,
    colored_images,
    equal_states,
    make_classifier,
    net_state,
    save_images,
)
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score

from sktransfer import EmbeddingStore, ImageError, estimate_cost
from sktransfer.data import decoding
from sktransfer.data.images import as_images
from sktransfer.data.labels import check_labels
from sktransfer.finetuning.fit_data import FitData

BROKEN = [2, 7, 12, 19, 20, 30]
N = 36
fits = functools.partial(make_classifier, max_epochs=2, n_views=1, on_error="skip")
pytestmark = pytest.mark.filterwarnings("ignore:Left out")


def broken_files(folder, n=N, seed=0):
    """Save images and break those in `BROKEN`, each in another way; return X and y."""
    X, y = colored_images(n, seed=seed)
    paths = save_images(X, folder)
    Path(paths[2]).write_bytes(b"no image")
    Path(paths[7]).unlink()
    Path(paths[12]).write_bytes(Path(paths[12]).read_bytes()[:400])
    Path(paths[20]).write_bytes(b"")
    Path(paths[30]).unlink()
    Path(paths[30]).mkdir()
    paths[19] = None
    return paths, y


def without(values, rows=BROKEN):
    return [value for row, value in enumerate(values) if row not in rows]


def rows_of(errors, argument=""):
    return [error.row for error in errors if error.argument == argument]


def assert_same_fit(classifier, expected, X):
    assert equal_states(net_state(classifier), net_state(expected))
    assert (classifier.predict_proba(X) == expected.predict_proba(X)).all()
    assert [{**stage, "seconds": 0} for stage in classifier.stages_] == [
        {**stage, "seconds": 0} for stage in expected.stages_
    ]
    assert str(classifier.decision_) == str(expected.decision_)
    assert classifier.pixel_range_ == expected.pixel_range_


SETTINGS = {
    "head only": {"unfreeze": (0,)},
    "staged": {},
    "without early stopping": {"early_stopping": False},
    "all blocks": {"unfreeze": (0, "all")},
    "all blocks from the start": {"unfreeze": ("all",)},
    "new views": {"unfreeze": (1,), "n_views": None},
    "new views of all blocks": {"unfreeze": ("all",), "n_views": None},
    "decided": {"unfreeze": "auto", "augment": "auto", "max_epochs": "auto", "lr": "auto"},
    "adapted": {"batch_norm": "adapt"},
    "balanced": {"class_weight": "balanced"},
}


@pytest.mark.slow_cases("without early stopping", "decided", "balanced", "all blocks")
@pytest.mark.parametrize("name", SETTINGS)
def test_fit_equals_the_fit_on_the_readable_images(name, tmp_path):
    X, y = broken_files(tmp_path)
    classifier = fits(**SETTINGS[name])
    with pytest.warns(UserWarning, match=r"Left out 6 of 36 images that cannot be read") as caught:
        classifier.fit(X, y)
    skipped = [warning for warning in caught if "Left out" in str(warning.message)]
    assert len(skipped) == 1
    assert skipped[0].filename == __file__
    assert f"Image in row 12 ({X[12]}): " in str(skipped[0].message)
    assert rows_of(classifier.errors_) == BROKEN
    assert classifier.errors_[0].source == X[2]
    expected = fits(**SETTINGS[name]).fit(without(X), without(y))
    assert expected.errors_ == []
    assert_same_fit(classifier, expected, without(X))
    assert_same_fit(
        classifier, fits(**SETTINGS[name], on_error="raise").fit(without(X), without(y)), X[:2]
    )


def test_fit_in_a_store_equals_the_fit_without_one(tmp_path):
    X, y = broken_files(tmp_path / "images")
    store = EmbeddingStore(tmp_path / "store")
    stored = fits(cache=store).fit(X, y)
    n_computed = store.info().computed
    again = fits(cache=store).fit(without(X), without(y))
    assert store.info().computed == n_computed
    assert_same_fit(stored, again, without(X))
    assert rows_of(stored.errors_) == BROKEN


def test_weights_labels_and_domains_stay_with_their_images(tmp_path):
    X, y = broken_files(tmp_path, 60)
    weight = np.linspace(0, 2, 60)
    domain = np.where(np.arange(60) % 4 == 3, -2, 1)  # rows 7 and 19 are of the target
    for settings in ({"batch_norm": "adapt"}, {"domain_adversarial": 0.1}):
        classifier = fits(unfreeze=(0, 1), averaging=1.0, **settings)
        with pytest.warns(UserWarning, match="Left out 6 of 60"):
            classifier.fit(X, y, sample_weight=weight, sample_domain=domain)
        assert rows_of(classifier.errors_) == BROKEN
        expected = clone(classifier).fit(
            without(X), without(y), sample_weight=without(weight), sample_domain=without(domain)
        )
        assert_same_fit(classifier, expected, without(X))


def test_images_of_a_target_that_the_fit_does_not_use_are_not_read(tmp_path):
    X, y = broken_files(tmp_path)
    domain = np.where(np.arange(N) % 4 == 3, -2, 1)
    classifier = fits().fit(X, y, sample_domain=domain)
    assert rows_of(classifier.errors_) == [2, 12, 20, 30]


def test_images_without_weight_are_not_read(tmp_path):
    X, y = broken_files(tmp_path)
    weight = np.ones(N)
    weight[[2, 7, 19]] = 0
    assert rows_of(fits().fit(X, y, sample_weight=weight).errors_) == [12, 20, 30]


def test_broken_validation_images_are_left_out_and_named_as_such(tmp_path):
    X, y = broken_files(tmp_path / "train")
    X_val, y_val = broken_files(tmp_path / "valid", 33, seed=1)
    classifier = fits()
    with pytest.warns(UserWarning, match="Left out 6 of 36 images and 6 images of X_val that"):
        classifier.fit(X, y, X_val=X_val, y_val=y_val)
    assert rows_of(classifier.errors_) == rows_of(classifier.errors_, "X_val") == BROKEN
    assert f"Image in row 2 of X_val ({X_val[2]}): " in str(classifier.errors_[6])
    expected = fits().fit(without(X), without(y), X_val=without(X_val), y_val=without(y_val))
    assert_same_fit(classifier, expected, without(X))
    only_valid = fits().fit(without(X), without(y), X_val=X_val, y_val=y_val)
    assert rows_of(only_valid.errors_) == []
    assert_same_fit(only_valid, expected, without(X))
    with pytest.raises(ImageError, match="Got 12 images that cannot be read") as caught:
        fits(on_error="raise").fit(X, y, X_val=X_val, y_val=y_val)
    assert str(caught.value.errors) == str(classifier.errors_)


@pytest.mark.parametrize(
    "settings", [{}, {"unfreeze": ("all",), "n_views": None}, {"unfreeze": (1,)}]
)
def test_one_error_names_broken_images_of_all_kinds_by_default(settings, tmp_path):
    X, y = broken_files(tmp_path)
    with pytest.raises(ImageError, match="Got 6 images that cannot be read") as caught:
        fits(on_error="raise", checkpoint_dir=tmp_path / "checkpoints", **settings).fit(X, y)
    assert rows_of(caught.value.errors) == BROKEN


def test_rows_with_the_same_broken_file_are_all_listed(tmp_path):
    X, y = broken_files(tmp_path)
    X, y = [*X, X[2], X[0], X[2]], np.append(y, y[[2, 0, 2]])
    classifier = fits().fit(X, y)
    assert rows_of(classifier.errors_) == [*BROKEN, 36, 38]


def test_random_state_advances_once(tmp_path):
    X, y = broken_files(tmp_path)
    state, expected_state = np.random.RandomState(5), np.random.RandomState(5)
    classifier = fits(random_state=state).fit(X, y)
    expected = fits(random_state=expected_state).fit(without(X), without(y))
    assert_same_fit(classifier, expected, without(X))
    assert state.randint(2**31) == expected_state.randint(2**31)


def test_class_without_a_readable_image_raises(tmp_path):
    X, y = broken_files(tmp_path)
    y = np.where(np.isin(np.arange(N), BROKEN[:3]), "ant", y)
    with pytest.raises(
        ValueError, match=r"^Got 3 images of the class 'ant', none of which"
    ) as caught:
        fits().fit(X, y)
    assert not isinstance(caught.value, ImageError)
    assert f"Image in row 2 ({X[2]}): " in str(caught.value)


def test_fit_without_a_readable_image_raises(tmp_path):
    missing = [str(tmp_path / f"{row}.png") for row in range(12)]
    with pytest.raises(ValueError, match=r"^Got 12 images in X, none of which can be read"):
        fits().fit(missing, NAMES[np.arange(12) % 3])
    X, y = colored_images(12)
    with pytest.raises(ValueError, match=r"^Got 12 images in X_val, none of which can be read"):
        fits().fit(X, y, X_val=missing, y_val=y)
    both, domain = [*X, *missing], np.repeat([1, -1], 12)
    with pytest.raises(ValueError, match=r"^Got 12 images of the target domain, none of which"):
        fits(batch_norm="adapt").fit(both, np.tile(y, 2), sample_domain=domain)


def count_reads(monkeypatch):
    """Count how often each file is decoded."""
    reads, decode = {}, decoding.decode

    def counting(image, *args, **options):
        reads[image] = reads.get(image, 0) + 1
        return decode(image, *args, **options)

    monkeypatch.setattr(decoding, "decode", counting)
    return reads


@pytest.mark.slow_cases("without early stopping", "decided", "adapted", "all blocks")
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "balanced"])
def test_readable_images_are_not_read_more_often_than_by_default(name, tmp_path, monkeypatch):
    X, y = colored_images(N)
    paths = save_images(X, tmp_path)
    reads = count_reads(monkeypatch)
    counts = []
    for on_error in ("raise", "skip"):
        fits(**SETTINGS[name], on_error=on_error).fit(paths, y)
        counts.append(dict(reads))
        reads.clear()
    assert counts[0] == counts[1]
    assert len(counts[0]) == N


def test_fit_resumes_from_the_checkpoint_of_the_readable_images(tmp_path):
    X, y = broken_files(tmp_path / "images")
    settings = {"checkpoint_dir": tmp_path / "checkpoints", "max_epochs": 3}
    expected = fits(max_epochs=3).fit(without(X), without(y))
    with pytest.raises(RuntimeError, match="power cut"):
        fits(**settings, callbacks=[PowerCut(4)]).fit(X, y)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.pt")
    resumed = fits(**settings).fit(X, y)
    assert_same_fit(resumed, expected, without(X))
    fits(**settings, on_error="raise").fit(without(X), without(y))
    assert [*(tmp_path / "checkpoints").glob("*.pt")] == [checkpoint]


def test_searches_leave_out_the_broken_images_of_each_fold(tmp_path):
    X, y = broken_files(tmp_path)
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    classifier = fits(unfreeze=(0,))
    with pytest.warns(UserWarning, match="that cannot be read"):
        scores = cross_val_score(classifier, X, y, cv=folds, error_score="raise")
    expected = []
    for train, test in folds.split(X, y):
        good_train, good_test = np.setdiff1d(train, BROKEN), np.setdiff1d(test, BROKEN)
        fitted = clone(classifier).fit([X[row] for row in good_train], y[good_train])
        expected.append(fitted.score([X[row] for row in good_test], y[good_test]))
    assert scores.tolist() == expected
    search = GridSearchCV(classifier, {"dropout": [0.1, 0.2]}, cv=folds, error_score="raise")
    with pytest.warns(UserWarning, match="that cannot be read"):
        search.fit(X, y)
    assert search.best_score_ == pytest.approx(np.mean(expected))
    assert rows_of(search.best_estimator_.errors_) == BROKEN


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("unfreeze", [(0,), ("all",)])
def test_outputs_of_broken_images_are_nan_and_predict_raises(unfreeze, cached, tmp_path):
    X, y = broken_files(tmp_path / "images")
    cache = str(tmp_path / "store") if cached else None
    classifier = fits(unfreeze=unfreeze, cache=cache).fit(without(X), without(y))
    readable = np.setdiff1d(np.arange(N), BROKEN)
    for method in ("predict_proba", "decision_function", "transform"):
        expected = getattr(classifier, method)(without(X))
        with pytest.warns(UserWarning, match=r"Got 6 of 36 images that cannot be read\.") as caught:
            outputs = getattr(classifier, method)(X)
        assert caught[-1].filename == __file__
        assert f"- Image in row 12 ({X[12]}): " in str(caught[-1].message)
        assert classifier.errors_ == []  # those of fit
        assert (outputs[readable] == expected).all()
        assert np.isnan(outputs[BROKEN]).all()
        assert outputs.dtype == expected.dtype
        with pytest.warns(UserWarning, match="Got 1 of 1 image that cannot be read"):
            alone = getattr(classifier, method)(X[7:8])
        assert alone.shape == (1, *expected.shape[1:])
        assert np.isnan(alone).all()
    with pytest.raises(ImageError, match="Got 6 images that cannot be read") as caught:
        classifier.predict(X)
    assert rows_of(caught.value.errors) == BROKEN
    with pytest.warns(UserWarning, match="Got 6 of 36"):
        score = classifier.score(X, y, sample_weight=np.arange(N))
    assert score == classifier.score(without(X), without(y), sample_weight=readable)
    with pytest.raises(ImageError), pytest.warns(UserWarning, match="Got 1 of 1"):
        classifier.score(X[7:8], y[7:8])
    classifier.set_params(on_error="raise")
    for method in ("predict_proba", "decision_function", "transform", "predict"):
        with pytest.raises(ImageError, match="Got 6 images that cannot be read"):
            getattr(classifier, method)(X)


def test_predictions_do_not_read_readable_images_twice(tmp_path, monkeypatch):
    X, y = colored_images(N)
    paths = save_images(X, tmp_path)
    classifier = fits(unfreeze=("all",)).fit(paths, y)
    reads = count_reads(monkeypatch)
    classifier.predict_proba(paths)
    assert [*reads.values()] == [1] * N


def test_estimators_from_before_the_parameter_are_loaded(tmp_path):
    X, y = colored_images(N)
    classifier = fits(on_error="raise").fit(X, y)
    expected = classifier.predict_proba(X)
    del classifier.on_error, classifier.errors_
    old = pickle.loads(pickle.dumps(classifier))
    assert (old.predict_proba(X) == expected).all()
    assert old.get_params()["on_error"] == clone(old).on_error == "raise"
    assert "Classifier" in repr(old)
    assert old.score(X, y) > 0.5


def test_errors_survive_pickling_and_cost_is_estimated(tmp_path):
    X, y = broken_files(tmp_path)
    classifier = pickle.loads(pickle.dumps(fits().fit(X, y, X_val=X, y_val=y)))
    assert rows_of(classifier.errors_, "X_val") == BROKEN
    cost = estimate_cost(fits(), X, y)
    on_readable = estimate_cost(fits(), without(X), without(y))
    assert cost.images_trained >= on_readable.images_trained > 0


def test_callbacks_score_the_images_of_the_fit(tmp_path):
    callback = pytest.importorskip("sklearn.callback")
    X, y = broken_files(tmp_path)
    weight, logs = np.arange(1.0, N + 1), []
    for arguments in ((X, y, weight), tuple(map(without, (X, y, weight)))):
        monitor = callback.ScoringMonitor(scoring="neg_log_loss")
        data, labels, weights = arguments
        fits().set_callbacks(monitor).fit(data, labels, sample_weight=weights)
        logs.append([row["neg_log_loss"] for row in monitor.get_logs().data])
    assert len(logs[0]) > 3
    assert logs[0] == logs[1]


def test_invalid_on_error_is_rejected():
    X, y = colored_images(6)
    with pytest.raises(ValueError, match="Got on_error='nan', but expected one of 'raise', 'skip'"):
        fits(on_error="nan").fit(X, y)


def test_an_error_that_names_no_used_image_is_raised_again():
    X, y = colored_images(6)
    images = as_images(X)
    error = ImageError("Gone.", 9, "a.png")
    data = FitData(X, y, None, None, None, None)
    with pytest.raises(ImageError) as caught:
        data.without(error, images, None)
    assert caught.value is error
    left = data.without(ImageError("Gone.", 4, "a.png"), images, None)
    assert left.rows.tolist() == [0, 1, 2, 3, 5]
    assert check_labels(images.take(left.rows), left.used("y")).rows.tolist() == [0, 1, 2, 3, 4]
    assert left.used("sample_weight") is None


def test_fit_on_pixels_and_datasets_leaves_out_wrong_types():
    X, y = colored_images(N)
    mixed = [None if row in BROKEN else image for row, image in enumerate(X)]
    classifier = fits().fit(mixed, y)
    assert rows_of(classifier.errors_) == BROKEN
    assert_same_fit(classifier, fits().fit(without(X), without(y)), X)
