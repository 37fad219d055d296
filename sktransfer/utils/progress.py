"""Progress of a fit: one bar per stage, and scikit-learn's callbacks.

A fit is a tree of tasks: the fit, its stages, their epochs. From version 1.9 on, scikit-learn has
callbacks that are notified of every task, such as `ProgressBar` and `ScoringMonitor`; a search or a
pipeline adds the tree to its own. If `verbose` is not 0 and no callback draws a bar, tqdm does.
"""

from __future__ import annotations

import contextlib
import inspect
import multiprocessing
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

__all__ = ["CallbackSupport", "FitProgress", "StageProgress", "with_callbacks"]

# A bar that counts epochs shows their metrics instead of a rate and a percentage.
_EPOCHS_FORMAT = "{desc}: |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
# Metrics to leave out, in this order, if the line does not fit in the terminal.
_DISPENSABLE = ("trainable", "lr", "valid_loss", "loss", "valid_acc")
# A bar that counts images is shown for at least this many.
_MIN_IMAGES = 64


class _NoTask:
    """A task without callbacks."""

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

    For a `fit` that `with_callbacks` decorates. Every task that begins also ends, even if an
    exception is raised.

    Parameters
    ----------
    estimator : estimator
        The estimator that is being fitted.
    n_stages : int
        Number of planned stages. A fit may end before the last one.
    verbose : int, default=0
        If not 0, draw a bar for every stage. No bar is drawn in a worker process, a search, an
        ensemble or a cross-validation, or if scikit-learn's `ProgressBar` or another callback that
        estimators propagate to inner estimators is set on this estimator or on an outer one.
    X, y : object or callable, default=None
        Training data for callbacks that request it; a callable is called on request.
    metadata : dict, default=None
        Metadata for callbacks, such as `sample_weight`; `ScoringMonitor` passes it to the scorer.

    Attributes
    ----------
    stop : bool
        Whether a callback requested a stop at the end of the last epoch or stage.
    drawn : bool
        Whether the fit draws bars.

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
        self.stop = self.drawn = False
        self._n_stages, self._verbose = n_stages, verbose
        self._fit = {"estimator": estimator, "X": X, "y": y, "metadata": metadata}
        self._reconstruction: Any = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> FitProgress:
        self._root = self._fit["estimator"]._init_callback_context(max_subtasks=self._n_stages)
        is_inner = _has_propagated_callback(self._root) or _is_one_of_many_fits()
        self.drawn = bool(self._verbose) and not is_inner
        self._open.enter_context(self._run(self._root))
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    @contextlib.contextmanager
    def stage(
        self, name: str, max_epochs: int, *, trainable: int, lr: float | Sequence[float] = ()
    ) -> Iterator[StageProgress]:
        """Run a stage of at most `max_epochs` epochs; 0 for a stage in a single step.

        It trains `trainable` parameters and begins with the learning rates `lr`. Both are part of
        the task's name, because scikit-learn's `ProgressBar` shows nothing else.
        """
        plan = {"lr": lr, "trainable": trainable}
        task = self._root.subcontext(
            task_name=f"{name} ({describe(plan)})",
            # scikit-learn's ProgressBar draws a bar for None, but none for 0.
            max_subtasks=max_epochs or None,
        )
        task.metrics = plan
        bar = tqdm(
            desc=name,
            total=max_epochs or 1,
            bar_format=_EPOCHS_FORMAT,
            disable=not self.drawn,
        )
        with bar, self._run(task), contextlib.ExitStack() as epoch:
            bar.set_postfix_str(_fitting(bar, plan))
            yield StageProgress(self, task, max_epochs, bar, epoch)
            # After an early end, too: notebooks show an incomplete bar as a failure.
            bar.total = bar.n = bar.n or bar.total

    def note(self, text: str) -> None:
        """Print a line above the bars, if the fit draws any, and to standard error like them."""
        if self.drawn:
            tqdm.write(text, file=sys.stderr)

    @contextlib.contextmanager
    def _run(self, task: Any) -> Iterator[None]:
        """Begin a task, and end it in any case."""
        task.call_on_fit_task_begin(**self._fit)
        try:
            yield
        except BaseException:
            # An error of a callback must not replace the first error: if it replaced a
            # KeyboardInterrupt, a search would continue after a failed candidate.
            with contextlib.suppress(Exception):
                task.call_on_fit_task_end(**self._fit)
            raise
        self.stop = task.call_on_fit_task_end(
            **self._fit, reconstruction_attributes=self._reconstruction
        )


class TrialProgress:
    """The progress of training that is not a part of the fit: bars that no callback sees.

    Parameters
    ----------
    drawn : bool
        Whether bars are drawn.
    name : str
        Description of the bars, before the name of the stage.
    """

    stop = False

    def __init__(self, drawn: bool, name: str) -> None:
        self.drawn, self._name = drawn, name

    @contextlib.contextmanager
    def stage(self, name: str, max_epochs: int, **plan: Any) -> Iterator[TrialProgress]:
        """Run a stage of at most `max_epochs` epochs; a stage in a single step has no bar."""
        title = f"{self._name}: {name}"
        hidden = not (self.drawn and max_epochs)
        options = {"bar_format": _EPOCHS_FORMAT, "disable": hidden, "leave": None}
        with tqdm(desc=title, total=max_epochs, **options) as bar:
            self._bar = bar
            yield self

    def note(self, text: str) -> None:
        """Print nothing."""

    def begin(self) -> None:
        """Begin an epoch."""

    def update(self, metrics: Mapping[str, Any], reconstruction: Any = None) -> bool:
        """End an epoch; nothing requests a stop."""
        self._bar.update()
        return False


@dataclass
class StageProgress:
    """The epochs of a stage; iterate over them, or call `begin` and `update` for each epoch."""

    _fit: FitProgress
    _task: Any
    _max_epochs: int
    _bar: Any
    _open: contextlib.ExitStack
    _epoch: Any = None

    def __iter__(self) -> Iterator[int]:
        """Yield the epochs from 0, up to the last one or until a callback requests a stop."""
        for epoch in range(self._max_epochs):
            if self._fit.stop:
                return
            self.begin()
            yield epoch

    def begin(self) -> None:
        """Begin an epoch if none is running."""
        if self._epoch is None:
            self._epoch = self._task.subcontext(task_name="epoch")
            self._open.enter_context(self._fit._run(self._epoch))

    def update(self, metrics: Mapping[str, Any], reconstruction: Any = None) -> bool:
        """End an epoch; begin it first if `begin` was not called.

        Parameters
        ----------
        metrics : dict of str to float
            Metrics to show, such as `{"loss": 0.7, "valid_acc": 0.9, "lr": (1e-3, 1e-4)}`; None
            is not shown. They are the attribute `metrics` of the context that callbacks get.
        reconstruction : dict or callable, default=None
            The fitted attributes with which a copy of the estimator predicts as the current model,
            for callbacks that request it, here and at the end of the stage and of the fit.

        Returns
        -------
        stop : bool
            Whether a callback requested a stop.
        """
        self.begin()
        self._epoch.metrics, self._epoch = dict(metrics), None
        self._fit._reconstruction = reconstruction
        self._open.close()
        # The metrics come first: without a terminal, each line is printed once.
        shown = metrics if describe(metrics) else self._task.metrics
        self._bar.set_postfix_str(_fitting(self._bar, shown), refresh=False)
        self._bar.update()
        return self._fit.stop


def describe(metrics: Mapping[str, Any]) -> str:
    """Format metrics in one line for a progress bar.

    >>> describe({"loss": 0.41234, "valid_acc": None, "lr": (1e-3, 1e-4), "trainable": 1234567})
    'loss=0.412, lr=0.001 to 0.0001, trainable=1.2M'
    """
    formatters = {"lr": _format_rates, "trainable": _abbreviate}
    shown = {name: value for name, value in metrics.items() if value is not None}
    texts = {name: formatters.get(name, "{:.3g}".format)(value) for name, value in shown.items()}
    return ", ".join(f"{name}={text}" for name, text in texts.items() if text)


def _fitting(bar: Any, metrics: Mapping[str, Any]) -> str:
    """Format the metrics that a bar has room for."""
    columns = bar.format_dict["ncols"]
    dispensable = iter(_DISPENSABLE)
    while isinstance(columns, int):
        line = f"{bar.desc}: |##| {bar.total}/{bar.total} [00:00<00:00, {describe(metrics)}]"
        if len(line) <= columns or (name := next(dispensable, None)) is None:
            break
        metrics = {key: value for key, value in metrics.items() if key != name}
    return describe(metrics)


def _format_rates(lr: float | Iterable[float]) -> str:
    """Format the learning rates of the first and the last parameter group."""
    rates = [f"{rate:.2g}" for rate in (lr if isinstance(lr, Iterable) else [lr])]
    return " to ".join(dict.fromkeys(rates[:1] + rates[-1:]))


def _abbreviate(count: float) -> str:
    power = 0
    while count >= 999.5:
        count, power = count / 1000, power + 1
    return f"{count:.{int(power > 0 and count < 9.95)}f}" + "KMBT"[power - 1 : power]


def _has_propagated_callback(task: Any) -> bool:
    """Return whether a callback that estimators propagate, such as a bar, is set on a task."""
    if any(hasattr(callback, "max_propagation_depth") for callback in task._callbacks):
        return True
    return task.parent is not None and _has_propagated_callback(task.parent)


def _is_one_of_many_fits() -> bool:
    """Return whether this call is part of several fits, so that it shows no bar.

    Searches, ensembles and cross-validation fit through joblib, even with n_jobs=1; refits do not.
    """
    frames = traceback.walk_stack(inspect.currentframe())
    modules = [frame.f_globals.get("__name__", "") for frame, _ in frames]
    outer = ("joblib.parallel", "sklearn.model_selection")
    several = any(module.startswith(outer) for module in modules)
    return several or multiprocessing.parent_process() is not None


def progress_bar(total: int, verbose: int, description: str, *, n_done: int = 0) -> Any:
    """Open a progress bar that counts images, `n_done` of which were done earlier.

    It is hidden if `verbose` is 0, for fewer than 64 images, and if a fit would hide its bars.
    """
    shown = bool(verbose) and total >= _MIN_IMAGES and not _is_one_of_many_fits()
    # A bar below that of a stage disappears at its end.
    return tqdm(
        total=total,
        initial=n_done,
        desc=description,
        unit="image",
        disable=not shown,
        leave=None,
    )
