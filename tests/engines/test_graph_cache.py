"""Graphs are moved to their folder whole, and the least recently used ones are removed."""

import os

import pytest

from sktransfer.engines import graph_cache
from sktransfer.engines.graph_cache import graph_folder, keep, new_folder


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """Use an empty hub folder in each test."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "sktransfer"


def write_graph(*key, size=100):
    """Write a graph of some bytes, and return its folder."""
    folder = graph_folder(*key)
    with new_folder(folder.parent) as new:
        (new / "graph.bin").write_bytes(b"x" * size)
        keep(new, folder)
    return folder


def test_graph_folder_depends_on_every_part_of_the_key(hub):
    folders = [graph_folder(*key) for key in (("a", 1), ("a", 2), ("b", 1), ("a", "1"), ("a",))]
    assert len(set(folders)) == 5
    assert {folder.parent for folder in folders} == {hub}
    assert graph_folder("a", 1) == folders[0]
    assert not hub.exists()


def test_keep_moves_the_graph_to_its_folder(hub):
    folder = write_graph("key")
    assert [path.name for path in hub.iterdir()] == [folder.name]
    assert (folder / "graph.bin").read_bytes() == b"x" * 100


def test_keep_replaces_an_unreadable_graph():
    folder = write_graph("key", size=7)
    (folder / "more.bin").write_bytes(b"damaged")
    assert write_graph("key") == folder
    assert [(path.name, path.stat().st_size) for path in folder.iterdir()] == [("graph.bin", 100)]


def test_new_folder_is_removed_if_the_graph_is_not_kept(hub):
    def fail():
        with new_folder(hub) as new:
            (new / "graph.bin").write_bytes(b"half")
            assert new.parent == hub
            raise RuntimeError("cannot be exported")

    with pytest.raises(RuntimeError, match="cannot be exported"):
        fail()
    assert list(hub.iterdir()) == []


def test_new_folder_is_temporary_if_the_hub_folder_is_not_writable(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hub.parent.parent.write_text("a file in place of the folder")
    folder = graph_folder("key")
    with new_folder(folder.parent) as new:
        assert new.parent == tmp_path
        keep(new, folder)
        assert new.is_dir(), "a graph in the temporary folder was moved"
    assert not new.exists()
    assert not folder.exists()


def test_keep_leaves_a_graph_in_the_temporary_folder(tmp_path):
    folder, temporary = write_graph("key"), tmp_path / "temporary"
    temporary.mkdir()
    keep(temporary, folder)
    assert temporary.is_dir()
    assert (folder / "graph.bin").is_file()


def test_keep_removes_the_least_recently_used_graphs(monkeypatch):
    monkeypatch.setattr(graph_cache, "_MAX_BYTES", 250)
    first, second = write_graph("first"), write_graph("second")
    for folder, time in ((first, 2000), (second, 1000)):
        os.utime(folder, (time, time))
    third = write_graph("third")
    assert [folder.exists() for folder in (first, second, third)] == [True, False, True]
