"""What a user sees of a fit: one bar a stage, and scikit-learn's callbacks where it has them.

A fit is a tree of tasks: the fit, its stages, their epochs. From version 1.9 on, scikit-learn has
callbacks that hear of every task, such as its `ProgressBar` and its `ScoringMonitor`; a search or
a pipeline hangs the tree into its own. Where none of them draws and `verbose` is not 0, tqdm does.
"""

from __future__ import annotations

import contextlib
import inspect
import multiprocessing
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

__all__ = ["CallbackSupport", "FitProgress", "StageProgress", "with_callbacks"]


class _NoTask:
    """A task that no callback hears of."""

    parent = None
    _callbacks = ()

    def subcontext(self, **kwargs: Any) -> _NoTask:
        return _NoTask()

    def call_on_fit_task_begin(self, **kwargs: Any) -> None:
        pass

    def call_on_fit_task_end(self, **kwargs: Any) -> bool:
        return False


class _NoCallbackSupport:
    def _init_callback_context(self, **kwargs: Any) -> _NoTask:
        return _NoTask()


try:
    from sklearn.callback import CallbackSupportMixin as CallbackSupport
    from sklearn.callback import with_callbacks
except ImportError:  # scikit-learn before 1.9
    CallbackSupport, with_callbacks = _NoCallbackSupport, lambda fit: fit


class FitProgress:
    """Report the progress of a fit to callbacks, and to a bar if `verbose` is not 0.

    For a `fit` that `with_callbacks` decorates. Every task that begins ends, on exceptions too.

    Parameters
    ----------
    estimator : estimator
        The estimator that is being fitted.
    n_stages : int
        Number of stages that are planned. A fit may end before the last one.
    verbose : int, default=0
        Draws a bar for every stage where it is not 0; but not in a worker process, a search, an
        ensemble or a cross-validation, nor where scikit-learn's `ProgressBar`, or another callback
        that estimators hand on to those inside them, is set on this one or around it.
    X, y : object or callable, default=None
        Training data for callbacks that ask for it; a callable is called where one does.
    metadata : dict, default=None
        Such as `sample_weight`, for callbacks too; `ScoringMonitor` hands all of it to the scorer.

    Attributes
    ----------
    stop : bool
        Whether a callback asked, at the end of the last epoch or stage, for no further ones.

    Examples
    --------
    >>> from sklearn.base import BaseEstimator
    >>> class Counter(CallbackSupport, BaseEstimator):
    ...     @with_callbacks
    ...     def fit(self, X, y=None):
    ...         with FitProgress(self, n_stages=1, X=X, y=y) as progress:
    ...             with progress.stage("head", 3, trainable=5130, lr=1e-3) as epochs:
    ...                 for epoch in epochs:
    ...                     epochs.update({"loss": 1 / (1 + epoch), "lr": 1e-3})
    ...         return self
    >>> Counter().fit([[0]])
    Counter()
    """

    def __init__(
        self,
        estimator: Any,
        *,
        n_stages: int,
        verbose: int = 0,
        X: Any = None,
        y: Any = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.stop = False
        self._n_stages, self._verbose = n_stages, verbose
        self._fit = {"estimator": estimator, "X": X, "y": y, "metadata": metadata}
        self._reconstruction: Any = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> FitProgress:
        self._root = self._fit["estimator"]._init_callback_context(max_subtasks=self._n_stages)
        self._drawn = bool(self._verbose) and not (_is_followed(self._root) or _is_one_of_many())
        self._open.enter_context(self._run(self._root))
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    @contextlib.contextmanager
    def stage(
        self, name: str, max_epochs: int, *, trainable: int, lr: float | Sequence[float] = ()
    ) -> Iterator[StageProgress]:
        """Run a stage of at most `max_epochs` epochs, 0 for one that is solved at once.

        It trains `trainable` parameters and begins with the learning rates `lr`. Both are part of
        its task's name, all that scikit-learn's `ProgressBar` shows.
        """
        plan = {"lr": lr, "trainable": trainable}
        task = self._root.subcontext(
            task_name=f"{name} ({describe(plan)})",
            # scikit-learn's ProgressBar has no bar for a task that says 0, but one for None.
            max_subtasks=max_epochs or None,
        )
        task.metrics = plan
        unit = "epoch" if max_epochs else "step"
        bar = tqdm(desc=name, total=max_epochs or 1, unit=unit, disable=not self._drawn)
        with bar, self._run(task), contextlib.ExitStack() as epoch:
            bar.set_postfix_str(describe(plan))
            yield StageProgress(self, task, max_epochs, bar, epoch)
            # An early end is an end, too: a notebook shows a bar that is not full as a failure.
            bar.total = bar.n = bar.n or bar.total

    @contextlib.contextmanager
    def _run(self, task: Any) -> Iterator[None]:
        """Begin a task, and end it whatever happens."""
        task.call_on_fit_task_begin(**self._fit)
        try:
            yield
        except BaseException:
            # What a callback raises now must not take the place of what went wrong: a search
            # would count a KeyboardInterrupt that became another error as a failed candidate.
            with contextlib.suppress(Exception):
                task.call_on_fit_task_end(**self._fit)
            raise
        self.stop = task.call_on_fit_task_end(
            **self._fit, reconstruction_attributes=self._reconstruction
        )


@dataclass
class StageProgress:
    """The epochs of a stage: iterate over it, or call `begin` and `update` around an epoch."""

    _fit: FitProgress
    _task: Any
    _max_epochs: int
    _bar: Any
    _open: contextlib.ExitStack
    _epoch: Any = None

    def __iter__(self) -> Iterator[int]:
        """Count the epochs from 0, until the last one or until a callback asks to stop."""
        for epoch in range(self._max_epochs):
            if self._fit.stop:
                return
            self.begin()
            yield epoch

    def begin(self) -> None:
        """Begin an epoch, where none is running."""
        if self._epoch is None:
            self._epoch = self._task.subcontext(task_name="epoch")
            self._open.enter_context(self._fit._run(self._epoch))

    def update(self, metrics: Mapping[str, Any], reconstruction: Any = None) -> bool:
        """End an epoch, after beginning it where `begin` was not called.

        Parameters
        ----------
        metrics : dict of str to float
            What to show, such as `{"loss": 0.7, "valid_acc": 0.9, "lr": (1e-3, 1e-4)}`, but not
            what is None. Callbacks find it in `context.metrics`.
        reconstruction : dict or callable, default=None
            Gives the fitted attributes with which a copy of the estimator predicts as the model
            does now; for callbacks that ask for one, where stage and fit end too.

        Returns
        -------
        stop : bool
            Whether a callback asked for no further epochs in this stage.
        """
        self.begin()
        self._epoch.metrics, self._epoch = dict(metrics), None
        self._fit._reconstruction = reconstruction
        self._open.close()
        self._bar.update()
        trainable = self._task.metrics["trainable"]
        self._bar.set_postfix_str(describe({**metrics, "trainable": trainable}))
        return self._fit.stop


def describe(metrics: Mapping[str, Any]) -> str:
    """Write metrics in one line, for a bar.

    >>> describe({"loss": 0.41234, "valid_acc": None, "lr": (1e-3, 1e-4), "trainable": 1234567})
    'loss=0.412, lr=0.001 to 0.0001, trainable=1.2M'
    """
    writers = {"lr": _rates, "trainable": _abbreviated}
    known = {name: value for name, value in metrics.items() if value is not None}
    texts = {name: writers.get(name, "{:.3g}".format)(value) for name, value in known.items()}
    return ", ".join(f"{name}={text}" for name, text in texts.items() if text)


def _rates(lr: float | Iterable[float]) -> str:
    """Write the learning rates of the parameter groups, the first and the last."""
    rates = [f"{rate:.2g}" for rate in (lr if isinstance(lr, Iterable) else [lr])]
    return " to ".join(dict.fromkeys(rates[:1] + rates[-1:]))


def _abbreviated(count: float) -> str:
    power = 0
    while count >= 999.5:
        count, power = count / 1000, power + 1
    return f"{count:.{int(power > 0 and count < 9.95)}f}" + "KMBT"[power - 1 : power]


def _is_followed(task: Any) -> bool:
    """Return whether a propagated callback, such as one that draws, follows a task."""
    followers = [each for each in task._callbacks if hasattr(each, "max_propagation_depth")]
    return bool(followers) or (task.parent is not None and _is_followed(task.parent))


def _is_one_of_many() -> bool:
    """Return whether this fit is one of several, so that it shows no bar of its own.

    Searches, ensembles and cross-validation fit through joblib, with n_jobs=1 too; refits do not.
    """
    frames = traceback.walk_stack(inspect.currentframe())
    rooms = [frame.f_globals.get("__name__", "") for frame, _ in frames]
    several = any(room.startswith(("joblib.parallel", "sklearn.model_selection")) for room in rooms)
    return several or multiprocessing.parent_process() is not None


def progress_bar(total: int, verbose: int, description: str) -> Any:
    """Open a bar that counts images; silent where `verbose` is 0."""
    return tqdm(total=total, desc=description, unit="image", disable=not verbose)
