"""Where the file of a store is: in its directory, or on a local disk if that is on a network.

SQLite locks a file and shares memory between processes, which network file systems do not do, or
only between the processes of one machine.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sktransfer.utils.config import NETWORK_CACHE
from sktransfer.utils.errors import warn_user

_NETWORK_TYPES = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "9p", "afs"),
        *("lustre", "gpfs", "beegfs", "ceph", "glusterfs", "gfs2", "ocfs2", "panfs", "pvfs2"),
        "wekafs",
    }
)
# After "fuse.". Other file systems of FUSE, such as mergerfs, are on local disks.
_NETWORK_FUSE = frozenset(
    {
        *("sshfs", "rclone", "davfs", "curlftpfs", "smbnetfs"),
        *("ceph", "ceph-fuse", "glusterfs", "juicefs", "lustre", "moosefs", "mfs"),
        *("s3fs", "gcsfuse", "goofys", "mountpoint-s3", "blobfuse", "blobfuse2"),
    }
)
_MOUNT_TABLE = Path("/proc/self/mountinfo")
_ESCAPE = re.compile(r"\\([0-7]{3})")

_warned: set[Path] = set()


class Location(NamedTuple):
    """The directory of a store's file, and whether it is on a network file system."""

    directory: Path
    on_network: bool


def locate(directory: Path, *, stay: bool) -> Location:
    """Choose the directory of a store's file, and warn once if it is not the one that was given.

    Parameters
    ----------
    directory : Path
        Absolute; it need not exist.
    stay : bool
        Whether only one machine uses the directory, wherever it is.
    """
    kind = network_type(directory, read_mount_table())
    if kind is None or stay or NETWORK_CACHE.get() == "1":
        return Location(directory, kind is not None)
    local = _local_directory(directory)
    if directory not in _warned:
        _warned.add(directory)
        warn_user(
            f"Got the directory {str(directory)!r} for embeddings, but it is on a network file "
            f"system ({kind}), where SQLite is not safe. This machine keeps them in "
            f"{str(local)!r} instead. Pass a directory on a local disk, and carry embeddings to "
            "other machines with EmbeddingStore.export() and absorb(); or set "
            f"{NETWORK_CACHE.name}=1 if never more than one machine uses the directory.",
        )
    return Location(local, on_network=False)


def read_mount_table() -> str:
    """Return the table of mounted file systems; empty if the system has none that can be read."""
    try:
        return _MOUNT_TABLE.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def network_type(path: Path, mount_table: str) -> str | None:
    r"""Return the type of the file system of a path if it is on a network, or None.

    Parameters
    ----------
    path : Path
        Absolute, without links.
    mount_table : str
        In the format of Linux's ``/proc/self/mountinfo``. Lines in any other format are ignored.

    Examples
    --------
    >>> table = '''21 1 8:1 / / rw - ext4 /dev/sda1 rw
    ... 60 21 0:52 / /my\\040data rw - nfs4 server:/data rw'''
    >>> network_type(Path("/my data/embeddings"), table)
    'nfs4'
    >>> network_type(Path("/home/me"), table) is None
    True
    """
    parents = {str(path), *map(str, path.parents)}
    # Of mounts at the same point, the last one hides the others.
    _, kind = max(
        (
            ((len(point), number), kind)
            for number, (point, kind) in enumerate(_mounts(mount_table))
            if point in parents
        ),
        default=(0, ""),
    )
    name = kind.removeprefix("fuse.")
    is_network = name in (_NETWORK_TYPES if name == kind else _NETWORK_FUSE)
    return kind if is_network else None


def _mounts(mount_table: str) -> Iterator[tuple[str, str]]:
    """Yield the mount point and the type of each file system."""
    for line in mount_table.split("\n"):
        # A number of optional fields comes before the hyphen.
        left, _, right = line.partition(" - ")
        fields, types = left.split(" "), right.split(" ")
        if len(fields) > 5 and types[0]:
            # Some file systems of FUSE have their name in the column of the source only.
            kind = f"fuse.{types[1]}" if types[0] == "fuse" and len(types) > 1 else types[0]
            yield _unescaped(fields[4]), kind


def _unescaped(point: str) -> str:
    """Decode the characters that the table has as octal numbers: spaces, tabs and the like."""
    return _ESCAPE.sub(lambda code: chr(int(code[1], 8)), point)


def _local_directory(directory: Path) -> Path:
    """Return a directory of this machine for the embeddings of a directory on a network."""
    digest = hashlib.blake2b(os.fsencode(directory), digest_size=8).hexdigest()
    return _local_root() / f"{directory.name}-{digest}"


def _local_root() -> Path:
    with contextlib.suppress(RuntimeError):  # the user has no home
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().resolve()
        if network_type(cache, read_mount_table()) is None and _is_writable(cache):
            return cache / "sktransfer" / "stores"
    return temporary_root() / "stores"


def _is_writable(directory: Path) -> bool:
    """Return whether a directory can be written to, or created."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return os.access(existing, os.W_OK)


def temporary_root() -> Path:
    """Return this user's private folder in the system's temporary one; create it if necessary."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    root = Path(tempfile.gettempdir()) / f"sktransfer-{user}"
    with contextlib.suppress(OSError):
        root.mkdir(0o700, exist_ok=True)
        if hasattr(os, "getuid") and os.lstat(root).st_uid != user:  # created by another user
            return root.with_name(f"{root.name}-{uuid.uuid4().hex}")
    return root
