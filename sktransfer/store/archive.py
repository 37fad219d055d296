"""A file that carries embeddings from one machine to another.

It begins with a line that names the format and its version. Blocks follow, and then a digest of
everything before it. A block is a line of JSON, which describes a table and counts rows, and their
keys and values. The file is read and written block by block, so memory does not grow with it.

N images, D values in an embedding (`width`).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import numpy as np

from sktransfer.store.database import Connection, Database
from sktransfer.store.embedding_table import EmbeddingTable
from sktransfer.utils.files import complete_file

_FORMAT, _VERSION = b"sktransfer embeddings", 1
_FIRST_LINE = b"%s %d\n" % (_FORMAT, _VERSION)
_DIGEST_BYTES = 32
_BYTES_PER_BLOCK = 2**23
_MAX_LINE = 2**20
_MAX_DESCRIPTION = 10_000  # characters; a few hundred are usual
_DTYPES = ("<f2", "<f4", "<f8")
_SQLITE = b"SQLite format 3\0"
_FIELDS = {"digest": str, "description": str, "width": int, "dtype": str, "rows": int, "key": int}

TableOf = Callable[[bytes, str, int, str], EmbeddingTable]


class _Block(NamedTuple):
    """Rows of one table; `values` has shape (N, D)."""

    table: EmbeddingTable
    keys: list[bytes]
    values: np.ndarray


def write_archive(database: Database, path: Path) -> int:
    """Write all finite embeddings of a database to a file, which is complete or not there.

    Returns
    -------
    int
        The number of embeddings.
    """
    count = 0
    with complete_file(path) as unfinished, open(unfinished, "wb") as file:
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)

        def write(content: bytes) -> None:
            file.write(content)
            digest.update(content)

        write(_FIRST_LINE)
        tables = database.transact(_tables, write=False)
        for table in tables:
            for rows in _rows(database, table):
                header = {**table, "rows": len(rows), "key": len(rows[0][0])}
                write(json.dumps(header).encode() + b"\n")
                for column in zip(*rows, strict=True):
                    write(b"".join(column))
                count += len(rows)
        file.write(digest.digest())
    return count


def absorb_archive(path: Path, table_of: TableOf) -> int:
    """Check a file as a whole, then add its embeddings to tables.

    Parameters
    ----------
    path : Path
    table_of : callable
        Returns the table of a digest, description, width and dtype.

    Returns
    -------
    int
        The number of embeddings that were new.

    Raises
    ------
    ValueError
        If it is not a whole file of this version, or does not fit the tables. None of them is
        changed.
    """
    with open(path, "rb") as file:
        _check_content(file, path)
        # Tables are written to only after all blocks have been checked.
        shapes = dict[bytes, tuple[int, str]]()
        for block in _blocks(file, path, table_of):
            table = block.table
            table.check_shape()
            shape = (table.width, table.dtype.str)
            if shapes.setdefault(table.digest, shape) != shape:
                _refuse(path, "a table of it has rows of several shapes; export it again")
        return sum(
            block.table.absorb(block.keys, block.values) for block in _blocks(file, path, table_of)
        )


def _tables(connection: Connection) -> list[dict[str, Any]]:
    query = "SELECT digest, description, width, dtype FROM tables ORDER BY last_used"
    names = ("description", "width", "dtype")
    return [
        {"digest": digest.hex(), **dict(zip(names, rest, strict=True))}
        for digest, *rest in connection.execute(query)
    ]


def _rows(database: Database, table: dict[str, Any]) -> Iterator[list[tuple[bytes, bytes]]]:
    """Yield keys and values of a table, in lists of keys of one length; skip those not finite."""
    digest, dtype = bytes.fromhex(table["digest"]), np.dtype(table["dtype"])
    limit = max(1, _BYTES_PER_BLOCK // (table["width"] * dtype.itemsize))
    # By digest, because `clear` lets another table take the number of this one.
    query = """SELECT id, key, value FROM embeddings WHERE id > ? AND table_id = (
        SELECT id FROM tables WHERE digest = ?) ORDER BY id LIMIT ?"""

    def select(after: int, connection: Connection) -> list[tuple[int, bytes, bytes]]:
        return connection.execute(query, (after, digest, limit)).fetchall()

    last = 0
    while rows := database.transact(functools.partial(select, last), write=False):
        last = rows[-1][0]
        finite = [
            (key, value) for _, key, value in rows if np.isfinite(np.frombuffer(value, dtype)).all()
        ]
        for _, group in itertools.groupby(finite, key=lambda row: len(row[0])):
            yield list(group)


def _check_content(file: IO[bytes], path: Path) -> None:
    """Check the format, the version and the digest of a file."""
    first = file.readline(_MAX_LINE)
    if first.startswith(_SQLITE):
        _refuse(path, "it is the file of a store; pass the file that its export() has written")
    if first != _FIRST_LINE:
        name, _, version = first.rstrip(b"\n").rpartition(b" ")
        if name == _FORMAT and version.isdigit():
            _refuse(
                path,
                f"its format has version {int(version)} and this version of sktransfer reads "
                f"version {_VERSION}; use the same version of sktransfer on both machines",
            )
        _refuse(path, "it is not a file that EmbeddingStore.export() has written")
    digest = hashlib.blake2b(first, digest_size=_DIGEST_BYTES)
    left = _size(file) - len(first) - _DIGEST_BYTES
    while left > 0 and (content := file.read(min(left, _BYTES_PER_BLOCK))):
        digest.update(content)
        left -= len(content)
    if left or file.read() != digest.digest():
        _refuse(path, "it is incomplete or damaged; copy it or export it again")


def _blocks(file: IO[bytes], path: Path, table_of: TableOf) -> Iterator[_Block]:
    """Yield the blocks of a file whose digest is right."""
    end = _size(file) - _DIGEST_BYTES
    file.seek(len(_FIRST_LINE))
    while file.tell() < end:
        try:
            block = _read_block(file, end, table_of)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            _refuse(path, f"one of its blocks is not valid ({error}); export it again")
        if not np.isfinite(block.values).all():
            _refuse(path, "it has embeddings that are not finite; export it again")
        yield block


def _read_block(file: IO[bytes], end: int, table_of: TableOf) -> _Block:
    header = json.loads(file.readline(_MAX_LINE))
    wrong = [name for name, kind in _FIELDS.items() if type(header[name]) is not kind]
    if wrong:
        raise ValueError(f"fields {wrong} have other types")
    if header["dtype"] not in _DTYPES:
        raise ValueError(f"a table has the dtype {header['dtype'][:20]!r}")
    if len(header["description"]) > _MAX_DESCRIPTION or not header["description"].isprintable():
        raise ValueError("the description of a table is too long, or is not printable")
    table = table_of(
        bytes.fromhex(header["digest"]), header["description"], header["width"], header["dtype"]
    )
    rows, key_bytes = header["rows"], header["key"]
    if min(rows, key_bytes) < 1 or file.tell() + rows * (key_bytes + table.row_bytes) > end:
        raise ValueError(f"{rows} rows of {table.width} values do not fit the file")
    keys = file.read(rows * key_bytes)
    values = np.frombuffer(file.read(rows * table.row_bytes), table.dtype)
    return _Block(
        table,
        [keys[start : start + key_bytes] for start in range(0, len(keys), key_bytes)],
        values.reshape(rows, table.width),
    )


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _refuse(path: Path, problem: str) -> NoReturn:
    raise ValueError(f"Got {str(path)!r}, but {problem}")
