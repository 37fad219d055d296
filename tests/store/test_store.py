"""Each image is computed once despite threads, processes, crashes and broken stores."""

import copy
import itertools
import pickle
import signal
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import finish_python, start_python

from sktransfer.store import embedding_table
from sktransfer.store import store as store_module
from sktransfer.store.store import EmbeddingStore, EmbeddingTable, embed_once

KEYS = [b"%016d" % number for number in range(200)]
BATCH = 8


class Backbone:
    """Embeds row i as (i, -i), records each row, and fails as configured."""

    def __init__(self, broken=(), error=None, after=0):
        self.rows = []
        self.broken = set(broken)
        self.error = error
        self.after = after

    def __call__(self, rows):
        for first in range(0, len(rows), BATCH):
            batch = [row for row in rows[first : first + BATCH] if row not in self.broken]
            if self.error is not None and len(self.rows) >= self.after:
                raise self.error
            self.rows += batch
            yield batch, expected(batch)


def expected(rows):
    return np.array([[row, -row] for row in rows], np.float32).reshape(-1, 2)


def embed(table, compute, keys=KEYS):
    """Call `embed_once` with a `compute` that takes one claim at a time."""

    def compute_claims(claims):
        return itertools.chain.from_iterable(map(compute, claims))

    return embed_once(table, keys, compute_claims, batch_size=BATCH)


def is_stored(table, keys=KEYS):
    return table.read(keys, np.empty((len(keys), table.width), table.dtype))


def test_image_is_computed_once(store, table):
    first, second = Backbone(), Backbone()
    half = embed(table, first, KEYS[:100])
    assert half.dtype == np.float32
    assert (half == expected(range(100))).all()
    assert first.rows == list(range(100))
    assert (embed(table, second) == expected(range(200))).all()
    assert second.rows == list(range(100, 200))
    assert (embed(table, None, KEYS[::-1]) == expected(range(199, -1, -1))).all()
    info = store.info()
    assert (info.computed, info.read) == (200, 300)


def test_repeated_images_are_computed_at_their_first_row(store, table):
    backbone = Backbone()
    keys = [KEYS[number] for number in (3, 1, 3, 1, 2)]
    assert (embed(table, backbone, keys) == expected([0, 1, 0, 1, 4])).all()
    assert backbone.rows == [0, 1, 4]
    assert (embed(table, None, keys) == expected([0, 1, 0, 1, 4])).all()
    assert store.info().read == 3


def test_embed_once_accepts_no_images(table):
    assert embed(table, None, []).shape == (0, 2)


def test_batch_is_stored_as_soon_as_it_is_computed(table):
    def compute(rows):
        for batch, embeddings in Backbone()(rows):
            yield batch, embeddings
            assert is_stored(table, [KEYS[row] for row in batch]).all()

    embed(table, compute)


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), GeneratorExit(), OSError()])
def test_interrupted_run_keeps_its_batches_and_no_claims(table, error):
    """An OSError of the computation is not taken for one of the store."""
    backbone = Backbone(error=error, after=3 * BATCH)
    with pytest.raises(type(error)):
        embed(table, backbone)
    assert is_stored(table).sum() == 3 * BATCH
    assert len(copy.copy(table).claim(KEYS)) == 200 - 3 * BATCH


def test_broken_images_are_nan_and_not_stored(table):
    broken = [0, 9, 10, 199]
    backbone = Backbone(broken)
    keys = [*KEYS, KEYS[9]]
    for _ in range(2):
        embeddings = embed(table, backbone, keys)
        assert np.flatnonzero(np.isnan(embeddings).all(axis=1)).tolist() == [*broken, 200]
        assert np.isnan(embeddings).any(axis=1).sum() == 5
    assert np.flatnonzero(~is_stored(table)).tolist() == broken
    assert len(backbone.rows) == 196
    assert copy.copy(table).claim(KEYS) == [KEYS[row] for row in broken]


def test_embed_once_rejects_embeddings_of_another_shape(table):
    with pytest.raises(ValueError, match=r"Got embeddings of shape \(1, 3\)"):
        embed(table, lambda rows: [(rows[:1], np.ones((1, 3)))])


def test_embed_once_waits_for_images_claimed_by_others(table, monkeypatch):
    other = copy.copy(table)
    other.claim(KEYS[:20])
    backbone = Backbone()
    pauses = []

    def sleep(seconds):
        """Let the other owner finish after some pauses; all other rows are computed by then."""
        assert backbone.rows == list(range(20, 200))
        pauses.append(seconds)
        if len(pauses) == 12:
            other.write(KEYS[:20], expected(range(20)))

    monkeypatch.setattr(store_module.time, "sleep", sleep)
    assert (embed(table, backbone) == expected(range(200))).all()
    assert pauses[:3] == [0.001, 0.002, 0.004]
    assert max(pauses) == 0.05


@pytest.mark.parametrize("end", ["release", "death", "lease"])
def test_embed_once_takes_over_unfinished_claims(table, monkeypatch, end):
    other = copy.copy(table)
    other.claim(KEYS[:20])
    other.write(KEYS[:5], expected(range(5)))

    def sleep(seconds):
        if end == "release":
            other.release()
        elif end == "death":
            monkeypatch.setattr(embedding_table, "is_running", lambda pid: False)
        else:
            monkeypatch.setattr(embedding_table, "LEASE_SECONDS", -1)
            other.renew()
            monkeypatch.setattr(embedding_table, "LEASE_SECONDS", 60)

    monkeypatch.setattr(store_module.time, "sleep", sleep)
    backbone = Backbone()
    assert (embed(table, backbone) == expected(range(200))).all()
    assert sorted(backbone.rows) == list(range(5, 200))


def test_long_computation_renews_its_claims(store, table, monkeypatch):
    monkeypatch.setattr(store_module, "LEASE_SECONDS", 0.003)  # of renewals, not of a lease
    renewed = threading.Event()
    renew = EmbeddingTable.renew
    monkeypatch.setattr(EmbeddingTable, "renew", lambda table: (renew(table), renewed.set()))

    def compute(rows):
        assert renewed.wait(60)
        yield rows, expected(rows)

    assert (embed(table, compute, KEYS[:9]) == expected(range(9))).all()


def test_threads_share_the_work(table):
    backbone = Backbone()
    barrier = threading.Barrier(4)

    def run(_):
        barrier.wait()
        return embed(table, backbone)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(4)))
    assert all((embeddings == expected(range(200))).all() for embeddings in results)
    assert sorted(backbone.rows) == list(range(200))


RUN = """
import os, sys, time
import numpy as np
from sktransfer.store.store import EmbeddingStore, embed_once

directory, log, batches = sys.argv[1], sys.argv[2], int(sys.argv[3])

def compute(claims):
    global batches
    for batch in (rows[start : start + 8] for rows in claims for start in range(0, len(rows), 8)):
        if batches == 0:
            print("stuck", flush=True)
            sys.stdin.read()
        batches -= 1
        with open(log, "a") as file:
            file.writelines(f"{row}\\n" for row in batch)
        time.sleep(0.002)
        yield batch, np.array([[row, -row] for row in batch], np.float32)

table = EmbeddingStore(directory).table(b"digest", "a table", width=2)
keys = [b"%016d" % number for number in range(200)]
print("ready", flush=True)
sys.stdin.readline()
embeddings = embed_once(table, keys, compute, batch_size=8)
assert (embeddings[:, 0] == np.arange(200)).all()
"""


def test_processes_share_the_work(store, tmp_path):
    log = tmp_path / "computed"
    processes = [start_python(RUN, store.directory, log, -1) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        finish_python(process)
    assert sorted(map(int, log.read_text().split())) == list(range(200))


def test_killed_process_loses_only_the_batch_in_flight(table, store, tmp_path, monkeypatch):
    process = start_python(RUN, store.directory, tmp_path / "computed", 3)
    with process:
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() + process.stdout.readline() == "ready\nstuck\n"
        assert table.claim(KEYS[:40]) == []
        process.kill()
    assert process.returncode == -signal.SIGKILL
    monkeypatch.setattr(store_module.time, "sleep", None)  # fails if anything waits for the lease
    backbone = Backbone()
    assert (embed(table, backbone) == expected(range(200))).all()
    assert sorted(backbone.rows) == list(range(3 * 8, 200))


def test_store_that_cannot_be_created_embeds_with_a_warning(tmp_path):
    (tmp_path / "file").touch()
    store = EmbeddingStore(tmp_path / "file" / "store")
    table = store.table(b"digest", "a table", width=2)
    backbone = Backbone(broken=[7])
    with pytest.warns(UserWarning, match="failed") as warned:
        embeddings = embed(table, backbone, KEYS + KEYS[:9])
    assert str(warned[0].message).startswith(f"The embedding store {store.directory}")
    assert str(warned[0].message).endswith(
        "so embeddings are computed without it. Free disk space, pass a writable directory "
        "as cache, or switch the store off with cache=None."
    )
    rows = [*range(200), *range(9)]
    assert np.flatnonzero(np.isnan(embeddings[:, 0])).tolist() == [7, 207]
    assert np.array_equal(
        np.delete(embeddings, [7, 207], 0), np.delete(expected(rows), [7, 207], 0)
    )
    assert backbone.rows == [row for row in range(200) if row != 7]
    embed(table, Backbone())  # a second warning would be an error


@pytest.mark.parametrize("operation", ["read", "claim", "write", "release"])
def test_store_that_fails_midway_embeds_with_a_warning(table, monkeypatch, operation):
    table.write(KEYS[:10], expected(range(10)))
    honest = getattr(EmbeddingTable, operation)
    calls = []

    def failing(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2 or operation == "release":
            raise sqlite3.OperationalError("database or disk is full")
        return honest(self, *arguments)

    monkeypatch.setattr(EmbeddingTable, operation, failing)
    backbone = Backbone(broken=[50])
    with pytest.warns(UserWarning, match="failed .database or disk is full., so embeddings are"):
        embeddings = embed(table, backbone)
    assert np.flatnonzero(np.isnan(embeddings[:, 0])).tolist() == [50]
    assert np.nanmax(np.abs(embeddings - expected(range(200)))) == 0
    assert sorted(backbone.rows) == [row for row in range(10, 200) if row != 50]
    assert len(calls) == 2  # each use of a locked store would take a minute


def test_failure_to_count_does_not_prevent_reading(table, monkeypatch):
    table.write(KEYS, expected(range(200)))

    def full(*arguments):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(EmbeddingTable, "_count", full)
    assert (embed(table, None) == expected(range(200))).all()


def test_corrupt_store_is_replaced(store, table):
    embed(table, Backbone())
    store.close()
    (store.directory / "embeddings.sqlite").write_bytes(b"not a database" * 10_000)
    backbone = Backbone()
    with pytest.warns(UserWarning, match="is corrupt"):
        assert (embed(table, backbone) == expected(range(200))).all()
    assert len(backbone.rows) == 200
    embed(table, None)


def test_directory_deleted_during_a_run_is_created_again(store, table):
    def compute(rows):
        if rows[0] == 0:
            for file in store.directory.iterdir():
                file.unlink()
            store.directory.rmdir()
        yield rows, expected(rows)

    assert (embed(table, compute) == expected(range(200))).all()
    assert is_stored(table).all()


def test_fork_uses_the_store_of_its_parent(store):
    script = """
import os, sys
import numpy as np
from sktransfer.store.store import EmbeddingStore, embed_once

table = EmbeddingStore(sys.argv[1]).table(b"digest", "a table", width=1)

def embed(numbers):
    compute = lambda claims: ((rows, np.array([[numbers[row]] for row in rows])) for rows in claims)
    keys = [b"%016d" % number for number in numbers]
    assert embed_once(table, keys, compute, batch_size=8)[:, 0].tolist() == list(numbers)

embed(range(10))
if os.fork() == 0:
    embed(range(20))
    sys.exit()
assert os.wait()[1] == 0
embed(range(30))
info = EmbeddingStore(sys.argv[1]).info()
assert (info.computed, info.read) == (30, 30), info
"""
    finish_python(start_python(script, store.directory))


def test_info_counts_images_bytes_and_use(store, table):
    assert store.info().tables == ()
    assert not store.directory.exists()
    embed(table, Backbone())
    store.table(b"other", "another table", 3, np.float16).write(KEYS[:5], np.ones((5, 3)))
    embed(table, None)
    info = store.info()
    assert info.directory == store.directory
    assert info.bytes == sum(file.stat().st_size for file in store.directory.iterdir())
    assert info.max_bytes == store.max_bytes == 32 * 2**30
    assert (info.computed, info.read) == (205, 200)
    assert [(listed.description, listed.images, listed.bytes) for listed in info.tables] == [
        ("a table", 200, 1600),
        ("another table", 5, 30),
    ]
    lines = str(info).splitlines()
    assert lines[0].endswith("limit 32 GiB; computed 205, read 200")
    assert lines[1].split()[:2] == ["images", "size"]
    assert lines[2].split()[:3] == ["200", "1.562", "KiB"]
    assert repr(info) == str(info)


def test_clear_removes_every_row_and_frees_the_file(store, table):
    store.clear()
    assert not store.directory.exists()
    large = store.table(b"large", "", width=1024)
    large.write(KEYS, np.ones((200, 1024)))
    assert store.info().bytes > 800_000
    store.clear()
    info = store.info()
    assert info.tables == ()
    assert (info.computed, info.read) == (0, 0)
    assert sum(path.stat().st_size for path in store.directory.glob("*.sqlite")) < 400_000
    assert not is_stored(large).any()


def digests(files):
    return {file: b"content of " + file for file in files if file != b"unreadable"}


def test_contents_of_files_are_read_once(store):
    read = []

    def honest(files):
        read.append(files)
        return digests(files)

    assert store.contents_of([], honest) == {}
    assert not store.directory.exists()
    assert store.contents_of([b"a", b"b", b"a", b"unreadable"], honest) == digests([b"a", b"b"])
    assert store.contents_of([b"c", b"b"], honest) == digests([b"b", b"c"])
    assert store.contents_of([b"a", b"b", b"c"], honest) == digests([b"a", b"b", b"c"])
    assert read == [[b"a", b"b", b"unreadable"], [b"c"]]
    many = [b"%d" % number for number in range(2000)]
    assert store.contents_of(many, digests) == store.contents_of(many, dict) == digests(many)
    store.clear()
    store.contents_of([b"a"], honest)
    assert read[2:] == [[b"a"]]


def test_contents_of_the_oldest_files_are_forgotten_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_MIN_FILES", 10)
    store = EmbeddingStore(tmp_path / "store", max_bytes=1000)
    store.contents_of([b"%d" % number for number in range(25)], digests)
    assert store.contents_of([b"14", b"15", b"24"], lambda unknown: {}).keys() == {b"15", b"24"}
    store.close()


def test_contents_of_files_are_read_if_the_store_fails(tmp_path):
    """A locked store takes a minute for each attempt, so there is only one."""
    (tmp_path / "file").touch()
    store = EmbeddingStore(tmp_path / "file" / "store")
    for _ in range(2):
        assert store.contents_of([b"a", b"b"], digests) == digests([b"a", b"b"])


@pytest.mark.parametrize(
    "max_bytes", [0, -1, 0.5, True, float("nan"), float("inf"), "1e9", None, [1]]
)
def test_limit_that_is_not_positive_is_rejected(tmp_path, max_bytes):
    with pytest.raises(ValueError, match="Got max_bytes") as error:
        EmbeddingStore(tmp_path, max_bytes=max_bytes)
    assert str(error.value) == (
        f"Got max_bytes={max_bytes!r}, but expected a number of at least 1; to store "
        "nothing, pass cache=None."
    )


def test_file_in_place_of_a_directory_is_rejected(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as error:
        EmbeddingStore(tmp_path / "file")
    assert str(error.value) == (
        f"Got the file '{tmp_path / 'file'}', but expected a directory for "
        "embeddings; pass another path, or move that file away."
    )


def test_directory_expands_the_user_and_is_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert EmbeddingStore("~/a/b").directory == EmbeddingStore(Path("a/b")).directory
    assert not (tmp_path / "a").exists()


def test_pickled_store_refers_to_the_same_directory(store, table):
    embed(table, Backbone())
    store.max_bytes = 2**20
    pickled = pickle.dumps(store)
    assert len(pickled) < 500
    copied = pickle.loads(pickled)
    assert (copied.directory, copied.max_bytes) == (store.directory, 2**20)
    assert repr(copied) == f"EmbeddingStore('{store.directory}', max_bytes=1048576)"
    assert copied.info().computed == 200
    copied.close()
    assert copy.deepcopy(store) is store


@pytest.mark.parametrize("max_bytes", [1, 1e9, np.int64(100), 2**60])
def test_limit_is_an_integer(tmp_path, max_bytes):
    limit = EmbeddingStore(tmp_path, max_bytes=max_bytes).max_bytes
    assert (limit, type(limit)) == (int(max_bytes), int)


@pytest.mark.parametrize("directory", [None, 0, True, b"x", "", "none", "False", __file__])
def test_directory_that_is_no_path_is_rejected(directory):
    with pytest.raises(
        (TypeError, ValueError, NotADirectoryError), match=r"^Got .*a directory for"
    ):
        EmbeddingStore(directory)


@pytest.mark.parametrize("temporary", [1, 0, None, "yes"])
def test_temporary_that_is_not_boolean_is_rejected(tmp_path, temporary):
    with pytest.raises(ValueError, match=r"Got temporary=.*, but expected True or False"):
        EmbeddingStore(tmp_path, temporary=temporary)
