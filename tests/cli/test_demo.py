import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from sktransfer.cli.demo import _title
from sktransfer.cli.main import main


@pytest.fixture
def photos(tmp_path):
    """Create a folder with two classes of 14 crops each."""
    random = np.random.RandomState(0)
    for name, photograph in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(14):
            top, left = random.randint(0, 300, 2)
            crop = Image.fromarray(photograph[top : top + 120, left : left + 120])
            crop.save(tmp_path / "photos" / name / f"{number}.jpg")
    return tmp_path / "photos"


def test_demo_runs_on_a_folder(photos, tmp_path, capsys):
    assert main(["demo", "--images", str(photos), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "21 training images and 7 held-out images, 2 classes" in printed
    # 31 fits on 21 images, and 7 predictions.
    assert "Embedded 28 images. Without the store, 31 fits would have embedded 658, 24 " in printed
    assert "1.000 on the 7 held-out images" in printed
    with Image.open(tmp_path / "out" / "result.png") as image:
        assert image.size == (1500, 750)


def test_demo_uses_the_folders_train_and_test(photos, tmp_path, capsys):
    for name in ("temple", "flower"):
        for split, numbers in (("train", range(10)), ("test", range(10, 14))):
            (tmp_path / "splits" / split / name).mkdir(parents=True)
            for number in numbers:
                file = f"{number}.jpg"
                (photos / name / file).rename(tmp_path / "splits" / split / name / file)
    arguments = ["demo", "--images", str(tmp_path / "splits"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "20 training images and 8 held-out images" in capsys.readouterr().out


def test_demo_rejects_a_small_class_before_embedding(photos, capsys):
    for number in range(6):
        (photos / "temple" / f"{number}.jpg").unlink()
    assert main(["demo", "--images", str(photos)]) == 1
    message = "Got 8 images of the class 'temple', but the demo needs 10 of each class"
    assert message in capsys.readouterr().err


def test_demo_rejects_a_missing_folder(tmp_path, capsys):
    assert main(["demo", "--images", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_demo_expands_the_home_folder(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    images = f"~/{photos.relative_to(tmp_path)}"
    assert main(["demo", "--images", images, "--output", "~/results"]) == 0
    assert (tmp_path / "results" / "result.png").is_file()


@pytest.mark.parametrize(
    ("names", "title"),
    [
        (["3"], "3 (90%)"),
        (["3", "9"], "3 → 9 (90%)"),
        (["cat", "dog"], "cat → dog (90%)"),
        (["dachshund"], "dachshund (90%)"),
        (["dachshund", "terrier"], "dachshund →\nterrier (90%)"),
        (["Norfolk terrier"], "Norfolk terr… (90%)"),
        (["Norfolk terrier", "cat"], "Norfolk terr… →\ncat (90%)"),
        (["cat", "Norfolk terrier"], "cat →\nNorfolk terr… (90%)"),
    ],
)
def test_titles_of_the_gallery_fit_their_columns(names, title):
    assert _title(names, 0.9) == title
    assert max(map(len, title.split("\n"))) <= 20
