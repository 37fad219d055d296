"""All workers find the session store, and it is removed with its owner."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import finish_python, start_python

from sktransfer.store import session
from sktransfer.store.embedding_table import this_host
from sktransfer.store.session import resolve_store, session_store, share_session
from sktransfer.store.store import EmbeddingStore, embed_once

VARIABLE = "SKTRANSFER_SESSION"


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Reset this process's session during a test, and return the directory of new ones."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(session, "_session", None)
    monkeypatch.setattr(session, "_stores", {})
    yield session.temporary_root()
    for store in [session._session, *session._stores.values()]:
        if store is not None:
            store.close()


def environment(tmp_path):
    return {**os.environ, "TMPDIR": str(tmp_path), VARIABLE: ""}


def embed(store):
    table = store.table(b"digest", "a table", width=1)
    return embed_once(
        table,
        [b"A", b"B"],
        lambda claims: ((rows, np.ones((2, 1))) for rows in claims),
        batch_size=8,
    )


def test_process_has_one_private_session(base):
    store = session_store()
    assert session_store() is store
    assert store.directory.parent == base
    assert os.environ[VARIABLE] == str(store.directory)
    for directory in (store.directory, base):
        assert directory.stat().st_mode & 0o777 == 0o700
    embed(store)
    assert store.info().computed == 2


@pytest.mark.parametrize(("free", "limit"), [(2**40, 2**32), (2**33, 2**31), (0, 2**20)])
def test_session_limit_follows_the_free_disk_space(base, monkeypatch, free, limit):
    monkeypatch.setattr(
        session.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free)
    )
    assert session_store().max_bytes == limit


def test_session_directory_is_read_from_the_environment(base, monkeypatch):
    directory = base / f"{this_host()}-1-abc"
    directory.mkdir()
    monkeypatch.setenv(VARIABLE, str(directory))
    assert session_store().directory == directory


@pytest.mark.parametrize("name", ["elsewhere-1-abc", f"{this_host()}-1-gone", ""])
def test_stale_directory_in_the_environment_is_ignored(base, monkeypatch, name):
    (base / "elsewhere-1-abc").mkdir()
    monkeypatch.setenv(VARIABLE, str(base / name))
    assert session_store().directory.name.startswith(f"{this_host()}-{os.getpid()}-")


def test_deleted_session_is_created_again(base):
    embed(session_store())
    shutil.rmtree(base)
    assert embed(session_store()).tolist() == [[1], [1]]
    shutil.rmtree(base)
    share_session()
    assert session_store().directory.is_dir()


def test_session_that_cannot_be_created_embeds_with_a_warning(tmp_path, base, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    share_session()
    with pytest.warns(UserWarning, match="failed"):
        assert embed(session_store()).tolist() == [[1], [1]]


def test_session_avoids_a_folder_of_another_user(tmp_path, base, monkeypatch):
    user = os.getuid() + 1
    monkeypatch.setattr(session.os, "getuid", lambda: user)
    (tmp_path / f"sktransfer-{user}").mkdir()
    assert session_store().directory.parent.name.startswith(f"sktransfer-{user}-")


def test_workers_share_the_session_and_it_is_removed_at_exit(tmp_path):
    """Workers started before and after the session find it, and it leaves no files."""
    script = """
import os
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from sktransfer.store.session import session_store, share_session

def session_of_worker():
    light()
    from sktransfer.store.session import session_store
    return str(session_store().directory), os.environ["SKTRANSFER_SESSION"]

def sessions_of_workers():
    return set(Parallel(2)(delayed(session_of_worker)() for _ in range(4)))

Parallel(2)(delayed(os.getpid)() for _ in range(4))
assert not os.environ["SKTRANSFER_SESSION"]
share_session()
directory = str(session_store().directory)
assert sessions_of_workers() == {(directory, directory)}
get_reusable_executor().shutdown()
assert sessions_of_workers() == {(directory, directory)}
assert os.listdir(os.path.dirname(directory)) == [os.path.basename(directory)]
print(directory)
"""
    directory = Path(finish_python(start_python(script, env=environment(tmp_path))).strip())
    assert directory.name.startswith(this_host())
    assert not directory.exists()
    assert not directory.parent.exists()


def test_fork_shares_the_session_and_removes_only_its_own(tmp_path):
    """A fork uses the session of its parent, and removes only a session that it created."""
    script = """
import multiprocessing, os, sys
from sktransfer.store.session import session_store

def make(queue):
    store = session_store()
    store.clear()
    queue.put((store.directory, store.directory.is_dir()))

context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()

def run():
    process = context.Process(target=make, args=(queue,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return queue.get()

of_child, existed = run()
assert existed and not of_child.exists()
directory = session_store().directory
assert run() == (directory, True)
assert directory.is_dir()
if os.fork() == 0:
    assert session_store().directory == directory
    sys.exit()
assert os.wait()[1] == 0
assert directory.is_dir()
"""
    finish_python(start_python(script, env=environment(tmp_path)))
    assert list(tmp_path.glob("sktransfer-*")) == []


def test_leftovers_of_killed_sessions_are_removed(tmp_path, base):
    script = """
import os, signal
from sktransfer.store.session import session_store
print(session_store().directory, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with start_python(script, env=environment(tmp_path)) as process:
        killed = Path(process.stdout.readline().strip())
    assert killed.is_dir()
    assert killed.parent == base
    living = [
        base / f"{this_host()}-{os.getppid()}-living",
        base / f"elsewhere-{killed.name.split('-')[1]}-unknown",
    ]
    reused = base / f"{this_host()}-{os.getpid()}-reused"
    for directory in [*living, reused]:
        directory.mkdir()
    new = session_store().directory
    assert sorted(base.iterdir()) == sorted([*living, new])


def test_old_sessions_are_removed_if_running_processes_are_unknown(base, monkeypatch):
    old, new = (base / f"{this_host()}-{os.getppid()}-{age}" for age in ("old", "new"))
    for directory in (old, new):
        directory.mkdir()
    os.utime(old, (0, 0))
    monkeypatch.setattr(session, "_RUNNING_IS_KNOWN", False)
    current = session_store().directory
    assert sorted(base.iterdir()) == sorted([new, current])


def test_resolve_store_accepts_every_kind_of_cache(base, tmp_path, monkeypatch):
    assert resolve_store(None) is None
    assert resolve_store("auto") is session_store()
    by_path = resolve_store(tmp_path / "kept")
    assert by_path.directory == tmp_path / "kept"
    assert not by_path.temporary
    monkeypatch.chdir(tmp_path)
    assert resolve_store("kept") is by_path
    assert resolve_store(Path("auto")).directory == tmp_path / "auto"
    explicit = EmbeddingStore(tmp_path / "kept")
    assert resolve_store(explicit) is explicit


@pytest.mark.parametrize("cache", [True, 3, b"bytes"])
def test_resolve_store_rejects_other_types(cache):
    with pytest.raises(TypeError) as error:
        resolve_store(cache)
    assert str(error.value) == (
        f"Got cache={cache!r}, but expected 'auto', a directory, an EmbeddingStore or None"
    )


def test_resolve_store_rejects_an_empty_string():
    with pytest.raises(ValueError, match="Got cache=''") as error:
        resolve_store("")
    assert str(error.value) == (
        "Got cache='', but expected 'auto', a directory, an EmbeddingStore or None; for the "
        "current one, pass '.'"
    )


@pytest.mark.parametrize("cache", ["none", "None", "NONE", "null", "false", "True", "off", "AUTO"])
def test_resolve_store_rejects_words_in_place_of_a_directory(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"cache={cache!r}, but expected 'auto'"):
        resolve_store(cache)
    assert list(tmp_path.iterdir()) == []
    assert resolve_store(f"./{cache}").directory == tmp_path / cache


def test_resolve_store_rejects_a_file():
    with pytest.raises(
        NotADirectoryError, match=r"^Got the file .*an EmbeddingStore or None; pass"
    ):
        resolve_store(__file__)
