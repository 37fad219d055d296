"""Measure the accuracy on corrupted test images with and without the augmentation "industrial".

`FineTunedImageClassifier` with its other defaults is trained on four fifths of the 432 photographs
of benchmarks/_sets.py, with augmented views of augment="standard" or augment="industrial". The same
is done with its head only, on frozen embeddings. Both are tested on the last fifth: clean, with one
of four corruptions, and with all four. This script makes the corruptions with Pillow and numpy: no
color, 0.4 of the light, noise with a standard deviation of 20 of 255, and a blur of 1.2% of the
shorter side. Their strengths were fixed before any measurement.

The policy "industrial" was developed on other images: its probability of each distortion, and
noise with grains larger than a pixel, were chosen out of nine policies by the log-loss of the head,
in three folds of four seeds. The images were 84 of other themes (hobbies, seasonal, sports), and
kinds of animals (birds, fish, insects, mammals), which are test images with other labels and in
other splits. An earlier policy, which distorted most views, recovered 0.11 of the lost accuracy in
this test with the head only, and 0.02 with two blocks tuned.

`test corruptions` is trained on the corruptions of the test: each training image appears once clean
and once with each corruption, with views of "standard". The policies are measured with three views
per image and with seven, the default of "industrial". More views had improved "industrial", but
hardly "standard", on the development images and on other folds of the photographs.

The run fails unless "industrial" with its default number of views and two blocks tuned recovers
half of the accuracy that "standard" loses between clean images and the mean over the four single
corruptions.

    python benchmarks/industrial.py [--folds 0,1,2,3,4] [--json PATH]
"""

from __future__ import annotations

from functools import cache

import numpy as np
from _common import command_line, finish, split
from PIL import Image, ImageEnhance, ImageFilter

from sktransfer import FineTunedImageClassifier
from sktransfer.data.decoding import decode

POLICIES = {
    "standard": {"augment": "standard"},
    "standard, 7 views": {"augment": "standard", "n_views": 7},
    "industrial, 3 views": {"augment": "industrial", "n_views": 3},
    "industrial": {"augment": "industrial"},
    "test corruptions": {"augment": "standard"},
}
STAGES = {"head": (0,), "tuned": (0, 2)}
MIN_RECOVERED = 0.5


def gray(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def dark(image: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(0.4)


def noisy(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(float)
    noise = np.random.default_rng(pixels.size).normal(0, 20, pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(0.012 * min(image.size)))


SINGLE = {"gray": gray, "dark": dark, "noisy": noisy, "blurred": blurred}
CORRUPTIONS = {
    "clean": lambda image: image,
    **SINGLE,
    "all four": lambda image: noisy(dark(gray(blurred(image)))),
}


def score(fold: int, policy: str, stages: str) -> dict[str, float]:
    """Train on clean images, and compute the accuracy for each corruption."""
    X, y, X_test, y_test = split(fold)
    classifier = FineTunedImageClassifier(
        unfreeze=STAGES[stages], **POLICIES[policy], random_state=0
    )
    names = CORRUPTIONS if policy == "test corruptions" else ["clean"]
    images = [corrupted(path, name) for name in names for path in X]
    classifier.fit(images, np.tile(y, len(names)))
    return {
        name: classifier.score([corrupted(path, name) for path in X_test], y_test)
        for name in CORRUPTIONS
    }


@cache
def corrupted(path: str, name: str) -> np.ndarray:
    """Load an image and apply a corruption."""
    return np.asarray(CORRUPTIONS[name](Image.fromarray(decode(path))))


def measure(folds: list[int], policy: str, stages: str) -> dict[str, float]:
    """Compute the mean accuracy for each corruption, and over the four single corruptions."""
    scores = [score(fold, policy, stages) for fold in folds]
    means = {name: float(np.mean([fold[name] for fold in scores])) for name in CORRUPTIONS}
    means["one corruption"] = float(np.mean([means[name] for name in SINGLE]))
    line = "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    print(stages, policy, line, flush=True)
    return {name: round(mean, 4) for name, mean in means.items()}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--folds", default="0,1,2,3,4", help="default: %(default)s")
    options = parser.parse_args()
    folds = [int(fold) for fold in options.folds.split(",")]
    result: dict = {"folds": folds}
    for stages in STAGES:
        accuracy = {policy: measure(folds, policy, stages) for policy in POLICIES}
        standard = accuracy["standard"]
        result[stages] = {"accuracy": accuracy}
        for name in ("one corruption", "all four"):
            lost = standard["clean"] - standard[name]
            recovered = {
                policy: round((accuracy[policy][name] - standard[name]) / lost, 4)
                for policy in list(POLICIES)[1:]
            }
            result[stages] |= {f"lost, {name}": round(lost, 4), f"recovered, {name}": recovered}
            print(f"{stages}, {name}: lost {lost:.3f}, recovered {recovered}")
    recovered = result["tuned"]["recovered, one corruption"]["industrial"]
    failures = [f"industrial recovers {recovered} of the lost accuracy, expected {MIN_RECOVERED}"]
    finish(result, failures if recovered < MIN_RECOVERED else [], options.json)


if __name__ == "__main__":
    main()
