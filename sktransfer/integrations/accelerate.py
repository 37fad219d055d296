"""Train on several devices with Hugging Face Accelerate."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from sktransfer.store.embedding_table import this_host
from sktransfer.store.session import joined_session, session_store
from sktransfer.utils.errors import ImageError, import_optional
from sktransfer.utils.processes import Processes, use_processes

T = TypeVar("T")
# What the others hear of a failure: broken images, or the name and the message of another error.
_Failure = ImageError | str | None

# Kinds of processes that keep a whole copy of the network each.
_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU")


@contextlib.contextmanager
def data_parallel(accelerator: Any) -> Iterator[None]:
    """Share every fit of a `FineTunedImageClassifier` inside the block between all processes.

    Start the program with `accelerate launch`, once for each device. All processes must run the
    same fits, with the same parameters and data. Each of them trains on its share of every batch,
    and has the same fitted classifier in the end: the one that a single process would train, up to
    rounding. Fits inside a pipeline, a search or a `SelfTrainedImageClassifier` are shared too,
    unless they run in workers (`n_jobs`). Predictions are not shared.

    Only the main process shows bars and warnings, and writes checkpoints. If one process fails or
    is interrupted, the others raise an error, too.

    Parameters
    ----------
    accelerator : accelerate.Accelerator
        With one process, fits are as usual. Its mixed precision must be `"no"`: the `precision` of
        the classifier counts. The classifier's `device="auto"` is the device of each process.

    Raises
    ------
    ImportError
        If Accelerate is not installed.
    TypeError, ValueError
        If it is not an `Accelerator`, or one for FSDP, DeepSpeed, gradient accumulation or mixed
        precision. A fit raises a ValueError for `domain_adversarial`, for BatchNorm that learns
        statistics (`batch_norm="train"` or `weights=None`), for a `device` that is not the
        accelerator's, and if the processes have different data.
    RuntimeError
        If another process has failed, or the connection to it is lost.

    Examples
    --------
    >>> from accelerate import Accelerator  # doctest: +SKIP
    >>> with data_parallel(Accelerator()):  # doctest: +SKIP
    ...     classifier.fit(X, y)
    """
    accelerate = import_optional("accelerate", extra="accelerate", purpose=__name__)
    if not isinstance(accelerator, accelerate.Accelerator):
        raise TypeError(
            f"Got {accelerator!r}, but expected an accelerate.Accelerator, such as Accelerator()"
        )
    _check_settings(accelerator)
    if accelerator.num_processes == 1:
        yield
        return
    processes = _AcceleratedProcesses(accelerator)
    with processes.together(), _one_session(processes), use_processes(processes):
        yield


def _check_settings(accelerator: Any) -> None:
    """Check that the settings of an `Accelerator` are those of plain data parallelism."""
    kind = accelerator.distributed_type
    if kind.name not in _KINDS:
        raise ValueError(
            f"Got an Accelerator for {kind.name}, but expected one whose processes have a CPU or a "
            "CUDA device each, and a whole copy of the network; run `accelerate config` again, "
            "without FSDP, DeepSpeed and Megatron-LM"
        )
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"Got an Accelerator with mixed_precision={accelerator.mixed_precision!r}, but the "
            "precision is a parameter of the classifier; pass Accelerator(mixed_precision='no'), "
            "and set precision='bfloat16' for mixed precision"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "Got an Accelerator with gradient_accumulation_steps="
            f"{accelerator.gradient_accumulation_steps}, but gradients are not accumulated; set it "
            "to 1, and increase the batch_size of the classifier, which is that of all processes"
        )


@contextlib.contextmanager
def _one_session(processes: Processes) -> Iterator[None]:
    """Let the processes of a machine have one session store, so that none embeds an image again."""
    directory = session_store().directory if processes.local_rank == 0 else Path()
    directory = processes.gather(directory)[processes.local_main]
    if processes.local_rank == 0:
        yield
        return
    with joined_session(directory):
        yield


class _AcceleratedProcesses(Processes):
    """The processes of an `Accelerator`.

    Before each exchange, all processes say which one they have come to, and whether they have
    failed. So a failure reaches the others, and the next fit finds all processes at the same point.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._operations = import_optional("accelerate.utils", extra="accelerate", purpose=__name__)
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.device = accelerator.device
        # Whether this process has announced its failure, or heard of one, in the current block.
        self._failure: BaseException | None = None
        self._is_connected = True
        hosts = self.gather(this_host())
        local = [rank for rank, host in enumerate(hosts) if host == hosts[self.rank]]
        self.local_rank, self.local_count = local.index(self.rank), len(local)
        self.local_main = local[0]

    def gather(self, value: T) -> list[T]:
        """See `Processes.gather`."""
        return self._exchange("gather", lambda: self._operations.gather_object([value]))

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """See `Processes.add`."""
        return self._exchange("add", lambda: self._operations.reduce(values, "sum"), values.numel())

    def from_main(self, compute: Callable[[], T]) -> T:
        """See `Processes.from_main`."""
        values = [compute() if self.is_main else None]
        self._exchange("from_main", lambda: self._operations.broadcast_object_list(values))
        return values[0]  # type: ignore[return-value]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """See `Processes.together`."""
        try:
            yield
            self._exchange("end", lambda: None)
        except BaseException as error:
            if self._failure is not None or not self._is_connected:
                raise
            failures = self._announce(error)
            if isinstance(error, ImageError) and not _messages(failures):
                raise _combined(failures) from error
            raise
        finally:
            self._failure = None

    def _exchange(self, name: str, exchange: Callable[[], T], size: int = 0) -> T:
        """Exchange values once all processes have come to the same point.

        Raises
        ------
        ImageError
            If this is the failure of all processes that have failed.
        RuntimeError
            If a process has failed in another way, does something else, or has ended.
        """
        if self._failure is not None:
            raise self._failure
        with _interrupts_deferred(), self._connection():
            failures = self._compare(name, size, None)
            if not any(failures):
                return exchange()
        self._failure = self._error_of(failures)
        raise self._failure

    def _announce(self, error: BaseException) -> list[_Failure]:
        """Tell the others that this process fails, and return the failures of all of them."""
        failure = error if isinstance(error, ImageError) else f"{type(error).__name__}: {error}"
        # A process that has ended needs no message.
        with contextlib.suppress(RuntimeError), _interrupts_deferred(), self._connection():
            return self._compare("", 0, failure)
        return [failure]

    def _compare(self, name: str, size: int, failure: _Failure) -> list[_Failure]:
        """Compare the points that all processes have come to; return their failures, if any."""
        point = [failure is not None, _POINTS.index(name), size]
        row = torch.tensor([point], dtype=torch.int64, device=self._accelerator.device)
        points = self._operations.gather(row).tolist()
        if any(has_failed for has_failed, *_ in points):
            return self._operations.gather_object([failure])
        if any(other != points[0] for other in points):
            return [_OUT_OF_STEP] * self.count
        return [None] * self.count

    def _error_of(self, failures: list[_Failure]) -> Exception:
        """Build the error of a process that has not failed itself."""
        messages = _messages(failures)
        if not messages:
            return _combined(failures)
        rank, message = messages[0]
        if message == _OUT_OF_STEP:
            return RuntimeError(message)
        return RuntimeError(
            f"Process {rank} of {self.count} has stopped with {message.rstrip(': .')}. This one "
            "stops, too, because they train together. Correct the cause, and start all of them "
            "again"
        )

    @contextlib.contextmanager
    def _connection(self) -> Iterator[None]:
        """Explain the error of an exchange with a process that has ended."""
        try:
            yield
        except RuntimeError as error:  # of torch.distributed
            self._is_connected = False
            raise RuntimeError(
                f"Process {self.rank} of {self.count} has lost the connection to another one, "
                "which has probably ended. Read the messages of that one, and start all of them "
                "again"
            ) from error


# Exchanges, by their number; the first is the announcement of a failure.
_POINTS = ("", "gather", "add", "from_main", "end")
_OUT_OF_STEP = (
    "Got processes that do different things at the same time, but all must run the same fits in "
    "the same order. Check that the program and its callbacks decide alike in all processes"
)


def _messages(failures: list[_Failure]) -> list[tuple[int, str]]:
    """Return rank and message of the failures that are not broken images."""
    return [(rank, text) for rank, text in enumerate(failures) if isinstance(text, str)]


def _combined(failures: list[_Failure]) -> ImageError:
    """Combine the broken images of all processes."""
    return ImageError.of(error for error in failures if isinstance(error, ImageError))


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Raise a KeyboardInterrupt after the block, as an interrupted exchange cannot be repeated."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is None:  # it cannot be replaced
        yield
        return
    interrupts: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if interrupts:
        signal.raise_signal(signal.SIGINT)
