"""The estimated cost equals the images that the counting backbone receives."""

import copy
import re

import numpy as np
import pandas as pd
import pytest
import torch
from edge_helpers import Unread
from helpers import CountingTiny, Tiny, counted, images
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.ensemble import BaggingClassifier, StackingClassifier, VotingClassifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    KFold,
    RandomizedSearchCV,
    ShuffleSplit,
    cross_val_score,
)
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNet

from sktransfer import FineTunedImageClassifier, PretrainedFeatureExtractor
from sktransfer.diagnostics.cost import Cost, estimate_cost

N = 60
X = images(N)
Y = np.arange(N) % 3


def classifier(backbone=Tiny, **parameters):
    defaults = {"unfreeze": (0, 1), "max_epochs": 2, "n_views": 2, "random_state": 0}
    return FineTunedImageClassifier(backbone, **{**defaults, **parameters})


def embedding(extractor):
    return make_pipeline(extractor, RidgeClassifier())


@pytest.fixture
def trained(monkeypatch):
    """Record the number of labeled images of each training step."""
    recorded, step = [], NeuralNet.train_step_single

    def recording(self, batch, **parameters):
        recorded.append(len(batch[1]))
        return step(self, batch, **parameters)

    monkeypatch.setattr(NeuralNet, "train_step_single", recording)
    return recorded


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"augment": "standard", "n_views": None, "averaging": 1.0},
        *(
            pytest.param(parameters, marks=pytest.mark.slow)
            for parameters in [
                {"averaging": 1.0},
                {"averaging": 0.5, "n_views": None},
                {"max_epochs": "auto"},
                {"unfreeze": 0},
                {"augment": None, "n_views": None},
                {"n_views": None},
                {"n_views": None, "unfreeze": (1,)},
                {"unfreeze": (1, 1)},
                {"cache": None},
            ]
        ),
    ],
)
def test_estimate_cost_equals_the_counts_of_a_classifier_search(log, store, trained, parameters):
    parameters = {"cache": store, **parameters}
    search = GridSearchCV(
        classifier(CountingTiny(log), **parameters),
        {"lr": [1e-3, 1e-4]},
        cv=ShuffleSplit(2, test_size=0.3, random_state=0),
        error_score="raise",
    )
    cost = estimate_cost(search, X, Y)
    log.unlink(missing_ok=True)
    trained.clear()
    search.fit(X, Y)
    best = search.best_estimator_
    assert cost.fits == 5
    assert cost.images_embedded == counted(log)
    assert cost.images_trained == sum(trained)
    tries = best.averaging == "auto" and best.unfreeze == (0, 1)
    assert (cost.images_trained > len(best.history_) * (2 * 2 * 42 + N)) == tries
    assert cost.seconds > 0
    stored_bytes = sum(table.bytes for table in store.info().tables)
    boundary = min(stage["boundary"] for stage in best.stages_)
    fresh = best.augment is not None and best.n_views is None
    views = 0 if fresh and best.unfreeze == (1,) else N
    views *= 1 if fresh or best.augment is None else 3
    first = 12 if fresh or boundary == 2 else 8 * 8 * 8 // 2  # the map in float16
    later = 12 * (first > 12 and best.unfreeze == (0, 1))
    assert cost.bytes_cached == stored_bytes + 4 * views * (first + later)


BOTH_DOMAINS = np.concatenate([X, images(30, seed=7)])
DOMAIN = np.repeat([1, -2], [N, 30])
BOTH_LABELS = np.concatenate([Y, np.full(30, Y[0])])


@pytest.mark.slow_cases("parameters0", "parameters1")
@pytest.mark.parametrize(
    "parameters",
    [
        {"domain_adversarial": 1.0},
        {"domain_adversarial": 1.0, "unfreeze": (0, 1, 2)},
        {"domain_adversarial": 1.0, "n_views": None},
        {"domain_adversarial": 1.0, "unfreeze": "all"},
        {"batch_norm": "adapt"},
    ],
)
def test_estimate_cost_counts_target_images(log, store, trained, parameters):
    estimator = classifier(CountingTiny(log), cache=store, early_stopping=False, **parameters)
    cost = estimate_cost(estimator, BOTH_DOMAINS, BOTH_LABELS, sample_domain=DOMAIN)
    source_only = estimate_cost(estimator, X, Y) if "batch_norm" in parameters else None
    log.unlink(missing_ok=True)
    trained.clear()
    estimator.fit(BOTH_DOMAINS, BOTH_LABELS, sample_domain=DOMAIN)
    matched = 0 if source_only is None else N + 30  # not in inference mode, so not in the log
    assert cost.images_embedded - matched == counted(log)
    domains = 2 if "domain_adversarial" in parameters else 1
    assert cost.images_trained == domains * sum(trained)


@pytest.mark.parametrize("early_stopping", [True, "auto", False])
@pytest.mark.parametrize("n_views", [2, None])
def test_estimate_cost_holds_out_as_many_images_as_the_fit(
    log, store, trained, monkeypatch, early_stopping, n_views
):
    monkeypatch.setattr("sktransfer.finetuning.plan.MIN_IMAGES_TO_HOLD_OUT", N)
    estimator = classifier(
        CountingTiny(log), cache=store, early_stopping=early_stopping, n_views=n_views
    )
    cost = estimate_cost(estimator, X, Y)
    log.unlink(missing_ok=True)
    trained.clear()
    estimator.fit(X, Y)
    held_out = 0 if early_stopping is False else 6
    assert (estimator.stages_[0]["valid_loss"] is None) == (not held_out)
    # An upper bound: held-out images have no augmented views, and train in no epoch.
    spared = held_out * (2 if n_views else 1 + estimator.max_epochs)
    assert 0 <= cost.images_embedded - counted(log) - spared <= len(np.unique(Y))
    assert cost.images_trained - sum(trained) == held_out * estimator.max_epochs


def test_estimate_cost_holds_nothing_out_by_default_with_an_adversary(log, store, monkeypatch):
    monkeypatch.setattr("sktransfer.finetuning.plan.MIN_IMAGES_TO_HOLD_OUT", N)
    estimator = classifier(CountingTiny(log), cache=store, domain_adversarial=1.0)
    cost = estimate_cost(estimator, BOTH_DOMAINS, BOTH_LABELS, sample_domain=DOMAIN)
    log.unlink(missing_ok=True)
    estimator.fit(BOTH_DOMAINS, BOTH_LABELS, sample_domain=DOMAIN)
    assert cost.images_embedded == counted(log)


def test_estimate_cost_of_a_whole_network_caches_nothing(log, store):
    estimator = classifier(CountingTiny(log), unfreeze="all", augment="light", cache=store)
    cost = estimate_cost(estimator, X, Y, cv=3)
    assert (cost.fits, cost.images_embedded, cost.bytes_cached) == (3, 0, 0)
    assert cost.images_trained == 3 * 40 * 2


@pytest.mark.parametrize("shared", [True, False])
def test_estimate_cost_equals_the_counts_of_a_pipeline_search(log, store, shared):
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=store if shared else None)
    search = GridSearchCV(
        embedding(extractor), {"ridgeclassifier__alpha": np.logspace(-3, 2, 6)}, cv=5
    )
    cost = estimate_cost(search, X, Y)
    assert (cost.fits, cost.images_embedded) == (31, N if shared else 31 * N)
    assert cost.bytes_cached == (N * 12 * 4 if shared else 0)
    log.unlink(missing_ok=True)
    search.fit(X, Y)
    assert cost.images_embedded == counted(log)


@pytest.mark.parametrize("batch_norm", ["frozen", "adapt"])
def test_estimate_cost_counts_each_embedding_of_a_search_separately(log, store, batch_norm):
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=store, batch_norm=batch_norm)
    grid = {
        "pretrainedfeatureextractor__layer": [None, "0"],
        "ridgeclassifier__alpha": [0.1, 1, 10],
    }
    search = GridSearchCV(embedding(extractor), grid, cv=KFold(3), return_train_score=True)
    cost = estimate_cost(search, X, Y)
    log.unlink(missing_ok=True)
    search.fit(X, Y)
    adapting = (18 * 40 + N) if batch_norm == "adapt" else 0  # not counted by the backbone
    assert cost.images_embedded - adapting >= counted(log)
    # The layer of the refit is unknown; its embeddings are shared unless BatchNorm is adapted.
    unknown = N if batch_norm == "adapt" else 0
    assert cost.images_embedded - adapting - counted(log) == unknown


@pytest.mark.slow
def test_estimate_cost_equals_the_counts_of_nested_cross_validation(log, store):
    tuned = classifier(CountingTiny(log), cache=store, max_epochs=1)
    search = GridSearchCV(tuned, {"lr": [1e-3, 1e-4]}, cv=2)
    cost = estimate_cost(search, X, Y, cv=3)
    assert cost.fits == 3 * (2 * 2 + 1)
    log.unlink(missing_ok=True)
    cross_val_score(search, X, Y, cv=3)
    assert cost.images_embedded == counted(log)


def test_estimate_cost_counts_both_estimators_of_a_union():
    tuned = classifier(n_views=0, averaging=1.0)
    union = FeatureUnion([("a", PretrainedFeatureExtractor(Tiny)), ("b", tuned)])
    cost = estimate_cost(Pipeline([("union", union), ("ridge", RidgeClassifier())]), X, Y, cv=3)
    assert cost.fits == 3
    assert cost.images_trained == 3 * 40 * 2
    assert cost.images_embedded > N


def test_estimate_cost_bounds_a_halving_search_from_above(log, store):
    grid = {"lr": [1e-3, 5e-4, 2e-4, 1e-4]}
    search = HalvingGridSearchCV(
        classifier(CountingTiny(log), cache=store),
        grid,
        cv=2,
        factor=2,
        random_state=0,
        min_resources=20,
    )
    cost = estimate_cost(search, X, Y)
    log.unlink(missing_ok=True)
    search.fit(X, Y)
    assert counted(log) <= cost.images_embedded
    assert len(search.cv_results_["params"]) * 2 + 1 <= cost.fits == 15


def test_estimate_cost_leaves_random_states_parameters_and_store_unchanged(store):
    search = RandomizedSearchCV(
        classifier(cache=store, augment="standard"),
        {"lr": [1e-3, 1e-4, 1e-5]},
        n_iter=2,
        cv=KFold(3, shuffle=True, random_state=np.random.RandomState(0)),
        random_state=np.random.RandomState(1),
    )

    def states():
        drawn = np.concatenate(
            [s.get_state()[1] for s in (search.cv.random_state, search.random_state)]
        )
        return drawn, np.random.get_state()[1].copy(), torch.get_rng_state().numpy()

    before, parameters = copy.deepcopy(states()), repr(search.get_params())
    cost = estimate_cost(search, X, Y)
    assert cost.fits == 7
    assert all(map(np.array_equal, before, states()))
    assert repr(search.get_params()) == parameters
    assert not store.directory.exists()


@pytest.mark.parametrize(
    ("estimator", "y", "cv", "message"),
    [
        (RidgeClassifier(), Y, None, "Got RidgeClassifier, whose cost cannot be counted; expected"),
        (
            make_pipeline(RidgeClassifier(), classifier()),
            Y,
            None,
            "Got Pipeline, whose cost cannot",
        ),
        (classifier, Y, None, "Got function, whose cost cannot be counted"),
        (classifier(), None, None, "Got y=None, but a FineTunedImageClassifier needs labels"),
        (classifier(), Y, iter([]), "an iterator, which counting would exhaust; pass list(cv)"),
        (classifier(max_epochs=0), Y, None, "Got max_epochs=0"),
        (classifier(unfreeze="layer9"), Y, None, "Got 'layer9' in unfreeze"),
    ],
)
def test_estimate_cost_raises_on_estimators_it_cannot_count(estimator, y, cv, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        estimate_cost(estimator, X, y, cv=cv)


def test_estimate_cost_of_an_extractor_needs_no_labels():
    assert estimate_cost(PretrainedFeatureExtractor(Tiny), X).images_embedded == N


@pytest.mark.parametrize(
    ("excluded", "ending"),
    [
        ((), ""),
        (("the head fit",), ", excluding the head fit"),
        (("the head fit", "the other steps"), ", excluding the head fit and the other steps"),
    ],
)
def test_cost_repr_has_units_and_names_excluded_steps(excluded, ending):
    assert repr(Cost(1001, 60_000, 0, 45_783_040, 239.9, excluded)).splitlines() == [
        "Cost, at most",
        "  fits               1,001",
        "  images embedded    60,000",
        "  images trained     0",
        "  disk space         46 MB",
        f"  time               4 min in one process{ending}",
    ]


PIPELINE = make_pipeline(PretrainedFeatureExtractor(Tiny), LogisticRegression())


@pytest.mark.parametrize(
    ("estimator", "excluded"),
    [
        (lambda: PretrainedFeatureExtractor(Tiny), ()),
        (lambda: PIPELINE, ("the other steps",)),
        (lambda: make_pipeline(classifier()), ("the head fit",)),
        (lambda: make_pipeline("passthrough", PretrainedFeatureExtractor(Tiny)), ()),
        (lambda: classifier(), ("the head fit",)),
        (lambda: GridSearchCV(classifier(), {"lr": [1e-3]}, cv=2), ("the head fit",)),
        (
            lambda: GridSearchCV(PIPELINE, {}, cv=2),
            ("the other steps",),
        ),
        (
            lambda: VotingClassifier([("tuned", classifier())]),
            ("the head fit", "the other steps"),
        ),
    ],
)
def test_cost_names_the_steps_that_it_excludes(estimator, excluded):
    assert estimate_cost(estimator(), X, Y).excluded == excluded


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_missing_labels_are_rejected_except_in_the_target(missing):
    y = [missing if row in (4, 7) else f"class {label}" for row, label in enumerate(Y)]
    with pytest.raises(ValueError, match=r"^Got 2 missing labels in y, in rows 4, 7, but"):
        estimate_cost(classifier(cache=None), X, y)
    domain = np.ones(N, dtype=int)
    domain[[4, 7]] = -2
    costs = [
        estimate_cost(classifier(cache=None), X, labels, cv=KFold(3), sample_domain=domain)
        for labels in (y, Y)
    ]
    assert costs[0].images_trained == costs[1].images_trained > 0


TABLE = pd.DataFrame({"photo": list(X), "size": np.arange(N)})


def columns(extractor, photo=("photo",)):
    return ColumnTransformer(
        [
            ("photo", make_pipeline(extractor, PCA(2)), list(photo)),
            ("size", StandardScaler(), ["size"]),
        ]
    )


def logistic(extractor):
    return make_pipeline(extractor, LogisticRegression(max_iter=1000))


@pytest.mark.slow_cases("data3-3", "data4-3", "data5", "data7-3")
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("cv", [None, 3])
@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda e: make_pipeline(columns(e), LogisticRegression(max_iter=1000)), TABLE),
        (lambda e: make_pipeline(FeatureUnion([("e", e)]), RidgeClassifier()), X),
        (lambda e: VotingClassifier([("a", logistic(e)), ("b", logistic(e))]), X),
        (lambda e: VotingClassifier([("a", logistic(e)), ("b", "drop")]), X),
        (lambda e: StackingClassifier([("a", logistic(e))], RidgeClassifier(), cv=4), X),
        (lambda e: StackingClassifier([("a", logistic(e)), ("b", embedding(e))]), X),
        (lambda e: CalibratedClassifierCV(embedding(e), cv=3), X),
        (lambda e: CalibratedClassifierCV(embedding(e), cv=3, ensemble=False), X),
    ],
)
def test_estimate_cost_equals_the_counts_of_meta_estimators(make, data, cv, cached, log, store):
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=store if cached else None)
    estimator = make(extractor)
    cost = estimate_cost(estimator, data, Y, cv=cv)
    log.unlink(missing_ok=True)
    if cv is None:
        estimator.fit(data, Y)
    else:
        cross_val_score(estimator, data, Y, cv=cv, error_score="raise")
    assert cost.images_embedded == counted(log)


@pytest.mark.parametrize(
    ("make", "fits"),
    [
        (lambda c: VotingClassifier([("a", c), ("b", c)]), 2),
        (lambda c: StackingClassifier([("a", c)], cv=3), 4),
        (lambda c: CalibratedClassifierCV(c, cv=3), 3),
        (lambda c: CalibratedClassifierCV(c, cv=3, ensemble=False), 4),
        (lambda c: GridSearchCV(VotingClassifier([("a", c)]), {"a__lr": [1e-3, 1e-4]}, cv=3), 7),
    ],
)
def test_estimate_cost_counts_the_fits_of_members(make, fits):
    cost = estimate_cost(make(classifier(averaging=1.0)), X, Y)
    assert cost.fits == fits
    folds, refits = fits - (fits == 4) - 2 * (fits == 2) - (fits == 7), fits in (2, 4, 7)
    n = folds * 40 + (2 if fits == 2 else 1) * refits * N
    assert cost.images_trained == 2 * n


@pytest.mark.parametrize(
    "estimator",
    [
        None,
        [],
        "x",
        PretrainedFeatureExtractor,
        BaggingClassifier(classifier()),
        VotingClassifier([("a", RidgeClassifier())]),
        StackingClassifier([("a", RidgeClassifier())]),
        StackingClassifier([("a", classifier())], classifier()),
        StackingClassifier([("a", classifier())], cv="prefit"),
        CalibratedClassifierCV(RidgeClassifier()),
        CalibratedClassifierCV(FrozenEstimator(classifier())),
        ColumnTransformer([], remainder=PretrainedFeatureExtractor(Tiny)),
    ],
)
def test_estimate_cost_says_that_it_cannot_count(estimator):
    with pytest.raises(TypeError, match=r"^Got .*whose cost cannot be counted"):
        estimate_cost(estimator, X, Y)


@pytest.mark.parametrize(
    ("estimator", "cv"),
    [(classifier(), cv) for cv in (0, 1, "x", True, 2.5, 10**6, [([0], [99])], [1, 2])]
    + [(PretrainedFeatureExtractor(Tiny, n_jobs=0), None)]
    + [(PretrainedFeatureExtractor(Tiny, layer="zz"), None)]
    + [(classifier(lr=0), None)],
)
def test_estimate_cost_checks_its_parameters_before_an_image_is_read(estimator, cv):
    with pytest.raises((ValueError, TypeError), match=r"^Got "):
        estimate_cost(estimator, Unread(), np.arange(12) % 2, cv=cv)


@pytest.mark.parametrize(("n", "checked"), [(60, True), (30, False)])
def test_estimate_cost_decides_as_the_fit_does(log, store, trained, n, checked):
    """The second part of the images is too small to hold 10 out."""
    estimator = FineTunedImageClassifier(CountingTiny(log), cache=store, n_views=1)
    cost = estimate_cost(estimator, X[:n], Y[:n])
    log.unlink(missing_ok=True)
    trained.clear()
    estimator.fit(X[:n], Y[:n])
    assert set(estimator.decision_.parameters) == {"unfreeze", "augment", "max_epochs", "lr"}
    assert cost.images_embedded == counted(log)
    assert cost.images_trained == sum(trained)
    assert (cost.images_trained > n * len(estimator.history_)) == checked
