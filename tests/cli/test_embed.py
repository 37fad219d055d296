import errno
import gzip
import io
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from cli_helpers import paths_below, run, save_broken, save_classes, tiny_extractor, write_csv
from helpers import BROKEN_ROWS, Tiny, encoded, images, paths_with_broken, save_images
from PIL import Image

from sktransfer import PretrainedFeatureExtractor
from sktransfer.cli.parts import EmbeddingParts
from sktransfer.data.image_lists import ParquetList
from sktransfer.embedding.output import ParquetFile

SMALL = ("--image-size", "32")


@pytest.fixture(scope="module")
def expected(photos):
    extractor = PretrainedFeatureExtractor(image_size=32)
    return extractor.fit_transform(paths_below(photos))


def test_array_has_a_row_for_each_image(photos, tmp_path, expected):
    result = run("embed", photos, "-o", tmp_path / "x.npy", *SMALL)
    embeddings = np.load(tmp_path / "x.npy")
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    assert result.stdout == ""
    assert "Embedding 24 images with efficientnet_lite0 ...\n" in result.stderr


def test_table_has_the_paths_and_embeddings(photos, tmp_path, expected):
    run("embed", photos / "cat", photos / "dog", "-o", tmp_path / "x.parquet", *SMALL)
    table = pd.read_parquet(tmp_path / "x.parquet")
    assert list(table) == ["path", "embedding", "error"]
    assert table["path"].tolist() == paths_below(photos)[:16]
    np.testing.assert_allclose(np.stack(table["embedding"]), expected[:16], atol=1e-5)
    assert table["error"].isna().all()


def test_embed_uses_the_requested_backbone(photos, tmp_path):
    run("embed", photos, "-o", tmp_path / "x.npy", "--backbone", "efficientnet_lite1", *SMALL)
    other = np.load(tmp_path / "x.npy")
    run("embed", photos, "-o", tmp_path / "x.npy", "--overwrite", *SMALL)
    assert not np.allclose(np.load(tmp_path / "x.npy"), other)
    result = run("embed", photos, "-o", tmp_path / "y.npy", "--backbone", "lite0", code=1)
    assert "sktransfer: Got backbone='lite0'" in result.stderr


def test_broken_images_fail_or_are_left_out(tmp_path):
    folder = save_classes(tmp_path / "photos", n=2)
    broken = save_broken(folder / "cat" / "broken.png")
    result = run("embed", folder, "-o", tmp_path / "x.npy", *SMALL, code=1)
    assert f"sktransfer: 1 image cannot be read (see --skip-broken): {broken}: " in result.stderr
    assert not (tmp_path / "x.npy").exists()
    result = run("embed", folder, "-o", tmp_path / "x.npy", *SMALL, "--skip-broken")
    assert np.isfinite(np.load(tmp_path / "x.npy")).all()
    assert len(np.load(tmp_path / "x.npy")) == 6
    assert f"1 image cannot be read, left out: {broken}: " in result.stderr
    arguments = [broken, "-o", tmp_path / "y.npy", *SMALL, "--skip-broken"]
    assert "no image can be read: " in run("embed", *arguments, code=1).stderr


def test_embeddings_are_kept_in_the_cache(photos, tmp_path, monkeypatch):
    run("embed", photos, "-o", tmp_path / "x.npy", *SMALL, "--cache", tmp_path / "cache")
    assert "computed 24, read 0" in run("cache", "info", "--cache", tmp_path / "cache").stdout
    monkeypatch.setenv("SKTRANSFER_CACHE", str(tmp_path / "cache"))
    run("embed", photos, "-o", tmp_path / "y.npy", *SMALL)
    assert "computed 24, read 24" in run("cache", "info").stdout


def test_output_must_be_named_and_have_a_known_suffix(photos, tmp_path):
    assert "Missing option '-o'" in run("embed", photos, code=2).stderr
    result = run("embed", photos, "-o", tmp_path / "x.csv", code=2)
    assert "expected a file that ends in .parquet or .npy" in result.stderr


# --- sources, with a small network ---------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """Embed with a small network, four images at a time; return the fitted extractor."""
    monkeypatch.setattr("sktransfer.cli.embed.make_extractor", tiny_extractor)
    monkeypatch.setattr("sktransfer.embedding.output.BLOCK_SIZE", 4)
    return PretrainedFeatureExtractor(Tiny, cache=None).fit(images(2))


def embedded(*arguments, **options):
    """Run the command; return the table that it has written."""
    run("embed", *arguments, **options)
    return pd.read_parquet(arguments[arguments.index("-o") + 1])


def check_rows(table, paths, embeddings):
    assert table["path"].tolist() == list(paths)
    np.testing.assert_array_equal(np.stack(table["embedding"]), embeddings)


def write_source(kind, paths, folder):
    """Write a list or table of paths that are relative to its folder."""
    source = folder / f"source.{kind}"
    names = [os.path.relpath(path, folder) for path in paths]
    if kind == "txt":
        source.write_text("\n".join([*names[:5], "", *names[5:]]) + "\r\n")
    elif kind == "csv":
        write_csv(source, "file,number", [(name, str(row)) for row, name in enumerate(names)])
    else:
        table = pd.DataFrame({"file": names, "number": range(len(names))})
        table.to_parquet(source, row_group_size=3)
    return source, names


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
def test_lists_and_tables_are_sources(kind, tiny, tmp_path, monkeypatch):
    (tmp_path / "tables").mkdir()
    paths = save_images(images(11), tmp_path / "photos")
    source, names = write_source(kind, paths, tmp_path / "tables")
    monkeypatch.chdir(tmp_path)  # paths are relative to the table
    options = [] if kind == "txt" else ["--path-column", "file", "--label-column", "number"]
    table = embedded(source, "-o", tmp_path / "x.parquet", *options)
    check_rows(table, names, tiny.transform(paths))
    if kind == "parquet":
        assert table["label"].tolist() == list(range(11))
    elif kind == "csv":
        assert table["label"].tolist() == [str(row) for row in range(11)]


def test_missing_file_of_a_list_is_named_with_its_full_path(tiny, tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    path = save_images(images(1), tmp_path / "lists")[0]
    names = [os.path.basename(path).encode(), b"gone.png", b"\xe9.png"]
    (tmp_path / "lists" / "a.txt").write_bytes(b"\n".join(names))
    monkeypatch.chdir(tmp_path)
    table = embedded(Path("lists/a.txt"), "-o", tmp_path / "x.parquet")
    folder = f"There is no such file. It was looked for at '{tmp_path}/lists"
    reasons = [f"{folder}/gone.png'.", f"{folder}/\\udce9.png'."]
    assert table["error"].dropna().tolist() == reasons


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_missing_columns_of_a_table_are_named(kind, tiny, tmp_path):
    source, _ = write_source(kind, ["a.png"], tmp_path)
    for columns in (("--path-column", "fill"), ("--path-column", "file", "--split-column", "fill")):
        result = run("embed", source, "-o", tmp_path / "x.parquet", *columns, code=1)
        assert f"Got the column 'fill', but the columns of '{source}' are 'file'" in result.stderr


def test_row_groups_of_a_table_are_read_one_at_a_time(tiny, tmp_path, monkeypatch):
    source, _ = write_source("parquet", save_images(images(11), tmp_path / "photos"), tmp_path)
    read = []
    read_row_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, **options: read.append(group) or read_row_group(self, group, **options),
    )
    monkeypatch.setattr(pq.ParquetFile, "read", None)
    images_of_table = ParquetList(source, "file", {})
    assert [len(images_of_table.read(start, start + 4).items) for start in (0, 4)] == [4, 4]
    assert read == [0, 1, 2]


def test_missing_paths_of_a_table_are_rows_with_a_reason(tiny, tmp_path):
    paths = save_images(images(5), tmp_path / "photos")
    names = [None, *paths[1:], str(tmp_path / "missing.png"), None, None, None, None]
    pd.DataFrame({"path": names}).to_parquet(tmp_path / "source.parquet")
    table = embedded(tmp_path / "source.parquet", "-o", tmp_path / "x.parquet")
    broken = table["error"].notna()
    assert broken.tolist() == [name not in paths for name in names]
    assert table["embedding"].isna().equals(broken)
    check_rows(table[~broken], paths[1:], tiny.transform(paths[1:]))
    assert table["error"][0].startswith("Got a missing value")
    assert table["error"][5].startswith("There is no such file.")


def test_pixel_range_is_learned_from_paths_that_are_not_missing(tiny, tmp_path):
    """All images that are spread evenly over the table are missing."""
    path = str(tmp_path / "a.png")
    Image.fromarray(np.full((32, 32), 60_000, np.uint16)).save(path)
    sampled = np.linspace(0, 199, 64).round().astype(int)
    names = [None if row in sampled else path for row in range(200)]
    source = tmp_path / "source.parquet"
    pd.DataFrame({"path": names}).to_parquet(source, row_group_size=30)
    table = embedded(source, "-o", tmp_path / "x.parquet")
    assert np.flatnonzero(table["error"].notna()).tolist() == sampled.tolist()
    expected = PretrainedFeatureExtractor(Tiny, cache=None).fit_transform([path])[0]
    rows = table["embedding"][table["error"].isna()]
    np.testing.assert_allclose(np.stack(rows), np.tile(expected, (136, 1)), rtol=1e-5)
    pd.DataFrame({"path": [None, None]}).to_parquet(source)
    result = run("embed", source, "-o", tmp_path / "y.parquet", code=1)
    assert "no image can be read:\n  missing path: " in result.stderr
    assert pd.read_parquet(tmp_path / "y.parquet")["error"].notna().tolist() == [True, True]


def test_urls_are_sources(tiny, tmp_path):
    pytest.importorskip("fsspec")
    import fsspec

    paths = save_images(images(5), tmp_path / "photos")
    urls = [f"memory://embed/{Path(path).name}" for path in paths]
    for path, url in zip(paths, urls, strict=True):
        fsspec.filesystem("memory").pipe(url, Path(path).read_bytes())
    check_rows(embedded(*urls, "-o", tmp_path / "x.parquet"), urls, tiny.transform(paths))
    (tmp_path / "urls.txt").write_text("\n".join(urls))
    table = embedded(tmp_path / "urls.txt", "-o", tmp_path / "y.parquet")
    check_rows(table, urls, tiny.transform(paths))


def save_tar(path, members):
    """Write a tar file of names and contents; a content of None is a link to the first member."""
    with tarfile.open(path, "w") as tar:
        first = None
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.LNKTYPE, first
            else:
                info.size = len(content)
            first = first or name
            tar.addfile(info, io.BytesIO(content))
    return path


def test_tar_files_are_sources(tiny, tmp_path):
    X = images(11)
    contents = [encoded(Image.fromarray(image)) for image in X]
    names = [f"train.1/{row:03}.left.PNG" for row in range(11)]
    members = []
    for row, (name, content) in enumerate(zip(names, contents, strict=True)):
        members += [(name, content), (f"train.1/{row:03}.json", b"{}")]
        if row % 2:  # before or after its image
            members.insert(len(members) - row % 3, (f"train.1/{row:03}.cls", f"{row}\n".encode()))
    members += [("train.1/._000.png", b"hidden"), ("__MACOSX/1.png", b"hidden")]
    tars = [tmp_path / "0.tar", tmp_path / "1.tar", tmp_path / "2.tar"]
    for tar, part in zip(tars, (members[:10], [], members[10:]), strict=True):
        save_tar(tar, part)
    table = embedded(*tars, "-o", tmp_path / "x.parquet")
    n_first = sum(name.endswith(".PNG") for name, _ in members[:10])
    paths = [f"{tars[0 if row < n_first else 2]}/{name}" for row, name in enumerate(names)]
    check_rows(table, paths, tiny.transform(X))
    labels = [str(row) if row % 2 else None for row in range(11)]
    assert table["label"].fillna("none").tolist() == [label or "none" for label in labels]
    part = embedded(*tars, "-o", tmp_path / "y.parquet", "--shard", "1/2")
    pd.testing.assert_frame_equal(part, table[5:].reset_index(drop=True))


def test_broken_tar_files_and_members_are_named(tiny, tmp_path):
    contents = [encoded(Image.fromarray(image)) for image in images(3)]
    members = [
        ("a.png", contents[0]),
        ("b.png", b"no image"),
        ("c.png", None),
        ("d.png", contents[2]),
    ]
    tar = save_tar(tmp_path / "a.tar", members)
    table = embedded(tar, "-o", tmp_path / "x.parquet")
    assert list(table) == ["path", "embedding", "error"]
    assert table["error"].notna().tolist() == [False, True, True, False]
    assert "it is a link; pack the tar file" in table["error"][2]
    check_rows(table[::3], ["a.png", "d.png"], tiny.transform(contents[::2]))
    content = tar.read_bytes()
    for name, damaged in {
        "cut.tar": content[:-10_200],
        "compressed.tar": gzip.compress(content),
        "compressed.tar.gz": gzip.compress(content),
        "empty.tar": b"",
    }.items():
        (tmp_path / name).write_bytes(damaged)
        result = run("embed", tar, tmp_path / name, "-o", tmp_path / "y.parquet", code=1)
        assert f"{name}', which is not a complete tar file without compression" in result.stderr


def test_different_kinds_of_sources_are_refused(tiny, tmp_path):
    photo = save_images(images(1), tmp_path / "photos")[0]
    (tmp_path / "a.txt").write_text(photo)
    (tmp_path / "empty.txt").write_text("\n")
    tar = save_tar(tmp_path / "a.tar", [("a.txt", b"")])
    for sources in ((photo, tar), (tmp_path / "a.txt", tar), (tmp_path / "a.txt", "b.csv")):
        result = run("embed", *sources, "-o", tmp_path / "x.parquet", code=1)
        assert "or tar files; or one list or table, and nothing else" in result.stderr
    for url in ("s3://bucket/a.tar", "https://host/a.parquet"):
        result = run("embed", url, "-o", tmp_path / "x.parquet", code=1)
        assert f"Got {url}, but expected a file on this machine; download it" in result.stderr
    for source in (tar, tmp_path / "empty.txt"):
        result = run("embed", source, "-o", tmp_path / "x.parquet", code=1)
        assert f"no images in {source}" in result.stderr
    result = run("embed", tmp_path / "b.tar", "-o", tmp_path / "x.parquet", code=1)
    assert "there is no file" in result.stderr


# --- shards and broken images --------------------------------------------------------------------


def test_shards_are_equal_to_one_run(tiny, tmp_path):
    paths = save_images(images(11), tmp_path / "photos")
    whole = embedded(tmp_path / "photos", "-o", tmp_path / "x.parquet")
    check_rows(whole, sorted(paths), tiny.transform(sorted(paths)))
    for count in (1, 3, 14):
        folder = tmp_path / str(count)
        folder.mkdir()
        parts = [
            embedded(
                tmp_path / "photos",
                *("-o", folder / f"{index:02}.parquet"),
                *("--shard", f"{index}/{count}"),
            )
            for index in range(count)
        ]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        pd.testing.assert_frame_equal(pd.read_parquet(folder), whole)
    run("embed", tmp_path / "photos", "-o", tmp_path / "x.npy", "--shard", "1/3")
    expected = np.stack(whole["embedding"][3:7])
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected)


def test_all_shards_learn_the_pixel_range_of_all_images(tiny, tmp_path):
    (tmp_path / "photos").mkdir()
    for row, image in enumerate(images(8)):  # the first half has values up to 255
        pixels = image[:, :, 0].astype(np.uint16) * (1 if row < 4 else 257)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{row}.png")
    whole = embedded(tmp_path / "photos", "-o", tmp_path / "x.parquet")
    parts = [
        embedded(tmp_path / "photos", "-o", tmp_path / f"{i}.parquet", "--shard", f"{i}/2")
        for i in range(2)
    ]
    pd.testing.assert_frame_equal(pd.concat(parts, ignore_index=True), whole)


@pytest.mark.parametrize("shard", ["3", "3/3", "-1/3", "0/0", "a/b", "1/3/5"])
def test_invalid_shards_are_refused(shard, tmp_path):
    result = run("embed", "photos", "-o", tmp_path / "x.parquet", "--shard", shard, code=2)
    assert f"Got '{shard}', but expected I/N with 0 <= I < N, such as 0/16" in result.stderr


def test_broken_images_are_rows_with_a_reason(tiny, tmp_path):
    paths, _ = paths_with_broken(tmp_path / "photos")
    (tmp_path / "list.txt").write_text("\n".join(paths))
    result = run("embed", tmp_path / "list.txt", "-o", tmp_path / "x.parquet")
    table = pd.read_parquet(tmp_path / "x.parquet")
    readable = np.setdiff1d(np.arange(12), BROKEN_ROWS)
    assert np.flatnonzero(table["error"].isna()).tolist() == readable.tolist()
    assert np.flatnonzero(table["embedding"].notna()).tolist() == readable.tolist()
    good = [paths[row] for row in readable]
    check_rows(table.iloc[readable], good, tiny.transform(good))
    assert f"4 images cannot be read, as the column error says:\n  {paths[1]}: " in result.stderr
    (tmp_path / "list.txt").write_text("\n".join([paths[1], paths[4]]))
    result = run("embed", tmp_path / "list.txt", "-o", tmp_path / "y.parquet", code=1)
    assert f"no image can be read:\n  {paths[1]}: " in result.stderr
    # The table of all shards needs the rows, and a queue does not try forever.
    assert f"Wrote {tmp_path / 'y.parquet'} (" in result.stderr
    table = pd.read_parquet(tmp_path / "y.parquet")
    assert table["path"].tolist() == [paths[1], paths[4]]
    assert table["error"].notna().all()
    assert table["embedding"].isna().all()
    run("embed", tmp_path / "list.txt", "-o", tmp_path / "y.parquet", "--resume")
    assert sorted(os.listdir(tmp_path)) == ["list.txt", "photos", "x.parquet", "y.parquet"]


def test_file_names_that_are_not_utf8_are_rows(tiny, tmp_path):
    path = save_images(images(1), tmp_path / "photos")[0]
    os.rename(path, os.fsencode(tmp_path / "photos") + b"/\xe9.png")
    table = embedded(tmp_path / "photos", "-o", tmp_path / "x.parquet")
    assert table["path"].tolist() == [str(tmp_path / "photos" / "\\udce9.png")]
    assert table["error"].isna().all()


# --- parts ---------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch):
    """Return a dict whose entry `left` is the number of blocks for which the disk has space."""
    disk, append = {"left": 1000}, ParquetFile.append

    def append_if_space(file, table):
        if not disk["left"]:
            raise OSError(errno.ENOSPC, "No space left on device", "x.parquet")
        disk["left"] -= 1
        append(file, table)

    monkeypatch.setattr(ParquetFile, "append", append_if_space)
    return disk


def parts_of(output):
    folder = Path(f"{output}.parts")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else None


@pytest.mark.parametrize("space", [0, 1, 2, 3, 4, 5])
def test_full_disk_leaves_the_finished_parts(space, tiny, tmp_path, disk):
    """There are three parts, which are then joined."""
    photos, output = tmp_path / "photos", tmp_path / "x.parquet"
    paths = sorted(save_images(images(11), photos))
    disk["left"] = space
    result = run("embed", photos, "-o", output, code=1)
    assert "sktransfer: x.parquet: No space left on device" in result.stderr
    assert not output.exists()
    parts = [f"{part:06}.parquet" for part in range(min(space, 3))]
    if not parts:
        assert parts_of(output) is None
    else:
        assert parts_of(output) == [*parts, "lock", "manifest.json"]
        hint = f"The finished parts are in {output}.parts; go on with --resume."
        assert hint in result.stderr
        result = run("embed", photos, "-o", output, code=1)
        assert "go on with --resume, or begin again with --overwrite" in result.stderr
    disk["left"] = 1000
    run("embed", photos, "-o", output, "--resume")
    # Only what is missing was computed: a block for each missing part, and three to join.
    assert disk["left"] == 1000 - (3 - len(parts)) - 3
    check_rows(pd.read_parquet(output), paths, tiny.transform(paths))
    assert parts_of(output) is None
    assert "is complete." in run("embed", photos, "-o", output, "--resume").stderr


def test_interruption_leaves_the_finished_parts(tiny, tmp_path, monkeypatch):
    photos, output = tmp_path / "photos", tmp_path / "x.parquet"
    save_images(images(11), photos)
    write = EmbeddingParts.write

    def interrupt(parts, block, table):
        if block == 2:
            raise KeyboardInterrupt
        write(parts, block, table)

    monkeypatch.setattr(EmbeddingParts, "write", interrupt)
    result = run("embed", photos, "-o", output, code=130)
    assert f"The finished parts are in {output}.parts; go on with --resume.\n" in result.stderr
    assert parts_of(output) == ["000000.parquet", "000001.parquet", "lock", "manifest.json"]


def test_resume_refuses_another_job(tiny, tmp_path, disk, monkeypatch):
    photos, output = tmp_path / "photos", tmp_path / "x.parquet"
    paths = sorted(save_images(images(11), photos))
    disk["left"] = 2
    run("embed", photos, "-o", output, code=1)
    disk["left"] = 1000
    before = parts_of(output)
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join([*paths[1:], paths[0]]))
    resume = ("-o", output, "--resume")
    message = (
        r"Got --resume with {} .*, but expected .*, as in .*; pass the same arguments, or begin"
    )
    for arguments, name in {
        (photos, "--shard", "0/2"): "rows",
        (photos / "0.png",): "number of images",
        (listed,): "list of images",
    }.items():
        result = run("embed", *arguments, *resume, code=1)
        assert re.search(message.format(name), result.stderr), result.stderr
    with monkeypatch.context() as patch:
        patch.setattr("sktransfer.embedding.output.BLOCK_SIZE", 5)
        assert re.search(message.format("block size"), run("embed", photos, *resume, code=1).stderr)
        patch.setattr(
            "sktransfer.cli.embed.make_extractor",
            lambda *args, **options: tiny_extractor(*args, **options).set_params(layer="logits"),
        )
        assert re.search(message.format("network"), run("embed", photos, *resume, code=1).stderr)
    assert parts_of(output) == before
    run("embed", listed, "-o", output, "--overwrite")
    check_rows(
        pd.read_parquet(output), [*paths[1:], paths[0]], tiny.transform([*paths[1:], paths[0]])
    )
    result = run("embed", photos, *resume, code=1)  # the file itself has the manifest, too
    assert re.search(message.format("list of images"), result.stderr)
    pd.DataFrame({"a": [1]}).to_parquet(output)
    assert re.search(message.format("format"), run("embed", photos, *resume, code=1).stderr)


def begin_and_resume(disk, output, first, second):
    """Finish two of several blocks with some arguments; go on with others, which are refused."""
    disk["left"] = 2
    run("embed", *first, "-o", output, code=1)
    disk["left"] = 1000
    before = parts_of(output)
    assert len(before) == 4
    message = run("embed", *second, "-o", output, "--resume", code=1).stderr
    assert parts_of(output) == before
    run("embed", *first, "-o", output, "--resume")
    return message


def test_resume_refuses_other_columns_and_values(tiny, tmp_path, disk):
    paths = save_images(images(11), tmp_path / "photos")
    cells = pd.DataFrame({"path": paths, "a": range(11), "b": range(11, 22)})
    for kind, write in {"csv": cells.to_csv, "parquet": cells.to_parquet}.items():
        source, output = tmp_path / f"source.{kind}", tmp_path / f"{kind}.parquet"
        write(source, index=False)
        a, b = ((source, "--label-column", column) for column in "ab")
        message = begin_and_resume(disk, output, a, b)
        assert "Got --resume with columns {'label': ['b', " in message, message
        assert pd.read_parquet(output)["label"].astype(int).tolist() == list(range(11))
    # The same columns with another value in a block that is finished.
    disk["left"] = 2
    run("embed", *a, "-o", tmp_path / "x.parquet", code=1)
    disk["left"] = 1000
    cells.assign(a=[7, *range(1, 11)]).to_parquet(source)
    message = run("embed", *a, "-o", tmp_path / "x.parquet", "--resume", code=1).stderr
    assert "Got --resume with values of the columns " in message


def test_resume_refuses_other_images_of_the_same_names(tiny, tmp_path, disk, monkeypatch):
    X = images(22)
    sources = {"tar": [], "txt": []}
    for folder, part in {"f1": X[:11], "f2": X[11:]}.items():
        (tmp_path / folder).mkdir()
        contents = [encoded(Image.fromarray(image)) for image in part]
        members = [(f"{row:02}.png", content) for row, content in enumerate(contents)]
        sources["tar"].append(save_tar(tmp_path / folder / "a.tar", members))
        for name, content in members:
            (tmp_path / folder / name).write_bytes(content)
        listed = tmp_path / folder / "l.txt"
        listed.write_text("\n".join(name for name, _ in members))
        sources["txt"].append(listed)
    for kind, (first, second) in sources.items():
        output = tmp_path / f"{kind}.parquet"
        message = begin_and_resume(disk, output, [first], [second])
        assert "Got --resume with list of images " in message, message
        names = [f"{row:02}.png" for row in range(11)]
        check_rows(pd.read_parquet(output), names, tiny.transform(X[:11]))
        # The same file in other words is the same.
        monkeypatch.chdir(first.parent)
        assert "complete" in run("embed", first.name, "-o", output, "--resume").stderr


def test_damaged_parts_are_computed_again(tiny, tmp_path, disk):
    photos, output = tmp_path / "photos", tmp_path / "x.parquet"
    paths = sorted(save_images(images(11), photos))
    disk["left"] = 3
    run("embed", photos, "-o", output, code=1)
    part = Path(f"{output}.parts") / "000001.parquet"
    content = part.read_bytes()
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")  # where the metadata begins
    for damaged in (b"", content[:4] + bytes(end - 4) + content[end:]):
        part.write_bytes(damaged)
        disk["left"] = 2  # for the parts 1 and 2
        run("embed", photos, "-o", output, "--resume", code=1)
        assert part.read_bytes() == content
    disk["left"] = 1000
    run("embed", photos, "-o", output, "--resume")
    check_rows(pd.read_parquet(output), paths, tiny.transform(paths))


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff"])
def test_damaged_manifest_is_named(content, tiny, tmp_path, disk):
    photos, output = tmp_path / "photos", tmp_path / "x.parquet"
    save_images(images(5), photos)
    disk["left"] = 1
    run("embed", photos, "-o", output, code=1)
    disk["left"] = 1000
    manifest = Path(f"{output}.parts") / "manifest.json"
    manifest.write_bytes(content)
    message = run("embed", photos, "-o", output, "--resume", code=1).stderr
    assert f"Got '{manifest}', which is damaged, but expected" in message
    assert "begin again with --overwrite" in message
    assert len(embedded(photos, "-o", output, "--overwrite")) == 5
    table = pq.read_table(output)
    pq.write_table(table.replace_schema_metadata({"sktransfer": content}), output)
    message = run("embed", photos, "-o", output, "--resume", code=1).stderr
    assert "Got --resume with format 2, but expected None" in message


@pytest.mark.parametrize("kind", ["folder", "folder of parts", "link", "file"])
def test_content_that_is_not_of_parts_is_kept(kind, tiny, tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "x.parquet"
    save_images(images(1), photos)
    path = Path(f"{output}.parts")
    thesis = path / "thesis.txt"
    if kind == "file":
        thesis = path
    elif kind == "link":
        (tmp_path / "target").mkdir()
        path.symlink_to(tmp_path / "target")
    else:
        path.mkdir()
    if kind == "folder of parts":
        for name in ("000000.parquet", "manifest.json"):
            (path / name).write_text("{}")
    thesis.write_text("years of work")
    for option in ([], ["--overwrite"], ["--resume"]):
        message = run("embed", photos, "-o", output, *option, code=1).stderr
        assert f"sktransfer: Got '{path}', a {kind.split()[0]}" in message
        assert "move it away, or choose another file" in message
        assert thesis.read_text() == "years of work"
    assert not output.exists()


@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
def test_existing_file_is_replaced_only_on_request(suffix, tiny, tmp_path):
    photos, output = tmp_path / "photos", tmp_path / f"x{suffix}"
    save_images(images(3), photos)
    output.write_text("old")
    result = run("embed", photos, "-o", output, code=1)
    assert "but expected a new file; replace it with --overwrite" in result.stderr
    assert output.read_text() == "old"
    assert f"Replaced {output} (" in run("embed", photos, "-o", output, "--overwrite").stderr
    assert sorted(os.listdir(tmp_path)) == ["photos", output.name]
    arguments = ("embed", photos, "-o", output, "--overwrite", "--resume")
    assert "Got --resume and --overwrite" in run(*arguments, code=2).stderr
    if suffix == ".npy":
        result = run("embed", photos, "-o", tmp_path / "y.npy", "--resume", code=2)
        assert "only .parquet files are written in parts" in result.stderr


def test_second_process_is_refused(tiny, tmp_path, monkeypatch):
    photos, output = tmp_path / "photos", tmp_path / "x.parquet"
    paths = sorted(save_images(images(11), photos))
    refused, write = [], EmbeddingParts.write

    def write_and_start_another(parts, block, table):
        """Another run begins before each block is written."""
        for option in ("--overwrite", "--resume"):
            refused.append(run("embed", photos, "-o", output, option, code=1).stderr)
        write(parts, block, table)

    monkeypatch.setattr(EmbeddingParts, "write", write_and_start_another)
    run("embed", photos, "-o", output)
    assert len(refused) == 6
    message = f"sktransfer: Got '{output}', which another process is writing; wait for its end, or"
    assert all(text == f"{message} choose another file\n" for text in refused)
    check_rows(pd.read_parquet(output), paths, tiny.transform(paths))
    assert parts_of(output) is None
