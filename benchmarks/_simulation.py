"""Discrete-event simulation of a job, with stragglers and failures, to check benchmarks/plan.py.

A scheduler hands one task after the other to free workers. The time of an attempt is lognormal. A
worker fails at random while it computes; it then needs a restart, and its task goes back into the
queue.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_N_DRAWS = 4096


@dataclass(frozen=True)
class Outcome:
    """What a simulated job took.

    Parameters
    ----------
    seconds : float
        Until the last task is done.
    attempts : int
        Tasks that were started, again after failures.
    busy : float
        Seconds in which workers computed, those of lost attempts included.
    """

    seconds: float
    attempts: int
    busy: float


class Simulation:
    """A job of `tasks` tasks, `seconds` long on average; see `plan.makespan` for the others.

    Parameters
    ----------
    tasks, workers : int
    seconds : float
    spread : float
        Standard deviation of the logarithm of the time of an attempt.
    failure_rate : float
        Failures of a worker per second while it computes.
    restart, start : float
        Seconds that a worker needs after a failure, and at the beginning.
    task_seconds : float
        Seconds of the scheduler for each attempt. It hands out one at a time.
    seed : int
    """

    def __init__(
        self,
        tasks: int,
        workers: int,
        seconds: float,
        *,
        spread: float = 0.0,
        failure_rate: float = 0.0,
        restart: float = 0.0,
        start: float = 0.0,
        task_seconds: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.tasks, self.seconds, self.spread = tasks, seconds, spread
        self.failure_rate, self.restart, self.task_seconds = failure_rate, restart, task_seconds
        self.random = np.random.default_rng(seed)
        self.order = itertools.count()  # of events at the same time
        # Events: time, order, and whether a task is done (+1), lost (-1) or neither (0).
        self.events = [(start, next(self.order), 0) for _ in range(workers)]
        self.scheduler_free = self.busy = 0.0
        self.attempts = 0
        self.draws = self._draw()

    def run(self) -> Outcome:
        """Run the job to its end."""
        waiting, idle, done, now = self.tasks, 0, 0, 0.0
        while done < self.tasks:
            now, _, change = heapq.heappop(self.events)
            if change < 0:
                waiting += 1
                self._push(now + self.restart, 0)
            else:
                done += change
                idle += 1
            while waiting and idle:
                waiting, idle = waiting - 1, idle - 1
                self._start(now)
        return Outcome(now, self.attempts, self.busy)

    def _start(self, now: float) -> None:
        """Start an attempt, and push the event with which it ends."""
        self.scheduler_free = max(now, self.scheduler_free) + self.task_seconds
        slowdown, failure = next(self.draws)
        lasts = self.seconds * slowdown
        lost = failure < lasts
        self.attempts += 1
        self.busy += min(failure, lasts)
        self._push(self.scheduler_free + min(failure, lasts), -1 if lost else 1)

    def _push(self, time: float, change: int) -> None:
        heapq.heappush(self.events, (time, next(self.order), change))

    def _draw(self) -> Iterator[tuple[float, float]]:
        """Yield the slowdown of an attempt, with mean 1, and the seconds until a failure."""
        while True:
            slowdowns = self.random.lognormal(-(self.spread**2) / 2, self.spread, _N_DRAWS)
            failures = self.random.exponential(size=_N_DRAWS)
            with np.errstate(divide="ignore"):
                failures = failures / self.failure_rate
            yield from zip(slowdowns.tolist(), failures.tolist(), strict=True)
