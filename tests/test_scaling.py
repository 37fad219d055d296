"""The cost model of benchmarks/plan.py agrees with a simulation, and with what is exact."""

import importlib
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def benchmark(name):
    """Import a module of benchmarks/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)


plans, simulation = benchmark("plan"), benchmark("_simulation")
Simulation = simulation.Simulation

MACHINE = plans.Machine(workers=4, images_per_second=100, network=1e9)
CLUSTER = plans.Cluster(MACHINE, machines=5)
JOB = plans.Job(images=1_000_000, image_bytes=100_000)


@pytest.mark.parametrize(("tasks", "workers"), [(1, 1), (7, 3), (9, 3), (2, 8), (1000, 17)])
def test_job_without_failures_takes_whole_rounds(tasks, workers):
    outcome = Simulation(tasks, workers, 8, start=3).run()
    assert outcome.seconds == 3 + math.ceil(tasks / workers) * 8
    assert outcome.seconds == 3 + plans.makespan(tasks, workers, 8)
    assert (outcome.attempts, outcome.busy) == (tasks, tasks * 8)


@pytest.mark.parametrize("restart", [0, 5])
def test_failures_cost_the_expected_retries(restart):
    tasks, seconds, failure_rate = 20_000, 10, 0.05
    done = Simulation(tasks, 1, seconds, failure_rate=failure_rate, restart=restart).run()
    # The number of attempts is geometric: mean exp(rate * seconds) = 1.65, standard error 0.0073.
    assert done.attempts / tasks == pytest.approx(math.exp(failure_rate * seconds), abs=0.03)
    assert done.busy / tasks == pytest.approx(math.expm1(0.5) / failure_rate, rel=0.02)
    expected = plans.with_retries(seconds, failure_rate, restart)
    assert done.seconds / tasks == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("tasks", "workers", "spread"),
    [(1000, 16, 0.3), (64, 16, 0.3), (16, 16, 0.3), (20, 16, 0.3), (1000, 16, 1), (3000, 500, 0.5)],
)
def test_stragglers_lengthen_a_job_as_predicted(tasks, workers, spread):
    times = [Simulation(tasks, workers, 10, spread=spread, seed=s).run().seconds for s in range(40)]
    # The standard error is at most 0.01, and the model is up to 0.03 off with few tasks per worker.
    assert plans.makespan(tasks, workers, 10, spread) == pytest.approx(mean(times), rel=0.04)


def test_small_spread_changes_a_long_job_little():
    exact = plans.makespan(1600, 16, 10)
    assert plans.makespan(1600, 16, 10, 0.01) == pytest.approx(exact, rel=0.01)


def test_scheduler_limits_many_workers_with_short_tasks():
    done = Simulation(1000, 200, 0.1, task_seconds=0.01).run()
    assert done.seconds == pytest.approx(1000 * 0.01 + 0.1)
    job = replace(JOB, images=100_000, partition=100)
    cluster = replace(CLUSTER, machines=50, machine=replace(MACHINE, images_per_second=1000))
    predicted = plans.plan(job, replace(cluster, task_seconds=0.01))
    assert predicted.bottleneck == "scheduler"
    assert predicted.seconds == pytest.approx(done.seconds)


def test_plan_equals_a_simulation_with_everything():
    machine = replace(MACHINE, workers=1, failures_per_hour=60, start=40)
    cluster = plans.Cluster(machine, 30, partition_overhead=2, task_seconds=0.01, spread=0.3)
    job = plans.Job(images=1_500_000, image_bytes=100_000, partition=500)
    predicted = plans.plan(job, cluster)
    runs = [
        Simulation(
            job.partitions, 30, 7, spread=0.3, failure_rate=1 / 60, restart=40, start=40,
            task_seconds=0.01, seed=seed,
        ).run()
        for seed in range(10)
    ]  # fmt: skip
    assert predicted.bottleneck == "workers"
    assert predicted.seconds == pytest.approx(mean(run.seconds for run in runs), rel=0.02)
    lost = mean(run.attempts for run in runs) - job.partitions
    assert predicted.lost == pytest.approx(lost, rel=0.1)


@pytest.mark.parametrize(("overhead", "failures_per_hour"), [(0.1, 1), (2, 0.01), (30, 0.1)])
def test_best_partition_wastes_the_least(overhead, failures_per_hour):
    failure_rate = failures_per_hour / 3600
    best = plans.best_partition_seconds(overhead, failure_rate)
    lengths = np.geomspace(best / 20, best * 20, 2001)
    wasted = [plans.wasted_share(length, overhead, failure_rate) for length in lengths]
    assert plans.wasted_share(best, overhead, failure_rate) < 1.01 * min(wasted)
    assert lengths[np.argmin(wasted)] == pytest.approx(best, rel=0.1)


@pytest.mark.parametrize(
    ("change", "bottleneck"),
    [
        ({}, "workers"),
        ({"machine": replace(MACHINE, network=1e7)}, "network"),
        ({"task_seconds": 1}, "scheduler"),
        ({"requests_per_second": 1000}, "storage requests"),
        ({"listed_per_second": 1000}, "listing"),
        ({"rows_per_second": 1000}, "one store"),
    ],
)
def test_slowest_resource_is_the_bottleneck(change, bottleneck):
    cluster = replace(CLUSTER, **change)
    predicted = plans.plan(JOB, cluster)
    assert predicted.bottleneck == bottleneck
    rate = plans.limits(JOB, cluster)[bottleneck]
    first_or_last = JOB.partition / MACHINE.images_per_second if bottleneck == "scheduler" else 0
    assert predicted.seconds == pytest.approx(JOB.images / rate + first_or_last)


def test_bytes_requests_and_cost_follow_from_the_images():
    machine = replace(MACHINE, start=1000)
    predicted = plans.plan(replace(JOB, value_bytes=2), replace(CLUSTER, machine=machine))
    assert predicted.stored == 1_000_000 * 1280 * 2
    assert predicted.read == 1_000_000 * 100_000
    assert predicted.requests == 1_000_000 + 1000
    assert predicted.seconds == 1000 + 1_000_000 / (5 * 4 * 100)
    assert predicted.machine_hours == 5 * predicted.seconds / 3600
    prices = plans.Prices(2.0, 0.5, 0.25, 0.125)
    assert predicted.cost(prices, months=3) == pytest.approx(
        2 * 5 * 1500 / 3600 + 0.5 * 3 * 2.56 + 0.25 * 102.56 + 0.125 * 1001
    )
