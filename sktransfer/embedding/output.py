"""Embeddings in files, appended block by block, so that only one block is in memory.

Shapes: N images, D features.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from sktransfer.utils.errors import import_optional

SUFFIXES = (".npy", ".parquet")
# Images of a block, unless the caller says otherwise: about 20 MB of embeddings.
BLOCK_SIZE = 4096
# Numbers in a block at most, which Arrow counts in 32 bits.
MAX_BLOCK_NUMBERS = 2**31 - 1


def check_embedding_path(path: object) -> Path:
    """Return the path of a file of embeddings, with the home folder in place of a leading `~`.

    Raises
    ------
    TypeError
        If it is no path.
    ValueError
        If it ends in neither `.npy` nor `.parquet`.
    IsADirectoryError
        If it is a folder.
    ImportError
        If it ends in `.parquet`, and pyarrow is missing.

    Examples
    --------
    >>> check_embedding_path("photos.npy").name
    'photos.npy'
    """
    expected = f"but expected the path of a file that ends in {' or '.join(SUFFIXES)}"
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"Got path={path!r}, {expected}")
    checked = Path(path).expanduser()
    if checked.suffix.lower() not in SUFFIXES:
        raise ValueError(f"Got path={str(path)!r}, {expected}")
    if checked.is_dir():
        raise IsADirectoryError(f"Got path={str(path)!r}, a folder, {expected}")
    if checked.suffix.lower() == ".parquet":
        import_parquet()
    return checked


class NpyFile:
    """A `.npy` file, float32 (N, D), of which N grows with each block.

    Parameters
    ----------
    path : path
    width : int
        D.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with NpyFile(Path(folder, "x.npy"), width=2) as file:
    ...         file.append(np.zeros((3, 2)))
    ...         file.append(np.ones((1, 2)))
    ...     np.load(Path(folder, "x.npy"))[2:]
    array([[0., 0.],
           [1., 1.]], dtype=float32)
    """

    def __init__(self, path: Path, width: int) -> None:
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115
        self._width, self._n_rows = width, 0
        self._write_header()

    def append(self, embeddings: np.ndarray) -> None:
        """Append embeddings (n, D)."""
        self._file.write(np.ascontiguousarray(embeddings, dtype="<f4").data)
        self._n_rows += len(embeddings)

    def _write_header(self) -> None:
        """Write the header, which numpy pads so that it keeps its length as N grows."""
        self._file.seek(0)
        shape = (self._n_rows, self._width)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> NpyFile:
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                self._write_header()
        finally:
            self._file.close()


class ParquetFile:
    """A Parquet file in which each block becomes a row group.

    Parameters
    ----------
    path : path
    schema : pyarrow.Schema
        From `embedding_schema`.
    """

    def __init__(self, path: Path, schema: Any) -> None:
        others = [name for name in schema.names if name != "embedding"]
        # Dictionaries of numbers that hardly repeat would only take time and memory.
        self._writer = import_parquet().ParquetWriter(path, schema, use_dictionary=others)

    def append(self, table: Any) -> None:
        """Append a table of the schema."""
        if len(table):
            self._writer.write_table(table, row_group_size=len(table))

    def __enter__(self) -> ParquetFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.close()


def embedding_schema(
    keys: Mapping[str, Any], *, with_errors: bool, metadata: Mapping[str, str] | None = None
) -> Any:
    """Build the pyarrow Schema of embeddings.

    Parameters
    ----------
    keys : dict of str to pyarrow.DataType or None
        Columns before the embedding; None is a string.
    with_errors : bool
        Whether there is a column `error`: null, or the reason why an image cannot be read.
    metadata : dict of str to str or None
    """
    arrow = import_arrow()
    fields = [(name, kind or arrow.string()) for name, kind in keys.items()]
    fields.append(("embedding", arrow.list_(arrow.float32())))
    if with_errors:
        fields.append(("error", arrow.string()))
    return arrow.schema(fields, metadata=metadata)


def embedding_table(
    schema: Any,
    keys: Mapping[str, Sequence[Any]],
    embeddings: np.ndarray,
    reasons: Sequence[str | None],
) -> Any:
    """Build a table of the schema from a block of N images.

    Parameters
    ----------
    schema : pyarrow.Schema
        From `embedding_schema`.
    keys : dict of str to sequence of length N
    embeddings : ndarray of shape (N, D)
    reasons : sequence of N (str or None)
        Why images cannot be read; their embedding is null.
    """
    arrow = import_arrow()
    broken = np.array([reason is not None for reason in reasons], dtype=bool)
    lengths = np.where(broken, 0, embeddings.shape[1])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = embeddings[~broken] if broken.any() else embeddings
    lists = arrow.ListArray.from_arrays(
        arrow.array(offsets),
        arrow.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1)),
        mask=arrow.array(broken),
    )
    columns = {**keys, "embedding": lists, "error": reasons}
    arrays = [
        lists if name == "embedding" else arrow.array(columns[name], schema.field(name).type)
        for name in schema.names
    ]
    return arrow.Table.from_arrays(arrays, schema=schema)


def as_utf8(text: str) -> str:
    r"""Return the name of a file for a column of strings, which must be UTF-8.

    Examples
    --------
    >>> as_utf8("é.png"), as_utf8("\udce9.png")
    ('é.png', '\\udce9.png')
    """
    return text.encode("utf-8", "backslashreplace").decode()


def import_arrow() -> Any:
    """Import pyarrow."""
    return import_optional("pyarrow", extra="parquet", purpose="Writing a .parquet file")


def import_parquet() -> Any:
    """Import `pyarrow.parquet`."""
    return import_optional("pyarrow.parquet", extra="parquet", purpose="Writing a .parquet file")
