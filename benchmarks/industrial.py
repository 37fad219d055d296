"""Images taken under worse conditions than those that were learned from.

`FineTunedImageClassifier`, all else by default, learns from four fifths of the 432 photographs of
benchmarks/_sets.py, with copies of augment="standard" or augment="industrial"; and so does
its head alone, on frozen embeddings. It is tested on the last fifth as it is, and spoiled in four
ways by code of this script (Pillow and numpy): without color, at 0.4 of the light, with noise of
a standard deviation of 20 of 255, and blurred by 1.2% of the shorter side; and in all ways at once.
The strengths were fixed before anything was measured.

Development: how often each thing is wrong with a copy, and that grains of noise have a size, was
chosen among nine policies by the log-loss of the head alone, in three folds of four seeds, on 84
images of other themes (hobbies, seasonal, sports) and on kinds of animals (birds, fish, insects,
mammals), which are images of the test with other labels and in other splits. With the policy
before, in which each thing was wrong with most copies, this test had found 0.11 of what is lost
recovered by the head alone, and 0.02 with two blocks tuned.

`bound` knows what is coming: it is "standard" with each training image once as it is and once
spoiled in each of the ways. The policies are measured with three copies of each image and with
seven, which are the default of "industrial": that more copies help it, and "standard" hardly, had
been seen on the images above and on other folds of these.

Fails unless "industrial", as it is by default, recovers at least half of what "standard" loses
between the images as they are and the mean over the four ways, with two blocks tuned.

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
    "standard, 7 copies": {"augment": "standard", "n_views": 7},
    "industrial, 3 copies": {"augment": "industrial", "n_views": 3},
    "industrial": {"augment": "industrial"},
    "bound": {"augment": "standard"},
}
STAGES = {"head": (0,), "tuned": (0, 2)}
BAR = 0.5


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


ALONE = {"gray": gray, "dark": dark, "noisy": noisy, "blurred": blurred}
WAYS = {
    "as they are": lambda image: image,
    **ALONE,
    "all at once": lambda image: noisy(dark(gray(blurred(image)))),
}


def score(fold: int, policy: str, stages: str) -> dict[str, float]:
    """Learn from images as they are; test on others in each way."""
    X, y, X_test, y_test = split(fold)
    classifier = FineTunedImageClassifier(
        unfreeze=STAGES[stages], **POLICIES[policy], random_state=0
    )
    ways = WAYS if policy == "bound" else ["as they are"]
    classifier.fit([spoiled(path, way) for way in ways for path in X], np.tile(y, len(ways)))
    return {way: classifier.score([spoiled(path, way) for path in X_test], y_test) for way in WAYS}


@cache
def spoiled(path: str, way: str) -> np.ndarray:
    """Spoil an image in one of the ways."""
    return np.asarray(WAYS[way](Image.fromarray(decode(path))))


def measure(folds: list[int], policy: str, stages: str) -> dict[str, float]:
    """Give the mean accuracy in each way, and over the four alone."""
    found = [score(fold, policy, stages) for fold in folds]
    means = {way: float(np.mean([fold[way] for fold in found])) for way in WAYS}
    means["spoiled"] = float(np.mean([means[way] for way in ALONE]))
    print(stages, policy, "  ".join(f"{way} {mean:.3f}" for way, mean in means.items()), flush=True)
    return {way: round(mean, 4) for way, mean in means.items()}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--folds", default="0,1,2,3,4")
    options = parser.parse_args()
    folds = [int(fold) for fold in options.folds.split(",")]
    result: dict = {"folds": folds}
    for stages in STAGES:
        found = {policy: measure(folds, policy, stages) for policy in POLICIES}
        standard = found["standard"]
        result[stages] = {"accuracy": found}
        for place in ("spoiled", "all at once"):
            lost = standard["as they are"] - standard[place]
            recovered = {
                policy: round((found[policy][place] - standard[place]) / lost, 4)
                for policy in list(POLICIES)[1:]
            }
            result[stages] |= {f"lost {place}": round(lost, 4), f"recovered {place}": recovered}
            print(f"{stages}, {place}: lost {lost:.3f}, recovered {recovered}")
    recovered = result["tuned"]["recovered spoiled"]["industrial"]
    failures = [f"industrial: recovers {recovered} of what is lost; bar {BAR}"]
    finish(result, failures if recovered < BAR else [], options.json)


if __name__ == "__main__":
    main()
