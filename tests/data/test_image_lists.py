import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sktransfer.data.image_lists import (
    ImageList,
    ListedImages,
    ParquetList,
    PathList,
    read_path_list,
)

SIZES = [0, 3, 0, 1, 5, 0]
NAMES = [f"{row}.png" for row in range(sum(SIZES))]


class Grouped(ImageList):
    """Images in groups; it records which groups are read."""

    columns = {"label": None}  # noqa: RUF012

    def __init__(self):
        self.reads = []

    @property
    def group_sizes(self):
        return SIZES

    def read_group(self, group):
        self.reads.append(group)
        start = sum(SIZES[:group])
        names = NAMES[start : start + SIZES[group]]
        return ListedImages(names, [f"photos/{name}" for name in names], {"label": names[:]})


def test_any_rows_are_read_across_groups():
    for start, stop in itertools.combinations_with_replacement(range(10), 2):
        part = Grouped().read(start, stop)
        assert part.keys == part.columns["label"] == NAMES[start:stop]
        assert part.items == [f"photos/{name}" for name in NAMES[start:stop]]


def test_each_group_is_read_once_in_order():
    images = Grouped()
    for start in range(0, 9, 2):
        images.read(start, min(start + 2, 9))
    assert [group for group in images.reads if SIZES[group]] == [1, 3, 4]


def test_sample_is_evenly_spaced():
    assert Grouped().sample(3) == ["photos/0.png", "photos/4.png", "photos/8.png"]
    assert Grouped().sample(64) == [f"photos/{name}" for name in NAMES]


def test_paths_are_relative_to_their_folder():
    paths = ["a.png", "/b.png", "s3://bucket/c.png", None]
    images = PathList(paths, Path("photos"))
    assert images.read(0, 4).keys == paths
    assert images.read(0, 4).items == ["photos/a.png", "/b.png", "s3://bucket/c.png", None]


def test_text_files_of_any_system_are_lists(tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_bytes("\ufeffä.png\r\n\r\n b\t.png \r\n".encode() + b"\xe9.png")
    part = read_path_list(listed).read(0, 3)
    assert part.keys == ["ä.png", " b\t.png ", "\udce9.png"]
    assert part.items == [f"{tmp_path}/{key}" for key in part.keys]


def test_path_column_of_a_table_must_be_of_strings(tmp_path):
    table = tmp_path / "a.parquet"
    text = pa.array(["a.png", None])
    for column in (text, text.cast(pa.large_string()), text.dictionary_encode()):
        pq.write_table(pa.table({"path": column}), table)
        assert ParquetList(table, "path", {}).read(0, 2).items == [f"{tmp_path}/a.png", None]
    pq.write_table(pa.table({"path": pa.nulls(2)}), table)
    assert ParquetList(table, "path", {}).read(0, 2).items == [None, None]
    for values, kind in (([1, 2], "int64"), ([b"a.png"], "binary"), ([["a.png"]], "list<")):
        pq.write_table(pa.table({"path": values}), table)
        with pytest.raises(ValueError, match=f"'path' of .*of type {kind}.* expected strings"):
            ParquetList(table, "path", {})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_list_in_utf16_is_refused(encoding, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_bytes("a.png\r\nb.png\r\n".encode(encoding))
    with pytest.raises(ValueError, match=r"list.txt', which is in UTF-16 .* save it as UTF-8"):
        read_path_list(listed)
    listed.write_bytes(b"a.png\r\nb.png\rc.png\n")
    assert read_path_list(listed).read(0, 3).keys == ["a.png", "b.png", "c.png"]
