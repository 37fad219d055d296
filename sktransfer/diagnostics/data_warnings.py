"""What to mind about pictures and labels before a score is believed.

Shapes: N pictures, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sktransfer.diagnostics.leaks import LeakReport
from sktransfer.diagnostics.probes import Evidence
from sktransfer.embedding.duplicates import SCAN

# How many times larger than the smallest class the largest may be.
_UNEVEN = 5
# Pictures of a class that say something about it.
_TINY = 5
# Standard deviation of brightness, of 255, below which a picture is nearly one colour.
_FLAT = 5
# Classes that a sentence names.
_NAMED = 5


def find_caveats(
    counts: dict[str, int], evidence: Evidence, leaks: LeakReport, side: int
) -> tuple[str, ...]:
    """Say what is uneven, too small or there twice, a sentence each.

    Parameters
    ----------
    counts : dict of str to int
        Pictures of each class.
    evidence : Evidence
    leaks : LeakReport
        Of the same pictures, and the folds in which they were measured.
    side : int
        Length of the side that the network sees, in pixels.
    """
    total = sum(counts.values())
    found = [
        *_of_classes(counts),
        *_of_copies(leaks, evidence, total),
        *_of_pictures(evidence, side),
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
            f"The largest class, {most!r}, has {counts[most]:,} pictures, the smallest, {least!r}, "
            f"{counts[least]:,}. Score with balanced accuracy, and try class_weight='balanced'."
        )
    tiny = [label for label, count in counts.items() if count < _TINY]
    if tiny:
        found.append(f"Fewer than {_TINY} pictures of {_name(tiny)}: scores say little about them.")
    return found


def _of_copies(leaks: LeakReport, evidence: Evidence, total: int) -> list[str]:
    scans = evidence.side[1] < SCAN
    same = np.isin(leaks.kinds, ["identical"] if scans else ["identical", "copy", "mirrored"])
    found = []
    if (same & leaks.conflicts).any():
        found.append(
            f"Pairs of the same picture under two labels: {(same & leaks.conflicts).sum():,}. One "
            "of the two is wrong; see leaks."
        )
    if (same & leaks.across).any():
        groups = "report.leaks" if evidence.n_pictures == total else "find_leaks(X)"
        found.append(
            "Pairs of the same picture of which one was trained on and the other tested: "
            f"{(same & leaks.across).sum():,}. The accuracies here are too good; give "
            f"groups={groups}.groups."
        )
    elif same.any():
        found.append(f"Pairs of the same picture: {same.sum():,}. See leaks.")
    return found


def _of_pictures(evidence: Evidence, side: int) -> list[str]:
    found = []
    least, median, most = evidence.side
    if 4 * median <= side:
        found.append(
            f"Half of the pictures are no larger than {median} pixels, and the network sees "
            f"{side}: a smaller image_size may do as well, and is faster."
        )
    if least * 10 <= most:
        found.append(
            f"The shorter sides go from {least} to {most:,} pixels: small pictures are blurred "
            "where they are enlarged. See that size does not tell the class."
        )
    if evidence.contrast < _FLAT:
        found.append("Half of the pictures are nearly of one colour. Check pixel_range.")
    return found


def _name(labels: Sequence[str]) -> str:
    rest = len(labels) - _NAMED
    return ", ".join(map(repr, labels[:_NAMED])) + (f" and {rest:,} more" if rest > 0 else "")
