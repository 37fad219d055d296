"""Values are kept by their memory; builds are counted."""

import gc
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sktransfer.utils import memory
from sktransfer.utils.memory import MemoryCache, memory_limit

CPU = torch.device("cpu")


class Value:
    """A value with a size, which can be referenced weakly."""

    def __init__(self, size):
        self.size = size


def cache_of(limit, at_least=1):
    return MemoryCache(at_least=at_least, limit=lambda device: limit)


def get(cache, key, builds, size=10, device=CPU):
    def make():
        builds[key] += 1
        return Value(size)

    return cache.get(key, make, lambda value: value.size, device)


@pytest.mark.parametrize(
    ("limit", "at_least", "keys", "builds"),
    [
        (30, 1, "abcabcabc", 3),  # all fit
        (29, 1, "abcabcabc", 9),  # the oldest is the next one
        (29, 3, "abcabcabc", 3),
        (20, 1, "abacad", 4),  # a stays, as it is used in between
        (20, 1, "abcbcbc", 3),
        (20, 1, "abcacb", 5),
        (0, 1, "aaaa", 1),  # the last one stays, whatever its size
        (0, 1, "abab", 4),
        (0, 2, "ababab", 2),
        (0, 3, "abcdabcd", 8),
        (1000, 1, "abcdefghij" * 3, 10),
    ],
)
def test_least_recently_used_values_are_removed_beyond_the_limit(limit, at_least, keys, builds):
    cache, counted = cache_of(limit, at_least), Counter()
    for key in keys:
        get(cache, key, counted)
    assert counted.total() == builds
    assert len(cache) == min(len(set(keys)), max(at_least, limit // 10))


def test_large_value_removes_several_small_ones():
    cache, builds = cache_of(50), Counter()
    for key in "abcde":
        get(cache, key, builds)
    get(cache, "large", builds, size=35)
    assert len(cache) == 2
    for key in ("large", "e"):
        get(cache, key, builds)
    assert set(builds.values()) == {1}


def test_value_in_use_is_not_built_again():
    cache, builds = cache_of(10), Counter()
    used = get(cache, "used", builds)
    for key in "abc":
        get(cache, key, builds)
    assert get(cache, "used", builds) is used
    assert builds["used"] == 1
    del used
    get(cache, "a", builds)
    gc.collect()
    get(cache, "used", builds)
    assert builds["used"] == 2


def test_each_device_has_its_own_limit():
    meta = torch.device("meta")
    cache = MemoryCache(at_least=1, limit=lambda device: 20 if device == CPU else 10)
    builds = Counter()
    for _ in range(3):
        for key in ("a", "b"):
            get(cache, key, builds)
        for key in ("c", "d"):
            get(cache, key, builds, device=meta)
    assert builds == {"a": 1, "b": 1, "c": 3, "d": 3}


def test_error_of_a_build_leaves_no_value():
    cache = cache_of(100)

    def fail():
        raise OSError("no network")

    for _ in range(2):
        with pytest.raises(OSError, match="no network"):
            cache.get("a", fail, lambda value: 0)
    assert len(cache) == 0
    assert get(cache, "a", Counter()).size == 10


def test_clear_forgets_all_values():
    cache, builds = cache_of(100), Counter()
    used = get(cache, "a", builds)
    cache.clear()
    assert len(cache) == 0
    assert get(cache, "a", builds) is not used


@pytest.mark.parametrize("limit", [80, 30])
def test_threads_build_a_value_once_while_it_is_kept(limit):
    cache, builds = cache_of(limit), Counter()
    start = threading.Barrier(8)

    def work(number):
        start.wait()
        values = []
        for turn in range(200):
            key = (number + turn) % 8
            value = cache.get(key, lambda key=key: made(key), lambda value: 10)
            assert value.size == key
            values = [*values[-3:], value]

    def made(key):
        builds[key] += 1
        return Value(key)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(cache) == limit // 10
    if limit == 80:
        assert set(builds.values()) == {1}


def test_waiting_build_does_not_block_other_keys():
    cache, builds, waiting, go_on = cache_of(100), Counter(), threading.Event(), threading.Event()

    def slow():
        waiting.set()
        assert go_on.wait(60)
        builds["slow"] += 1
        return Value(10)

    def get_slow(_):
        return cache.get("slow", slow, lambda value: 10)

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(get_slow, number) for number in range(2)]
        assert waiting.wait(60)
        assert get(cache, "other", builds).size == 10  # would wait forever
        go_on.set()
        first, second = (result.result() for result in results)
    assert first is second
    assert builds == {"slow": 1, "other": 1}


def test_build_may_ask_for_another_value():
    cache, builds = cache_of(100), Counter()
    outer = cache.get("outer", lambda: get(cache, "inner", builds), lambda value: 10)
    assert outer is get(cache, "inner", builds)


@pytest.mark.parametrize(
    ("total", "is_worker", "cores", "limit"),
    [
        (2**30, False, 8, 2**30),  # the smallest limit
        (2**33, False, 8, 2**30),
        (2**34, False, 8, 2**31),
        (2**36, False, 8, 2**33),
        (2**36, True, 4, 2**31),
        (2**36, True, 64, 2**30),
        (2**39, True, 16, 2**32),
        (2**36, True, None, 2**33),
    ],
)
def test_limit_is_a_share_of_the_memory(monkeypatch, total, is_worker, cores, limit):
    monkeypatch.setattr(memory, "_system_memory", lambda: total)
    monkeypatch.setattr(memory.multiprocessing, "parent_process", lambda: is_worker or None)
    monkeypatch.setattr(memory.os, "cpu_count", lambda: cores)
    assert memory_limit(CPU) == limit


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 2**34),
        ({"memory.max": "max\n"}, 2**34),
        ({"memory.max": f"{2**32}\n"}, 2**32),
        ({"memory.max": f"{2**62}\n"}, 2**34),
        ({"memory/memory.limit_in_bytes": f"{2**31}\n"}, 2**31),
        ({"memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, 2**34),
        ({"memory.max": ""}, 2**34),
        ({"memory.max": "max", "memory/memory.limit_in_bytes": f"{2**33}"}, 2**33),
    ],
)
def test_container_may_have_less_memory(tmp_path, monkeypatch, files, expected):
    sizes = {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**22}
    monkeypatch.setattr(memory.os, "sysconf", sizes.__getitem__, raising=False)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert memory._system_memory(tmp_path) == expected


def test_memory_is_assumed_if_the_system_does_not_report_it(tmp_path, monkeypatch):
    monkeypatch.delattr(memory.os, "sysconf", raising=False)
    assert memory._system_memory(tmp_path) == 2**33
