import pytest
from helpers import make_classifier

from sktransfer.finetuning.plan import MIN_IMAGES_TO_HOLD_OUT, held_out_fraction, make_plan
from sktransfer.transforms.augmentation import resolve_augmentation

NAMES = ["stem", "layer1", "layer2"]


def plan(**parameters):
    estimator = make_classifier(**{"augment": "standard", **parameters})
    return make_plan(estimator, NAMES, resolve_augmentation(estimator.augment))


@pytest.mark.parametrize(
    ("unfreeze", "first_boundary", "n_trained"),
    [(0, 3, 0), ((0, 1), 2, 1), ((0, 1, "all"), 2, 2), ("all", 0, 1), ((1, 2), 1, 2)],
)
def test_plan_finds_the_first_cached_boundary_and_the_trained_stages(
    unfreeze, first_boundary, n_trained
):
    fit_plan = plan(unfreeze=unfreeze)
    assert fit_plan.first_boundary == first_boundary
    assert len(fit_plan.trained_stages) == n_trained
    assert all(stage.blocks for stage in fit_plan.trained_stages)
    assert fit_plan.n_blocks == 3


def test_plan_counts_the_views_of_the_target_only_with_an_adversary():
    assert plan(n_views=2).count_cached_views(10, 4) == 30
    assert plan(n_views=2, domain_adversarial=0.5).count_cached_views(10, 4) == 42
    assert plan(n_views=2, augment=None).count_cached_views(10, 4) == 10


def test_plan_caches_stages_after_the_input_if_their_activations_fit():
    cached = plan(unfreeze=(0, 1, "all"), n_views=2)
    assert [cached.is_cached(stage) for stage in cached.stages] == [True, True, False]
    assert cached.gathering_boundary == 2
    fresh = plan(unfreeze=(0, 1, "all"), n_views=None)
    assert fresh.fresh
    whole = plan(unfreeze="all", n_views=2)
    for uncached in (cached.without_cache(), fresh, whole):
        assert not any(uncached.is_cached(stage) for stage in uncached.stages)
        assert uncached.gathering_boundary == 3


@pytest.mark.parametrize(
    ("parameters", "n_images", "expected"),
    [
        ({"early_stopping": True}, 10, 0.2),
        ({"early_stopping": True, "domain_adversarial": 1.0}, 10, 0.2),
        ({"early_stopping": False}, 10**6, 0),
        ({"early_stopping": "auto"}, MIN_IMAGES_TO_HOLD_OUT - 1, 0),
        ({"early_stopping": "auto"}, MIN_IMAGES_TO_HOLD_OUT, 0.2),
        ({"early_stopping": "auto", "domain_adversarial": 1.0}, MIN_IMAGES_TO_HOLD_OUT, 0),
    ],
)
def test_held_out_fraction_follows_early_stopping(parameters, n_images, expected):
    estimator = make_classifier(validation_fraction=0.2, **parameters)
    assert held_out_fraction(estimator, n_images) == expected
