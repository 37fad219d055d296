"""Warnings about images and labels that make a score unreliable.

Shapes: N images, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sktransfer.diagnostics.leaks import LeakReport
from sktransfer.diagnostics.probes import ProbeResults
from sktransfer.embedding.duplicates import MAX_SCAN_SIDE

# Classes are imbalanced if the largest is at least this many times as large as the smallest.
_MIN_IMBALANCE = 5
# Scores of a class with fewer images are unreliable.
_MIN_RELIABLE = 5
# An image has nearly one color if the standard deviation of its brightness (0-255) is lower.
_MIN_CONTRAST = 5
# Maximum number of classes that a sentence names.
_MAX_NAMED = 5


def find_data_warnings(
    counts: dict[str, int], results: ProbeResults, leaks: LeakReport, side: int
) -> tuple[str, ...]:
    """Return warnings of imbalance, duplicates and unusual images, one sentence each.

    Parameters
    ----------
    counts : dict of str to int
        Number of images of each class.
    results : ProbeResults
    leaks : LeakReport
        Duplicates among the measured images, checked against their folds.
    side : int
        Side of the network's input, in pixels.
    """
    total = sum(counts.values())
    sentences = [
        *_class_warnings(counts),
        *_duplicate_warnings(leaks, results, total),
        *_image_warnings(results, side),
    ]
    chance = max(counts.values()) / total
    if max(results.accuracy, results.pixels) <= chance:
        sentences.append(
            "No classifier is better than always guessing the largest class, which is right "
            f"{chance:.0%} of the time. Check the labels."
        )
    return tuple(sentences)


def _class_warnings(counts: dict[str, int]) -> list[str]:
    sentences = []
    smallest = min(counts, key=lambda label: counts[label])
    largest = max(counts, key=lambda label: counts[label])
    if counts[largest] >= _MIN_IMBALANCE * counts[smallest]:
        sentences.append(
            f"The largest class, {largest!r}, has {counts[largest]:,} images, and the smallest, "
            f"{smallest!r}, has {counts[smallest]:,}. Score with balanced accuracy, and try "
            "class_weight='balanced'."
        )
    tiny = [label for label, count in counts.items() if count < _MIN_RELIABLE]
    if tiny:
        sentences.append(
            f"Fewer than {_MIN_RELIABLE} images of {_name(tiny)}: scores of such classes are "
            "unreliable."
        )
    return sentences


def _duplicate_warnings(leaks: LeakReport, results: ProbeResults, total: int) -> list[str]:
    are_scans = results.side[1] < MAX_SCAN_SIDE
    same = np.isin(leaks.kinds, ["identical"] if are_scans else ["identical", "copy", "mirrored"])
    sentences = []
    if (same & leaks.conflicts).any():
        sentences.append(
            f"Duplicates with different labels: {_pairs(same & leaks.conflicts)}. One label of "
            "each pair is wrong; see report.leaks."
        )
    if (same & leaks.across).any():
        groups = "report.leaks" if results.n_images == total else "find_leaks(X)"
        sentences.append(
            "Duplicates on both sides of a fold: "
            f"{_pairs(same & leaks.across)}. The accuracies here are too high; pass "
            f"groups={groups}.groups."
        )
    elif same.any():
        sentences.append(f"Duplicates: {_pairs(same)}. See report.leaks.")
    return sentences


def _image_warnings(results: ProbeResults, side: int) -> list[str]:
    sentences = []
    shortest, median, longest = results.side
    if 4 * median <= side:
        sentences.append(
            f"Half of the images have a shorter side of at most {median} pixels, but the network's "
            f"input has {side}. A smaller image_size is faster, and may be as accurate."
        )
    if shortest * 10 <= longest:
        sentences.append(
            f"The shorter sides range from {shortest} to {longest:,} pixels: small images are "
            "enlarged and look blurred. Check that the image size does not depend on the class."
        )
    if results.contrast < _MIN_CONTRAST:
        sentences.append(
            "At least half of the images are almost a single color. Check pixel_range."
        )
    return sentences


def _name(labels: Sequence[str]) -> str:
    rest = len(labels) - _MAX_NAMED
    return ", ".join(map(repr, labels[:_MAX_NAMED])) + (f" and {rest:,} more" if rest > 0 else "")


def _pairs(mask: np.ndarray) -> str:
    count = int(mask.sum())
    return f"{count:,} pair" + ("s" if count != 1 else "")
