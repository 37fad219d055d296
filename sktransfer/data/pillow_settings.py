"""Settings of Pillow that reach worker processes, so that they decode as their parent does.

They are not part of a pickle: a model that is loaded elsewhere must not change how that process
decodes images. A process writes them to a private file when it pickles an estimator, and only its
own workers read that file.
"""

from __future__ import annotations

import contextlib
import importlib
import pickle
import sys
from collections.abc import Iterator
from typing import Any

from joblib import wrap_non_picklable_objects
from PIL import Image

from sktransfer.store.session import read_from_parent, share_with_workers

# Switches that change what is decoded, and Pillow's own values: module, name, value.
_SWITCHES: tuple[tuple[str, str, Any], ...] = (
    ("PIL.Image", "MAX_IMAGE_PIXELS", 89478485),
    ("PIL.ImageFile", "LOAD_TRUNCATED_IMAGES", False),
    ("PIL.GifImagePlugin", "LOADING_STRATEGY", 0),
    ("PIL.PngImagePlugin", "MAX_TEXT_CHUNK", 2**20),
    ("PIL.PngImagePlugin", "MAX_TEXT_MEMORY", 2**26),
    ("PIL.TiffImagePlugin", "READ_LIBTIFF", False),
)


def share_pillow_settings() -> None:
    """Write the settings of this process for its workers, if they differ from Pillow's own."""
    changed = {}
    for module, name, usual in _SWITCHES:
        # A plugin that is not imported yet has its usual settings.
        value = getattr(sys.modules.get(module), name, usual)
        if value != usual:
            changed[name] = value
    openers = list(_pickled_openers())
    content = pickle.dumps((changed, openers))
    share_with_workers("pillow", content, is_usual=not changed and not openers)


def adopt_pillow_settings() -> None:
    """In a worker process, take over the settings that the parent has shared, if any."""
    content = read_from_parent("pillow")
    if content is None:
        return
    changed, openers = pickle.loads(content)
    for module, name, usual in _SWITCHES:
        if name in changed or module in sys.modules:
            setattr(importlib.import_module(module), name, changed.get(name, usual))
    if openers:
        Image.init()  # otherwise Pillow's own plugins could replace the openers later
    for pickled in openers:
        # A module may be missing, for example if it is in a folder that only the parent knows.
        with contextlib.suppress(Exception):
            Image.register_open(*pickle.loads(pickled))


def _pickled_openers() -> Iterator[bytes]:
    """Yield the pickled arguments of `Image.register_open` of each plugin that is not Pillow's."""
    for name, (factory, accept) in list(Image.OPEN.items()):
        if not factory.__module__.startswith("PIL."):
            # joblib also pickles plugins that are defined in a notebook.
            with contextlib.suppress(Exception):
                yield pickle.dumps(
                    wrap_non_picklable_objects((name, factory, accept), keep_wrapper=False)
                )
