import re
from array import array
from collections import UserList
from datetime import date
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from inspect import signature

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from sklearn.exceptions import DataConversionWarning
from sklearn.utils.class_weight import compute_class_weight, compute_sample_weight

from sktransfer.data.labels import as_labels, check_labels, encode, split_domains

Y = ["dog", "cat", "dog", "owl", "dog", "cat"]
Pet = Enum("Pet", "CAT DOG")
SAMPLE_WEIGHT = [1.0, 0.25, 2.0, 3.0, 0.5, 1.5]


def labels(y=Y, sample_weight=None, class_weight=None, **options):
    return check_labels(range(len(y)), y, sample_weight, class_weight, **options)


@pytest.mark.parametrize(
    "y", [Y, np.array(Y), np.array(Y, object), pd.Series(Y), pd.Series(Y, dtype="category")]
)
def test_labels_of_every_container_are_encoded(y):
    encoded = labels(y)
    assert encoded.classes.tolist() == ["cat", "dog", "owl"]
    assert encoded.y.tolist() == [1, 0, 1, 2, 1, 0]
    assert encoded.rows.tolist() == list(range(6))
    assert encoded.sample_weight.dtype == encoded.weights.dtype == np.float64
    assert (encoded.sample_weight == 1).all()
    assert (encoded.weights == 1).all()


@pytest.mark.parametrize(
    ("y", "classes"),
    [([3, -1, 3], [-1, 3]), ([True, False, True], [False, True]), ([1.0, 2.0, 1.0], [1.0, 2.0])],
)
def test_classes_keep_the_dtype_of_the_labels(y, classes):
    encoded = labels(y)
    assert encoded.classes.tolist() == classes
    assert encoded.classes.dtype == np.asarray(y).dtype
    np.testing.assert_array_equal(encoded.classes[encoded.y], y)


def test_column_of_labels_is_accepted_with_a_warning():
    with pytest.warns(DataConversionWarning, match="A column-vector y was passed"):
        assert labels(np.array([[0], [1], [0]])).y.tolist() == [0, 1, 0]


def test_weight_of_0_leaves_out_an_image_and_its_class():
    encoded = labels(sample_weight=[1, 1, 0, 0, 1, 2], class_weight="balanced")
    assert encoded.classes.tolist() == ["cat", "dog"]
    assert encoded.rows.tolist() == [0, 1, 4, 5]
    assert encoded.y.tolist() == [1, 0, 1, 0]
    assert encoded.sample_weight.tolist() == [1, 1, 1, 2]
    np.testing.assert_allclose(
        encoded.weights, np.array([1, 1, 1, 2]) * [5 / 4, 5 / 6, 5 / 4, 5 / 6]
    )


@pytest.mark.skipif(
    "sample_weight" not in signature(compute_class_weight).parameters,
    reason="this scikit-learn weights classes without sample weights",
)
@pytest.mark.parametrize("class_weight", [None, "balanced", {"cat": 2.0, "dog": 0.5, "owl": 7}])
@pytest.mark.parametrize("sample_weight", [None, SAMPLE_WEIGHT])
def test_class_weights_equal_those_of_scikit_learn(class_weight, sample_weight):
    encoded = labels(sample_weight=sample_weight, class_weight=class_weight)
    class_weights = compute_class_weight(
        class_weight, classes=encoded.classes, y=np.array(Y), sample_weight=sample_weight
    )
    image_weights = np.ones(len(Y)) if sample_weight is None else np.array(sample_weight)
    np.testing.assert_allclose(
        encoded.weights, image_weights * class_weights[encoded.y], rtol=1e-14
    )
    np.testing.assert_array_equal(encoded.sample_weight, image_weights)


def test_class_missing_from_a_weight_dict_weighs_1():
    encoded = labels(class_weight={"owl": 4})
    np.testing.assert_array_equal(encoded.weights, compute_sample_weight({"owl": 4}, Y))
    assert encoded.weights.tolist() == [1, 1, 1, 4, 1, 1]


def test_weight_of_an_unknown_class_is_rejected_if_a_class_has_none():
    expected = "unknown class 'owls', but without 'owl'; its keys must be labels; did you mean 'o"
    with pytest.raises(ValueError, match=expected):
        labels(class_weight={"cat": 1, "dog": 1, "owls": 2})
    # A fold of a cross-validation may lack a class.
    weights = labels(class_weight={"cat": 1, "dog": 1, "owl": 2, "fox": 9}).weights
    assert weights.tolist() == [1, 1, 1, 2, 1, 1]


def test_balanced_weights_treat_weights_as_repetition():
    repeated = labels([*Y, "owl", "owl"], class_weight="balanced")
    weighted = labels(sample_weight=[1, 1, 1, 3, 1, 1], class_weight="balanced")
    np.testing.assert_allclose(weighted.weights[3], repeated.weights[repeated.y == 2].sum())
    np.testing.assert_allclose(weighted.weights[:3], repeated.weights[:3])


@pytest.mark.parametrize(
    ("y", "options", "message"),
    [
        (["a", "a"], {}, "Got 1 class in y, 'a', but a classifier needs at least two classes"),
        ([7, 7], {}, "Got 1 class in y, 7, but a classifier needs at least two classes"),
        (
            ["a", "b"],
            {"sample_weight": [1, 0]},
            "Got 1 class in y, 'a', but a classifier needs at least two classes",
        ),
        (
            ["a", "b"],
            {"class_weight": "balance"},
            "Got class_weight='balance', but expected one of 'balanced', None; "
            "did you mean 'balanced'?",
        ),
    ],
)
def test_invalid_labels_and_class_weights_are_rejected(y, options, message):
    with pytest.raises(ValueError, match=r"^Got ") as caught:
        labels(y, **options)
    assert str(caught.value) == message


def test_missing_y_raises_an_error_that_names_the_estimator():
    with pytest.raises(ValueError, match=r"^Picky requires y to be passed, but the target y is"):
        check_labels(range(3), None, estimator="Picky")


@pytest.mark.parametrize(
    ("y", "options", "match"),
    [
        ([0.5, 1.25, 3.1], {}, "Unknown label type: continuous"),
        ([0.0, np.inf, 1.0], {}, "Input y contains infinity"),
        ([[0, 1], [1, 0]], {}, "y should be a 1d array"),
        ([0, 1], {"sample_weight": [1, -1]}, "[Nn]egative"),
        ([0, 1], {"sample_weight": [1, np.nan]}, "NaN"),
        ([0, 1], {"sample_weight": [1, 1, 1]}, "sample_weight"),
        ([0, 1], {"sample_weight": [1, np.inf]}, "infinity"),
        ([0, 1], {"sample_weight": np.nan}, "^Got nan as the largest sample_weight"),
        ([0, 1], {"sample_weight": [0, 1e-300]}, "^Got 1e-300 as the largest sample_weight"),
        ([0, 1], {"sample_weight": 1e300}, r"^Got 1e\+300 as the largest sample_weight"),
        ([0, 1], {"sample_weight": "auto"}, "^Got an invalid sample_weight, but expected numbers"),
        # Recent versions of scikit-learn raise the first message.
        ([0, 1], {"sample_weight": [0, 0]}, "at least one non-zero number|^Got no weight above 0"),
    ],
)
def test_labels_that_scikit_learn_rejects_are_rejected(y, options, match):
    with pytest.raises(ValueError, match=match):
        labels(y, **options)


@pytest.mark.parametrize(
    "y",
    [
        *(0, 1.5, True, np.int64(3), np.array("cat"), object(), iter("ab"), len),
        *("ab", b"ab", bytearray(b"ab"), {0: "a", 1: "b"}, {0: "a", 1: "b"}.values(), {"a", "b"}),
    ],
)
def test_labels_that_are_not_a_list_are_rejected(y):
    with pytest.raises(TypeError, match=r"^Got y=.* a list or an array with an entry for each"):
        check_labels(range(2), y)


def test_inconsistent_number_of_labels_is_rejected():
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        check_labels(range(3), [0, 1])


# Containers of other libraries and types: the labels, and the classes that they become.

CONTAINERS = {
    "nullable booleans": (pd.Series([True, False], dtype="boolean"), [False, True], "b"),
    "nullable integers": (pd.Series([7, -3], dtype="Int64"), [-3, 7], "i"),
    "nullable uint8": (pd.Series([7, 3], dtype="UInt8"), [3, 7], "u"),
    "nullable array": (pd.array([7, 3], dtype="Int32"), [3, 7], "i"),
    "integers as objects": (np.array([7, 3], dtype=object), [3, 7], "i"),
    "booleans as objects": (pd.Series([True, False], dtype=object), [False, True], "b"),
    "numpy strings": (np.array(["dog", "cat"], dtype=np.dtypes.StringDType()), ["cat", "dog"], "U"),
    "pandas Index": (pd.Index(["dog", "cat"]), ["cat", "dog"], "O"),
    "polars": (pl.Series(["dog", "cat"]), ["cat", "dog"], "U"),
    "pyarrow": (pa.array(["dog", "cat"]), ["cat", "dog"], "O"),
    "memoryview": (memoryview(bytes([7, 3])), [3, 7], "i"),
    "array": (array("i", [7, 3]), [3, 7], "i"),
    "bfloat16": (torch.tensor([7, 3], dtype=torch.bfloat16), [3, 7], "f"),
    "tensor with a gradient": (torch.tensor([7.0, 3.0], requires_grad=True), [3, 7], "f"),
    "list of tensors": ([torch.tensor(7), torch.tensor(3)], [3, 7], "i"),
}


@pytest.mark.parametrize("with_domains", [False, True])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_classes_of_other_containers_keep_their_type(kind, with_domains):
    y, classes, dtype_kind = CONTAINERS[kind]
    encoded = check_labels(range(2), y, sample_domain=[1, 2] if with_domains else None)
    assert encoded.classes.tolist() == classes
    assert encoded.classes.dtype.kind == dtype_kind
    assert encoded.y.tolist() == [1, 0]


@pytest.mark.filterwarnings("ignore:A column-vector y was passed")
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_matrix_of_labels_is_accepted():
    assert check_labels(range(2), np.asmatrix([[7], [3]])).classes.tolist() == [3, 7]


OTHER_TYPES = {
    "bytes": ([b"cat", b"dog"], "bytes", "label.decode()"),
    "array of bytes": (np.array([b"cat", b"dog"]), "bytes", "label.decode()"),
    "several types": (np.array(["cat", 1], dtype=object), "int, str", "str(label)"),
    "enum": ([Pet.CAT, Pet.DOG], "Pet", "str(label)"),
    "decimals": ([Decimal(1), Decimal(2)], "Decimal", "str(label)"),
    "fractions": ([Fraction(1, 2), Fraction(1, 3)], "Fraction", "str(label)"),
    "dates": ([date(2020, 1, 1), date(2021, 1, 1)], "date", "str(label)"),
    "huge integers": ([10**30, 1], "int", "str(label)"),
    "structured": (np.array([(1,), (2,)], dtype=[("y", int)]), "tuple", "str(label)"),
    "dicts": ([{"y": 1}, {"y": 2}], "dict", "y['label']"),
    "pandas intervals": (pd.Series(pd.cut([1, 5], 2)), "Interval", "str(label)"),
}


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_labels_of_other_types_are_named(kind):
    y, types, remedy = OTHER_TYPES[kind]
    message = f"^Got labels of type {types} in y.*{re.escape(remedy)}"
    with pytest.raises(ValueError, match=message):
        check_labels(range(2), y)
    with pytest.raises(ValueError, match=message.replace("in y", "in y_val")):
        encode(y, np.array(["cat", "dog"]))


@pytest.mark.parametrize(
    ("classes", "y", "codes"),
    [
        (["cat", "dog", "owl"], ["owl", "cat", "owl"], [2, 0, 2]),
        ([-1, 3], [3, -1], [1, 0]),
        ([False, True], [True], [1]),
        ([0, 1, 2], np.array([[2], [0]]), [2, 0]),
    ],
)
def test_encode_returns_the_codes_of_known_labels(classes, y, codes):
    assert encode(y, np.array(classes)).tolist() == codes


@pytest.mark.parametrize(
    ("classes", "y", "unknown"),
    [
        (["cat", "dog"], ["eel", "cat", "ant", "zebra", "eel"], ["ant", "eel", "zebra"]),
        (["cat", "dog"], ["cats"], ["cats"]),
        ([1, 3], [0, 2, 3, 9], [0, 2, 9]),
        ([0, 1], ["1"], ["1"]),
        (["0", "1"], [1], [1]),
    ],
)
def test_encode_names_unknown_labels(classes, y, unknown):
    with pytest.raises(ValueError, match=r"^Got ") as caught:
        encode(y, np.array(classes))
    assert str(caught.value) == (
        f"Got {unknown} in y_val, but expected only classes that occur in y: {classes}"
    )


@pytest.mark.parametrize("weight", [-1.0, 0.0, float("nan")])
def test_class_weight_of_at_most_0_is_rejected(weight):
    with pytest.raises(ValueError, match=r"Got class_weight=.*expected weights above 0"):
        labels(class_weight={"cat": weight})


NAN = float("nan")
# The label of row 1 of 3 is missing.
MISSING = {
    "None in a list": ["a", None, "b"],
    "None in a tuple": ("a", None, "b"),
    "None among numbers": [1, None, 2],
    "None among booleans": [True, None, False],
    "NaN among strings": ["a", NAN, "b"],
    "float32 NaN among strings": ["a", np.float32("nan"), "b"],
    "NaN among numbers": [1, NAN, 2],
    "NaN in an array": np.array([1, NAN, 2]),
    "NaN in an array of objects": np.array(["a", NAN, "b"], dtype=object),
    "float32 NaN in an array of objects": np.array(["a", np.float32("nan"), "b"], dtype=object),
    "NaN that numpy made a string": np.array(["a", NAN, "b"]),
    "NaN in a column": np.array([[1.0], [NAN], [2.0]]),
    "pd.NA in a list": ["a", pd.NA, "b"],
    "pd.NA in an array": np.array(["a", pd.NA, "b"], dtype=object),
    "pd.NaT in a list": ["a", pd.NaT, "b"],
    "NaT in an array": np.array(["2020-01-01", "NaT", "2021-01-01"], dtype="M8[D]"),
    "decimal NaN": [Decimal(1), Decimal("nan"), Decimal(2)],
    "masked strings": np.ma.array(["a", "x", "b"], mask=[0, 1, 0]),
    "masked integers": np.ma.array([1, 2, 3], mask=[0, 1, 0]),
    "masked floats": np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0]),
    "masked constant in a list": ["a", np.ma.masked, "b"],
    "pandas objects": pd.Series(["a", None, "b"], dtype=object),
    "pandas strings": pd.Series(["a", None, "b"], dtype="string"),
    "pandas Int64": pd.Series([1, None, 2], dtype="Int64"),
    "pandas Float64": pd.Series([1, None, 2], dtype="Float64"),
    "pandas boolean": pd.Series([True, None, False], dtype="boolean"),
    "pandas category": pd.Series(["a", None, "b"], dtype="category"),
    "pandas array": pd.array([1, None, 2], dtype="Int64"),
    "pandas Index": pd.Index(["a", None, "b"]),
    "pandas DataFrame": pd.DataFrame({"y": ["a", None, "b"]}),
    "polars strings": pl.Series(["a", None, "b"]),
    "polars integers": pl.Series([1, None, 2]),
    "polars booleans": pl.Series([True, None, False]),
    "polars categories": pl.Series(["a", None, "b"], dtype=pl.Categorical),
    "polars DataFrame": pl.DataFrame({"y": ["a", None, "b"]}),
    "pyarrow strings": pa.array(["a", None, "b"]),
    "pyarrow integers": pa.array([1, None, 2]),
    "pyarrow chunks": pa.chunked_array([["a", None], ["b"]]),
    "torch": torch.tensor([1, NAN, 2]),
    "other sequences": UserList(["a", NAN, "b"]),
}


@pytest.mark.parametrize("container", MISSING)
@pytest.mark.filterwarnings("ignore:A column-vector y was passed")
def test_missing_label_is_rejected_in_every_spelling(container):
    with pytest.raises(ValueError, match="missing label") as caught:
        labels(MISSING[container])
    assert str(caught.value) == (
        "Got 1 missing label in y, in row 1, but expected a label for each image; label this "
        "image, or leave it out"
    )


@pytest.mark.parametrize("container", MISSING)
def test_missing_labels_are_marked(container):
    values, missing = as_labels(MISSING[container])
    assert missing.tolist() == [False, True, False]
    assert values[1] is None
    assert None not in values[[0, 2]].tolist()


def test_the_first_ten_missing_labels_are_listed():
    with pytest.raises(ValueError, match="missing label") as caught:
        labels(["a", "b", *[None] * 13])
    assert str(caught.value) == (
        "Got 13 missing labels in y, in rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ..., but expected a "
        "label for each image; label these images, or leave them out"
    )


@pytest.mark.parametrize(
    ("y", "classes"),
    [
        (["", "a"], ["", "a"]),
        (["nan", "a"], ["a", "nan"]),
        (np.array(["nan", "a"]), ["a", "nan"]),
        (["None", "a"], ["None", "a"]),
        (["NA", "<NA>"], ["<NA>", "NA"]),
        ([0, 1], [0, 1]),
        ([False, True], [False, True]),
        (np.array(["a" * 40, "b"]), ["a" * 40, "b"]),
        (UserList(["b", "a"]), ["a", "b"]),
        (pa.array(["b", "a"]), ["a", "b"]),
    ],
)
def test_labels_that_look_missing_are_kept(y, classes):
    assert labels(y).classes.tolist() == classes


@pytest.mark.parametrize(
    "garbage", [None, NAN, pd.NA, np.float32("nan"), pd.NaT, np.datetime64("NaT"), "x", ""]
)
def test_labels_of_the_target_may_be_missing(garbage):
    encoded = labels(["a", garbage, "b", garbage], sample_domain=[1, -2, 1, -2])
    assert encoded.classes.tolist() == ["a", "b"]
    assert encoded.rows.tolist() == [0, 2]


def test_missing_label_of_the_source_has_the_row_of_the_user():
    with pytest.raises(ValueError, match=r"^Got 1 missing label in y, in row 2, but"):
        labels(["a", None, None, "b"], sample_domain=[1, -2, 1, 1])


@pytest.mark.parametrize(
    "y", [[None, "a"], [NAN, "a"], [pd.NA, "a"], np.ma.array(["x", "a"], mask=[1, 0])]
)
def test_encode_rejects_missing_labels(y):
    with pytest.raises(ValueError, match=r"^Got 1 missing label in y_val, in row 0, but expected"):
        encode(y, np.array(["a", "b"]))


@pytest.mark.parametrize(
    "domains",
    [
        [1, None, -1],
        [1, NAN, -1],
        [1, pd.NA, -1],
        (1, None, -1),
        np.array([1, NAN, -1]),
        np.array([1, None, -1], dtype=object),
        np.ma.array([1, 1, -1], mask=[0, 1, 0]),
        pd.Series([1, None, -1], dtype="Int64"),
        pl.Series([1, None, -1]),
        pa.array([1, None, -1]),
        torch.tensor([1, NAN, -1]),
    ],
)
def test_missing_domain_is_rejected_with_its_row(domains):
    with pytest.raises(ValueError, match=r"^Got no value for row 1 in sample_domain, but"):
        split_domains(domains, 3)


def test_split_domains_accepts_whole_numbers_of_any_dtype():
    for domains in ([1, -2], (1.0, -2.0), np.array([1, -2], dtype=object)):
        source, target = split_domains(domains, 2)
        assert (source.tolist(), target.tolist()) == ([0], [1])
    for domains in ([1, -np.inf], [1, np.nan], np.array([1, None], dtype=object), [True, False]):
        with pytest.raises(ValueError, match="in sample_domain, but expected whole numbers"):
            split_domains(domains, 2)
