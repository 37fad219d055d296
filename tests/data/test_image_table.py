"""`load_image_table`, in sktransfer/data/folders.py."""

import csv
import os
import sys
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from helpers import Tiny, colored_images, make_classifier, save_images
from pyarrow import parquet

import sktransfer
from sktransfer.data.folders import load_image_folder, load_image_table


@pytest.fixture
def files(tmp_path):
    """Create empty files, as nothing is decoded; return the names of 12."""
    names = [f"images/{number}.png" for number in range(12)]
    (tmp_path / "images").mkdir()
    for name in names:
        (tmp_path / name).touch()
    return names


def write(tmp_path, columns, name="table.csv", delimiter=",", encoding="utf-8"):
    """Write columns, lists by name, as a CSV or Parquet file."""
    path = tmp_path / name
    if path.suffix == ".parquet":
        parquet.write_table(pa.table(columns), path)
        return path
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_table_has_the_result_of_the_folder(name, tmp_path, files):
    labels = ["dog", "cat", "cat"]
    splits = ["train", "Testing", "dev"]
    table = write(tmp_path, {"path": files[:3], "label": labels, "split": splits}, name)
    bunch = load_image_table(table)
    assert bunch.data.tolist() == [str(tmp_path / file) for file in files[:3]]
    assert bunch.filenames is bunch.data
    assert bunch.labels.tolist() == labels
    assert (bunch.target_names, bunch.target.tolist()) == (["cat", "dog"], [1, 0, 0])
    assert (bunch.data.dtype, bunch.target.dtype, bunch.labels.dtype.kind) == (
        object,
        np.int64,
        "U",
    )
    assert bunch.split.tolist() == ["train", "test", "val"]
    assert bunch.DESCR.splitlines() == [f"3 images of {table}", "", "cat: 2", "dog: 1"]
    (tmp_path / "folder" / "cat").mkdir(parents=True)
    (tmp_path / "folder" / "cat" / "1.png").touch()
    assert set(load_image_folder(tmp_path / "folder")) == {*bunch, "ignored"}


def test_columns_and_root_are_chosen(tmp_path, files, monkeypatch):
    columns = {
        "split": ["x", "y"],
        "fold": ["1", "train_set"],
        "file": files[:2],
        "kind": ["a", "b"],
    }
    (tmp_path / "tables").mkdir()
    table = write(tmp_path / "tables", columns)
    chosen = {"path_column": "file", "label_column": "kind"}
    for root in (tmp_path, str(tmp_path)):
        bunch = load_image_table(table, **chosen, split_column="fold", root=root)
        assert bunch.data.tolist() == [str(tmp_path / file) for file in files[:2]]
        assert bunch.split.tolist() == ["1", "train"]
    assert load_image_table(table, **chosen, root=tmp_path).split.tolist() == ["x", "y"]
    monkeypatch.chdir(tmp_path)
    assert load_image_table("tables/table.csv", **chosen, root="").data.tolist() == files[:2]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_image_table("~/tables/table.csv", **chosen, root="~").data) == 2


def test_absolute_paths_are_kept_and_split_is_none_without_a_column(tmp_path, files):
    absolute = str(tmp_path / files[0])
    bunch = load_image_table(write(tmp_path, {"path": [absolute, files[1]], "label": ["a", "b"]}))
    assert bunch.data.tolist() == [absolute, str(tmp_path / files[1])]
    assert bunch.split is None


@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(";", "utf-8-sig"), ("\t", "utf-8"), (",", "utf-8-sig")]
)
def test_csv_of_spreadsheets_is_read(delimiter, encoding, tmp_path, files):
    label = unicodedata.normalize("NFD", "Grün; a, b")
    table = write(
        tmp_path, {" path": files[:2], "label ": [label, " ß "]}, "t.txt", delimiter, encoding
    )
    with table.open("a") as file:
        file.write("\n\n")
    assert load_image_table(table).labels.tolist() == ["Grün; a, b", "ß"]


def test_labels_of_parquet_become_strings(tmp_path, files):
    dictionary = pa.array(["x", "y", "x"]).dictionary_encode()
    table = write(
        tmp_path, {"path": files[:3], "label": [3, 10, 3], "kind": dictionary}, "t.parquet"
    )
    bunch = load_image_table(table)
    assert (bunch.labels.tolist(), bunch.target_names) == (["3", "10", "3"], ["10", "3"])
    assert load_image_table(table, label_column="kind").target.tolist() == [0, 1, 0]


def test_all_missing_files_are_named_at_once(tmp_path, files):
    names = [*files[:3], *(f"images/lost{number}.png" for number in range(11)), "images"]
    table = write(tmp_path, {"path": names, "label": ["a"] * 15})
    with pytest.raises(FileNotFoundError) as caught:
        load_image_table(table)
    lines = str(caught.value).splitlines()
    assert lines[0] == "Got 12 of 15 paths that do not exist; the first 10:"
    assert lines[1] == f"- row 3 ({tmp_path}/images/lost0.png)"
    assert len(lines) == 12
    assert "pass another folder as root=" in lines[-1]


def test_paths_that_occur_more_than_once_raise(tmp_path, files):
    names = [files[0], files[1], f"images/../{files[0]}", files[2], files[1]]
    table = write(tmp_path, {"path": names, "label": ["a", "b", "c", "a", "b"]})
    with pytest.raises(ValueError, match=r"^Got 2 paths more than once:\n") as caught:
        load_image_table(table)
    assert f"- rows 0, 2 ({tmp_path}/{files[0]}, labeled 'a', 'c')" in str(caught.value)
    assert f"- rows 1, 4 ({tmp_path}/{files[1]}, labeled 'b', 'b')" in str(caught.value)


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
@pytest.mark.parametrize("column", ["path", "label", "split"])
def test_empty_cells_raise(name, column, tmp_path, files):
    columns = {"path": files, "label": ["a", "b"] * 6, "split": ["train"] * 12}
    columns[column] = [
        None if row in (2, 5) else value for row, value in enumerate(columns[column])
    ]
    table = write(tmp_path, columns, name)
    with pytest.raises(
        ValueError, match=rf"^Got 2 empty cells in the column '{column}' of .*row 2, 5 \("
    ):
        load_image_table(table)


def test_more_than_ten_empty_cells_are_counted(tmp_path, files):
    table = write(tmp_path, {"path": files, "label": [" "] * 12})
    with pytest.raises(ValueError, match=r"^Got 12 empty cells .* in row 0, 1, .*8, 9, \.\.\. \("):
        load_image_table(table)


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_missing_columns_raise_with_a_suggestion(name, tmp_path, files):
    table = write(tmp_path, {"path": files, "labels": ["a", "b"] * 6}, name)
    message = r"^Got the column 'label', but .* are 'path', 'labels'; did you mean 'labels'\?"
    with pytest.raises(ValueError, match=message):
        load_image_table(table)
    with pytest.raises(ValueError, match=r"Got the column 'fold', .*; pass path_column="):
        load_image_table(table, label_column="labels", split_column="fold")


def test_unreadable_tables_raise(tmp_path, files):
    def load(name, content=None, **parameters):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        return load_image_table(tmp_path / name, **parameters)

    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load("lost.csv")
    with pytest.raises(ValueError, match=r"a folder, but expected .* use load_image_folder"):
        load("images")
    with pytest.raises(ValueError, match=r"ends in \.csv, \.tsv, \.txt, \.parquet, \.pq"):
        load("table.xlsx", b"")
    with pytest.raises(ValueError, match=r"the columns of .* are none"):
        load("empty.csv", b"")
    with pytest.raises(ValueError, match="which has no rows"):
        load("header.csv", b"path,label\n")
    with pytest.raises(ValueError, match="is not CSV in UTF-8"):
        load("latin.csv", "path,label\na.png,grün".encode("latin-1"))
    with pytest.raises(ValueError, match="is not CSV in UTF-8"):
        load("quote.csv", b'path,label\n"' + b"a" * 2**18)
    with pytest.raises(
        ValueError, match=r"Got 1 rows with more cells than the 2 columns .*in line 3"
    ):
        load("long.csv", b"path,label\na.png,x\na,b.png,y\n")
    with pytest.raises(ValueError, match="Got 1 empty cell in the column 'label'"):
        load("short.csv", b"path,label\na.png\n")
    with pytest.raises(ValueError, match="Got several columns 'label'"):
        load("twice.csv", b"path,label,label\na.png,x,y\n")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        load("table.parquet", b"path,label\n")
    with pytest.raises(TypeError, match="Got path=3, but expected the path of a CSV"):
        load_image_table(3)
    with pytest.raises(TypeError, match="Got 0 as the name of a column"):
        load("header.csv", path_column=0)
    table = write(tmp_path, {"path": [b"a"], "label": ["x"]}, "bytes.parquet")
    with pytest.raises(
        TypeError, match=r"Got bytes in the column 'path' .* expected paths as strings"
    ):
        load_image_table(table)


def test_parquet_needs_pyarrow(tmp_path, files, monkeypatch):
    table = write(tmp_path, {"path": files[:1], "label": ["a"]}, "table.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install 'sktransfer\[parquet\]'"):
        load_image_table(table)


def test_similar_labels_warn(tmp_path, files):
    table = write(tmp_path, {"path": files[:2], "label": ["Cat", "cat"]})
    with pytest.warns(UserWarning, match="The classes 'Cat', 'cat' differ only by") as caught:
        load_image_table(table)
    assert caught[0].filename == __file__


def test_classifier_of_a_table_and_of_a_folder_have_names_as_classes(tmp_path):
    X, y = colored_images(12)
    for label in np.unique(y):
        save_images(X[y == label], tmp_path / label)
    photos = sktransfer.load_image_folder(tmp_path)
    relative = [os.path.relpath(path, tmp_path) for path in photos.data]
    table = write(tmp_path, {"path": relative, "label": photos.labels.tolist()})
    bunch = sktransfer.load_image_table(table)
    assert bunch.data.tolist() == photos.data.tolist()
    for loaded in (photos, bunch):
        classifier = make_classifier(Tiny, unfreeze=(0,), early_stopping=False)
        classifier.fit(loaded.data, loaded.labels)
        assert classifier.classes_.tolist() == ["cat", "dog", "owl"]
        assert set(classifier.predict(loaded.data)) <= {"cat", "dog", "owl"}


def test_urls_are_kept_and_not_checked(tmp_path, files):
    paths = ["s3://bucket/a.png", files[0], "https://host/b.png?Signature=1"]
    table = write(tmp_path, {"path": paths, "label": ["x", "y", "x"]})
    assert load_image_table(table, root=tmp_path).data.tolist() == [
        paths[0],
        str(tmp_path / files[0]),
        paths[2],
    ]
    twice = {"path": [paths[2], "https://host/b.png?Signature=2"], "label": ["x", "y"]}
    with pytest.raises(ValueError, match="Got 1 path more than once"):
        load_image_table(write(tmp_path, twice))
