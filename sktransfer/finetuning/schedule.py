"""Blocks, boundary and learning rates of each stage: pure functions of the stage and its progress.

Nothing here depends on the state of a fit, so a resumed fit has the same boundary and rates as one
that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from sktransfer.utils.errors import did_you_mean

HEAD, PRE_LOGITS, ADVERSARY = "head", "pre_logits", "adversary"

# Share of a stage in which the rates rise.
_WARM_UP = 0.1
# The final rate, as a share of the peak rate.
_FINAL_RATE = 0.01
# The lowest peak rate of a trained block, as a share of that of the last block.
_MIN_BLOCK_RATE = 0.1


@dataclass(frozen=True)
class Stage:
    """One stage of a fit.

    Parameters
    ----------
    name : str
        Such as "head", "last 2 blocks", "all", "stem + block3".
    blocks : tuple of str
        The trained blocks, in network order; empty if only the head is fitted.
    boundary : int
        Number of blocks before the first one that this or an earlier stage trains. Those blocks
        are as pretrained, so the activations after them can be cached.
    """

    name: str
    blocks: tuple[str, ...]
    boundary: int

    @property
    def head_only(self) -> bool:
        """Whether only the head is fitted, as a logistic regression."""
        return not self.blocks


def resolve_stages(unfreeze: Any, names: Sequence[str]) -> tuple[Stage, ...]:
    """Resolve `unfreeze` to stages.

    Parameters
    ----------
    unfreeze : int, str or sequence of (int, str or sequence of str)
        For each stage: how many blocks to train, counted from the head (0: the head alone),
        `"all"`, the name of a block, or several names.
    names : sequence of str
        The backbone's blocks, in network order.

    Raises
    ------
    ValueError
        If a block is unknown, a stage trains nothing, or 0 comes after other stages.

    Examples
    --------
    >>> for stage in resolve_stages((0, 1, "all"), ["stem", "layer1", "layer2"]):
    ...     print(stage)
    Stage(name='head', blocks=(), boundary=3)
    Stage(name='last block', blocks=('layer2',), boundary=2)
    Stage(name='all', blocks=('stem', 'layer1', 'layer2'), boundary=0)
    """
    single = isinstance(unfreeze, (str, Integral))
    wanted = [unfreeze] if single else list(unfreeze) if isinstance(unfreeze, Iterable) else []
    if not wanted:
        raise ValueError(
            f"Got unfreeze={unfreeze!r}, but expected one entry per stage, such as (0, 1, 2): "
            "the number of last blocks to train, 'all', or names of blocks"
        )
    stages: list[Stage] = []
    boundary = len(names)
    for entry in wanted:
        name, blocks = _blocks_of(entry, names)
        if not blocks and stages:
            raise ValueError(
                f"Got unfreeze={unfreeze!r}, but 0, which fits only the head, must come first: "
                "later stages train the head together with the blocks"
            )
        boundary = min([boundary, *(names.index(block) for block in blocks)])
        stages.append(Stage(name, blocks, boundary))
    return tuple(stages)


def train_all(stages: Sequence[Stage]) -> bool:
    """Return whether a stage trains the first block, so it reads images in every epoch."""
    return any(stage.boundary == 0 for stage in stages)


def _blocks_of(entry: Any, names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    if isinstance(entry, str) and entry == "all":
        return "all", tuple(names)
    if isinstance(entry, Integral) and not isinstance(entry, bool):
        count = int(entry)
        if not 0 <= count <= len(names):
            raise ValueError(
                f"Got {count} in unfreeze, but the backbone has {len(names)} blocks; expected 0 "
                f"to {len(names)}, or 'all'"
            )
        many = f"last {count} blocks" if count > 1 else "last block"
        return (many if count else HEAD), tuple(names[len(names) - count :])
    chosen = (
        [entry] if isinstance(entry, str) else list(entry) if isinstance(entry, Iterable) else []
    )
    if not chosen:
        raise ValueError(
            f"Got {entry!r} in unfreeze, a stage that trains nothing; expected a number of "
            "blocks, 'all', or names of blocks"
        )
    for name in chosen:
        if name not in names:
            raise ValueError(
                f"Got {name!r} in unfreeze, but the backbone has blocks {', '.join(names)}"
                f"{did_you_mean(str(name), [*names, 'all'])}"
            )
    blocks = tuple(name for name in names if name in chosen)
    return " + ".join(blocks), blocks


def peak_rates(
    stage: Stage,
    *,
    lr: float,
    lr_drop: float,
    lr_decay: float,
    scratch: bool = False,
    adversarial: bool = False,
) -> dict[str, float]:
    """Return the peak learning rate of each part that a stage trains.

    The last block learns `lr_drop` times slower than the head, and every block before it
    `lr_decay` times slower than the one after it (Howard and Ruder, "Universal Language Model
    Fine-tuning for Text Classification", 2018), the first one no more than 10 times slower than
    the last.

    Parameters
    ----------
    stage : Stage
    lr : float
        Rate of the head.
    lr_drop, lr_decay : float
    scratch : bool
        Whether the weights are random; all parts then learn at `lr`.
    adversarial : bool
        Whether an adversary is trained too, at the head's rate.

    Examples
    --------
    >>> stage = Stage("last 2 blocks", ("layer3", "layer4"), 3)
    >>> peak_rates(stage, lr=1e-3, lr_drop=10, lr_decay=2.5)
    {'head': 0.001, 'pre_logits': 0.0001, 'layer4': 0.0001, 'layer3': 4e-05}
    """
    count = len(stage.blocks)
    drop, decay = (1.0, 1.0) if scratch else (lr_drop, lr_decay)
    if decay > 1 and count > 1:
        decay = min(decay, (1 / _MIN_BLOCK_RATE) ** (1 / (count - 1)))
    rates = {HEAD: lr}
    if count:
        rates[PRE_LOGITS] = lr / drop
    if count and adversarial:
        rates[ADVERSARY] = lr
    rates |= {block: lr / drop / decay**k for k, block in enumerate(reversed(stage.blocks))}
    return rates


def rate_factor(progress: float) -> float:
    """Return the factor on the peak rates: a linear warm-up, then half a cosine.

    Parameters
    ----------
    progress : float
        Completed share of the stage, 0 to 1.

    Examples
    --------
    >>> [round(rate_factor(progress), 3) for progress in (0, 0.05, 0.1, 0.55, 1)]
    [0.01, 0.505, 1.0, 0.505, 0.01]
    """
    if progress < _WARM_UP:
        return _FINAL_RATE + (1 - _FINAL_RATE) * progress / _WARM_UP
    passed = (progress - _WARM_UP) / (1 - _WARM_UP)
    return _FINAL_RATE + (1 - _FINAL_RATE) * (1 + math.cos(math.pi * passed)) / 2
