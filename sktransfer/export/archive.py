"""The file of a saved model: a zip archive that is only ever read into memory.

A file has a JSON description, tensors, and parts of other libraries, none of them compressed. It
ends in the SHA-256 of all bytes before, so any damage is noticed before anything is parsed. A
digest is not a signature: whoever writes a file can compute it. So names, sizes and compression are
checked as well, and nothing is ever extracted to a disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sktransfer.utils.errors import ModelFileError, file_path
from sktransfer.utils.files import complete_file

FORMAT, VERSION = "sktransfer model", 1
DESCRIPTION, TENSORS = "model.json", "weights.safetensors"
_STEP = re.compile(r"steps/\d{1,4}\.skops")
# The comment of the archive, which ends the file.
_COMMENT = b"sktransfer sha256 "
_DIGITS = 64
_MAX_DESCRIPTION = 64 * 2**20
_BLOCK = 2**20
# Calls with a path, for the message of an error.
_EXAMPLE = "save(model, 'model.skt') and load('model.skt')"
# The same for all files, so that equal models have equal files.
_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Archive:
    """The checked content of a file.

    Parameters
    ----------
    path : Path
    description : dict
        The JSON description.
    parts : dict of str to bytes
        Content of the other parts that were read, by name.
    sizes : dict of str to int
        Bytes of all parts.
    """

    path: Path
    description: dict[str, Any]
    parts: dict[str, bytes]
    sizes: dict[str, int]


def write_archive(
    path: str | os.PathLike[str], description: Mapping[str, Any], parts: Mapping[str, bytes]
) -> None:
    """Write a file; an old one stays until the new one is complete.

    Parameters
    ----------
    path : path
        Missing folders are created.
    description : dict
        JSON values.
    parts : dict of str to bytes
        `TENSORS`, and `"steps/NUMBER.skops"`.

    Raises
    ------
    TypeError
        If `path` is no path.
    OSError
        If the file cannot be written.
    """
    path = file_path(path, _EXAMPLE)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}
    head = {"format": FORMAT, "version": VERSION, **description, "sha256": digests}
    text = json.dumps(head, indent=1, allow_nan=False, ensure_ascii=False).encode()
    with complete_file(path) as unfinished, unfinished.open("w+b") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, content in {DESCRIPTION: text, **parts}.items():
                archive.writestr(zipfile.ZipInfo(name, _DATE), content)
            archive.comment = _COMMENT + b"0" * _DIGITS
        file.seek(-_DIGITS, os.SEEK_END)
        digest = _digest_of_rest(file, file.tell())
        file.seek(-_DIGITS, os.SEEK_END)
        file.write(digest)


def read_archive(path: str | os.PathLike[str], *, description_only: bool = False) -> Archive:
    """Read and check a file.

    Parameters
    ----------
    path : path
    description_only : bool, default=False
        Leave out the other parts; they are checked all the same.

    Raises
    ------
    TypeError
        If `path` is no path.
    FileNotFoundError, OSError
        If it cannot be read.
    ModelFileError
        If it is not a saved model, is damaged, or has contents that no saved model has.
    """
    path = file_path(path, _EXAMPLE)
    with path.open("rb") as file:
        _check_digest(path, file)
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
                _check_entries(path, infos)
                description = _parse(path, archive.read(DESCRIPTION))
                wanted = [] if description_only else [*infos]
                parts = {i.filename: archive.read(i) for i in wanted if i.filename != DESCRIPTION}
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
            raise ModelFileError(path, f"its archive cannot be read ({error})") from error
    for name, content in parts.items():
        if hashlib.sha256(content).hexdigest() != description["sha256"].get(name):
            raise ModelFileError(path, f"its part {name!r} does not have the recorded SHA-256")
    sizes = {info.filename: info.file_size for info in infos}
    return Archive(path, description, parts, sizes)


def _check_digest(path: Path, file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _DIGITS - len(_COMMENT)))
    end = file.read()
    if not end.startswith(_COMMENT):
        file.seek(0)
        is_archive = file.read(4) == b"PK\x03\x04"
        problem = (
            "it is cut off, or another kind of archive"
            if is_archive
            else "it is another kind of file"
        )
        raise ModelFileError(path, f"{problem}; expected a file that sktransfer.save has written")
    if _digest_of_rest(file, size - _DIGITS) != end[len(_COMMENT) :]:
        raise ModelFileError(path, "it is damaged: its content does not have the recorded SHA-256")


def _digest_of_rest(file: Any, size: int) -> bytes:
    """Compute the SHA-256 of the first bytes, in hexadecimal digits."""
    file.seek(0)
    digest = hashlib.sha256()
    while size > 0 and (block := file.read(min(size, _BLOCK))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest().encode()


def _check_entries(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    """Check names and sizes before any content is read."""
    names = [info.filename for info in infos]
    unknown = [name for name in names if not _is_known(name)]
    if unknown or len(set(names)) < len(names) or DESCRIPTION not in names:
        raise ModelFileError(path, f"it has parts that no saved model has: {sorted(names)[:5]}")
    size = path.stat().st_size
    if any(
        info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size
        for info in infos
    ) or (sum(info.file_size for info in infos) > size):
        raise ModelFileError(path, "its parts are compressed, or their sizes are wrong")
    if next(info.file_size for info in infos if info.filename == DESCRIPTION) > _MAX_DESCRIPTION:
        raise ModelFileError(path, f"{DESCRIPTION} has more than {_MAX_DESCRIPTION:,} bytes")


def _is_known(name: str) -> bool:
    return name in (DESCRIPTION, TENSORS) or _STEP.fullmatch(name) is not None


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, f"{DESCRIPTION} is not JSON ({type(error).__name__})") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ModelFileError(path, f"{DESCRIPTION} does not describe a model")
    version = description.get("version")
    if not isinstance(version, int) or version < 1:
        raise ModelFileError(path, f"it has the format version {version!r}")
    if version > VERSION:
        raise ModelFileError(
            path,
            f"a later release wrote it, in format version {version}, and this one reads up to "
            f"{VERSION}; install a newer sktransfer",
        )
    if not isinstance(description.get("sha256"), dict):
        raise ModelFileError(path, f"{DESCRIPTION} records no digests")
    return description
