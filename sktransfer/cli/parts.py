"""Files of embeddings that are written in parts, so that a command that was killed can go on.

The parts are in a folder next to the file: one for each finished block, and a manifest of what is
embedded. Each appears when it is complete. At the end they are joined, and the folder is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sktransfer.cli.messages import MAX_LISTED

# Entry of the metadata of a Parquet file that holds the manifest.
_METADATA = "sktransfer"
# Names of the files in the folder of parts, complete or not yet.
_OWN_NAME = re.compile(
    r"lock|(\d{6,}|joined)\.parquet|manifest\.json|(\d{6,}|joined|manifest)\.[0-9a-f]+\.\d+\.tmp"
)


class EmbeddingParts:
    """The parts of one file.

    Parameters
    ----------
    output : Path
        The `.parquet` file.
    keys : dict of str to (pyarrow.DataType or None)
        See `embedding_schema`.
    blocks : sequence of range
        Rows of each part.
    manifest : dict
        What determines the content of the file, as values of JSON under names for messages.
    """

    def __init__(
        self, output: Path, keys: dict[str, Any], blocks: Sequence[range], manifest: dict[str, Any]
    ) -> None:
        from sktransfer.embedding.output import embedding_schema

        text = json.dumps(manifest)
        # Values as they will be read again.
        self._manifest: dict[str, Any] = json.loads(text)
        self.schema = embedding_schema(keys, with_errors=True, metadata={_METADATA: text})
        self.output, self._blocks = output, blocks
        self.folder = parts_folder(output)
        self._manifest_file = self.folder / "manifest.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing the same file.

        Raises
        ------
        RuntimeError
            If another process is writing it.
        FileExistsError
            If the folder of the parts has other content.
        """
        check_parts_folder(self.output)
        lock = self.folder / "lock"
        try:
            held = _hold(lock)
        except BlockingIOError:
            raise RuntimeError(
                f"Got {str(self.output)!r}, which another process is writing; wait for its end, "
                "or choose another file"
            ) from None
        with held:
            try:
                # Without a lock, two processes would write the same parts, each as a whole.
                yield
            finally:
                if not has_parts(self.output):
                    self._clear()
                    if os.name == "nt":  # where an open file cannot be removed
                        held.close()
                    # While it is held: later it may be the lock of another process.
                    with contextlib.suppress(OSError):
                        lock.unlink()
                    held.close()
                    with contextlib.suppress(OSError):  # another process has begun
                        self.folder.rmdir()

    def begin(self, *, resume: bool, overwrite: bool) -> int | None:
        """Return the number of parts that are finished, or None if the whole file is.

        Raises
        ------
        FileExistsError
            If there is a file, or parts of it, and neither `resume` nor `overwrite` is true.
        ValueError
            If `resume` is true, but the file or the parts have another manifest, or a damaged one.
        """
        from sktransfer.utils.files import complete_file

        check_unfinished(self.output, resume=resume, overwrite=overwrite)
        if resume and has_parts(self.output):
            self._check(self._begun_manifest(), self.folder)
            for path in self.folder.glob("*.tmp"):
                path.unlink()
            return self._n_finished()
        if resume and self.output.exists():
            self._check(_manifest_of(self.output), self.output)
            return None
        self._clear()
        with complete_file(self._manifest_file, durable=True) as unfinished:
            unfinished.write_text(json.dumps(self._manifest, indent=2))
        return 0

    def write(self, block: int, table: Any) -> None:
        """Write a part."""
        from sktransfer.embedding.output import ParquetFile
        from sktransfer.utils.files import complete_file

        with (
            complete_file(self._path(block), durable=True) as unfinished,
            ParquetFile(unfinished, self.schema) as file,
        ):
            file.append(table)

    def join(self) -> tuple[int, list[str]]:
        """Join the parts to the file, and remove them.

        Returns
        -------
        n_broken : int
            Number of images that cannot be read.
        problems : list of str
            The first of them, each with the reason.
        """
        from sktransfer.utils.files import complete_file

        joined = self.folder / "joined.parquet"
        with complete_file(joined, durable=True) as unfinished:
            n_broken, problems = self._join_to(unfinished)
        os.replace(joined, self.output)
        self._clear()
        return n_broken, problems

    def _join_to(self, path: Path) -> tuple[int, list[str]]:
        from sktransfer.embedding.output import ParquetFile, import_parquet

        n_broken, problems = 0, list[str]()
        with ParquetFile(path, self.schema) as file:
            for block in range(len(self._blocks)):
                with import_parquet().ParquetFile(self._path(block)) as part:
                    table = part.read()
                file.append(table)
                broken = table.filter(table["error"].is_valid()).select(["path", "error"])
                n_broken += len(broken)
                problems += [
                    f"{row['path'] or 'missing path'}: {row['error']}"
                    for row in broken.slice(0, MAX_LISTED + 1).to_pylist()
                ]
                del problems[MAX_LISTED + 1 :]
        return n_broken, problems

    def _path(self, block: int) -> Path:
        return self.folder / f"{block:06}.parquet"

    def _n_finished(self) -> int:
        """Count the parts up to the first one that is missing, or damaged by a power failure."""
        from sktransfer.embedding.output import import_parquet

        for block, rows in enumerate(self._blocks):
            try:
                # All of it: the metadata at its end may be there without the rest.
                with import_parquet().ParquetFile(self._path(block)) as part:
                    if len(part.read()) != len(rows):
                        return block
            except (OSError, ValueError):  # pyarrow's ArrowInvalid is a ValueError
                return block
        return len(self._blocks)

    def _begun_manifest(self) -> dict[str, Any]:
        """Read the manifest of the parts that are there."""
        with contextlib.suppress(ValueError):
            manifest = json.loads(self._manifest_file.read_bytes())
            if isinstance(manifest, dict):
                return manifest
        raise ValueError(
            f"Got {str(self._manifest_file)!r}, which is damaged, but expected a JSON object that "
            "says what the parts are; begin again with --overwrite"
        )

    def _check(self, manifest: dict[str, Any], begun: Path) -> None:
        """Raise a ValueError if what was begun has another manifest."""
        for name, value in self._manifest.items():
            if manifest.get(name) != value:
                raise ValueError(
                    f"Got --resume with {name} {value!r}, but expected {manifest.get(name)!r}, as "
                    f"in {str(begun)!r}; pass the same arguments, or begin again with --overwrite"
                )

    def _clear(self) -> None:
        """Remove the parts but the lock, first the manifest, without which they do not count."""
        self._manifest_file.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name != "lock" and _OWN_NAME.fullmatch(path.name):
                path.unlink()


def parts_folder(output: Path) -> Path:
    """Return the folder of the parts of a file.

    Examples
    --------
    >>> str(parts_folder(Path("photos.parquet")))
    'photos.parquet.parts'
    """
    return output.with_name(f"{output.name}.parts")


def has_parts(output: Path) -> bool:
    """Return whether there are finished parts of a file."""
    folder = parts_folder(output)
    return (folder / "manifest.json").exists() and any(folder.glob("*.parquet"))


def check_parts_folder(output: Path) -> None:
    """Raise a FileExistsError if the folder of the parts of a file has any other content."""
    folder = parts_folder(output)
    if not os.path.lexists(folder):
        return
    problem = None
    if folder.is_symlink() or not folder.is_dir():
        problem = "a link" if folder.is_symlink() else "a file"
    else:
        with os.scandir(folder) as entries:
            others = sorted(
                entry.name
                for entry in entries
                if not (_OWN_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False))
            )
        if others:
            problem = f"a folder with {', '.join(others[:MAX_LISTED])}"
    if problem:
        raise FileExistsError(
            f"Got {str(folder)!r}, {problem}, but expected no such path, or a folder of parts that "
            "this command has written; move it away, or choose another file"
        )


def check_unfinished(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise a FileExistsError if a file or parts of it exist, and no option says what to do."""
    if resume or overwrite:
        return
    if has_parts(output):
        raise FileExistsError(
            f"Got {str(output)!r}, but parts of it are in {str(parts_folder(output))!r}; go on "
            "with --resume, or begin again with --overwrite"
        )
    if output.exists():
        raise FileExistsError(
            f"Got {str(output)!r}, but expected a new file; replace it with --overwrite"
        )


def _manifest_of(output: Path) -> dict[str, Any]:
    """Return the manifest of a file; an empty one if it is another kind of file."""
    from sktransfer.embedding.output import import_parquet

    try:
        metadata = import_parquet().read_schema(output).metadata or {}
        manifest = json.loads(metadata.get(_METADATA.encode(), b"{}"))
    except ValueError:
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _hold(lock: Path) -> contextlib.ExitStack:
    """Hold a lock until the stack is closed.

    Raises
    ------
    BlockingIOError
        If another process holds it.
    """
    from sktransfer.utils.files import locked_file

    while True:
        lock.parent.mkdir(exist_ok=True)
        # A process that ends removes the lock. One that was opened before keeps nobody away.
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:
            lock.open("a").close()
            before = lock.stat()
            stack.enter_context(locked_file(lock))
            if os.path.samestat(before, lock.stat()):
                return stack.pop_all()
