"""The command line in this process, and folders of small images for it."""

import inspect
from pathlib import Path

from click.testing import CliRunner
from helpers import Tiny, colored_images
from PIL import Image

from sktransfer import PretrainedFeatureExtractor
from sktransfer.cli.main import cli

# Small images, and a head only: a fit takes a second.
QUICK = ("--image-size", "32", "--strategy", "frozen")

# Until click 8.2, both streams are one by default.
_OLD = "mix_stderr" in inspect.signature(CliRunner).parameters
_RUNNER = CliRunner(**({"mix_stderr": False} if _OLD else {}))


def run(*arguments, code=0, **options):
    """Run a command; check its exit status, and return its result with `stdout` and `stderr`."""
    result = _RUNNER.invoke(cli, list(map(str, arguments)), prog_name="sktransfer", **options)
    assert result.exit_code == code, result.output
    return result


def tiny_extractor(backbone, image_size, cache, notes, *, skip_broken=False):
    """Replace `make_extractor`: embed with a small network."""
    on_error = "nan" if skip_broken else "raise"
    return PretrainedFeatureExtractor(Tiny, cache=cache, on_error=on_error, verbose=notes.verbose)


def save_classes(root, n=8, seed=0):
    """Save `n` images for each of three classes that differ in color; return the folder."""
    X, y = colored_images(3 * n, seed=seed)
    for row, (pixels, label) in enumerate(zip(X, y, strict=True)):
        folder = Path(root, label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{row:02}.png")
    return Path(root)


def save_splits(root):
    """Save images of three classes in folders for train, val and test; return the folder."""
    for seed, (split, n) in enumerate({"train": 8, "val": 3, "test": 4}.items()):
        save_classes(Path(root, split), n, seed)
    return Path(root)


def save_broken(path):
    """Write a file that has the extension of an image, and is none."""
    Path(path).write_bytes(b"no image")
    return Path(path)


def paths_below(folder):
    return sorted(map(str, Path(folder).rglob("*.png")))


def write_csv(path, header, rows):
    lines = [header, *(",".join(row) for row in rows)]
    Path(path).write_text("\n".join(lines) + "\n")
    return Path(path)
