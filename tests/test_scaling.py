"""The cost model of benchmarks/plan.py agrees with closed forms, a simulation, and the page."""

import importlib
import json
import math
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from sktransfer.engines.openvino_engine import OpenVINOEngine

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def benchmark(name):
    """Import a module of benchmarks/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)


PAGE = BENCHMARKS.parent / "docs" / "scaling.md"
plans, simulation, page = map(benchmark, ("plan", "_simulation", "_scaling_page"))
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


def test_partition_that_outlives_its_machine_never_ends():
    machine = replace(MACHINE, failures_per_hour=1000)
    predicted = plans.plan(replace(JOB, partition=500_000), replace(CLUSTER, machine=machine))
    assert predicted.seconds == predicted.lost == math.inf


def test_impossible_value_is_an_error_that_names_it(monkeypatch, capsys):
    command = ["plan.py", "--images", "9", "--images-per-second", "9", "--partition", "0"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        plans.main()
    assert "Got 0 partition, expected a positive number" in capsys.readouterr().err


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


def test_overhead_of_a_partition_is_the_intercept():
    clusters = benchmark("clusters")
    # Two workers, each of which takes 0.03 s for a partition and 0.01 s for an image.
    speeds = {size: 2 * size / (0.03 + 0.01 * size) for size in (25, 100, 400)}
    figures = {str(size): {"images_per_second": speed} for size, speed in speeds.items()}
    assert clusters.partition_ms(figures, 2) == pytest.approx(30)


def test_speed_of_workers_does_not_count_first_partitions(tmp_path):
    clusters, log = benchmark("clusters"), tmp_path / "log"
    log.write_text("1 100 25\n2 101 25\n1 102 25\n2 105 25\n1 104 15\n3 104 25\n")
    speeds = [clusters.steady_speed(worker) for worker in clusters.read_log(log)]
    assert speeds == [40 / 4, 25 / 4, 0]


def committed(name):
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())


def load(name):
    """Load a committed result, or figures in place of those of clusters and of scaling."""
    part = {"seconds": 2.0, "images_per_second": 150.0, "share_of_local": 0.75}
    engine = {"start_seconds": 3.0, "first_seconds": 4.0, "task_ms": 2.0, "partition_ms": 30.0}
    engine |= {"partitions": {"25": part, "400": part | {"share_of_local": 0.96}}}
    local = {key: engine[key] for key in ("first_seconds", "partition_ms", "partitions")}
    run = {"sizes": {"500": {"predicted": 9.0, "measured": 10.0, "error": -0.1}}}
    compared = {"predicted": 99.0, "simulated": 100.0, "error": -0.01, "lost": 0.0}
    figures = {
        "clusters": {
            "variants": {
                "local 1": local,
                "dask 2": engine,
                "ray 1": {"missing": "could not be measured"},
            }
        },
        "scaling": {
            "parquet": {"write_rows_per_second": 10_000.0, "bytes_per_row": 5200.0},
            "runs": {"command": run},
            "simulations": {"uneven partitions": compared},
        },
    }
    return figures[name] if name in figures else committed(name)


def cells(markdown):
    """Return the rows of a table below its head, as lists of cells."""
    return [line.strip("| ").split(" | ") for line in markdown.splitlines()[2:]]


def test_tables_show_the_figures_of_the_benchmarks():
    tables = page.tables(load)
    assert cells(tables["engines"]) == [
        ["`extractor.transform`, 1 thread", "", "4", "", "30", "0.75", "0.96"],
        ["Dask, 2 workers", "3", "4", "2", "30", "0.75", "0.96"],
    ]
    assert cells(tables["runs"]) == [["`sktransfer embed`", "500", "9", "10", "-10 %"]]
    assert cells(tables["simulations"]) == [["uneven partitions", "99", "100", "-1.0 %"]]
    # 25 images in 2 ms are 12,500 per second.
    limits = {name: rest for name, *rest in cells(tables["limits"])}
    assert limits["a Dask scheduler, partitions of 25 images (measured)"][0] == "12,000"
    speed = committed("embedding")["variants"]["sktransfer"]["median"] / 2 * 16
    assert float(limits["requests to one prefix of the storage (assumed)"][1]) == pytest.approx(
        5500 / speed, abs=0.1
    )


def test_plans_show_that_the_simple_way_does_not_scale():
    rows = cells(page.tables(load)["plans"])
    hours = {(row[0], row[1].split()[1]): (row[2], row[4]) for row in rows}
    assert all(
        "(workers)" in simple for (images, _), (simple, _) in hours.items() if images == "10^6"
    )
    for kind in ("CPU", "GPU"):
        simple, recommended = hours["10^10", kind]
        assert simple.endswith("(requests to one prefix)")
        assert 20 * float(recommended.split()[0]) < float(simple.split()[0])


def test_partitions_of_the_range_waste_at_most_a_percent():
    for overhead, per_hour in ((0.02, 0.001), (1, 0.05)):
        rate = per_hour / 3600
        short, long = page.good_lengths(overhead, rate)
        assert plans.wasted_share(short, overhead, rate) == pytest.approx(0.01, rel=0.02)
        assert plans.wasted_share(long, overhead, rate) == pytest.approx(0.01, rel=0.02)
        # The rules of the page: 100 times the overhead, a fiftieth of the time between failures.
        assert short == pytest.approx(100 * overhead, rel=0.15)
        assert long == pytest.approx(0.02 / rate, rel=0.15)
    assert page.good_lengths(30, 0.05 / 3600) == (None, None)


def test_page_has_the_tables_of_the_committed_results():
    if not (BENCHMARKS / "results" / "scaling.json").is_file():
        pytest.skip("benchmarks/scaling.py has not been run")
    text = PAGE.read_text()
    assert page.filled(text, page.tables(committed)) == text


def test_every_table_has_its_place_on_the_page():
    tables = page.tables(load)
    text = page.filled(PAGE.read_text(), tables)
    assert all(f"\n{table}\n" in text for table in tables.values())
    assert page.filled(text, tables) == text
    with pytest.raises(ValueError, match=r"expected .*'runs'"):
        page.filled(text.replace("<!-- table runs -->", ""), tables)


def test_example_of_the_page_prints_what_it_shows(monkeypatch, capsys):
    command, printed = re.findall(
        r"```text\npython benchmarks/plan\.py (.*?)```\n+```text\n(.*?)```", PAGE.read_text(), re.S
    )[0]
    monkeypatch.setattr(sys, "argv", ["plan.py", *shlex.split(command.replace("\\\n", ""))])
    plans.main()
    assert capsys.readouterr().out == printed


def test_page_names_the_images_for_which_openvino_is_chosen():
    found = re.search(r"It has at least (\d+) images", PAGE.read_text())
    worth = [
        OpenVINOEngine.is_worth_starting(int(found[1]) - less, from_library=True, fork=False)
        for less in (0, 1)
    ]
    assert worth == [True, False]
