"""Cross-validate a linear classifier on a folder with one subfolder of images per class.

    python examples/02_folder_of_images.py [FOLDER]

Without FOLDER, the script cuts scikit-learn's two sample photographs into crops, one class per
photograph. This is a toy problem: crops of one photograph look alike, so expect few errors.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import classification_report
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor, load_image_folder


def make_folder(folder, side=100):
    """Write crops of scikit-learn's two photographs, one folder for each."""
    for name, photograph in zip(("temple", "flower"), load_sample_images().images, strict=True):
        Path(folder, name).mkdir()
        height, width, _ = photograph.shape
        for top in range(0, height - side + 1, side):
            for left in range(0, width - side + 1, side):
                crop = photograph[top : top + side, left : left + side]
                Image.fromarray(crop).save(Path(folder, name, f"{top:03}-{left:03}.png"))


def evaluate(folder):
    """Print the scores of a linear classifier on frozen embeddings."""
    bunch = load_image_folder(folder)
    print(bunch.DESCR)

    names, counts = np.unique(bunch.labels, return_counts=True)
    smallest = counts.min()
    if smallest < 2:
        name = str(names[counts.argmin()])
        raise SystemExit(
            f"The class {name!r} has a single image, but cross-validation needs at least two per "
            "class."
        )
    folds = StratifiedKFold(min(5, smallest), shuffle=True, random_state=0)

    embed = PretrainedFeatureExtractor(on_error="nan", verbose=1)
    embeddings = embed.fit_transform(bunch.data)
    for error in embed.errors_:
        print(error)
    readable = ~np.isnan(embeddings).any(axis=1)

    # The pipeline reads the embeddings from the store, so no image is embedded again.
    pipeline = make_pipeline(
        PretrainedFeatureExtractor(), StandardScaler(), LogisticRegression(C=0.03, max_iter=2000)
    )
    y = bunch.labels[readable]
    predicted = cross_val_predict(pipeline, bunch.data[readable], y, cv=folds)
    print()
    print(classification_report(y, predicted, zero_division=0))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", nargs="?", type=Path, help="folder with one subfolder of images per class"
    )
    folder = parser.parse_args().folder
    if folder is not None:
        evaluate(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        make_folder(temporary)
        evaluate(temporary)


if __name__ == "__main__":
    main()
