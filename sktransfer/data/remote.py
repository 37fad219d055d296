"""Images at URLs, through fsspec: their versions from metadata, and their content.

Requests run on threads, since they mostly wait. Temporary failures, such as a dropped connection,
are retried; permanent ones, such as a missing object, raise an `ImageError` at once.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlencode

from sktransfer.utils.errors import ImageError, import_optional

# Requests at the same time.
_MAX_REQUESTS = 16
_ATTEMPTS = 3
# Seconds that a request may take, and before the second attempt; twice as many before the third.
_TIMEOUT, _PAUSE = 60.0, 0.5

# "C:/cat.jpg" is a path. `pathlib` writes "s3:/bucket/cat.jpg".
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(?=[^/])")
_PASSWORD = re.compile(r"(?<=://)([^/@:?]*):[^/?]*@")

# Parts of a signed query, which change each time a URL is signed.
_SIGNATURE_PARAMETERS = ("x-amz-signature", "x-goog-signature", "signature", "sig")
_SIGNED_PREFIXES = ("x-amz-", "x-goog-")
_SIGNED_PARAMETERS = frozenset(
    {
        *("awsaccesskeyid", "expires", "googleaccessid", "key-pair-id", "policy", "signature"),
        *("se", "sig", "sip", "ske", "skoid", "sks", "skt", "sktid", "skv", "sp", "spr", "sr"),
        *("st", "sv"),  # Azure
    }
)

# Keys of the version and of the time in the metadata of various filesystems.
_VERSION_KEYS = ("ETag", "etag", "Content-MD5", "md5Hash", "blob_id", "sha")
_TIME_KEYS = ("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "modify")

_TOO_MANY_REQUESTS, _REQUEST_TIMEOUT, _SERVER_ERRORS = 429, 408, 500
_MISSING, _REFUSED = (404, 410), (401, 403)

_Result = TypeVar("_Result")


class RemoteVersion(NamedTuple):
    """What identifies the content of an image at a URL in a cache.

    Parameters
    ----------
    name : str
        See `RemoteFile.name`.
    version : str
        The ETag, else the time of the last change, else a digest of the content.
    size : int or None
        In bytes, if the server says it.
    """

    name: str
    version: str
    size: int | None


@dataclass(frozen=True)
class RemoteFile:
    """An image at a URL."""

    url: str

    @property
    def name(self) -> str:
        """The URL without its password and signature, which may change.

        Examples
        --------
        >>> RemoteFile("https://me:secret@host/cat.jpg?id=5&Expires=9&Signature=aB").name
        'https://me@host/cat.jpg?id=5'
        """
        address, mark, query = self._split()
        parts = parse_qsl(query, keep_blank_values=True)
        if not any(key.lower() in _SIGNATURE_PARAMETERS for key, _ in parts):
            return address + mark + query
        unsigned = [
            (key, value)
            for key, value in parts
            if key.lower() not in _SIGNED_PARAMETERS
            and not key.lower().startswith(_SIGNED_PREFIXES)
        ]
        return f"{address}?{urlencode(unsigned)}" if unsigned else address

    def __str__(self) -> str:
        """Return the URL without anything that may be secret, for messages.

        Examples
        --------
        >>> str(RemoteFile("https://me:secret@host/cat.jpg?token=5"))
        'https://me@host/cat.jpg?...'
        """
        address, mark, _ = self._split()
        return f"{address}?..." if mark else address

    def _split(self) -> tuple[str, str, str]:
        """Split the URL before its query; only that of a web server has one."""
        url = _PASSWORD.sub(r"\1@", self.url)
        return url.partition("?") if url.startswith("http") else (url, "", "")


def as_remote_file(text: str) -> RemoteFile | None:
    """Return the file that a URL names, or None if a string is not a URL.

    Examples
    --------
    >>> as_remote_file("S3://bucket/cat.jpg"), as_remote_file("C:/cat.jpg")
    (RemoteFile(url='s3://bucket/cat.jpg'), None)
    """
    match = _URL.match(text)
    if match is None:
        return None
    scheme, slashes = match[1].lower(), match[2]
    if slashes == "/":
        slashes = "///" if scheme == "file" else "//"
    return RemoteFile(f"{scheme}:{slashes}{text[match.end() :]}")


class RemoteFiles:
    """Reads images at URLs, and remembers their versions: one object for a fit or a prediction.

    Several threads may use it at once.
    """

    def __init__(self) -> None:
        self._versions: dict[RemoteFile, RemoteVersion | ImageError] = {}
        self._started: dict[RemoteFile, Future[bytes]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[RemoteFiles], tuple[()]]:
        return RemoteFiles, ()  # Another process, or a later one, asks again.

    def version(
        self, file: RemoteFile, others: Callable[[], Iterable[RemoteFile]] = tuple
    ) -> RemoteVersion:
        """Return the version of a file; request those of some others in parallel, if it is unknown.

        Raises
        ------
        ImageError
            If the file is missing, or cannot be reached.
        ImportError
            If fsspec, or its package for the protocol, is missing.
        """
        with self._lock:
            if file not in self._versions:
                unknown = [one for one in {file, *others()} if one not in self._versions]
                self._request_versions(unknown)
            version = self._versions[file]
        if isinstance(version, ImageError):
            raise ImageError(version.reason) from version.__cause__
        return version

    def _request_versions(self, files: list[RemoteFile]) -> None:
        if len(files) == 1:  # Starting a thread would take longer.
            self._versions[files[0]] = _version_or_error(files[0])
            return
        with ThreadPoolExecutor(_MAX_REQUESTS, "sktransfer-metadata") as pool:
            versions = pool.map(_version_or_error, files)
            self._versions.update(zip(files, versions, strict=True))

    def read(self, file: RemoteFile) -> bytes:
        """Read a file, or wait for it if that has been started.

        Raises
        ------
        ImageError, ImportError
            As in `version`; also if the server sends fewer bytes than it promised.
        """
        started = self._started.pop(file, None)
        if started is not None:
            with suppress(CancelledError):
                return started.result()
        return self._fetch(file)

    def keep(self, file: RemoteFile, content: bytes) -> None:
        """Keep the content of a file until the next `read` of it."""
        future = self._started[file] = Future()
        future.set_result(content)

    @contextmanager
    def fetching(self) -> Iterator[Callable[[Iterable[RemoteFile]], None]]:
        """Return a function that starts to read files on threads, for `read`, in a context."""
        pool = ThreadPoolExecutor(_MAX_REQUESTS, "sktransfer-fetch")
        requested = set[RemoteFile]()

        def start(files: Iterable[RemoteFile]) -> None:
            for file in files:
                if file not in self._started:
                    self._started[file] = pool.submit(self._fetch, file)
                    requested.add(file)

        try:
            yield start
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for file in requested:
                self._started.pop(file, None)

    def _fetch(self, file: RemoteFile) -> bytes:
        version = self._versions.get(file)
        return _read(file, version.size if isinstance(version, RemoteVersion) else None)


def _version_or_error(file: RemoteFile) -> RemoteVersion | ImageError:
    try:
        return _version(file)
    except ImageError as error:
        return error


def _version(file: RemoteFile) -> RemoteVersion:
    def request(filesystem: Any, path: str, limits: dict[str, float]) -> Mapping[str, Any]:
        filesystem.invalidate_cache(path)  # the user may have listed the folder long ago
        return filesystem.info(path, **limits)

    info = _retried(file, request)
    if info.get("type") == "directory":
        raise ImageError("Got a folder, but expected an image.")
    size = info.get("size")
    tag, modified = (
        next((str(info[key]) for key in keys if info.get(key)), None)
        for keys in (_VERSION_KEYS, _TIME_KEYS)
    )
    if tag is not None:
        return RemoteVersion(file.name, tag, size)
    if modified is not None and size is not None:
        return RemoteVersion(file.name, modified, size)
    content = _read(file, None)
    return RemoteVersion(file.name, hashlib.blake2b(content).hexdigest(), len(content))


def _read(file: RemoteFile, size: int | None) -> bytes:
    def request(filesystem: Any, path: str, limits: dict[str, float]) -> bytes:
        content = filesystem.cat_file(path, **limits)
        if size is not None and len(content) != size:
            raise OSError(f"got {len(content):,} bytes, but expected {size:,}")
        return content

    return _retried(file, request)


def _retried(file: RemoteFile, request: Callable[[Any, str, dict[str, float]], _Result]) -> _Result:
    """Call a function of filesystem, path and timeout; repeat it after a temporary error."""
    attempt = 0
    while True:
        try:
            filesystem, path = _filesystem(file)
            # Only asynchronous filesystems can be interrupted.
            limits = {"timeout": _TIMEOUT} if filesystem.async_impl else {}
            return request(filesystem, path, limits)
        except (ImageError, ImportError, MemoryError):
            raise
        except Exception as error:  # Each filesystem has errors of its own.
            attempt += 1
            reason, is_final = _why(error, file)
            if is_final:
                raise ImageError(reason) from error
            if attempt == _ATTEMPTS:
                raise ImageError(f"{reason} Tried {_ATTEMPTS} times.") from error
        time.sleep(_PAUSE * 2 ** (attempt - 1))


def _filesystem(file: RemoteFile) -> tuple[Any, str]:
    """Return the filesystem of a URL, and the path in it."""
    fsspec = import_optional("fsspec", extra="remote", purpose="An image at a URL")
    scheme = file.url.partition(":")[0]
    try:
        # Threads share asynchronous instances; of the other kind, each thread has one.
        return fsspec.core.url_to_fs(file.url)
    except ImportError as error:
        raise ImportError(
            f"An image at a URL of {scheme}:// needs another package: {error}. It is the package "
            f"with which fsspec reads {scheme}://, such as s3fs, gcsfs or aiohttp"
        ) from error
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise
        raise ImageError(
            f"Got a URL of {scheme}://, a protocol that fsspec does not know. Correct it, or pass "
            "the image as bytes."
        ) from error


def _why(error: Exception, file: RemoteFile) -> tuple[str, bool]:
    """Return the problem with its remedy, and whether another attempt would be useless."""
    error = _underlying(error)
    status = _status(error)
    answer = f" (status {status})" if status else ""
    if status in _MISSING or isinstance(error, FileNotFoundError):
        return f"There is no such object{answer}. Correct the URL, or leave it out.", True
    if (
        status in _REFUSED
        or isinstance(error, PermissionError)
        or "Credentials" in type(error).__name__
    ):
        return (
            f"Access was refused{answer}. Check your credentials and permissions, and whether a "
            "signed URL has expired.",
            True,
        )
    if isinstance(error, IsADirectoryError):
        return "Got a folder, but expected an image.", True
    if isinstance(error, TimeoutError):
        return f"No answer within {_TIMEOUT:g} s. Check the network, or try again later.", False
    if status:
        is_final = status < _SERVER_ERRORS and status not in (_TOO_MANY_REQUESTS, _REQUEST_TIMEOUT)
        return f"The server answered with status {status}. Try again later.", is_final
    return (
        f"The connection failed: {_text(error, file)}. Check the network, or try again later.",
        False,
    )


def _underlying(error: Exception) -> Exception:
    """Return the error of the connection, which fsspec reports as a missing file for HTTP."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        is_of_connection = type(cause).__module__.startswith("aiohttp") or isinstance(
            cause, TimeoutError
        )
        return cause if is_of_connection else error
    return error


def _status(error: Exception) -> int | None:
    """Return the status of HTTP that an error reports, whatever its library calls it."""
    values = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((value for value in values if isinstance(value, int) and 400 <= value < 600), None)


def _text(error: Exception, file: RemoteFile) -> str:
    text = str(error).replace(file.url, str(file)).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
