"""Combine images with ordinary columns: a ColumnTransformer embeds one column of a DataFrame.

Each row of the table is a crop from one of scikit-learn's two sample photographs: the path of the
crop and its position. The task is to predict which photograph it comes from. That takes the image:
the position carries no information, because both photographs are cut at the same positions.

    python examples/03_images_beside_columns.py
"""

import tempfile
from pathlib import Path

import pandas as pd
from PIL import Image
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor


def make_table(folder, side=100):
    """Write the crops to a folder, and return their table."""
    rows = []
    for name, photograph in zip(("temple", "flower"), load_sample_images().images, strict=True):
        height, width, _ = photograph.shape
        for top in range(0, height - side + 1, side):
            for left in range(0, width - side + 1, side):
                path = Path(folder, f"{name}-{top:03}-{left:03}.png")
                Image.fromarray(photograph[top : top + side, left : left + side]).save(path)
                rows.append({"file": str(path), "top": top, "left": left, "photograph": name})
    return pd.DataFrame(rows)


def main():
    with tempfile.TemporaryDirectory() as folder:
        table = make_table(folder)
        X, y = table[["file", "top", "left"]], table["photograph"]

        columns = make_column_transformer(
            (make_pipeline(PretrainedFeatureExtractor(), StandardScaler()), ["file"]),
            (StandardScaler(), ["top", "left"]),
        )
        folds = StratifiedKFold(4, shuffle=True, random_state=0)
        for name, transformer in {
            "columns only": make_column_transformer((StandardScaler(), ["top", "left"])),
            "images and columns": columns,
        }.items():
            model = make_pipeline(transformer, LogisticRegression(C=0.03, max_iter=2000))
            scores = cross_val_score(model, X, y, cv=folds)
            print(f"{name}: accuracy {scores.mean():.3f} in {len(scores)} folds of {len(X)} crops")

        embedded = columns.set_output(transform="pandas").fit_transform(X)
        print(f"The classifier gets {embedded.shape[1]} columns")
        print(f"First and last column: {embedded.columns[0]}, {embedded.columns[-1]}")


if __name__ == "__main__":
    main()
