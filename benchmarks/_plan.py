"""Cost model of a large job: time, storage, transfer and cost, and the resource that limits it.

A job is divided into partitions. Each worker takes the next partition when it has finished one. If
its machine fails, the partition is lost, and computed again from its beginning. Times are in
seconds, sizes in bytes, and rates in images per second unless stated otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

HOUR = 3600.0


@dataclass(frozen=True)
class Job:
    """Images, and the embeddings that are computed from them.

    Parameters
    ----------
    images : int
    image_bytes : float
        Mean size of an encoded image.
    width : int
        Values of an embedding.
    value_bytes : int
        4 for float32, 2 for float16.
    partition : int
        Images of a partition.
    """

    images: int
    image_bytes: float
    width: int = 1280
    value_bytes: int = 4
    partition: int = 1000

    @property
    def partitions(self) -> int:
        return math.ceil(self.images / self.partition)

    @property
    def embedding_bytes(self) -> int:
        return self.width * self.value_bytes


@dataclass(frozen=True)
class Machine:
    """One of many equal machines.

    Parameters
    ----------
    workers : int
        Worker processes: one per core, or one per GPU.
    images_per_second : float
        Images that one worker reads, decodes and embeds in a second, from a fast local disk.
    network : float
        Bytes per second in each direction.
    failures_per_hour : float
    start : float
        Seconds from the request for a machine to its first image: the machine, the imports, and
        the model. The same after a failure.
    """

    workers: int
    images_per_second: float
    network: float
    failures_per_hour: float = 0.0
    start: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """Machines, and what they share.

    Parameters
    ----------
    machine : Machine
    machines : int
    partition_overhead : float
        Seconds that a worker loses with each partition.
    task_seconds : float
        Seconds of the scheduler for each partition.
    spread : float
        Standard deviation of the logarithm of the time of a partition.
    requests_per_second : float
        Objects that the storage delivers.
    listed_per_second : float
        Objects that are listed, or infinite if the paths are in a table.
    rows_per_second : float
        Rows that are written into one store, or infinite if each partition writes a file.
    """

    machine: Machine
    machines: int
    partition_overhead: float = 0.0
    task_seconds: float = 0.0
    spread: float = 0.0
    requests_per_second: float = math.inf
    listed_per_second: float = math.inf
    rows_per_second: float = math.inf

    @property
    def workers(self) -> int:
        return self.machines * self.machine.workers


@dataclass(frozen=True)
class Prices:
    """Prices in any currency, all 0 by default."""

    machine_hour: float = 0.0
    gigabyte_month: float = 0.0
    gigabyte_transferred: float = 0.0
    thousand_requests: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a job needs.

    Parameters
    ----------
    seconds : float
        From the request for the machines to the last partition.
    bottleneck : str
        The resource in `limits` that allows the fewest images per second.
    lost : float
        Expected number of partitions that are computed again.
    read, stored : float
        Bytes, lost partitions included and not included.
    requests : float
        Objects that are read and written.
    """

    seconds: float
    machine_hours: float
    bottleneck: str
    partitions: int
    lost: float
    read: float
    stored: float
    requests: float

    def cost(self, prices: Prices, months: float = 1.0) -> float:
        """Compute the cost of the job, and of keeping the embeddings for some months."""
        return (
            prices.machine_hour * self.machine_hours
            + prices.gigabyte_month * months * self.stored / 1e9
            + prices.gigabyte_transferred * (self.read + self.stored) / 1e9
            + prices.thousand_requests * self.requests / 1000
        )


def limits(job: Job, cluster: Cluster) -> dict[str, float]:
    """Compute the images per second that each resource allows."""
    machine, machines = cluster.machine, cluster.machines
    per_image = max(job.image_bytes, job.embedding_bytes)  # both directions at once
    worker_seconds = cluster.partition_overhead + job.partition / machine.images_per_second
    return {
        "workers": cluster.workers * job.partition / worker_seconds,
        "network": machines * machine.network / per_image,
        "scheduler": job.partition / cluster.task_seconds if cluster.task_seconds else math.inf,
        "storage requests": cluster.requests_per_second,
        "listing": cluster.listed_per_second,
        "one store": cluster.rows_per_second,
    }


def plan(job: Job, cluster: Cluster) -> Plan:
    """Predict what a job needs on a cluster."""
    allowed = limits(job, cluster)
    bottleneck = min(allowed, key=lambda name: allowed[name])
    machine = cluster.machine
    failure_rate = machine.failures_per_hour / HOUR
    # The scheduler does not slow a partition down, but delays its start.
    allowed_for_workers = min(rate for name, rate in allowed.items() if name != "scheduler")
    attempt = job.partition * cluster.workers / allowed_for_workers
    lost = job.partitions * math.expm1(failure_rate * attempt)
    retries = with_retries(attempt, failure_rate, machine.start) - attempt
    working = (
        makespan(job.partitions, cluster.workers, attempt, cluster.spread)
        + job.partitions * retries / cluster.workers
    )
    scheduling = (job.partitions + lost) * cluster.task_seconds + attempt
    seconds = machine.start + max(working, scheduling)
    return Plan(
        seconds=seconds,
        machine_hours=cluster.machines * seconds / HOUR,
        bottleneck=bottleneck,
        partitions=job.partitions,
        lost=lost,
        # An attempt that fails has read half of its partition on average.
        read=job.image_bytes * (job.images + lost * job.partition / 2),
        stored=float(job.embedding_bytes) * job.images,
        requests=job.images + lost * job.partition / 2 + job.partitions,
    )


def with_retries(seconds: float, failure_rate: float, restart: float = 0.0) -> float:
    """Compute the expected time until an attempt of some seconds succeeds.

    Failures come at random, `failure_rate` per second, and each one costs the attempt and a
    restart. Exact: the number of failures is geometric, with mean exp(rate * seconds) - 1.
    """
    if failure_rate == 0:
        return seconds
    return math.expm1(failure_rate * seconds) * (1 / failure_rate + restart)


def best_partition_seconds(overhead: float, failure_rate: float) -> float:
    """Compute the length of a partition that wastes least on overhead and on lost partitions.

    Young (1974), "A first order approximation to the optimum checkpoint interval", Communications
    of the ACM 17(9), 530-531: the result of a partition is a checkpoint, and the overhead its cost.
    """
    return math.sqrt(2 * overhead / failure_rate)


def wasted_share(work: float, overhead: float, failure_rate: float) -> float:
    """Compute the time per partition that is not work, relative to the work."""
    return with_retries(work + overhead, failure_rate) / work - 1


def makespan(tasks: int, workers: int, seconds: float, spread: float = 0.0) -> float:
    """Compute the expected time until the last of some tasks is done.

    The time of a task has the given mean, and its logarithm is normal with the standard deviation
    `spread`. The result is exact without a spread, and if there is at most one task per worker. For
    more tasks, the times that remain when the last one starts follow from renewal theory.
    """
    if spread == 0:
        return math.ceil(tasks / workers) * seconds
    one_each = _mean_of_longest(lambda x: _below(x, spread), min(tasks, workers), spread)
    if tasks <= workers:
        return seconds * one_each
    mean_remaining = math.exp(spread**2) / 2
    longest_remaining = _mean_of_longest(lambda x: _remaining_below(x, spread), workers, spread)
    return seconds * max(one_each, tasks / workers - mean_remaining + longest_remaining)


def _below(x: float, spread: float) -> float:
    """Return the probability that a lognormal time with mean 1 is below x."""
    return _normal((math.log(x) + spread**2 / 2) / spread)


def _remaining_below(x: float, spread: float) -> float:
    """Return the probability that less than x remains of a time, seen at a random moment of it."""
    whole = _normal((math.log(x) - spread**2 / 2) / spread)
    return x * (1 - _below(x, spread)) + whole


def _normal(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2


def _mean_of_longest(below: Callable[[float], float], count: int, spread: float) -> float:
    """Compute the mean of the longest of some independent times, from their distribution."""
    # The integral of the probability that the longest is above x, with steps that are even in log.
    n_steps, low, high = 4000, -12.0, 8 * spread + 1
    xs = [math.exp(low + (high - low) * step / n_steps) for step in range(n_steps + 1)]
    above = [1 - below(x) ** count for x in xs]
    pairs = zip(xs, xs[1:], above, above[1:], strict=False)
    return xs[0] + sum((right - left) * (a + b) / 2 for left, right, a, b in pairs)
