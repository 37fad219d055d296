"""A store in a directory on a network file system is kept on a local disk, with one warning."""

import os
import pickle
import tempfile
import warnings
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from sktransfer import PretrainedFeatureExtractor
from sktransfer.store import location
from sktransfer.store.location import network_type
from sktransfer.store.store import EmbeddingStore

ROOT = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw"


def mounts(*points):
    """Build a mount table from pairs of a mount point and a type, as in /proc/self/mountinfo."""
    lines = [
        f"{number} 22 0:{number} / {point} rw,relatime shared:{number} master:2 - {kind} src rw"
        for number, (point, kind) in enumerate(points, 60)
    ]
    return "\n".join([ROOT, *lines, ""])


@pytest.mark.parametrize(
    "kind",
    [
        *("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "9p"),
        *("fuse.sshfs", "fuse.rclone", "fuse.s3fs", "fuse.gcsfuse"),
    ],
)
def test_network_file_system_is_found_at_and_below_its_mount_point(kind):
    table = mounts(("/net", kind))
    assert network_type(Path("/net"), table) == kind
    assert network_type(Path("/net/a/b"), table) == kind
    assert network_type(Path("/network"), table) is None
    assert network_type(Path("/"), table) is None


@pytest.mark.parametrize(
    "kind", ["ext4", "xfs", "btrfs", "tmpfs", "overlay", "fuseblk", "fuse.mergerfs", "sshfs", ""]
)
def test_other_file_systems_are_local(kind):
    assert network_type(Path("/net/a"), mounts(("/net", kind))) is None


def test_longest_mount_point_and_then_the_last_mount_wins():
    table = mounts(("/net/disk", "xfs"), ("/net", "nfs4"), ("/net/disk/more", "cifs"))
    assert network_type(Path("/net/x"), table) == "nfs4"
    assert network_type(Path("/net/disk/x"), table) is None
    assert network_type(Path("/net/disk/more/x"), table) == "cifs"
    assert network_type(Path("/net/x"), mounts(("/net", "nfs4"), ("/net", "ext4"))) is None
    assert network_type(Path("/net/x"), mounts(("/net", "ext4"), ("/net", "nfs4"))) == "nfs4"
    assert network_type(Path("/x"), mounts(("/", "nfs"))) == "nfs"


def test_name_of_a_fuse_file_system_may_be_its_source():
    table = f"{ROOT}\n60 22 0:60 / /bucket rw shared:9 - fuse mountpoint-s3 rw,user_id=0"
    assert network_type(Path("/bucket/a"), table) == "fuse.mountpoint-s3"
    local = f"{ROOT}\n60 22 0:60 / /pool rw - fuse /dev/sda1 rw"
    assert network_type(Path("/pool/a"), local) is None


def test_escaped_characters_of_a_mount_point_are_decoded():
    table = mounts((r"/my\040data\134new\011tab\012line/größe", "nfs4"))
    assert network_type(Path("/my data\\new\ttab\nline/größe/x"), table) == "nfs4"
    assert network_type(Path(r"/my\040data"), table) is None


@pytest.mark.parametrize(
    "table",
    [
        "",
        "\n\n",
        "no table at all",
        "- nfs4 server rw",
        "1 2 3 - nfs4",
        f"{ROOT}\n60 22 0:60 / /net rw",
        f"{ROOT}\n60 22 0:60 / /net rw - ",
        f"{ROOT}\n60 22 0:60 / /net rw shared:1 nfs4",
        "\0" * 99,
    ],
)
def test_odd_table_is_no_network(table):
    assert network_type(Path("/net/x"), table) is None


def test_line_after_an_odd_one_is_read():
    table = f"odd\n{mounts(('/net', 'nfs4'))}\n1 2 3"
    assert network_type(Path("/net/x"), table) == "nfs4"


def test_table_without_optional_fields_is_read():
    assert network_type(Path("/net"), "60 22 0:60 / /net rw - nfs4 server:/ rw") == "nfs4"


def test_table_that_cannot_be_read_is_empty(tmp_path, monkeypatch):
    for path in (tmp_path / "none", tmp_path):
        monkeypatch.setattr(location, "_MOUNT_TABLE", path)
        assert location.read_mount_table() == ""
    with closing(EmbeddingStore(tmp_path / "store")) as store:
        assert store.path == tmp_path / "store" / "embeddings.sqlite"
    (tmp_path / "bytes").write_bytes(b"\xff\xfe / \n")
    monkeypatch.setattr(location, "_MOUNT_TABLE", tmp_path / "bytes")
    assert network_type(Path("/net"), location.read_mount_table()) is None


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="needs Linux")
def test_table_of_this_system_is_read():
    points = [point for point, _ in location._mounts(location.read_mount_table())]
    assert "/" in points
    assert "/proc" in points


# Stores


@pytest.fixture
def mount(tmp_path, monkeypatch):
    """Return a function that mounts file systems below a temporary folder: name=type."""
    monkeypatch.setattr(location, "_warned", set())
    monkeypatch.setattr(location, "_MOUNT_TABLE", tmp_path / "mountinfo")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("SKTRANSFER_NETWORK_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("net", "home", "tmp"):
        (tmp_path / name).mkdir()

    def mount(**kinds):
        table = mounts(*((tmp_path / name, kind) for name, kind in kinds.items()))
        (tmp_path / "mountinfo").write_text(table)

    return mount


def write(store, value=1.0):
    table = store.table(b"digest", "a table", width=2)
    table.write([b"key"], np.full((1, 2), value))
    read = np.zeros((1, 2), np.float32)
    table.read([b"key"], read)
    return read[0, 0]


def test_store_on_a_network_is_kept_on_a_local_disk_with_one_warning(mount, tmp_path):
    mount(net="nfs4")
    directory = tmp_path / "net" / "embeddings"
    with closing(EmbeddingStore(directory)) as store:
        with pytest.warns(UserWarning, match="network file system") as warned:
            assert write(store) == 1
        local = store.path.parent
        assert local.parent == tmp_path / "home" / ".cache" / "sktransfer" / "stores"
        assert [str(each.message) for each in warned] == [
            f"Got the directory '{directory}' for embeddings, but it is on a network file system "
            f"(nfs4), where SQLite is not safe. This machine keeps them in '{local}' instead. Pass "
            "a directory on a local disk, and carry embeddings to other machines with "
            "EmbeddingStore.export() and absorb(); or set SKTRANSFER_NETWORK_CACHE=1 if never more "
            "than one machine uses the directory."
        ]
        assert store.directory == directory
        assert store.info().directory == local
    assert list((tmp_path / "net").iterdir()) == []
    # A second warning would be an error.
    for again in (EmbeddingStore(directory), pickle.loads(pickle.dumps(store))):
        with closing(again):
            assert again.path.parent == local
            assert again.directory == directory
            assert again.info().computed == 1


def test_stores_of_different_directories_stay_apart(mount, tmp_path):
    mount(net="cifs")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        stores = [EmbeddingStore(tmp_path / "net" / name) for name in ("a/x", "b/x", "b", "a/x")]
        assert [write(store, number) for number, store in enumerate(stores)] == [0, 1, 2, 0]
    assert len(warned) == 3
    assert len({store.path for store in stores}) == 3
    for store in stores:
        store.close()


def test_extractor_uses_the_local_store(mount, tmp_path):
    mount(net="fuse.sshfs")
    X = np.random.RandomState(0).randint(0, 256, (3, 20, 20, 3)).astype(np.uint8)
    extractor = PretrainedFeatureExtractor(image_size=32, cache=tmp_path / "net")
    with pytest.warns(UserWarning, match=r"network file system \(fuse\.sshfs\)"):
        first = extractor.fit_transform(X)
    np.testing.assert_array_equal(extractor.fit_transform(X), first)
    store = EmbeddingStore(tmp_path / "net")
    assert (store.info().computed, store.info().read) == (3, 3)
    store.close()
    assert list((tmp_path / "net").iterdir()) == []


@pytest.mark.parametrize("problem", ["network", "read-only", "no home"])
def test_temporary_folder_replaces_a_home_that_cannot_be_used(
    mount, tmp_path, monkeypatch, problem
):
    mount(net="nfs", **({"home": "nfs"} if problem == "network" else {}))
    if problem == "read-only":  # for root, too
        home, access = tmp_path / "home", os.access
        monkeypatch.setattr(os, "access", lambda path, mode: path != home and access(path, mode))
    if problem == "no home":
        monkeypatch.setattr(
            Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home"))
        )
        local = location._local_directory(tmp_path / "net")
    else:
        with closing(EmbeddingStore(tmp_path / "net")) as store:
            with pytest.warns(UserWarning, match="network file system"):
                write(store)
            local = store.path.parent
    assert local.parent == tmp_path / "tmp" / f"sktransfer-{os.getuid()}" / "stores"
    assert local.parent.parent.stat().st_mode & 0o777 == 0o700


def test_cache_folder_of_the_user_is_used(mount, tmp_path, monkeypatch):
    mount(net="nfs", home="nfs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "scratch"))
    with closing(EmbeddingStore(tmp_path / "net")) as store:
        with pytest.warns(UserWarning, match="scratch"):
            write(store)
        assert store.path.is_relative_to(tmp_path / "scratch" / "sktransfer" / "stores")


def test_setting_keeps_the_store_on_the_network_without_a_shared_log(mount, tmp_path, monkeypatch):
    directory = tmp_path / "net"
    mount()
    with closing(EmbeddingStore(directory)) as store:  # with a write-ahead log
        write(store, 3.0)
    mount(net="nfs4")
    monkeypatch.setenv("SKTRANSFER_NETWORK_CACHE", "1")
    for place in (directory, directory / "new"):
        with closing(EmbeddingStore(place)) as store:
            assert store.path == place / "embeddings.sqlite"
            assert write(store, 4.0) == (3 if place == directory else 4)
            assert {path.name for path in place.iterdir()} <= {"embeddings.sqlite", "new"}
            table = pickle.loads(pickle.dumps(store.table(b"digest", "a table", width=2)))
            assert table.read([b"key"], np.zeros((1, 2), np.float32)).all()
            table.database.close()


def test_temporary_store_stays_where_it_is(mount, tmp_path):
    mount(tmp="nfs4")
    with closing(EmbeddingStore(tmp_path / "tmp" / "session", temporary=True)) as store:
        assert store.path.parent == tmp_path / "tmp" / "session"
        write(store)
        assert [path.name for path in store.path.parent.iterdir()] == ["embeddings.sqlite"]
