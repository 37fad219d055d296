"""Warnings about images and labels that make a score unreliable.

Shapes: N images, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sktransfer.diagnostics.leaks import LeakReport
from sktransfer.diagnostics.probes import ProbeResults
from sktransfer.embedding.duplicates import SCAN

# Classes are imbalanced if the largest is this many times larger than the smallest.
_IMBALANCED = 5
# Scores of a class with fewer images are unreliable.
_MIN_RELIABLE = 5
# An image has nearly one color if the standard deviation of its brightness, of 255, is lower.
_MIN_CONTRAST = 5
# Number of classes that a sentence names.
_MAX_NAMED = 5


def find_data_warnings(
    counts: dict[str, int], results: ProbeResults, leaks: LeakReport, side: int
) -> tuple[str, ...]:
    """Return warnings of imbalance, duplicates and unusual images, a sentence each.

    Parameters
    ----------
    counts : dict of str to int
        Images of each class.
    results : ProbeResults
    leaks : LeakReport
        Duplicates among the measured images, and across their folds.
    side : int
        Side of the network's input, in pixels.
    """
    total = sum(counts.values())
    found = [
        *_of_classes(counts),
        *_of_copies(leaks, results, total),
        *_of_images(results, side),
    ]
    chance = max(counts.values()) / total
    if max(results.accuracy, results.pixels) <= chance:
        found.append(
            "No classifier is better than always guessing the largest class, which is right "
            f"{chance:.0%} of the time. Check the labels."
        )
    return tuple(found)


def _of_classes(counts: dict[str, int]) -> list[str]:
    found = []
    least, most = (choose(counts, key=lambda label: counts[label]) for choose in (min, max))
    if counts[most] >= _IMBALANCED * counts[least]:
        found.append(
            f"The largest class, {most!r}, has {counts[most]:,} images, the smallest, {least!r}, "
            f"{counts[least]:,}. Score with balanced accuracy, and try class_weight='balanced'."
        )
    tiny = [label for label, count in counts.items() if count < _MIN_RELIABLE]
    if tiny:
        found.append(
            f"Fewer than {_MIN_RELIABLE} images of {_name(tiny)}: their scores are unreliable."
        )
    return found


def _of_copies(leaks: LeakReport, results: ProbeResults, total: int) -> list[str]:
    scans = results.side[1] < SCAN
    same = np.isin(leaks.kinds, ["identical"] if scans else ["identical", "copy", "mirrored"])
    found = []
    if (same & leaks.conflicts).any():
        found.append(
            f"Duplicates with different labels: {_pairs(same & leaks.conflicts)}. One label of "
            "each pair is wrong; see report.leaks."
        )
    if (same & leaks.across).any():
        groups = "report.leaks" if results.n_images == total else "find_leaks(X)"
        found.append(
            "Duplicates on both sides of a fold: "
            f"{_pairs(same & leaks.across)}. The accuracies here are too high; pass "
            f"groups={groups}.groups."
        )
    elif same.any():
        found.append(f"Duplicates: {_pairs(same)}. See report.leaks.")
    return found


def _of_images(results: ProbeResults, side: int) -> list[str]:
    found = []
    least, median, most = results.side
    if 4 * median <= side:
        found.append(
            f"Half of the images have a shorter side of at most {median} pixels, and the network's "
            f"input has {side}: a smaller image_size may be as accurate, and is faster."
        )
    if least * 10 <= most:
        found.append(
            f"The shorter sides range from {least} to {most:,} pixels: small images are enlarged "
            "and look blurred. Check that image size does not correlate with the class."
        )
    if results.contrast < _MIN_CONTRAST:
        found.append("Half of the images have nearly one color. Check pixel_range.")
    return found


def _name(labels: Sequence[str]) -> str:
    rest = len(labels) - _MAX_NAMED
    return ", ".join(map(repr, labels[:_MAX_NAMED])) + (f" and {rest:,} more" if rest > 0 else "")


def _pairs(mask: np.ndarray) -> str:
    count = int(mask.sum())
    return f"{count:,} pair" + ("s" if count != 1 else "")
