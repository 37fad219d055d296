import importlib.util
import inspect
import multiprocessing
import re
import sys

import numpy as np
import pytest
import sklearn
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import BaggingClassifier
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from tqdm.auto import tqdm

from sktransfer.utils import progress
from sktransfer.utils.progress import CallbackSupport, FitProgress, describe, with_callbacks

X = np.random.default_rng(0).normal(size=(24, 3))
y = np.where(X[:, 0] > 0, "daisy", "rose")
X[:, 0] *= 3


class Staged(CallbackSupport, GaussianNB):
    """A classifier whose fit takes no time, with stages and epochs only for callbacks."""

    def __init__(self, epochs=(0, 2, 3), last_epochs=None, fail_at=None, verbose=0):
        super().__init__()
        self.epochs = epochs  # of every stage
        self.last_epochs = last_epochs  # epochs of the last stage before early stopping
        self.fail_at = fail_at  # (stage, epoch)
        self.verbose = verbose

    @with_callbacks
    def fit(self, X, y, sample_weight=None):
        """Fit."""
        super().fit(X, y, sample_weight)
        progress = FitProgress(
            self, n_stages=len(self.epochs), verbose=self.verbose, X=lambda: X, y=lambda: y
        )
        with progress:
            for stage, max_epochs in enumerate(self.epochs):
                lr = (1e-3, 1e-4) if stage else ()
                with progress.stage(
                    f"stage {stage}", max_epochs, trainable=10 ** (3 * stage), lr=lr
                ) as epochs:
                    for epoch in epochs:
                        self._run(stage, epoch, epochs)
                        if stage == len(self.epochs) - 1 and epoch + 1 == self.last_epochs:
                            break
                if progress.stop:
                    break
        return self

    def _run(self, stage, epoch, epochs):
        if self.fail_at == (stage, epoch):
            raise RuntimeError("out of luck")
        metrics = {"loss": 1 / (1 + epoch), "valid_acc": 0.5 + epoch / 10, "lr": (1e-3, 1e-4)}
        # The first epoch swaps the two classes.
        means = self.theta_ if epoch else self.theta_[::-1]
        epochs.update(metrics, reconstruction=lambda: {"theta_": means})


class Recorder:
    """Records the events that a callback receives, with the path of each task."""

    def __init__(self, stop_after=()):
        self.heard = []
        self.stop_after = stop_after
        self.metrics = []

    def setup(self, estimator, context):
        self.heard.append("setup")

    def teardown(self, estimator, context):
        self.heard.append("teardown")

    def on_fit_task_begin(self, estimator, context):
        self.heard.append(f"begin {task_path(context)}")

    def on_fit_task_end(self, estimator, context, *, X=None, fitted_estimator=None):
        self.heard.append(f"end {task_path(context)}")
        self.metrics.append(getattr(context, "metrics", None))
        return task_path(context) in self.stop_after


class Follower(Recorder):
    """A recorder that meta-estimators propagate."""

    max_propagation_depth = None


def task_path(context):
    """Return the path of a task, such as fit.1.0 for the first epoch of the second stage."""
    numbers = []
    while context.parent is not None:
        numbers.append(str(context.task_id))
        context = context.parent
    return ".".join(["fit", *reversed(numbers)])


def assert_nested(heard):
    """Check that every task ends once, before the task around it."""
    running = []
    for what in heard:
        if what.startswith("begin"):
            task = what.removeprefix("begin ")
            assert not running or task.startswith(running[-1])
            running.append(task)
        elif what.startswith("end"):
            assert running.pop() == what.removeprefix("end ")
    assert not running


needs_callbacks = pytest.mark.skipif(
    importlib.util.find_spec("sklearn.callback") is None,
    reason="scikit-learn before 1.9 has no callbacks",
)


@needs_callbacks
def test_callback_receives_fit_stages_and_epochs():
    recorder = Recorder()
    Staged(epochs=(0, 1, 2)).set_callbacks(recorder).fit(X, y)
    assert recorder.heard == [
        "setup",
        "begin fit",
        *("begin fit.0", "end fit.0"),
        *("begin fit.1", "begin fit.1.0", "end fit.1.0", "end fit.1"),
        *("begin fit.2", "begin fit.2.0", "end fit.2.0"),
        *("begin fit.2.1", "end fit.2.1", "end fit.2"),
        "end fit",
        "teardown",
    ]


@needs_callbacks
def test_early_stop_ends_every_task():
    recorder = Recorder()
    Staged(epochs=(1, 5), last_epochs=2).set_callbacks(recorder).fit(X, y)
    assert_nested(recorder.heard)
    assert recorder.heard[-5:] == [
        *("begin fit.1.1", "end fit.1.1", "end fit.1", "end fit", "teardown"),
    ]


@needs_callbacks
def test_tasks_end_on_exceptions():
    recorder = Recorder()
    with pytest.raises(RuntimeError, match="out of luck"):
        Staged(fail_at=(1, 1)).set_callbacks(recorder).fit(X, y)
    assert_nested(recorder.heard)
    assert recorder.heard[-5:] == [
        *("begin fit.1.1", "end fit.1.1", "end fit.1", "end fit", "teardown"),
    ]


@needs_callbacks
def test_error_of_the_fit_takes_precedence_over_callback_errors():
    class Broken(Recorder):
        def on_fit_task_end(self, estimator, context):
            super().on_fit_task_end(estimator, context)
            raise OSError(f"no connection in {task_path(context)}")

    with pytest.raises(OSError, match=r"no connection in fit\.0"):
        Staged().set_callbacks(Broken()).fit(X, y)
    with pytest.raises(RuntimeError, match="out of luck"):
        Staged(epochs=(1,), fail_at=(0, 0)).set_callbacks(Broken()).fit(X, y)


@needs_callbacks
def test_callback_stops_the_epochs_of_a_stage():
    recorder = Recorder(stop_after=["fit.1.0"])
    Staged().set_callbacks(recorder).fit(X, y)
    assert_nested(recorder.heard)
    assert "begin fit.1.1" not in recorder.heard
    assert "end fit.2.2" in recorder.heard


@needs_callbacks
def test_callback_stops_the_stages():
    recorder = Recorder(stop_after=["fit.0"])
    Staged().set_callbacks(recorder).fit(X, y)
    assert recorder.heard[1:-1] == ["begin fit", "begin fit.0", "end fit.0", "end fit"]


@needs_callbacks
def test_stage_after_a_request_to_stop_has_no_epochs():
    """This holds even if a fit ignores `stop`."""
    recorder = Recorder(stop_after=["fit.0"])

    class Deaf(CallbackSupport):
        @with_callbacks
        def fit(self):
            with FitProgress(self, n_stages=2) as progress:
                for _ in range(2):
                    with progress.stage("stage", 1, trainable=1) as epochs:
                        assert [epochs.update({}) for _ in epochs] == [False] * (not progress.stop)

    Deaf().set_callbacks(recorder).fit()
    assert "begin fit.0.0" in recorder.heard
    assert "begin fit.1.0" not in recorder.heard


@needs_callbacks
def test_update_begins_an_epoch_and_returns_a_request_to_stop():
    recorder = Recorder(stop_after=["fit.0.1"])

    class Plain(CallbackSupport):
        @with_callbacks
        def fit(self):
            with (
                FitProgress(self, n_stages=1) as progress,
                progress.stage("stage", 9, trainable=1) as epochs,
            ):
                self.answers = [epochs.update({}), epochs.update({}), epochs.update({})]
                epochs.begin()
                epochs.begin()
            return self

    assert Plain().set_callbacks(recorder).fit().answers == [False, True, False]
    assert_nested(recorder.heard)
    assert recorder.heard.count("begin fit.0.3") == 1


@needs_callbacks
def test_context_holds_the_metrics():
    recorder = Recorder()
    Staged(epochs=(1,)).set_callbacks(recorder).fit(X, y)
    epoch, stage, fit = recorder.metrics
    assert epoch == {"loss": 1, "valid_acc": 0.5, "lr": (1e-3, 1e-4)}
    assert stage == {"lr": (), "trainable": 1}
    assert fit is None


@needs_callbacks
def test_data_and_fitted_estimator_are_built_only_on_request():
    calls = []

    class Lazy(CallbackSupport):
        @with_callbacks
        def fit(self):
            def reconstruction():
                calls.append("reconstruction")
                return {"epoch_": 7}

            def data():
                calls.append("X")
                return X

            with (
                FitProgress(self, n_stages=1, X=data) as progress,
                progress.stage("stage", 1, trainable=1) as epochs,
            ):
                epochs.update({}, reconstruction)

    class Curious(Recorder):
        def on_fit_task_end(self, estimator, context, *, X=None, fitted_estimator=None):
            assert fitted_estimator is not estimator
            self.heard.append((X is not None, fitted_estimator.epoch_))

    class Idle(Recorder):
        def on_fit_task_end(self, estimator, context):
            pass

    Lazy().set_callbacks(Idle()).fit()
    assert calls == []
    curious = Curious()
    Lazy().set_callbacks(curious).fit()
    assert curious.heard[-4:-1] == [(True, 7)] * 3  # epoch, stage and fit


@needs_callbacks
def test_scoring_monitor_scores_every_epoch_stage_and_the_fit():
    from sklearn.callback import ScoringMonitor

    monitor = ScoringMonitor(scoring="accuracy")
    Staged(epochs=(0, 2)).set_callbacks(monitor).fit(X, y)
    scores = {row["task_id_path"]: row["accuracy"] for row in monitor.get_logs().data}
    right = scores[(0,)]
    assert right > 0.9
    assert scores == {(0,): right, (0, 1): right, (0, 1, 0): 1 - right, (0, 1, 1): right}


@needs_callbacks
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_search_with_a_progress_bar_shows_stages_and_epochs(n_jobs, capfd, monkeypatch):
    pytest.importorskip("rich")
    from sklearn.callback import ProgressBar

    monkeypatch.setenv("COLUMNS", "160")
    search = GridSearchCV(Staged(verbose=1), {"epochs": [(0, 2), (0, 3)]}, cv=2, n_jobs=n_jobs)
    search.set_callbacks(ProgressBar()).fit(X, y)
    out, err = capfd.readouterr()
    assert err == ""
    assert out.count("candidate-split-evaluation | Staged - fit") == 4
    assert out.count("Staged - stage 0 (trainable=1) #0") == 5
    assert out.count("Staged - stage 1 (lr=0.001 to 0.0001, trainable=1.0K) #1") == 5
    assert out.count("100%") == out.count("\n") == 17


@needs_callbacks
def test_search_passes_stages_and_epochs_of_every_fit_to_callbacks():
    follower = Follower()
    search = GridSearchCV(Staged(), {"epochs": [(0, 2), (0, 3)]}, cv=2)
    search.set_callbacks(follower).fit(X, y)
    assert_nested(follower.heard)
    assert follower.heard.count("setup") == 1
    evaluations = [f"fit.0.{split}" for split in range(4)]
    for fit in [*evaluations, "fit.1"]:
        assert f"begin {fit}.0" in follower.heard
        assert f"end {fit}.1.1" in follower.heard
    assert f"end {evaluations[3]}.1.2" in follower.heard


@needs_callbacks
def test_failed_fit_in_a_search_ends_its_tasks():
    follower = Follower()
    search = GridSearchCV(Staged(), {"fail_at": [None, (1, 0)]}, cv=2, error_score=0)
    with pytest.warns(sklearn.exceptions.FitFailedWarning, match="out of luck"):
        search.set_callbacks(follower).fit(X, y)
    assert_nested(follower.heard)


@needs_callbacks
def test_pipeline_propagates_its_callbacks():
    follower = Follower()
    pipeline = Pipeline([("scale", StandardScaler()), ("classify", Staged(epochs=(1,)))])
    pipeline.set_callbacks(follower).fit(X, y)
    assert_nested(follower.heard)
    assert "end fit.1.0.0" in follower.heard


@needs_callbacks
def test_fit_leaves_no_context_and_clone_keeps_the_callbacks():
    recorder = Recorder()
    estimator = Staged().set_callbacks(recorder).fit(X, y)
    assert not [name for name in vars(estimator) if "context" in name or "ctx" in name]
    assert clone(estimator)._skl_callbacks == [recorder]


def bars(err):
    """Return the last state of each bar."""
    return [line.split("\r")[-1].strip() for line in err.split("\n")[:-1]]


def bar_with(**options):
    """Return a class of bars with other options."""

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, **options)

    return Bar


def test_verbose_fit_shows_one_bar_per_stage(capfd, monkeypatch):
    monkeypatch.setattr(progress, "tqdm", bar_with(ncols=79))  # as in a terminal of 80 columns
    Staged(verbose=1).fit(X, y)
    out, err = capfd.readouterr()
    assert out == ""
    rates = "lr=0.001 to 0.0001"
    assert [re.sub(r"(?<=: ).*(\d/\d).*?(?=, [a-z])", r"\1", bar) for bar in bars(err)] == [
        "stage 0: 1/1, trainable=1]",
        f"stage 1: 2/2, loss=0.5, valid_acc=0.6, {rates}]",
        f"stage 2: 3/3, loss=0.333, valid_acc=0.7, {rates}]",
    ]


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (200, "loss=0.123, valid_loss=0.234, valid_acc=0.95, lr=0.001 to 0.0001"),
        (90, "loss=0.123, valid_loss=0.234, valid_acc=0.95"),
        (80, "loss=0.123, valid_acc=0.95"),
        (64, "valid_acc=0.95"),
        (40, ""),
    ],
)
def test_line_leaves_out_metrics_that_do_not_fit(columns, shown, capfd, monkeypatch):
    monkeypatch.setattr(progress, "tqdm", bar_with(ncols=columns))
    metrics = {"loss": 0.1234, "valid_loss": 0.2345, "valid_acc": 0.95, "lr": (1e-3, 1e-4)}
    fit = FitProgress(Staged(), n_stages=1, verbose=1)
    with fit, fit.stage("last 4 blocks", 12, trainable=10**6, lr=(1e-3, 1e-4)) as epochs:
        for _ in epochs:
            epochs.update(metrics)
    (bar,) = bars(capfd.readouterr().err)
    assert len(bar) <= columns
    assert re.search(r"█+\| 12/12 \[\d\d:\d\d<\d\d:\d\d(.*)\]$", bar)[1].removeprefix(", ") == shown


def test_every_line_shows_the_metrics_of_its_epoch(capfd, monkeypatch):
    monkeypatch.setattr(progress, "tqdm", bar_with(mininterval=0, miniters=1))
    Staged(epochs=(4,), verbose=1).fit(X, y)
    lines = re.findall(r"([1-4])/4 \[.*?, loss=([\d.]+)", capfd.readouterr().err)
    assert {int(epoch) for epoch, _ in lines} == {1, 2, 3, 4}
    assert all(float(loss) == pytest.approx(1 / int(epoch), abs=1e-3) for epoch, loss in lines)


def test_bar_is_full_after_an_early_stop_but_not_after_a_failure(capfd):
    Staged(epochs=(9,), last_epochs=2, verbose=1).fit(X, y)
    assert "| 2/2 [" in bars(capfd.readouterr().err)[0]
    with pytest.raises(RuntimeError, match="out of luck"):
        Staged(epochs=(9,), fail_at=(0, 3), verbose=1).fit(X, y)
    assert "| 3/9 [" in bars(capfd.readouterr().err)[0]


def test_fit_in_a_pipeline_shows_its_bars(capfd):
    Pipeline([("scale", StandardScaler()), ("classify", Staged(verbose=1))]).fit(X, y)
    assert len(bars(capfd.readouterr().err)) == 3


@needs_callbacks
def test_propagating_callback_replaces_the_bars(capfd):
    Staged(verbose=1).set_callbacks(Recorder()).fit(X, y)
    assert len(bars(capfd.readouterr().err)) == 3
    Staged(verbose=1).set_callbacks(Follower()).fit(X, y)
    assert capfd.readouterr() == ("", "")
    shallow = Follower()
    shallow.max_propagation_depth = 0
    Pipeline([("classify", Staged(verbose=1))]).set_callbacks(shallow).fit(X, y)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "many",
    [
        lambda: GridSearchCV(Staged(verbose=1), {"epochs": [(0, 2), (0, 3)]}, cv=2).fit(X, y),
        lambda: GridSearchCV(
            Pipeline([("c", Staged(verbose=1))]), {"c__epochs": [(0, 2)]}, cv=2
        ).fit(X, y),
        lambda: cross_val_score(Staged(verbose=1), X, y, cv=2),
        lambda: BaggingClassifier(Staged(verbose=1), n_estimators=2).fit(X, y),
        lambda: CalibratedClassifierCV(Staged(verbose=1), cv=2).fit(X, y),
    ],
    ids=["search", "search in pipelines", "cross-validation", "ensemble", "calibration"],
)
def test_fit_is_quiet_in_meta_estimators(many, capfd):
    many()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_fit_is_quiet_in_a_parallel_search(folder, capfd):
    """The fixture starts new workers, whose output is captured."""
    GridSearchCV(Staged(verbose=1), {"epochs": [(0, 2), (0, 3)]}, cv=2, n_jobs=2).fit(X, y)
    assert capfd.readouterr() == ("", "")


def test_fit_is_quiet_in_a_worker_process(capfd, monkeypatch):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: multiprocessing)
    Staged(verbose=1).fit(X, y)
    assert capfd.readouterr() == ("", "")


def test_fit_is_quiet_by_default(capfd):
    Staged().fit(X, y)
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # of GaussianNB
def test_estimator_with_callbacks_passes_check_estimator():
    results = check_estimator(Staged(), on_skip=None, on_fail="raise")
    assert len(results) > 40


def test_decorated_fit_keeps_its_signature_and_metadata_requests():
    assert list(inspect.signature(Staged.fit).parameters) == ["self", "X", "y", "sample_weight"]
    assert Staged.fit.__doc__ == "Fit."
    assert set(Staged().get_params()) == {"epochs", "last_epochs", "fail_at", "verbose"}
    with sklearn.config_context(enable_metadata_routing=True):
        request = Staged().set_fit_request(sample_weight=True).get_metadata_routing()
    assert request.fit.requests == {"sample_weight": True}


def test_bars_work_without_sklearn_callback(capfd, monkeypatch):
    """As in scikit-learn 1.6: bars are shown, but not in a search."""
    monkeypatch.setitem(sys.modules, "sklearn.callback", None)
    spec = importlib.util.spec_from_file_location("progress_without_callbacks", progress.__file__)
    bare = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, bare)
    spec.loader.exec_module(bare)
    assert bare.CallbackSupport is not CallbackSupport

    class Old(bare.CallbackSupport, GaussianNB):
        @bare.with_callbacks
        def fit(self, X, y):
            with (
                bare.FitProgress(self, n_stages=1, verbose=1) as progress,
                progress.stage("stage", 2, trainable=1) as epochs,
            ):
                assert [epochs.update({"loss": 1}) for _ in epochs] == [False, False]
            return super().fit(X, y)

    assert not hasattr(Old, "set_callbacks")
    Old().fit(X, y)
    assert re.match(r"stage: \|█+\| 2/2 \[", bars(capfd.readouterr().err)[0])
    monkeypatch.delitem(sys.modules, "sklearn.callback")
    GridSearchCV(Old(), {"var_smoothing": [1e-9, 1e-8]}, cv=2).fit(X, y)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (950, "950"), (5130, "5.1K"), (999_960, "1.0M"), (12_345_678, "12M")],
)
def test_describe_shortens_counts(count, text):
    assert describe({"trainable": count}) == f"trainable={text}"


@pytest.mark.parametrize(
    ("lr", "text"),
    [
        (1e-3, "lr=0.001"),
        ([1e-3], "lr=0.001"),
        ([1e-3, 1e-3], "lr=0.001"),
        (np.geomspace(1e-3, 1e-5, 5), "lr=0.001 to 1e-05"),
        ((), ""),
        (None, ""),
    ],
)
def test_describe_shortens_rates(lr, text):
    assert describe({"lr": lr}) == text


def test_stage_without_epochs_shows_its_metrics(capfd):
    class HeadOnly(CallbackSupport):
        @with_callbacks
        def fit(self):
            with (
                FitProgress(self, n_stages=1, verbose=1) as progress,
                progress.stage("head", 0, trainable=5130) as epochs,
            ):
                epochs.update({"valid_loss": None, "valid_acc": 0.875})

    HeadOnly().fit()
    (bar,) = bars(capfd.readouterr().err)
    assert "1/1" in bar
    assert bar.endswith(", valid_acc=0.875]")


@pytest.mark.parametrize("verbose", [0, 1])
def test_notes_are_printed_beside_the_bars(verbose, capsys):
    """Standard output is for the results of a script."""
    with FitProgress(Staged(), n_stages=1, verbose=verbose) as fit:
        fit.note("decided")
    assert capsys.readouterr() == ("", "decided\n" * verbose)
