"""A table stores rows, grants claims, and removes old rows beyond the limit."""

import copy
import pickle
from contextlib import closing

import numpy as np
import pytest
from helpers import finish_python, start_python

from sktransfer.store import embedding_table
from sktransfer.store.store import EmbeddingStore, EmbeddingTable

A, B, C, D, E = (letter.encode() * 16 for letter in "ABCDE")


def rows(*values):
    return np.array([[value, -value] for value in values], np.float32)


def stored(table, keys):
    out = np.zeros((len(keys), table.width), table.dtype)
    return [key for key, is_stored in zip(keys, table.read(keys, out), strict=True) if is_stored]


def test_read_returns_the_written_rows(table):
    table.write([A, B], rows(1, 2))
    out = np.full((4, 2), 7, np.float32)
    is_stored = table.read([B, C, A, B], out)
    assert is_stored.tolist() == [True, False, True, True]
    assert out.tolist() == [[2, -2], [7, 7], [1, -1], [2, -2]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_are_stored_to_the_bit(store, dtype):
    table = store.table(b"digest", "", 5, dtype)
    values = np.random.RandomState(0).randn(1, 5).astype(dtype)
    values[0, :2] = np.nan, -0.0
    out = np.empty_like(values)
    table.write([A], values)
    assert table.read([A], out).all()
    assert out.tobytes() == values.tobytes()


def test_read_handles_many_keys_in_any_order(table, monkeypatch):
    """The keys need several queries and reads, and some are missing."""
    monkeypatch.setattr(embedding_table, "_BYTES_PER_READ", 700 * table.row_bytes)
    keys = [b"%016d" % number for number in range(2000)]
    table.write(keys[:1500], rows(*range(1500)))
    order = np.random.RandomState(0).permutation(2000)
    out = np.full((2000, 2), -1, np.float32)
    is_stored = table.read([keys[number] for number in order], out)
    assert (is_stored == (order < 1500)).all()
    assert (out[is_stored, 0] == order[is_stored]).all()
    assert (out[~is_stored] == -1).all()


def test_table_methods_accept_empty_lists(table):
    assert table.read([], np.empty((0, 2), np.float32)).tolist() == []
    assert table.claim([]) == []
    table.write([], rows().reshape(0, 2))
    table.release([])


def test_row_reused_during_a_read_is_not_returned(store, table, monkeypatch):
    table.write([A, B], rows(1, 2))
    look_up = EmbeddingTable._look_up

    def disturbed(self, query, items):
        answer = look_up(self, query, items)
        if query.startswith("SELECT id"):
            store.clear()
            self.write([C, B], rows(3, 2))
        return answer

    monkeypatch.setattr(EmbeddingTable, "_look_up", disturbed)
    out = np.zeros((2, 2), np.float32)
    assert table.read([A, B], out).tolist() == [False, True]
    assert out.tolist() == [[0, 0], [2, -2]]


def test_write_keeps_rows_that_are_already_stored(store, table):
    """A writer that lost its claim may write late."""
    table.write([A], rows(1))
    table.write([A, B], rows(3, 2))
    out = np.empty((2, 2), np.float32)
    assert table.read([A, B], out).all()
    assert out.tolist() == [[1, -1], [2, -2]]
    assert store.info().tables[0].images == 2
    assert store.info().computed == 3


def test_tables_of_different_digests_are_independent(store, table):
    other = store.table(b"another digest", "a table", width=3)
    table.write([A], rows(1))
    assert stored(other, [A]) == []
    other.write([A], np.ones((1, 3)))
    assert other.claim([A]) == table.claim([A]) == []


def test_digest_with_another_width_or_dtype_is_rejected(store, table):
    table.write([A], rows(1))
    wider = store.table(b"digest", "wider", width=3)
    for use in (
        lambda: wider.read([A], np.empty((1, 3), np.float32)),
        lambda: wider.claim([A]),
        lambda: wider.write([A], np.ones((1, 3))),
    ):
        with pytest.raises(ValueError, match="Got width=3") as error:
            use()
    assert str(error.value) == (
        "Got width=3 and dtype='<f4' for the table 'wider', but its digest is stored with width=2 "
        "and dtype='<f4'; the digest must cover everything that determines an embedding."
    )
    with pytest.raises(ValueError, match="dtype='<f8' for the table"):
        store.table(b"digest", "", 2, np.float64).claim([A])


@pytest.mark.parametrize(("width", "dtype"), [(0, "float32"), (2, "int64")])
def test_invalid_width_or_dtype_is_rejected(store, width, dtype):
    with pytest.raises(ValueError, match="Got width=") as error:
        store.table(b"digest", "", width, dtype)
    assert str(error.value) == (
        f"Got width={width} and dtype='{dtype}', but expected at least one value of a floating "
        "dtype."
    )


@pytest.mark.parametrize("shape", [(2,), (1, 2), (2, 3), (2, 1)])
def test_write_rejects_embeddings_of_another_shape(table, shape):
    with pytest.raises(ValueError, match="Got embeddings of shape") as error:
        table.write([A, B], np.ones(shape))
    assert str(error.value) == (
        f"Got embeddings of shape {shape}, but expected (2, 2): one row for each image, one "
        "column for each value."
    )


def test_claims_exclude_each_other(store, table):
    with closing(EmbeddingStore(store.directory)) as elsewhere:
        other = elsewhere.table(b"digest", "a table", width=2)
        assert table.claim([A, B, A]) == [A, B]
        assert other.claim([B, C]) == [C]
        assert table.claim([A, B, C]) == [A, B]  # claims of the same table are kept
        table.write([A], rows(1))
        assert other.claim([A, B]) == []
        table.release([B])
        assert other.claim([A, B]) == [B]
        table.release([B])  # the claim belongs to the other table
        assert table.claim([B]) == []
        other.release()
        assert table.claim([A, B, C]) == [B, C]


def test_every_table_object_claims_for_itself(store, table):
    table.claim([A])
    for other in (
        copy.copy(table),
        pickle.loads(pickle.dumps(table)),
        store.table(b"digest", "a table", width=2),
    ):
        assert other.claim([A]) == []


def test_lease_expires_unless_it_is_renewed(table, monkeypatch):
    other = copy.copy(table)
    monkeypatch.setattr(embedding_table, "LEASE_SECONDS", -1)
    table.claim([A])
    assert other.claim([A]) == [A]
    table.claim([A])
    monkeypatch.undo()
    table.renew()
    assert other.claim([A]) == []
    monkeypatch.setattr(embedding_table, "LEASE_SECONDS", -1)
    table.renew()
    monkeypatch.undo()
    table.write([B], rows(1))  # renews the lease too
    assert other.claim([A]) == []


def test_claims_of_a_dead_process_expire_at_once(store, table):
    script = """
import os, sys
from sktransfer.store.store import EmbeddingStore, EmbeddingTable
table = EmbeddingStore(sys.argv[1]).table(b"digest", "a table", width=2)
print(len(table.claim([b"A" * 16, b"B" * 16])), flush=True)
sys.stdin.readline()
os._exit(0)
"""
    process = start_python(script, store.directory)
    assert process.stdout.readline() == "2\n"
    assert table.claim([A, B, C]) == [C]
    finish_python(process)
    assert table.claim([A, B, C]) == [A, B, C]
    owners = table.database.transact(lambda c: c.execute("SELECT COUNT(*) FROM owners").fetchone())
    assert owners == (1,)


def test_process_number_is_ignored_for_another_machine(table, monkeypatch):
    other = copy.copy(table)
    monkeypatch.setattr(embedding_table, "is_running", lambda pid: False)
    monkeypatch.setattr(embedding_table, "this_host", lambda: "elsewhere")
    table.claim([A])
    monkeypatch.setattr(embedding_table, "this_host", lambda: "here")
    assert other.claim([A]) == []
    monkeypatch.setattr(embedding_table, "this_host", lambda: "elsewhere")
    assert other.claim([A]) == [A]


def test_clear_during_other_work_does_no_harm(store, table):
    """Claims and table numbers from before `clear` do no harm."""
    table.claim([A])
    store.clear()
    other = store.table(b"other", "", width=2)
    assert other.claim([A]) == [A]
    table.write([A], rows(1))
    table.release()
    other.write([A], rows(2))
    assert [(info.description, info.images) for info in store.info().tables] == [
        ("", 1),
        ("a table", 1),
    ]


@pytest.fixture
def bounded(tmp_path):
    """Return a store limited to ten rows of two float32."""
    with closing(EmbeddingStore(tmp_path, max_bytes=80)) as store:
        yield store


def keys(letter, count):
    return [f"{letter}{number:015d}".encode() for number in range(count)]


def test_oldest_rows_are_removed_beyond_the_limit(bounded):
    table = bounded.table(b"digest", "", width=2)
    for number, key in enumerate(keys("x", 11)):
        table.write([key], rows(number))
    assert stored(table, keys("x", 11)) == keys("x", 11)[2:]  # a tenth of the limit is free
    table.write(keys("y", 4), rows(1, 2, 3, 4))
    assert stored(table, keys("x", 11) + keys("y", 4)) == keys("x", 11)[6:] + keys("y", 4)
    (info,) = bounded.info().tables
    assert (info.images, info.bytes) == (9, 72)


def test_rows_of_the_least_recently_used_table_are_removed_first(bounded, monkeypatch):
    clock = iter(range(1000, 2000))
    monkeypatch.setattr(embedding_table.time, "time", lambda: next(clock))
    first, second, third = (bounded.table(name, "", width=2) for name in (b"1", b"2", b"3"))
    first.write(keys("a", 4), rows(*range(4)))
    second.write(keys("b", 4), rows(*range(4)))
    assert len(stored(first, keys("a", 4))) == 4  # the second is the least recently used
    third.write(keys("c", 4), rows(*range(4)))
    assert stored(second, keys("b", 4)) == keys("b", 4)[3:]
    assert stored(first, keys("a", 4)) == keys("a", 4)
    third.write(keys("d", 6), rows(*range(6)))
    # The table being written goes last.
    assert stored(first, keys("a", 4)) == []
    assert stored(second, keys("b", 4)) == []
    assert stored(third, keys("c", 4) + keys("d", 6)) == keys("c", 4)[1:] + keys("d", 6)


def test_batch_beyond_the_limit_keeps_its_last_rows(bounded):
    table = bounded.table(b"digest", "", width=2)
    table.write(keys("x", 30), rows(*range(30)))
    assert stored(table, keys("x", 30)) == keys("x", 30)[21:]


def test_row_larger_than_the_limit_is_not_stored(bounded):
    table = bounded.table(b"digest", "", width=21)
    table.claim([A])
    with pytest.warns(UserWarning, match="One embedding takes 84 bytes, but .* 80 .*max_bytes"):
        table.write([A], np.ones((1, 21)))
    table.write([B], np.ones((1, 21)))  # warns only once
    assert stored(table, [A, B]) == []
    assert copy.copy(table).claim([A]) == [A]
    assert bounded.info().computed == 2


def test_file_shrinks_to_a_smaller_limit(tmp_path):
    with closing(EmbeddingStore(tmp_path)) as large:
        table = large.table(b"digest", "", width=1024)
        table.write(keys("x", 2000), np.ones((2000, 1024)))
        large.close()
        assert large.info().bytes > 8_000_000
    with closing(EmbeddingStore(tmp_path, max_bytes=2**20)) as small:
        small.table(b"digest", "", width=1024).write([A], np.ones((1, 1024)))
        small.close()
        assert small.info().bytes < 2 * 2**20
