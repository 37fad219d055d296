"""A file of embeddings is absorbed as a whole or not at all, once, and within the limit."""

import hashlib
import json
import threading
import tracemalloc
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from sktransfer.store import archive
from sktransfer.store.embedding_table import EmbeddingTable
from sktransfer.store.store import EmbeddingStore

KEYS = [b"%016d" % number for number in range(300)]


def rows(count, width, seed=0):
    return np.random.RandomState(seed).randn(count, width).astype(np.float32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Write a few rows in each block, so that there are many blocks."""
    monkeypatch.setattr(archive, "_BYTES_PER_BLOCK", 1000)


@pytest.fixture
def other(tmp_path):
    """Return the empty store of another machine."""
    with closing(EmbeddingStore(tmp_path / "other")) as store:
        yield store


@pytest.fixture
def exported(store, tmp_path):
    """Export a store of two tables, of 300 and 50 embeddings."""
    store.table(b"wide", "a wide table", width=30).write(KEYS, rows(300, 30))
    half = store.table(b"half", "a table of float16", 3, np.float16)
    half.write(KEYS[:50], rows(50, 3, seed=1))
    path = tmp_path / "embeddings"
    assert store.export(path) == 350
    return path


def contents(store):
    """Return all rows of the tables of a store: by digest and key, the bytes of the value."""
    query = """SELECT t.digest, t.description, t.width, t.dtype, e.key, e.value
        FROM embeddings e JOIN tables t ON t.id = e.table_id"""
    return {row[:-1]: row[-1] for row in select(store, query)}


def select(store, query):
    return store._database.transact(lambda c: c.execute(query).fetchall(), write=False)


def rewrite(path, *changes):
    """Change the content of a file, and give it the digest of a whole one."""
    content = path.read_bytes()[:-32]
    for old, new in changes:
        assert old in content
        content = content.replace(old, new, 1)
    path.write_bytes(content + hashlib.blake2b(content, digest_size=32).digest())


def test_absorbed_embeddings_are_those_that_were_exported(store, exported, other):
    assert other.absorb(str(exported)) == 350
    assert contents(other) == contents(store)
    assert len(contents(other)) == 350
    info = other.info()
    assert (info.computed, info.read) == (0, 0)
    assert {(table.description, table.images) for table in info.tables} == {
        ("a wide table", 300),
        ("a table of float16", 50),
    }
    assert sorted(path.name for path in exported.parent.iterdir()) == [
        "embeddings",
        "other",
        "store",
    ]


def test_absorbing_twice_changes_nothing(store, exported, other):
    other.absorb(exported)
    before = contents(other), [table.images for table in other.info().tables]
    assert other.absorb(exported) == 0
    assert store.absorb(exported) == 0
    assert (contents(other), [table.images for table in other.info().tables]) == before


def test_embeddings_in_both_stores_are_kept_once(exported, other):
    table = other.table(b"wide", "a wide table", width=30)
    values = rows(40, 30, seed=2)
    table.write(KEYS[280:] + [b"another key %04d" % number for number in range(20)], values)
    assert other.absorb(exported) == 330
    kept = np.empty((20, 30), np.float32)
    assert table.read(KEYS[280:], kept).all()
    np.testing.assert_array_equal(kept, values[:20])
    assert sum(table.images for table in other.info().tables) == 370 == len(contents(other))


def test_embedding_that_is_being_computed_elsewhere_is_found_by_it(exported, other):
    table = other.table(b"wide", "a wide table", width=30)
    assert table.claim(KEYS[:10]) == KEYS[:10]
    assert other.absorb(exported) == 350
    assert table.read(KEYS[:10], np.empty((10, 30), np.float32)).all()
    assert select(other, "SELECT COUNT(*) FROM claims") == [(0,)]


def test_keys_of_several_lengths_are_carried(store, other, tmp_path):
    keys = [b"a", b"bb", b"c", b"ddd", b"eee"]
    store.table(b"digest", "", width=2).write(keys, rows(5, 2))
    store.export(tmp_path / "embeddings")
    assert other.absorb(tmp_path / "embeddings") == 5
    assert contents(other) == contents(store)


def test_embeddings_that_are_not_finite_are_not_exported(store, other, tmp_path):
    values = rows(4, 2)
    values[1, 0], values[2, 1] = np.nan, np.inf
    store.table(b"digest", "", width=2).write(KEYS[:4], values)
    assert store.export(tmp_path / "embeddings") == 2
    assert other.absorb(tmp_path / "embeddings") == 2
    assert {key for *_, key in contents(other)} == {KEYS[0], KEYS[3]}


def test_empty_store_is_carried_and_a_missing_one_is_an_error(store, other, tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no embeddings in it; embed images"):
        store.export(tmp_path / "embeddings")
    assert not (tmp_path / "embeddings").exists()
    store.table(b"digest", "", width=2).claim([])
    store.table(b"digest", "", width=2).write([], rows(0, 2))
    assert store.export(tmp_path / "embeddings") == 0
    assert other.absorb(tmp_path / "embeddings") == 0


def test_directory_is_no_file_to_export_to(exported, store, tmp_path):
    with pytest.raises(IsADirectoryError, match="but expected a file for embeddings; add a name"):
        store.export(tmp_path)


@pytest.mark.parametrize("name", ["embeddings.sqlite", "../store/embeddings.sqlite-wal"])
def test_store_is_not_exported_to_its_own_file(exported, store, name):
    before = contents(store)
    store.close()
    with pytest.raises(ValueError, match="a file of the store itself, but expected another file"):
        store.export(store.directory / name)
    assert contents(store) == before


def test_failed_export_leaves_the_older_file(store, exported, monkeypatch):
    before = exported.read_bytes()

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(archive, "_rows", fail)
    with pytest.raises(OSError, match="no space left"):
        store.export(exported)
    assert exported.read_bytes() == before
    assert {path.name for path in exported.parent.iterdir()} == {"embeddings", "store"}


def test_incomplete_file_is_refused(exported, other):
    whole = exported.read_bytes()
    for size in [*range(0, len(whole), 997), len(whole) - 1]:
        exported.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"^Got '{exported}', but it is (not a file|incompl)"):
            other.absorb(exported)
    exported.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="but it is incomplete or damaged; copy it or export it"):
        other.absorb(exported)
    assert not other.directory.exists()


def test_file_with_any_flipped_bit_is_refused(store, other, tmp_path):
    store.table(b"digest", "", width=2).write(KEYS[:3], rows(3, 2))
    path = tmp_path / "embeddings"
    store.export(path)
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(
            whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :]
        )
        with pytest.raises(ValueError, match=r"^Got '.*', but it"):
            other.absorb(path)
    assert not other.directory.exists()
    path.write_bytes(whole)
    assert other.absorb(path) == 3


def test_file_of_another_version_is_refused(exported, other):
    rewrite(exported, (b"sktransfer embeddings 1\n", b"sktransfer embeddings 12\n"))
    with pytest.raises(ValueError, match="version 12") as error:
        other.absorb(exported)
    assert str(error.value) == (
        f"Got '{exported}', but its format has version 12 and this version of sktransfer reads "
        "version 1; use the same version of sktransfer on both machines"
    )


def test_other_files_are_refused(store, exported, other, tmp_path):
    (tmp_path / "text").write_text("not embeddings\n" * 100)
    with pytest.raises(ValueError, match=r"but it is not a file that EmbeddingStore\.export"):
        other.absorb(tmp_path / "text")
    store.close()
    with pytest.raises(ValueError, match=r"it is the file of a store; pass the file that its exp"):
        other.absorb(store.directory / "embeddings.sqlite")
    for path, error in ((tmp_path / "none", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(error):
            other.absorb(path)
    assert not other.directory.exists()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b'"rows": 8', b'"rows": 9', "one of its blocks is not valid"),
        (b'"rows": 8', b'"rows": 8e99', r"fields \['rows'\] have other types"),
        (b'"rows": 8', b'"rows": 999999999', "rows of 30 values do not fit the file"),
        (b'"rows": 8', b'"rows": 0', "0 rows of 30 values do not fit the file"),
        (b'"width": 30', b'"width": 0', "Got width=0"),
        (b'"width": 30', b'"breadth": 30', r"not valid \('width'\)"),
        (b'"dtype": "<f4"', b'"dtype": "|O8"', r"a table has the dtype '\|O8'"),
        (b'"dtype": "<f4"', b'"dtype": "<i4"', "a table has the dtype '<i4'"),
        (b'"dtype": "<f4"', b'"dtype": "(1,2"', "a table has the dtype"),
        (b'"description": ""', b'"description": "\\ud800"', "or is not printable"),
        (b'"description": ""', b'"description": "\\u001b[31m"', "or is not printable"),
        (b'"description": ""', b'"description": "%s"' % (b"a" * 10_001), "is too long"),
        (
            b'"description": ""',
            b'"description": ' + b"[" * 100_000,
            "one of its blocks is not valid",
        ),
        (np.float32(7).tobytes(), np.float32(np.nan).tobytes(), "that are not finite; export it"),
        (np.float32(7).tobytes(), np.float32(np.inf).tobytes(), "that are not finite; export it"),
    ],
)
def test_wrong_block_at_the_end_leaves_the_store_unchanged(
    store, other, tmp_path, old, new, problem
):
    """The blocks before it are right, and so is the digest of the file."""
    store.table(b"first", "", width=30).write(KEYS[:200], rows(200, 30))
    values = rows(8, 30)
    values[7, 29] = 7
    store.table(b"second", "", width=30).write(KEYS[:8], values)
    path = tmp_path / "embeddings"
    store.export(path)
    content = path.read_bytes()
    start = content.index(json.dumps({"digest": b"second".hex()})[:-1].encode())
    last = content[start:-32]
    assert old in last
    rewrite(path, (last, last.replace(old, new, 1)))
    with pytest.raises(ValueError, match=problem):
        other.absorb(path)
    assert other.info().tables == ()


def test_embeddings_of_another_shape_leave_the_store_unchanged(exported, other):
    """The table that does not fit comes last."""
    assert exported.read_bytes().rindex(b"float16") > exported.read_bytes().rindex(b"a wide table")
    other.table(b"half", "a table of float16", 4, np.float16).write(KEYS[:1], rows(1, 4))
    with pytest.raises(ValueError, match="but its digest is stored with width=4 and dtype='<f2'"):
        other.absorb(exported)
    assert [table.images for table in other.info().tables] == [1]


def test_table_of_several_shapes_in_one_file_is_refused(exported, other):
    rewrite(exported, (b"half".hex().encode(), b"wide".hex().encode()))
    with pytest.raises(ValueError, match="a table of it has rows of several shapes"):
        other.absorb(exported)
    assert other.info().tables == ()


def test_absorbing_continues_after_an_error_of_the_disk(store, exported, other, monkeypatch):
    honest, calls = EmbeddingTable.absorb, []

    def fail(table, keys, values):
        calls.append(len(keys))
        if len(calls) == 10:
            raise OSError("no space left")
        return honest(table, keys, values)

    monkeypatch.setattr(EmbeddingTable, "absorb", fail)
    with pytest.raises(OSError, match="no space left"):
        other.absorb(exported)
    done = sum(calls[:9])
    assert len(contents(other)) == sum(table.images for table in other.info().tables) == done
    assert other.absorb(exported) == 350 - done
    assert contents(other) == contents(store)


def test_absorbing_respects_the_limit(exported, tmp_path):
    with closing(EmbeddingStore(tmp_path / "small", max_bytes=12_000)) as small:
        small.table(b"old", "the least recently used", width=30).write(KEYS[:60], rows(60, 30))
        with pytest.warns(UserWarning, match="keeps only a part; raise max_bytes") as warned:
            small.absorb(exported)
        assert str(exported) in str(warned[0].message)
        info = {table.description: table for table in small.info().tables}
        assert info["the least recently used"].images == 0
        assert info["a table of float16"].images == 50
        assert 60 < info["a wide table"].images <= 100
        assert sum(table.bytes for table in info.values()) <= 12_000
        assert len(contents(small)) == sum(table.images for table in info.values())


def test_stores_are_used_while_they_are_exported_and_absorbed(store, exported, other):
    """Other threads, with handles of their own, write the same keys and read them."""
    finished, problems = threading.Event(), []
    values, done = rows(300, 30), threading.Semaphore(0)

    def use(directory):
        with closing(EmbeddingStore(directory)) as handle:
            table = handle.table(b"wide", "a wide table", width=30)
            number = 0
            while not finished.is_set() or number < 20:
                key = KEYS[number % 300]
                table.write([key], values[[number % 300]])
                read = np.empty((1, 30), np.float32)
                if not table.read([key], read)[0] or (read != values[number % 300]).any():
                    problems.append(key)
                number += 1
                if number == 5:
                    done.release()

    threads = [threading.Thread(target=use, args=(each.directory,)) for each in (store, other)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert done.acquire(timeout=60)
    for number in range(5):
        path = Path(f"{exported}{number}")
        assert store.export(path) == 350
        other.absorb(path)
    finished.set()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert contents(other) == contents(store)


def test_memory_does_not_grow_with_the_file(store, other, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_BYTES_PER_BLOCK", 200_000)
    table = store.table(b"digest", "", width=1000)
    for part in range(20):
        table.write([b"%d-%012d" % (part, row) for row in range(250)], rows(250, 1000, part))
    tracemalloc.start()
    assert store.export(tmp_path / "embeddings") == other.absorb(tmp_path / "embeddings") == 5000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "embeddings").stat().st_size > 20_000_000
    assert peak < 2_000_000
