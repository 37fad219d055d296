"""Images in tar files, such as the shards of WebDataset, read without unpacking them."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sktransfer.data.folders import IMAGE_EXTENSIONS, is_hidden
from sktransfer.data.image_lists import ImageList, ListedImages

_LABEL_EXTENSION = ".cls"
# Tar files that are searched at the same time; on a network, most of the time is waiting.
_SEARCHED_AT_ONCE = 16
_CHUNK = 2**16


@dataclass(frozen=True)
class TarMember:
    """An image in a tar file, which is read when it is decoded.

    Parameters
    ----------
    archive : str
        Path of the tar file.
    name : str
    offset : int
        Where its bytes begin.
    size : int
        Number of its bytes.
    problem : str or None
        Why it cannot be read.
    """

    archive: str
    name: str
    offset: int
    size: int
    problem: str | None = None

    def read_bytes(self) -> bytes:
        """Read the member.

        Raises
        ------
        OSError
            If the file cannot be read or has become shorter, or if there is a `problem`.
        """
        if self.problem is not None:
            raise OSError(self.problem)
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise OSError(f"got {len(content):,} bytes, but expected {self.size:,}")
        return content


class _Contents(NamedTuple):
    """Number of images in a tar file, and whether there are labels."""

    n_images: int
    has_labels: bool


class TarList(ImageList):
    """The images of tar files, by the extensions of their names, in the order of the files.

    The keys are the names of the members; of several tar files, with the path of the tar file, such
    as `shards/0.tar/cat.jpg`. If there are members such as `cat.cls` next to `cat.jpg`, their text
    is the column `label`.

    Parameters
    ----------
    archives : sequence of Path

    Raises
    ------
    ValueError
        If a file is not a complete tar file, or if it is compressed.
    """

    def __init__(self, archives: Sequence[Path]) -> None:
        self._archives = list(archives)
        with ThreadPoolExecutor(_SEARCHED_AT_ONCE, "sktransfer-tar") as pool:
            contents = list(pool.map(_contents, self._archives))
        self._sizes = [each.n_images for each in contents]
        has_labels = any(each.has_labels for each in contents)
        self.columns = {"label": None} if has_labels else {}

    @property
    def group_sizes(self) -> Sequence[int]:
        """Images of the tar files."""
        return self._sizes

    def read_group(self, group: int) -> ListedImages:
        """Find the images of a tar file, and read the labels.

        Raises
        ------
        ValueError
            If the tar file has changed and is not complete, or if a label is not text.
        """
        images, labels = list[TarMember](), dict[str, str]()
        archive = self._archives[group]
        for member in _members(archive):
            if _is_image(member.name):
                images.append(member)
            elif member.name.endswith(_LABEL_EXTENSION):
                labels[_sample(member.name)] = _label(member)
        columns = {
            name: [labels.get(_sample(image.name)) for image in images] for name in self.columns
        }
        # Shards often have the same names.
        prefix = f"{archive}/" if len(self._archives) > 1 else ""
        return ListedImages([prefix + image.name for image in images], images, columns)


def _contents(archive: Path) -> _Contents:
    n_images, has_labels = 0, False
    for member in _members(archive):
        n_images += _is_image(member.name)
        has_labels = has_labels or member.name.endswith(_LABEL_EXTENSION)
    return _Contents(n_images, has_labels)


def _members(archive: Path) -> Iterator[TarMember]:
    """Yield the visible files and links of a tar file, in their order."""
    try:
        with tarfile.open(archive, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                problem = _problem(info)
                if (info.isfile() or problem) and not is_hidden(info.name):
                    yield TarMember(str(archive), info.name, info.offset_data, info.size, problem)
            _check_end(archive, tar.offset)
    except tarfile.TarError as error:
        raise ValueError(
            f"Got {str(archive)!r}, which is not a complete tar file without compression "
            f"({error}); pack it again, or leave it out"
        ) from error


def _problem(info: tarfile.TarInfo) -> str | None:
    if info.islnk() or info.issym():
        return "it is a link; pack the tar file with --dereference --hard-dereference"
    if info.issparse():
        return "it is a sparse file; pack the tar file without --sparse"
    return None


def _check_end(archive: Path, offset: int) -> None:
    """Raise a ReadError unless a tar file has zeros from `offset` to its end.

    At a damaged header or at the end of a cut file, tarfile ends as if the tar file were complete.
    """
    with open(archive, "rb") as file:
        file.seek(offset)
        first = file.read(tarfile.BLOCKSIZE)
        if len(first) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"it is cut off at byte {offset + len(first):,}")
        if any(first):
            raise tarfile.ReadError(f"the header at byte {offset:,} is damaged")
        while chunk := file.read(_CHUNK):
            if rest := chunk.lstrip(b"\0"):
                raise tarfile.ReadError(
                    f"after its end, there is more at byte {file.tell() - len(rest):,}; tar files "
                    "that are joined, as for tar -i, cannot be read"
                )


def _label(member: TarMember) -> str:
    try:
        return member.read_bytes().decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"Got the label {member.name!r} in {member.archive!r}, which cannot be read: {error}; "
            "pack it again as a file with text in UTF-8, or leave it out"
        ) from error


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _sample(name: str) -> str:
    """Return the name that the files of one sample share: all before the first dot of the file.

    Examples
    --------
    >>> _sample("train.1/cat.left.jpg")
    'train.1/cat'
    """
    folder, file = os.path.split(name)
    return os.path.join(folder, file.partition(".")[0])
