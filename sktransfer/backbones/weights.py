"""Loading of weights from a file, torch's hub folder or the internet; and their digest."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load, load_file, save, save_file

from sktransfer.utils.errors import WeightsNotFoundError
from sktransfer.utils.files import complete_file

# Long enough for a DNS lookup and one round trip, short enough not to look like a hang.
REACH_SECONDS = 0.8
# Integers as wide as the dtypes that numpy lacks.
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16}


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read a state dict without running code from the file.

    Parameters
    ----------
    path : path
        A `.safetensors` file, or a `.pth` or `.pt` that torch reads with ``weights_only=True``. If
        the file is a checkpoint with weights under `"state_dict"` or `"model"`, these are returned.

    Raises
    ------
    WeightsNotFoundError
        If the file does not exist.
    ValueError
        If the file does not contain a state dict.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise WeightsNotFoundError(
            f"Got weights={str(path)!r}, but there is no such file (looked in "
            f"{path.absolute().parent})"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"Got weights={str(path)!r}, but the file could not be read as a state dict: it is "
            "damaged, or contains objects that would have to run code "
            f"({type(error).__name__}). Save one with torch.save(model.state_dict(), path) or "
            "safetensors.torch.save_file(model.state_dict(), path)"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = isinstance(content, Mapping) and all(torch.is_tensor(v) for v in content.values())
    if not tensors:
        raise ValueError(
            f"Got weights={str(path)!r}, which contains a {type(content).__name__}, but expected a "
            "state dict (names to tensors), as torch.save(model.state_dict(), path) writes it"
        )
    return dict(content)


def save_state_dict(state: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Write a `.safetensors` file; an old file stays until the new one is complete.

    Raises
    ------
    TypeError
        If `path` is not a path.
    ValueError
        If the path does not end in .safetensors.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"Got path={path!r}, but expected the path of a .safetensors file")
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"Got the path {str(path)!r}, but expected one that ends in .safetensors")
    with complete_file(path) as unfinished:
        save_file(_copies(state), unfinished)


def tensors_to_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return the content of a `.safetensors` file."""
    return save(_copies(tensors))


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors: safetensors refuses those that share memory or are not contiguous."""
    return {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}


def tensors_of_bytes(content: bytes) -> dict[str, torch.Tensor]:
    """Return the tensors in the content of a `.safetensors` file.

    Raises
    ------
    ValueError
        If it is not one.
    """
    try:
        return load(content)
    except Exception as error:  # SafetensorError, and KeyError for an unknown dtype
        raise ValueError(f"it has no tensors in the format safetensors ({error})") from error


def hub_path(url: str) -> Path:
    """Return the path of a downloaded file in torch's hub folder, below `TORCH_HOME`."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name


def fetch(url: str, name: str) -> Path:
    """Return the path of weights in torch's hub folder; download them once if missing.

    Parameters
    ----------
    url : str
        Address of the file; its name ends in the first digits of its SHA-256, which are checked.
    name : str
        Name of the backbone, for the error message.

    Raises
    ------
    WeightsNotFoundError
        Within a second, if the file is not on this machine and its host cannot be reached.
    """
    path = hub_path(url)
    if path.is_file():
        return path
    require_reachable(
        url,
        f"The weights of {name!r} are not on this machine: {path.name} is not in {path.parent}",
        f"put it there, or pass its path (weights='{path.name}')",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            _download(url, path, name)
    return path


def require_reachable(url: str, missing: str, remedy: str) -> None:
    """Check within a second that a host answers.

    Parameters
    ----------
    url : str
        Address of the file.
    missing : str
        The beginning of the message: the missing file, and the searched folder.
    remedy : str
        How to use the file after it has been downloaded elsewhere.

    Raises
    ------
    WeightsNotFoundError
    """
    if not _reachable(url):
        raise WeightsNotFoundError(
            f"{missing}, and {urlparse(url).hostname} cannot be reached to download it. On a "
            f"machine with a network, download {url} and {remedy}; or use random values "
            "(weights=None), or the backbone whose weights come with the installation "
            "(backbone='efficientnet_lite0')"
        )


def digest_tensors(named: Iterable[tuple[str, torch.Tensor]], *more: str) -> bytes:
    """Compute 16 bytes of BLAKE2b over the names, shapes, dtypes and values of weights."""
    digest = hashlib.blake2b(digest_size=16)
    for text in more:
        digest.update(text.encode() + b"\0")
    for name, tensor in named:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        values = tensor.detach().cpu().contiguous()
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def to_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Copy tensors to numpy arrays, for the state of a fitted estimator.

    A dtype that numpy lacks, such as bfloat16, is kept as bits under its name.

    Examples
    --------
    >>> arrays = to_arrays({"weight": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)})
    >>> arrays["weight"].dtype
    dtype([('bfloat16', '<i2')])
    >>> to_tensors(arrays)["weight"]
    tensor([ 1.5000, -2.0000], dtype=torch.bfloat16)
    """
    return {name: _to_array(tensor) for name, tensor in tensors.items()}


def to_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Convert the arrays of `to_arrays` to tensors, which share their memory if possible."""
    return {name: _to_tensor(array) for name, array in arrays.items()}


def _to_array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().to("cpu", copy=True)
    try:
        return tensor.numpy()
    except TypeError:
        bits = _INTEGER_OF_SIZE[tensor.itemsize]
        name = str(tensor.dtype).removeprefix("torch.")
        array = tensor.contiguous().view(bits).numpy()
        return array.view([(name, array.dtype)])


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    if not array.flags.writeable:  # such as a file that joblib maps into a worker's memory
        array = array.copy()
    names = array.dtype.names
    if not names:
        return torch.from_numpy(array)
    return torch.from_numpy(array[names[0]].copy()).view(getattr(torch, names[0]))


def _download(url: str, path: Path, name: str) -> None:
    expected = path.stem.rpartition("-")[2]
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=expected)
    except OSError as error:
        raise WeightsNotFoundError(
            f"Downloading the weights of {name!r} failed ({error}). Download {url} by other means "
            f"and put it into {path.parent}"
        ) from error


def _reachable(url: str) -> bool:
    """Try to connect to the host of `url`, or to its proxy, within a time limit."""
    target = urlparse(url)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urlparse(proxy if "://" in proxy else f"http://{proxy}")
    address = (target.hostname, target.port or (443 if target.scheme == "https" else 80))
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=REACH_SECONDS).close()
        except OSError:
            return
        answered.set()

    # In a thread, because DNS lookup ignores the timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return answered.is_set()
