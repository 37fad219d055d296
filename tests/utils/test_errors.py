import math
import pickle
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import pytest
from helpers import X, Y, make_classifier
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from sktransfer import SelfTrainedImageClassifier, load_image_folder
from sktransfer.utils.errors import (
    ImageError,
    check_bool,
    check_choice,
    check_directory,
    check_number,
    check_random_state,
    check_verbose,
    import_optional,
    warn_user,
)


def test_image_error_names_row_and_source_and_survives_pickling():
    assert str(ImageError("It is broken.")) == "Image: It is broken."
    error = ImageError("It is broken.", 3, "a.png")
    assert str(error) == "Image in row 3 (a.png): It is broken."
    loaded = pickle.loads(pickle.dumps(error))
    assert (loaded.reason, loaded.row, loaded.source) == ("It is broken.", 3, "a.png")
    assert str(loaded) == str(error)


ERRORS = [ImageError(f"Broken {row}.", row, f"{row}.png") for row in range(12)]


def test_image_error_of_several_images_lists_ten_and_keeps_all():
    error = ImageError.of([*reversed(ERRORS), ERRORS[3]])
    lines = str(error).splitlines()
    assert lines[0] == "Got 12 images that cannot be read; the first 10:"
    assert lines[1:11] == [f"- Image in row {i} ({i}.png): Broken {i}." for i in range(10)]
    assert lines[11:] == [
        "Fix the cause, or leave these images out. `error.errors` lists all of them. Rows count "
        "the images that this call got, such as those of one fold."
    ]
    assert (error.reason, error.row, error.source) == ("Broken 0.", 0, "0.png")
    assert [each.row for each in error.errors] == list(range(12))
    loaded = pickle.loads(pickle.dumps(error))
    assert str(loaded) == str(error)
    assert [each.row for each in ImageError.of([loaded, error]).errors] == list(range(12))


@pytest.mark.parametrize(
    ("errors", "shown"),
    [
        (ERRORS[3:4], "ImageError('Image in row 3 (3.png): Broken 3.')"),
        (ERRORS[3:5], "ImageError('Image in row 3 (3.png): Broken 3.', and 1 more)"),
        (ERRORS, "ImageError('Image in row 0 (0.png): Broken 0.', and 11 more)"),
        (
            [ImageError("No.", row) for row in range(2000)],
            "ImageError('Image in row 0: No.', and 1,999 more)",
        ),
    ],
)
def test_repr_of_an_image_error_has_the_first_message_and_the_count(errors, shown):
    error = ImageError.of(errors)
    loaded = pickle.loads(pickle.dumps(error))
    assert repr(error) == repr(loaded) == shown
    assert len(loaded.errors) == len(errors)
    assert repr([error]) == f"[{shown}]"


def test_image_error_of_one_image_is_the_error_itself():
    error = ImageError.of([ERRORS[5]])
    assert str(error) == str(ERRORS[5])
    assert [each.row for each in error.errors] == [5]


def test_check_choice_lists_the_options_and_suggests_the_closest():
    check_choice("pooling", "avg", ["avg", "max", None])
    check_choice("pooling", None, ["avg", "max", None])
    with pytest.raises(ValueError, match="pooling") as error:
        check_choice("pooling", "avgg", ["avg", "max", None])
    assert str(error.value) == (
        "Got pooling='avgg', but expected one of 'avg', 'max', None; did you mean 'avg'?"
    )


@pytest.mark.parametrize("value", [None, 1, np.array(["avg"]), ["avg"], True])
def test_check_choice_rejects_other_types(value):
    with pytest.raises(ValueError, match=r"^Got pooling=.*, but expected one of 'avg', 'max'"):
        check_choice("pooling", value, ["avg", "max"])


@pytest.mark.parametrize(
    ("value", "kind", "low", "high"),
    [(1, Integral, 1, None), (np.int64(3), Integral, 0, 3), (0.5, Real, 0, 1), (1, Real, 0, 1)],
)
def test_check_number_accepts_values_in_range(value, kind, low, high):
    check_number("n", value, kind, low, high)


@pytest.mark.parametrize(
    ("value", "kind", "low", "high", "expected"),
    [
        (0, Integral, 1, None, "an integer of at least 1"),
        (1.0, Integral, 1, None, "an integer of at least 1"),
        (True, Integral, 1, None, "an integer of at least 1"),
        (1.5, Real, 0, 1, "a number from 0 to 1"),
        (float("nan"), Real, 0, 1, "a number from 0 to 1"),
        ("x", Real, 0, None, "a number of at least 0"),
        ("1e-3", Real, 0, None, "a number of at least 0"),
        (float("inf"), Real, 0, None, "a number of at least 0"),
        (-math.inf, Real, 0, None, "a number of at least 0"),
        (np.float64("nan"), Real, 0, None, "a number of at least 0"),
        (np.bool_(True), Integral, 0, None, "an integer of at least 0"),
        (np.float32(2), Integral, 0, None, "an integer of at least 0"),
        (np.array(2), Integral, 0, None, "an integer of at least 0"),
        (None, Real, 0, None, "a number of at least 0"),
        (10**400, Integral, 0, 70_000, "an integer from 0 to 70,000"),
    ],
)
def test_check_number_names_the_kind_and_the_range(value, kind, low, high, expected):
    with pytest.raises(ValueError, match="Got n=") as error:
        check_number("n", value, kind, low, high)
    assert str(error.value) == f"Got n={value!r}, but expected {expected}"


@pytest.mark.parametrize(
    ("limits", "bad", "good", "expected"),
    [
        ({"low": 0, "above_low": True}, 0, 1e-9, "above 0"),
        ({"low": 0, "high": 1, "above_low": True}, 0, 1, "above 0 and at most 1"),
        ({"low": 0, "high": 1, "below_high": True}, 1, 0, "of at least 0 and below 1"),
        (
            {"low": 0, "high": 1, "above_low": True, "below_high": True},
            1,
            0.5,
            "above 0 and below 1",
        ),
    ],
)
def test_check_number_can_exclude_its_limits(limits, bad, good, expected):
    check_number("n", good, Real, **limits)
    with pytest.raises(ValueError, match="Got n=") as error:
        check_number("n", bad, Real, **limits, remedy="try 0.5")
    assert str(error.value) == f"Got n={bad}, but expected a number {expected}; try 0.5"


@pytest.mark.parametrize("value", [True, False, np.bool_(True), 0, 3, np.int64(2)])
def test_check_verbose_accepts_booleans_and_integers(value):
    check_verbose(value)


@pytest.mark.parametrize("value", [-1, 1.5, "1", None, float("nan"), [1], np.float64(1)])
def test_check_verbose_rejects_other_values(value):
    with pytest.raises(ValueError, match=r"^Got verbose=.*True, False or an integer of at least 0"):
        check_verbose(value)


@pytest.mark.parametrize("value", [None, 0, 2**63 - 1, np.int64(3), np.random.RandomState(0)])
def test_check_random_state_accepts_seeds(value):
    check_random_state(value)


@pytest.mark.parametrize(
    "value", [-1, 2**63, True, 1.0, "0", float("nan"), [0], np.random.default_rng(0), np.True_]
)
def test_check_random_state_rejects_other_values(value):
    with pytest.raises(
        ValueError, match=r"^Got random_state=.*from 0 to 9,223,372,036,854,775,807, or a"
    ):
        check_random_state(value)


@pytest.mark.parametrize("value", [1, 0, None, "True", np.array([True])])
def test_check_bool_rejects_other_values(value):
    check_bool("flag", np.False_)
    with pytest.raises(ValueError, match=r"^Got flag=.*, but expected True or False$"):
        check_bool("flag", value)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, "Got folder=None, but expected a directory"),
        (0, TypeError, "Got folder=0, but expected a directory"),
        (True, TypeError, "Got folder=True, but expected a directory"),
        (b"x", TypeError, "Got folder=b'x', but expected a directory"),
        ("", ValueError, "Got folder='', but expected a directory; for the current one, pass '.'"),
        ("None", ValueError, "Got the string folder='None', but expected a directory; pass None w"),
        ("FALSE", ValueError, "Got the string folder='FALSE', but expected a directory; pass None"),
        (__file__, NotADirectoryError, f"Got the file {__file__!r}, but expected a directory"),
    ],
)
def test_check_directory_rejects_other_values(value, error, message):
    check_directory("folder", Path("none"))  # not a string
    check_directory("folder", str(Path(__file__).parent))
    with pytest.raises(error, match=re.escape(message)):
        check_directory("folder", value)


def test_check_number_names_the_other_values():
    with pytest.raises(ValueError, match="but expected 'auto', None or an integer of at least 0"):
        check_number("n", -1, Integral, 0, besides="'auto', None")


def test_import_optional_names_the_purpose_and_the_extra(monkeypatch):
    assert import_optional("json", extra="x", purpose="The test") is sys.modules["json"]
    monkeypatch.setitem(sys.modules, "json", None)
    with pytest.raises(
        ImportError, match=r"^The test needs 'json'.*pip install 'sktransfer\[x\]'$"
    ):
        import_optional("json", extra="x", purpose="The test")


def warn_in_a_thread():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(warn_user, "in a thread").result()


@pytest.mark.parametrize(
    "call",
    [
        lambda: warn_user("direct"),
        lambda: make_classifier(lr_drop=2, unfreeze=0).fit(X, Y),
        lambda: make_pipeline(make_classifier(lr_drop=2, unfreeze=0)).fit(X, Y),
        lambda: cross_val_score(make_classifier(lr_drop=2, unfreeze=0), X, Y, cv=2),
        lambda: SelfTrainedImageClassifier(make_classifier(lr_drop=2, unfreeze=0)).fit(X, Y),
        lambda: load_image_folder(Path(__file__).parent.parent, extensions=[".py"]),
    ],
)
def test_warnings_name_the_line_of_the_user(call):
    with pytest.warns(UserWarning, match="direct|lr_drop|Ignored") as caught:
        call()
    line = call.__code__.co_firstlineno
    assert {(warning.filename, warning.lineno) for warning in caught} == {(__file__, line)}


def test_warning_in_a_thread_is_not_lost():
    with pytest.warns(UserWarning, match="in a thread"):
        warn_in_a_thread()
