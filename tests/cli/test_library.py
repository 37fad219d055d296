import json
import shutil

from cli_helpers import run

import sktransfer


def test_backbones_lists_matching_networks():
    printed = run("backbones", "lite").stdout
    assert "efficientnet_lite0       4.7 M    0.41      1280" in printed
    assert len(printed.splitlines()) == 4


def test_backbones_prints_json():
    printed = json.loads(run("backbones", "lite", "--json").stdout)
    assert printed == [row._asdict() for row in sktransfer.list_backbones("lite")]


def test_backbones_fails_without_a_match():
    result = run("backbones", "zzz", code=1)
    message = "no backbone has 'zzz' in its name; list all with: sktransfer backbones"
    assert (result.stdout, result.stderr) == ("", f"sktransfer: {message}\n")


def test_cache_is_shown_and_cleared(photos, tmp_path):
    cache = tmp_path / "cache"
    arguments = ["--image-size", "32", "--cache", cache, "--quiet"]
    run("embed", photos, "-o", tmp_path / "x.npy", *arguments)
    printed = json.loads(run("cache", "info", "--cache", cache, "--json").stdout)
    assert printed["directory"] == str(cache.resolve())
    assert printed["computed"] == 24
    assert [table["images"] for table in printed["tables"]] == [24]
    result = run("cache", "clear", "--cache", cache)
    assert (result.stdout, result.stderr) == ("", f"Removed 24 embeddings from {cache}\n")
    assert json.loads(run("cache", "info", "--cache", cache, "--json").stdout)["tables"] == []


def test_cache_is_carried_to_another_folder(photos, tmp_path):
    """Copies of the images elsewhere are not embedded again."""
    first, second, file = tmp_path / "first", tmp_path / "second", tmp_path / "a.embeddings"
    arguments = ["-o", tmp_path / "x.npy", "--image-size", "32", "--quiet"]
    run("embed", photos, *arguments, "--cache", first)
    result = run("cache", "export", file, "--cache", first)
    assert (result.stdout, result.stderr) == ("", f"Wrote 24 embeddings to {file}\n")
    result = run("cache", "absorb", file, "--cache", second)
    assert (result.stdout, result.stderr) == ("", f"Added 24 embeddings to {second}\n")
    copies = shutil.copytree(photos, tmp_path / "copies", copy_function=shutil.copyfile)
    run("embed", copies, *arguments, "--cache", second, "--overwrite")
    info = json.loads(run("cache", "info", "--cache", second, "--json").stdout)
    assert (info["computed"], info["read"]) == (0, 24)
    result = run("cache", "absorb", file, "--cache", second)
    assert result.stderr == f"Added 0 embeddings to {second}\n"
    file.write_bytes(file.read_bytes()[:-1])
    result = run("cache", "absorb", file, "--cache", tmp_path / "third", code=1)
    problem = "it is incomplete or damaged; copy it or export it again"
    assert result.stderr == f"sktransfer: Got '{file}', but {problem}\n"
    assert not (tmp_path / "third").exists()


def test_cache_needs_a_folder_of_embeddings(tmp_path, monkeypatch):
    monkeypatch.delenv("SKTRANSFER_CACHE", raising=False)
    file = tmp_path / "file"
    for command in (["info"], ["clear"], ["export", file]):
        assert "Missing option '--cache'" in run("cache", *command, code=2).stderr
        result = run("cache", *command, "--cache", tmp_path, code=1)
        assert result.stderr == f"sktransfer: there are no embeddings in '{tmp_path}'\n"
    assert list(tmp_path.iterdir()) == []
