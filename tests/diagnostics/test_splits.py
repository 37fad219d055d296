"""The splits of a `cv` parameter."""

import numpy as np
import pytest
from sklearn.model_selection import GroupKFold, KFold, ShuffleSplit

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
def test_splits_are_rows(cv, n_splits):
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
