"""What to mind about images and labels before a score is believed.

Shapes: N images, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sktransfer.diagnostics.leaks import LeakReport
from sktransfer.diagnostics.probes import ProbeResults
from sktransfer.embedding.duplicates import SCAN

# How many times larger than the smallest class the largest may be.
_UNEVEN = 5
# Images of a class that say something about it.
_TINY = 5
# Standard deviation of brightness, of 255, below which an image is nearly one color.
_FLAT = 5
# Classes that a sentence names.
_NAMED = 5


def find_data_warnings(
    counts: dict[str, int], evidence: ProbeResults, leaks: LeakReport, side: int
) -> tuple[str, ...]:
    """Say what is uneven, too small or there twice, a sentence each.

    Parameters
    ----------
    counts : dict of str to int
        Images of each class.
    evidence : ProbeResults
    leaks : LeakReport
        Of the same images, and the folds in which they were measured.
    side : int
        Length of the side that the network sees, in pixels.
    """
    total = sum(counts.values())
    found = [
        *_of_classes(counts),
        *_of_copies(leaks, evidence, total),
        *_of_images(evidence, side),
    ]
    chance = max(counts.values()) / total
    if max(evidence.accuracy, evidence.pixels) <= chance:
        found.append(
            f"Nothing tells the classes apart: to guess the largest class is right {chance:.2f} of "
            "the time. Check the labels."
        )
    return tuple(found)


def _of_classes(counts: dict[str, int]) -> list[str]:
    found = []
    least, most = (choose(counts, key=lambda label: counts[label]) for choose in (min, max))
    if counts[most] >= _UNEVEN * counts[least]:
        found.append(
            f"The largest class, {most!r}, has {counts[most]:,} images, the smallest, {least!r}, "
            f"{counts[least]:,}. Score with balanced accuracy, and try class_weight='balanced'."
        )
    tiny = [label for label, count in counts.items() if count < _TINY]
    if tiny:
        found.append(f"Fewer than {_TINY} images of {_name(tiny)}: scores say little about them.")
    return found


def _of_copies(leaks: LeakReport, evidence: ProbeResults, total: int) -> list[str]:
    scans = evidence.side[1] < SCAN
    same = np.isin(leaks.kinds, ["identical"] if scans else ["identical", "copy", "mirrored"])
    found = []
    if (same & leaks.conflicts).any():
        found.append(
            f"Pairs of the same image under two labels: {(same & leaks.conflicts).sum():,}. One "
            "of the two is wrong; see leaks."
        )
    if (same & leaks.across).any():
        groups = "report.leaks" if evidence.n_images == total else "find_leaks(X)"
        found.append(
            "Pairs of the same image of which one was trained on and the other tested: "
            f"{(same & leaks.across).sum():,}. The accuracies here are too good; give "
            f"groups={groups}.groups."
        )
    elif same.any():
        found.append(f"Pairs of the same image: {same.sum():,}. See leaks.")
    return found


def _of_images(evidence: ProbeResults, side: int) -> list[str]:
    found = []
    least, median, most = evidence.side
    if 4 * median <= side:
        found.append(
            f"Half of the images are no larger than {median} pixels, and the network sees "
            f"{side}: a smaller image_size may do as well, and is faster."
        )
    if least * 10 <= most:
        found.append(
            f"The shorter sides go from {least} to {most:,} pixels: small images are blurred "
            "where they are enlarged. See that size does not tell the class."
        )
    if evidence.contrast < _FLAT:
        found.append("Half of the images are nearly of one color. Check pixel_range.")
    return found


def _name(labels: Sequence[str]) -> str:
    rest = len(labels) - _NAMED
    return ", ".join(map(repr, labels[:_NAMED])) + (f" and {rest:,} more" if rest > 0 else "")
