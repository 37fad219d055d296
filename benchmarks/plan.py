"""Plan a large job: time, storage, transfer and cost, and the resource that limits it.

A job is divided into partitions. Each worker takes the next partition when it has finished one. If
its machine fails, the partition is lost, and computed again from its beginning. docs/scaling.md
explains the parameters and where to get their values.

This module needs nothing but Python. Times are in seconds, sizes in bytes, and rates in images per
second unless stated otherwise.

    python benchmarks/plan.py --images 1e8 --images-per-second 90 --machines 20 --workers 16
"""

from __future__ import annotations

import argparse
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
        """Number of partitions."""
        return math.ceil(self.images / self.partition)

    @property
    def embedding_bytes(self) -> int:
        """Size of an embedding."""
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
        """Number of workers of all machines."""
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
    lost = job.partitions * mean_failures(attempt, failure_rate)
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
    restart. The result is exact.
    """
    if failure_rate == 0:
        return seconds
    return mean_failures(seconds, failure_rate) * (1 / failure_rate + restart)


def mean_failures(seconds: float, failure_rate: float) -> float:
    """Compute the expected number of failures until an attempt succeeds, which is geometric."""
    exponent = failure_rate * seconds
    return math.expm1(exponent) if exponent < 700 else math.inf  # it never succeeds


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


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, default: float | None, text: str) -> None:
        shown = "required" if default is None else f"default: {default:g}"
        command.add_argument(
            name, type=float, default=default, required=default is None, help=f"{text}; {shown}"
        )

    add("--images", None, "number of images")
    add("--images-per-second", None, "of one worker, measured on a sample")
    add("--machines", 1, "number of machines")
    add("--workers", 1, "workers of a machine: its cores, or its GPUs")
    add("--image-kb", 110, "mean size of an encoded image, in kB")
    add("--width", 1280, "values of an embedding")
    add("--value-bytes", 4, "4 for float32, 2 for float16")
    add("--partition", 1000, "images of a partition")
    add("--network-gbit", 10, "Gbit/s of a machine")
    add("--failures-per-hour", 0.001, "of a machine")
    add("--start-seconds", 120, "until a new machine computes")
    add("--partition-ms", 100, "that a worker loses with each partition")
    add("--task-ms", 1, "of the scheduler for each partition")
    add("--spread", 0.3, "standard deviation of the logarithm of the time of a partition")
    add("--requests-per-second", math.inf, "objects that the storage delivers")
    add("--listed-per-second", math.inf, "objects that are listed during the job")
    add("--rows-per-second", math.inf, "embeddings that are written into one store")
    add("--price-machine-hour", 0, "price")
    add("--price-gb-month", 0, "price of storage")
    add("--price-gb", 0, "price of transfer")
    add("--price-1000-requests", 0, "price")
    add("--months", 1, "that the embeddings are kept")
    return command


def main() -> None:
    command = parser()
    options = command.parse_args()
    for name in ("images", "images_per_second", "machines", "workers", "partition", "network_gbit"):
        if not (value := getattr(options, name)) > 0:
            command.error(f"Got {value:g} {name.replace('_', ' ')}, expected a positive number")
    machine = Machine(
        workers=int(options.workers),
        images_per_second=options.images_per_second,
        network=options.network_gbit * 1e9 / 8,
        failures_per_hour=options.failures_per_hour,
        start=options.start_seconds,
    )
    cluster = Cluster(
        machine,
        machines=int(options.machines),
        partition_overhead=options.partition_ms / 1000,
        task_seconds=options.task_ms / 1000,
        spread=options.spread,
        requests_per_second=options.requests_per_second,
        listed_per_second=options.listed_per_second,
        rows_per_second=options.rows_per_second,
    )
    job = Job(
        images=int(options.images),
        image_bytes=options.image_kb * 1000,
        width=int(options.width),
        value_bytes=int(options.value_bytes),
        partition=int(options.partition),
    )
    prices = Prices(
        machine_hour=options.price_machine_hour,
        gigabyte_month=options.price_gb_month,
        gigabyte_transferred=options.price_gb,
        thousand_requests=options.price_1000_requests,
    )
    print_plan(job, cluster, prices, options.months)


def print_plan(job: Job, cluster: Cluster, prices: Prices, months: float) -> None:
    predicted = plan(job, cluster)
    print("images per second that each resource allows:")
    for name, rate in sorted(limits(job, cluster).items(), key=lambda item: item[1]):
        print(f"  {name:18}{rate:>14,.0f}{'  <- limit' * (name == predicted.bottleneck)}")
    seconds = job.partition / cluster.machine.images_per_second
    failure_rate = cluster.machine.failures_per_hour / HOUR
    print(f"hours              {predicted.seconds / HOUR:14,.2f}")
    print(f"machine-hours      {predicted.machine_hours:14,.1f}")
    print(f"partitions         {predicted.partitions:14,} of {seconds:,.0f} s, without waiting")
    print(f"computed again     {predicted.lost:14,.1f}")
    if failure_rate and cluster.partition_overhead:
        best = best_partition_seconds(cluster.partition_overhead, failure_rate)
        images = best * cluster.machine.images_per_second
        print(f"best partition     {images:14,.0f} images, {best:,.0f} s")
    print(f"read, GB           {predicted.read / 1e9:14,.1f}")
    print(f"stored, GB         {predicted.stored / 1e9:14,.1f}")
    print(f"requests           {predicted.requests:14,.0f}")
    print(f"cost               {predicted.cost(prices, months):14,.2f}")


if __name__ == "__main__":
    main()
