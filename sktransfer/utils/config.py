"""The environment variables of the package: names, defaults and meaning, in one table."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """An environment variable.

    Parameters
    ----------
    name : str
    default : str
        The value if the variable is not set.
    meaning : str
        Its effect, in one sentence.
    """

    name: str
    default: str
    meaning: str

    def get(self) -> str:
        """Return the value in the environment of this process, or the default."""
        return os.environ.get(self.name, self.default)

    def set(self, value: str) -> None:
        """Set the value for this process and for the processes that it starts."""
        os.environ[self.name] = value


TUNE_MALLOC = Variable(
    "SKTRANSFER_TUNE_MALLOC",
    "1",
    "0 leaves glibc's malloc unchanged; otherwise malloc keeps the memory that tensors free.",
)
DEVICE_JPEG = Variable(
    "SKTRANSFER_DEVICE_JPEG",
    "1",
    "0 decodes JPEGs on the CPU, even if there is a CUDA device.",
)
SESSION = Variable(
    "SKTRANSFER_SESSION",
    "",
    "Directory of the session store; the package sets it for the processes that it starts.",
)
CACHE = Variable(
    "SKTRANSFER_CACHE",
    "auto",
    "Folder in which the command line keeps embeddings, as with --cache; auto deletes them.",
)
NETWORK_CACHE = Variable(
    "SKTRANSFER_NETWORK_CACHE",
    "0",
    "1 keeps embeddings in directories on network file systems, too: never for several machines.",
)

VARIABLES = (TUNE_MALLOC, DEVICE_JPEG, SESSION, CACHE, NETWORK_CACHE)
