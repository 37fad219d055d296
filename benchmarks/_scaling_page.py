"""Tables of docs/scaling.md, from the figures in benchmarks/results/ and the assumptions below.

The page has marks around each table; `filled` replaces what is between them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from plan import (
    HOUR,
    Cluster,
    Job,
    Machine,
    Plan,
    Prices,
    best_partition_seconds,
    limits,
    plan,
    wasted_share,
)

from sktransfer.data import remote

Load = Callable[[str], dict[str, Any]]

# Assumptions. The page says that they are.
IMAGE_BYTES = 110_000  # the mean of ImageNet's JPEGs
NETWORK_GBIT = 10
CORES = 16
START_SECONDS = 120.0
FAILURES_PER_HOUR = {"reserved": 0.001, "preemptible": 0.05}
SPREAD = 0.3
# Images per second of 500 x 375 on an H100: its JPEG decoder alone, and a plain loop that decodes
# on the device, resizes and runs EfficientNet-Lite0 in float16. Upper limits, not sktransfer.
H100_DECODER, H100_LOOP = 13_697, 8_173
# Amazon S3: 5,500 GET requests per second for a prefix, and 1,000 keys in a LIST request, of which
# ten per second are assumed if one follows the other.
PREFIX_REQUESTS_PER_SECOND = 5_500
LISTED_PER_SECOND = 10_000
# Examples of prices.
MACHINE_HOUR = {"CPU": 0.7, "GPU": 4.0}
THOUSAND_REQUESTS, GIGABYTE_MONTH = 0.0004, 0.023
# Seconds of a request to the storage.
LATENCY = 0.05

SMALL_PARTITION = 100
# Images, machines, their kind, and images of a partition.
JOBS = [
    (10**6, 1, "CPU", 1000),
    (10**8, 10, "CPU", 10_000),
    (10**10, 200, "CPU", 10_000),
    (10**6, 1, "GPU", 10_000),
    (10**8, 4, "GPU", 100_000),
    (10**10, 50, "GPU", 100_000),
]
# Seconds of overhead for each partition, besides the measured one.
OVERHEADS = [1.0, 30.0]
MAX_WASTED = 0.01

ENGINES = {"local": "`extractor.transform`", "dask": "Dask", "ray": "Ray", "spark": "Spark"}
RESOURCES = {
    "workers": "workers",
    "network": "network",
    "scheduler": "scheduler",
    "storage requests": "requests to one prefix",
    "listing": "listing one after the other",
    "one store": "one store",
}


@dataclass(frozen=True)
class Measured:
    """Figures of the benchmarks that the plans use."""

    core: float  # images per second
    partition_overhead: float  # seconds
    task_seconds: float
    store_rows: float  # per second
    store_bytes: float  # per row
    parquet_rows: float
    parquet_bytes: float


def measured(load: Load) -> Measured:
    embedding, store = load("embedding"), load("store_read")
    dask, parquet = load("clusters")["variants"]["dask 2"], load("scaling")["parquet"]
    return Measured(
        core=embedding["variants"]["sktransfer"]["median"] / embedding["threads"],
        partition_overhead=dask["partition_ms"] / 1000,
        task_seconds=dask["task_ms"] / 1000,
        store_rows=store["images"] / store["write_seconds"],
        store_bytes=store["bytes_per_image"],
        parquet_rows=parquet["write_rows_per_second"],
        parquet_bytes=parquet["bytes_per_row"],
    )


def machines(figures: Measured) -> dict[str, Machine]:
    """Build the machines of the plans: with CPU cores as workers, or with one GPU."""
    common = {
        "network": NETWORK_GBIT * 1e9 / 8,
        "failures_per_hour": FAILURES_PER_HOUR["reserved"],
        "start": START_SECONDS,
    }
    return {
        "CPU": Machine(workers=CORES, images_per_second=figures.core, **common),
        "GPU": Machine(workers=1, images_per_second=H100_LOOP, **common),
    }


def recommended(figures: Measured, machine: Machine, count: int) -> Cluster:
    """Build a cluster that reads paths from a table, and writes a file for each partition."""
    return Cluster(machine, count, figures.partition_overhead, figures.task_seconds, SPREAD)


def simple(figures: Measured, machine: Machine, count: int) -> Cluster:
    """Build one that lists images under one prefix, and writes all embeddings into one store."""
    return replace(
        recommended(figures, machine, count),
        requests_per_second=PREFIX_REQUESTS_PER_SECOND,
        listed_per_second=LISTED_PER_SECOND,
        rows_per_second=figures.store_rows,
    )


def table(head: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines)


def plans(figures: Measured) -> Iterator[tuple[list[str], str, Plan, Plan, Job]]:
    """Yield images and machines as cells, the kind, the simple and the recommended plan."""
    for images, count, kind, partition in JOBS:
        machine = machines(figures)[kind]
        job = Job(images, IMAGE_BYTES, partition=partition)
        small = replace(job, partition=SMALL_PARTITION)
        first = plan(small, simple(figures, machine, count))
        best = plan(job, recommended(figures, machine, count))
        yield [power(images), f"{count} {kind}"], kind, first, best, job


def plans_table(figures: Measured) -> str:
    rows = [
        [
            *cells,
            f"{number(first.seconds / HOUR)} ({RESOURCES[first.bottleneck]})",
            f"{job.partition:,}",
            f"{number(best.seconds / HOUR)} ({RESOURCES[best.bottleneck]})",
            f"{best.lost:.1f}",
        ]
        for cells, _, first, best, job in plans(figures)
    ]
    head = ["images", "machines", "simple: hours (limit)", "recommended: images per partition",
            "hours (limit)", "partitions computed again"]  # fmt: skip
    return table(head, rows)


def costs_table(figures: Measured) -> str:
    """List what the recommended plans read, store and cost."""
    rows = [
        [
            *cells,
            number(best.machine_hours),
            size(best.read),
            size(best.stored),
            number(best.cost(Prices(machine_hour=MACHINE_HOUR[kind]))),
            number(best.cost(Prices(thousand_requests=THOUSAND_REQUESTS))),
            number(best.cost(Prices(gigabyte_month=GIGABYTE_MONTH))),
        ]
        for cells, kind, _, best, _ in plans(figures)
    ]
    prices = " or ".join(f"{price:g} ({kind})" for kind, price in MACHINE_HOUR.items())
    head = ["images", "machines", "machine-hours", "read", "stored",
            f"machines, at {prices} per hour", f"requests, at {THOUSAND_REQUESTS:g} per 1,000",
            f"a month of storage, at {GIGABYTE_MONTH:g} per GB"]  # fmt: skip
    return table(head, rows)


def limits_table(figures: Measured) -> str:
    """List what shared resources allow, and for how many machines that is enough."""
    kinds = machines(figures)
    job = Job(1, IMAGE_BYTES, partition=100_000)
    alone = {kind: limits(job, recommended(figures, machine, 1)) for kind, machine in kinds.items()}
    speeds = {kind: min(allowed["workers"], allowed["network"]) for kind, allowed in alone.items()}
    resources = {
        "requests to one prefix of the storage (assumed)": PREFIX_REQUESTS_PER_SECOND,
        "listing, one request after the other (assumed)": LISTED_PER_SECOND,
        "writing into one store (measured)": figures.store_rows,
        "a Dask scheduler, partitions of 25 images (measured)": 25 / figures.task_seconds,
        "the same, 1,000 images": 1000 / figures.task_seconds,
        "the same, 10,000 images": 10_000 / figures.task_seconds,
    }
    rows = [
        [name, number(rate), *(number(rate / speeds[kind]) for kind in kinds)]
        for name, rate in resources.items()
    ]
    return table(["shared resource", "images per second", "CPU machines", "GPU machines"], rows)


def machines_table(figures: Measured) -> str:
    """List what the parts of one machine allow."""
    network = NETWORK_GBIT * 1e9 / 8 / IMAGE_BYTES
    at_once = remote._MAX_REQUESTS
    rows = [
        ["one CPU core", number(figures.core), "measured"],
        [f"{CORES} cores", number(CORES * figures.core), f"{CORES} times that: assumed"],
        [f"network of {NETWORK_GBIT} Gbit/s, images of {IMAGE_BYTES // 1000} kB",
         number(network),
         f"assumed; enough for {number(network / figures.core)} cores, or "
         f"{number(network / H100_LOOP)} H100"],
        [f"URLs in one process, {at_once} at a time, {1000 * LATENCY:.0f} ms each",
         number(at_once / LATENCY), "assumed"],
        ["JPEG decoder of an H100", f"at most {number(H100_DECODER)}", "assumed"],
        ["the same, with resizing and the network", f"at most {number(H100_LOOP)}", "assumed"],
        ["one process that writes Parquet", number(figures.parquet_rows), "measured"],
    ]  # fmt: skip
    return table(["part of a machine", "images per second", "from"], rows)


def partitions_table(figures: Measured) -> str:
    """List the best length of a partition for several overheads and failure rates."""
    rows = []
    for kind, per_hour in FAILURES_PER_HOUR.items():
        for overhead in [figures.partition_overhead, *OVERHEADS]:
            failure_rate = per_hour / HOUR
            best = best_partition_seconds(overhead, failure_rate)
            short, long = good_lengths(overhead, failure_rate)
            rows.append(
                [
                    f"{per_hour:g} ({kind})",
                    number(overhead),
                    number(best),
                    f"{100 * wasted_share(best, overhead, failure_rate):.2g} %",
                    "none" if short is None else f"{number(short)} to {number(long)}",
                ]
            )
    head = ["failures per machine-hour", "overhead, s", "best length, s", "wasted there",
            f"wastes at most {100 * MAX_WASTED:g} %, s"]  # fmt: skip
    return table(head, rows)


def good_lengths(overhead: float, failure_rate: float) -> tuple[Any, Any]:
    """Return the shortest and the longest partition that waste little, or None and None."""
    best = best_partition_seconds(overhead, failure_rate)
    lengths = [best * 10 ** (step / 200) for step in range(-600, 601)]
    good = [
        length for length in lengths if wasted_share(length, overhead, failure_rate) <= MAX_WASTED
    ]
    return (good[0], good[-1]) if good else (None, None)


def engines_table(clusters: dict[str, Any]) -> str:
    variants = {k: v for k, v in clusters["variants"].items() if "missing" not in v}
    sizes = list(next(iter(variants.values()))["partitions"])
    rows = []
    for name, figures in variants.items():
        engine, count = name.split()
        unit = "thread" if engine == "local" else "worker"
        rows.append(
            [
                f"{ENGINES[engine]}, {count} {unit}{'s' * (count != '1')}",
                *(
                    number(figures[key]) if key in figures else ""
                    for key in ("start_seconds", "first_seconds", "task_ms", "partition_ms")
                ),
                *(f"{figures['partitions'][size]['share_of_local']:.2f}" for size in sizes),
            ]
        )
    head = ["", "start, s", "first partition, s", "empty task, ms", "partition, ms"]
    return table([*head, *(f"{size} images" for size in sizes)], rows)


def runs_table(scaling: dict[str, Any]) -> str:
    labels = {"command": "`sktransfer embed`", "dask": "Dask, 2 workers"}
    rows = [
        [labels[name], f"{int(count):,}", number(v["predicted"]), number(v["measured"]),
         f"{100 * v['error']:+.0f} %"]
        for name, run in scaling["runs"].items()
        for count, v in run["sizes"].items()
    ]  # fmt: skip
    return table(["", "images", "predicted, s", "measured, s", "error"], rows)


def simulations_table(scaling: dict[str, Any]) -> str:
    rows = [
        [name, number(v["predicted"]), number(v["simulated"]), f"{100 * v['error']:+.1f} %"]
        for name, v in scaling["simulations"].items()
    ]
    return table(["", "predicted, s", "simulated, s", "error"], rows)


def stores_table(figures: Measured) -> str:
    gib = 32 * 2**30
    rows = [
        ["store (SQLite)", number(figures.store_bytes), number(figures.store_rows),
         f"{number(gib / figures.store_bytes / 1e6)} million"],
        ["Parquet", number(figures.parquet_bytes), number(figures.parquet_rows), "no limit"],
    ]  # fmt: skip
    head = ["", "bytes per embedding", "written per second, one process", "default limit"]
    return table(head, rows)


def tables(load: Load) -> dict[str, str]:
    """Build all tables by their names on the page."""
    figures, scaling = measured(load), load("scaling")
    return {
        "machines": machines_table(figures),
        "plans": plans_table(figures),
        "costs": costs_table(figures),
        "limits": limits_table(figures),
        "partitions": partitions_table(figures),
        "stores": stores_table(figures),
        "engines": engines_table(load("clusters")),
        "runs": runs_table(scaling),
        "simulations": simulations_table(scaling),
    }


_MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end of table -->)", re.S)


def filled(page: str, content: dict[str, str]) -> str:
    """Replace the tables of a page; all must be there once."""
    names = [name for _, name, _ in _MARKED.findall(page)]
    if sorted(names) != sorted(content):
        raise ValueError(f"Got marks for {sorted(names)}, expected {sorted(content)}")
    return _MARKED.sub(lambda mark: f"{mark[1]}\n{content[mark[2]]}\n\n{mark[3]}", page)


def power(value: int) -> str:
    return f"10^{round(math.log10(value))}"


def number(value: float) -> str:
    """Format a figure with two or three significant digits."""
    if value >= 100:
        digits = 3 if value < 10_000 else 2
        return f"{float(f'{value:.{digits}g}'):,.0f}"
    return f"{value:.2g}"


def size(value: float) -> str:
    """Format a number of bytes."""
    for unit, factor in (("PB", 1e15), ("TB", 1e12)):
        if value >= factor:
            return f"{number(value / factor)} {unit}"
    return f"{number(value / 1e9)} GB"
