import pickle
import sys
from numbers import Integral, Real

import numpy as np
import pytest

from sktransfer.utils.errors import (
    ImageError,
    check_choice,
    check_number,
    import_optional,
)


def test_image_error_names_row_and_source_and_survives_pickling():
    assert str(ImageError("It is broken.")) == "Image: It is broken."
    error = ImageError("It is broken.", 3, "a.png")
    assert str(error) == "Image in row 3 (a.png): It is broken."
    loaded = pickle.loads(pickle.dumps(error))
    assert (loaded.reason, loaded.row, loaded.source) == ("It is broken.", 3, "a.png")
    assert str(loaded) == str(error)


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
    ],
)
def test_check_number_names_the_kind_and_the_range(value, kind, low, high, expected):
    with pytest.raises(ValueError, match="Got n=") as error:
        check_number("n", value, kind, low, high)
    assert str(error.value) == f"Got n={value!r}, but expected {expected}"


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
