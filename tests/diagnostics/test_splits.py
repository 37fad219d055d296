"""The splits of a `cv` parameter."""

import numpy as np
import pytest
from sklearn.model_selection import (
    GroupKFold,
    GroupShuffleSplit,
    KFold,
    LeaveOneGroupOut,
    RepeatedStratifiedKFold,
    ShuffleSplit,
    StratifiedGroupKFold,
    StratifiedKFold,
    StratifiedShuffleSplit,
)

from sktransfer.diagnostics.splits import check_splits

Y = np.arange(6) % 2


@pytest.mark.parametrize(
    ("cv", "n_splits"),
    [
        (2, 2),
        (KFold(3), 3),
        (ShuffleSplit(4, random_state=0), 4),
        ([([0, 1, 2, 3], [4, 5])], 1),
        (iter([([0, 1], [2]), ([2, 3], [4])]), 2),
        ([(Y == 0, Y == 1)], 1),
        ([(range(3), range(3, 6))], 1),
    ],
)
def test_check_splits_returns_the_rows_of_each_split(cv, n_splits):
    splits = check_splits(cv, 6, Y)
    assert len(splits) == n_splits
    for train, test in splits:
        assert min(len(train), len(test)) > 0
        assert not set(train) & set(test)
        assert max(*train, *test) < 6


def test_groups_are_passed_to_the_splitter():
    groups = [0, 0, 1, 1, 2, 2]
    for train, test in check_splits(GroupKFold(3), 6, Y, groups):
        assert not set(np.array(groups)[train]) & set(np.array(groups)[test])


def test_random_state_of_the_splitter_is_left_alone():
    splitter = ShuffleSplit(3, random_state=np.random.RandomState(0))
    first, second = (check_splits(splitter, 6, Y) for _ in range(2))
    np.testing.assert_equal(first, second)


@pytest.mark.parametrize(
    "cv",
    [0, 1, -1, 0.5, True, "auto", [], (), {}, [0], [None], [([0], [9])], [([0.5], [1])], object()],
)
def test_invalid_splits_are_rejected(cv):
    with pytest.raises(
        ValueError, match=r"^Got cv=.* but expected an int of at least 2, a splitter"
    ):
        check_splits(cv, 6, Y)


GROUPS = [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("cv", "y", "groups", "problem"),
    [
        (StratifiedKFold(2), None, None, "StratifiedKFold needs labels; pass y"),
        (StratifiedShuffleSplit(2), None, None, "StratifiedShuffleSplit needs labels; pass y"),
        (RepeatedStratifiedKFold(), None, None, "RepeatedStratifiedKFold needs labels; pass y"),
        (StratifiedGroupKFold(2), None, GROUPS, "StratifiedGroupKFold needs labels; pass y"),
        (GroupKFold(2), Y, None, "GroupKFold needs groups; pass groups, or the pairs list("),
        (LeaveOneGroupOut(), Y, None, "LeaveOneGroupOut needs groups; pass groups"),
        (GroupShuffleSplit(2), None, None, "GroupShuffleSplit needs groups; pass groups"),
        (StratifiedGroupKFold(2), Y, None, "StratifiedGroupKFold needs groups; pass groups"),
        (100, None, None, "expected at most 6 folds, the number of images"),
        (7, np.arange(6) / 7, None, "expected at most 6 folds, the number of images"),
        (KFold(7), Y, None, "expected at most 6 folds, the number of images"),
        (100, Y, None, "expected at most 3 folds, the size of the largest class"),
        (4, Y, None, "expected at most 3 folds, the size of the largest class"),
        (StratifiedKFold(4), list("aababb"), None, "expected at most 3 folds, the size of the"),
        (GroupKFold(3), Y, GROUPS, "expected at most 2 folds, the number of groups"),
        ("5", Y, None, "expected an int; pass cv=5 without quotation marks"),
    ],
)
def test_error_names_the_missing_input_of_a_splitter(cv, y, groups, problem):
    with pytest.raises(ValueError, match=r"^Got cv=") as caught:
        check_splits(cv, 6, y, groups)
    assert f", but {problem}" in str(caught.value)
    assert str(caught.value.__cause__) not in str(caught.value)
