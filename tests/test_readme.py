"""The README's blocks run in order on images with the names that they use."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.datasets import load_sample_images

README = Path(__file__).parent.parent / "README.md"


def save_crops(folder, name, photograph, count):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    for number in range(1, count + 1):
        top, left = random.randint(0, 200, 2)
        crop = Image.fromarray(photograph[top : top + 200, left : left + 300])
        crop.save(folder / f"{name}{number}.jpg")


def test_python_blocks_run(folder):
    china, flower = load_sample_images().images
    save_crops(folder, "cat", china, 2)
    save_crops(folder, "dog", flower, 1)
    save_crops(folder / "photos" / "cat", "", china, 6)
    save_crops(folder / "photos" / "dog", "", flower, 6)
    products = pd.DataFrame({"photo": sorted(map(str, folder.rglob("photos/*/*.jpg")))})
    products = products.assign(price=np.arange(12.0), weight=np.arange(12.0)[::-1])
    products["category"] = products["photo"].map(lambda path: Path(path).parent.name)

    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 7
    names = {"products": products}
    for block in blocks:
        exec(compile(block.replace(", ...]", "]"), "README.md", "exec"), names)
    assert names["search"].best_score_ == 1.0
    assert (folder / "embeddings" / "embeddings.sqlite").is_file()


def test_named_make_targets_exist():
    commands = re.findall(r"^make ([\w-]+) +#", README.read_text(), re.MULTILINE)
    targets = re.findall(r"^([\w-]+):", (README.parent / "Makefile").read_text(), re.MULTILINE)
    assert commands == ["demo", "test"]
    assert set(commands) <= set(targets)
