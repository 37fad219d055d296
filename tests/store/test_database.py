"""The database file survives threads, processes, forks, corruption and deletion."""

import shutil
import sqlite3
from contextlib import closing

import pytest
from helpers import finish_python, start_python

from sktransfer.store import database
from sktransfer.store.database import Database


@pytest.fixture
def file(tmp_path):
    with closing(Database(tmp_path / "folder" / "file", temporary=False)) as file:
        yield file


def note(file, digest):
    file.transact(lambda c: c.execute("INSERT INTO tables (digest) VALUES (?)", (digest,)))


def noted(file):
    query = "SELECT digest FROM tables ORDER BY id"
    return [row[0] for row in file.transact(lambda c: c.execute(query).fetchall(), write=False)]


def test_file_is_created_by_the_first_transaction(file):
    assert not file.path.parent.exists()
    assert noted(file) == []
    assert file.path.exists()


@pytest.mark.parametrize("temporary", [False, True])
def test_database_has_its_pragmas(tmp_path, temporary):
    with closing(Database(tmp_path / "folder" / "file", temporary)) as file:

        def setting(name):
            return file.transact(lambda c: c.execute(f"PRAGMA {name}").fetchone()[0], write=False)

        assert setting("journal_mode") == "wal"
        assert setting("auto_vacuum") == 2  # incremental
        assert setting("page_size") == 32768
        assert setting("synchronous") == (0 if temporary else 1)  # off, normal
        if temporary:
            assert file.path.parent.stat().st_mode & 0o777 == 0o700


def test_failed_transaction_is_rolled_back(file):
    def half(connection):
        connection.execute("INSERT INTO tables (digest) VALUES (?)", (b"half",))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file.transact(half)
    note(file, b"whole")
    assert noted(file) == [b"whole"]


def test_closed_database_opens_again(file):
    note(file, b"before")
    file.close()
    file.close()
    note(file, b"after")
    assert noted(file) == [b"before", b"after"]


def test_database_works_on_a_file_system_without_shared_memory(file, monkeypatch):
    """The pragma returns the old mode or fails. Either way the database works."""
    monkeypatch.setattr(database, "_prefer_wal", lambda connection: None)
    note(file, b"a")
    mode = file.transact(lambda c: c.execute("PRAGMA journal_mode").fetchone(), write=False)
    assert mode == ("delete",)
    monkeypatch.undo()

    database._prefer_wal(Answering("locking protocol"))


def test_switch_to_wal_is_retried_while_the_database_is_locked(monkeypatch):
    """SQLite returns BUSY at once if two processes switch to WAL together. The second retries."""
    pauses = []
    monkeypatch.setattr(database.time, "sleep", pauses.append)
    connection = Answering("database is locked", "database is locked", "wal")
    database._prefer_wal(connection)
    assert connection.answers == []
    assert len(pauses) == 2


CODES = {
    "database is locked": sqlite3.SQLITE_BUSY,
    "locking protocol": sqlite3.SQLITE_PROTOCOL,
}


class Answering:
    """A connection with predefined answers."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def execute(self, statement):
        answer = self.answers.pop(0)
        if answer in CODES:
            error = sqlite3.OperationalError(answer)
            error.sqlite_errorcode = CODES[answer]
            raise error
        return self

    def fetchall(self):
        return []


@pytest.mark.parametrize("start", [0, 32768], ids=["header", "tables"])
def test_corrupt_file_is_moved_aside(file, start):
    note(file, b"lost")
    file.close()
    with open(file.path, "r+b") as raw:
        size = raw.seek(0, 2)
        raw.seek(start)
        raw.write(b"\xff" * (size - start))
    with pytest.warns(UserWarning, match="is corrupt .* moved to .*file.corrupt-.* may be deleted"):
        note(file, b"new")
    assert noted(file) == [b"new"]
    (aside,) = file.path.parent.glob("file.corrupt-*")
    assert aside.stat().st_size == size


def test_file_replaced_by_another_process_is_not_moved_aside(file):
    note(file, b"old")
    with closing(Database(file.path, temporary=False)) as replacement:
        shutil.rmtree(file.path.parent)
        note(replacement, b"new")
        with pytest.warns(UserWarning, match="is corrupt"):
            file._move_aside(sqlite3.DatabaseError("malformed"))
        assert noted(file) == noted(replacement) == [b"new"]


def test_deleted_directory_is_created_again(file):
    note(file, b"before")
    shutil.rmtree(file.path.parent)
    note(file, b"after")
    assert noted(file) == [b"after"]


@pytest.mark.parametrize("statement", ["PRAGMA user_version = 99", "CREATE TABLE theirs (x)"])
def test_file_of_another_version_is_rejected(file, statement):
    file.path.parent.mkdir()
    with closing(sqlite3.connect(file.path)) as connection:
        connection.execute(statement)
        connection.commit()
    version = 99 if "99" in statement else 0
    with pytest.raises(ValueError, match="Got version") as error:
        noted(file)
    assert str(error.value) == (
        f"Got version {version} of the embedding store {file.path}, but expected version 3; "
        "delete that file, or pass another directory as cache."
    )


def test_fork_during_a_write_works_in_child_and_parent(tmp_path):
    """No child inherits a held lock, and no child disturbs its parent."""
    script = """
import os, sys, threading
from pathlib import Path
from sktransfer.store.database import Database

file = Database(Path(sys.argv[1]), temporary=False)

def note(digest):
    file.transact(lambda c: c.execute("INSERT INTO tables (digest) VALUES (?)", (digest,)))

def write():
    while not stop.is_set():
        note(os.urandom(8))
        written.append(1)

stop, written = threading.Event(), []
thread = threading.Thread(target=write)
thread.start()
for child in range(20):
    pid = os.fork()
    if pid == 0:
        assert file._connection is None
        note(b"child %d" % child)
        thread = threading.Thread(target=note, args=(b"its thread %d" % child,))
        thread.start()
        thread.join()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
thread.join()
count = "SELECT COUNT(*) FROM tables"
assert file.transact(lambda c: c.execute(count).fetchone()) == (40 + len(written),)
assert file.transact(lambda c: c.execute("PRAGMA integrity_check").fetchone()) == ("ok",)
"""
    finish_python(start_python(script, tmp_path / "file"))
