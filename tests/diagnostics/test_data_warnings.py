import dataclasses

import numpy as np
import pytest
from helpers import images

from sktransfer.data.images import as_images
from sktransfer.diagnostics.data_warnings import find_data_warnings
from sktransfer.diagnostics.leaks import LeakReport
from sktransfer.diagnostics.probes import ProbeResults

RESULTS = ProbeResults(
    n_images=50,
    accuracy=0.9,
    spread=0.1,
    neighbor=0.8,
    pixels=0.5,
    curve=((20, 0.7), (40, 0.9)),
    mean_interclass_cosine=0.2,
    side=(100, 200, 300),
    gray=0.0,
    contrast=50.0,
)


NO_LEAKS = LeakReport(
    pairs=np.empty((0, 2), dtype=int),
    cosines=np.empty(0),
    kinds=np.array([], dtype=str),
    across=np.array([], dtype=bool),
    conflicts=np.array([], dtype=bool),
    groups=np.arange(2),
    n_images=(2,),
    unreadable=np.array([], dtype=int),
    _is_split=False,
    _paths=(),
    _images=(as_images(images(2)),) * 2,
)


def test_find_data_warnings_names_find_leaks_if_a_sample_was_measured():
    leaks = dataclasses.replace(
        NO_LEAKS,
        kinds=np.array(["copy", "alike"]),
        across=np.array([True, True]),
        conflicts=np.array([False, False]),
    )
    for count, groups in {50: "report.leaks", 49: "find_leaks(X)"}.items():
        probe_results = dataclasses.replace(RESULTS, n_images=count)
        (warning,) = find_data_warnings({"a": 30, "b": 20}, probe_results, leaks, 224)
        assert warning == (
            "Duplicates on both sides of a fold: 1 pair. The accuracies here are too high; pass "
            f"groups={groups}.groups."
        )


@pytest.mark.parametrize(
    ("counts", "change", "expected"),
    [
        (
            {"a": 50, "b": 10},
            {},
            "The largest class, 'a', has 50 images, and the smallest, 'b', has 10. Score with "
            "balanced accuracy, and try class_weight='balanced'.",
        ),
        (
            {"a": 4, "b": 5, "c": 3},
            {},
            "Fewer than 5 images of 'a', 'c': scores of such classes are unreliable.",
        ),
        (
            {"a": 5, "b": 5},
            {"side": (8, 56, 79)},
            "Half of the images have a shorter side of at most 56 pixels, but the network's input "
            "has 224. A smaller image_size is faster, and may be as accurate.",
        ),
        (
            {"a": 5, "b": 5},
            {"side": (30, 200, 300)},
            "The shorter sides range from 30 to 300 pixels: small images are enlarged and look "
            "blurred. Check that the image size does not depend on the class.",
        ),
        (
            {"a": 5, "b": 5},
            {"contrast": 4.9},
            "At least half of the images are almost a single color. Check pixel_range.",
        ),
        (
            {"a": 9, "b": 6},
            {"accuracy": 0.6, "pixels": 0.4},
            "No classifier is better than always guessing the largest class, which is right 60% of "
            "the time. Check the labels.",
        ),
    ],
)
def test_find_data_warnings_reports_each_problem(counts, change, expected):
    probe_results = dataclasses.replace(RESULTS, **change)
    assert find_data_warnings(counts, probe_results, NO_LEAKS, 224) == (expected,)


def test_find_data_warnings_is_empty_for_sound_data():
    assert find_data_warnings({"a": 50, "b": 11}, RESULTS, NO_LEAKS, 224) == ()
