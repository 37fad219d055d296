import itertools

import numpy as np
import pytest

from sktransfer.finetuning.schedule import (
    HEAD,
    PRE_LOGITS,
    Stage,
    peak_rates,
    rate_factor,
    resolve_stages,
)

NAMES = ["stem", "layer1", "layer2", "layer3"]


def stage(count):
    """Build a stage that trains `count` blocks."""
    return Stage(f"last {count} blocks", tuple(f"block{i}" for i in range(count)), 3)


def of_blocks(rates):
    """Return the rates of the blocks, from the last to the first."""
    return [rate for name, rate in rates.items() if name not in (HEAD, PRE_LOGITS)]


@pytest.mark.parametrize(
    ("unfreeze", "expected"),
    [
        (0, [("head", (), 4)]),
        (1, [("last block", ("layer3",), 3)]),
        (np.int64(2), [("last 2 blocks", ("layer2", "layer3"), 2)]),
        (4, [("last 4 blocks", tuple(NAMES), 0)]),
        ("all", [("all", tuple(NAMES), 0)]),
        ("layer1", [("layer1", ("layer1",), 1)]),
        ((("layer3", "stem"),), [("stem + layer3", ("stem", "layer3"), 0)]),
        ([["layer2", "layer2"]], [("layer2", ("layer2",), 2)]),
        (
            (0, 1, "all"),
            [("head", (), 4), ("last block", ("layer3",), 3), ("all", tuple(NAMES), 0)],
        ),
        (
            iter([0, {"layer2"}, "layer3"]),
            [("head", (), 4), ("layer2", ("layer2",), 2), ("layer3", ("layer3",), 2)],
        ),
        (np.array([0, 1]), [("head", (), 4), ("last block", ("layer3",), 3)]),
    ],
)
def test_resolve_stages_accepts_every_form_of_unfreeze(unfreeze, expected):
    assert resolve_stages(unfreeze, NAMES) == tuple(Stage(*fields) for fields in expected)


def test_stage_without_blocks_is_head_only():
    assert [s.head_only for s in resolve_stages((0, 1, "stem"), NAMES)] == [True, False, False]


@pytest.mark.parametrize(
    ("unfreeze", "boundaries"),
    [
        (("stem", 2), [0, 0]),
        ((0, 2, "layer3"), [4, 2, 2]),
        ((1, ["layer1", "layer3"], 2, "all"), [3, 1, 1, 0]),
    ],
)
def test_boundary_never_moves_back_over_trained_blocks(unfreeze, boundaries):
    stages = resolve_stages(unfreeze, NAMES)
    assert [s.boundary for s in stages] == boundaries
    for s in stages:
        assert all(NAMES.index(block) >= s.boundary for block in s.blocks)


@pytest.mark.parametrize(
    ("unfreeze", "message"),
    [
        *[
            (
                nothing,
                f"Got unfreeze={nothing!r}, but expected one entry per stage, such as (0, 1, 2): "
                "the number of last blocks to train, 'all', or names of blocks",
            )
            for nothing in ((), None, 1.5)
        ],
        (
            (1, 0),
            "Got unfreeze=(1, 0), but 0, which fits only the head, must come first: later "
            "stages train the head together with the blocks",
        ),
        (
            (0, 0),
            "Got unfreeze=(0, 0), but 0, which fits only the head, must come first: later "
            "stages train the head together with the blocks",
        ),
        (
            5,
            "Got 5 in unfreeze, but the backbone has 4 blocks; expected 0 to 4, or 'all'",
        ),
        (
            (0, -1),
            "Got -1 in unfreeze, but the backbone has 4 blocks; expected 0 to 4, or 'all'",
        ),
        (
            (0, "layer9"),
            "Got 'layer9' in unfreeze, but the backbone has blocks stem, layer1, layer2, layer3; "
            "did you mean 'layer3'?",
        ),
        (
            "al",
            "Got 'al' in unfreeze, but the backbone has blocks stem, layer1, layer2, layer3; "
            "did you mean 'all'?",
        ),
        (
            (["stem", 7],),
            "Got 7 in unfreeze, but the backbone has blocks stem, layer1, layer2, layer3",
        ),
        *[
            (
                (0, nothing),
                f"Got {nothing!r} in unfreeze, a stage that trains nothing; expected a number of "
                "blocks, 'all', or names of blocks",
            )
            for nothing in ([], None, 1.0)
        ],
    ],
)
def test_resolve_stages_rejects_invalid_unfreeze(unfreeze, message):
    with pytest.raises(ValueError, match=r"^Got ") as caught:
        resolve_stages(unfreeze, NAMES)
    assert str(caught.value) == message


@pytest.mark.parametrize("unfreeze", [True, (True,), (0, False)])
def test_resolve_stages_rejects_booleans(unfreeze):
    with pytest.raises(ValueError, match=r"^Got (True|False) in unfreeze, a stage that trains"):
        resolve_stages(unfreeze, NAMES)


@pytest.mark.parametrize("count", [1, 2, 3, 18, 100])
@pytest.mark.parametrize(("lr_drop", "lr_decay"), [(10, 2.6), (1, 1), (50, 1.1), (2, 1000)])
def test_peak_rates_fall_from_head_to_input_by_a_factor_of_10_at_most(count, lr_drop, lr_decay):
    rates = peak_rates(stage(count), lr=0.02, lr_drop=lr_drop, lr_decay=lr_decay)
    blocks = of_blocks(rates)
    assert rates[HEAD] == 0.02
    assert set(rates) == {HEAD, PRE_LOGITS, *stage(count).blocks}
    assert blocks[0] == rates[PRE_LOGITS] == 0.02 / lr_drop
    assert max(blocks) <= 0.02 / lr_drop
    assert all(later >= earlier for later, earlier in itertools.pairwise(blocks))
    assert blocks[0] / blocks[-1] <= 10 * (1 + 1e-12)


def test_peak_rates_are_listed_from_the_last_block_to_the_first():
    rates = peak_rates(stage(3), lr=1.0, lr_drop=10, lr_decay=2)
    assert rates == {
        "head": 1.0,
        "pre_logits": 0.1,
        "block2": 0.1,
        "block1": pytest.approx(0.05),
        "block0": pytest.approx(0.025),
    }


def test_peak_rates_of_many_blocks_are_spread_evenly():
    blocks = of_blocks(peak_rates(stage(18), lr=1.0, lr_drop=10, lr_decay=2.6))
    steps = [later / earlier for later, earlier in itertools.pairwise(blocks)]
    np.testing.assert_allclose(steps, 10 ** (1 / 17))


def test_peak_rates_from_scratch_are_equal():
    rates = peak_rates(stage(4), lr=0.1, lr_drop=10, lr_decay=2.6, scratch=True)
    assert set(rates.values()) == {0.1}


def test_head_stage_has_only_the_rate_of_the_head():
    assert peak_rates(Stage("head", (), 4), lr=0.1, lr_drop=10, lr_decay=2.6) == {HEAD: 0.1}


def test_rate_factor_rises_for_a_tenth_and_then_falls():
    factors = np.array([rate_factor(progress) for progress in np.linspace(0, 1, 1001)])
    assert factors.argmax() == 100
    assert factors.max() == pytest.approx(1)
    assert (np.diff(factors[:101]) > 0).all()
    assert (np.diff(factors[100:]) < 0).all()
    assert factors[[0, -1]] == pytest.approx(0.01)
    assert np.abs(np.diff(factors)).max() < 0.011, "the two parts do not meet"
