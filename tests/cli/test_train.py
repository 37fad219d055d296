import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import QUICK, paths_below, run, save_broken, save_classes, save_splits, write_csv

import sktransfer
from sktransfer import FineTunedImageClassifier
from sktransfer.cli import train as train_module
from sktransfer.cli.train import _make_classifier
from sktransfer.export.show import read_summary


def test_train_saves_a_model_that_predicts_the_names_of_the_folders(photos, tmp_path):
    result = run("train", photos, "-o", tmp_path / "m.skt", *QUICK)
    model = sktransfer.load(tmp_path / "m.skt")
    assert model.classes_.tolist() == ["cat", "dog", "owl"]
    assert model.score(paths_below(photos), [path.split("/")[-2] for path in paths_below(photos)])
    assert result.stdout == ""
    assert "24 training images; 3 classes: cat, dog, owl\n" in result.stderr
    assert f"Wrote {tmp_path / 'm.skt'}" in result.stderr


def test_val_folders_validate_and_test_folders_are_scored(tmp_path, monkeypatch):
    root = save_splits(tmp_path / "splits")
    sizes = []
    fit = FineTunedImageClassifier.fit

    def recorded(self, X, y, **validation):
        sizes.append((len(X), len(y), *map(len, validation.values())))
        return fit(self, X, y, **validation)

    monkeypatch.setattr(FineTunedImageClassifier, "fit", recorded)
    result = run("train", root, "-o", tmp_path / "m.skt", *QUICK)
    assert sizes == [(24, 24, 9, 9)]
    assert "24 training images, 9 validation images, 12 test images; 3 classes" in result.stderr
    assert result.stdout.startswith("Test images: accuracy ")
    assert "of 12 images" in result.stdout


def test_train_prints_json(tmp_path):
    root = save_splits(tmp_path / "splits")
    result = run("train", root, "-o", tmp_path / "m.skt", *QUICK, "--json", "--quiet")
    printed = json.loads(result.stdout)
    assert printed["model"] == str(tmp_path / "m.skt")
    assert printed["classes"] == ["cat", "dog", "owl"]
    assert (printed["training_images"], printed["validation_images"]) == (24, 9)
    assert printed["test"]["images"] == 12
    assert [stage["stage"] for stage in printed["stages"]] == ["head"]
    assert result.stderr == ""


def test_same_seed_gives_the_same_model(photos, tmp_path):
    probabilities = []
    for name in ("a.skt", "b.skt"):
        run("train", photos, "-o", tmp_path / name, *QUICK, "--seed", 3)
        probabilities.append(sktransfer.load(tmp_path / name).predict_proba(paths_below(photos)))
    np.testing.assert_array_equal(*probabilities)
    assert sktransfer.load(tmp_path / "a.skt").random_state == 3


def test_saved_model_has_no_folder_of_this_machine(photos, tmp_path):
    run("train", photos, "-o", tmp_path / "m.skt", *QUICK, "--cache", tmp_path / "cache")
    assert (tmp_path / "cache" / "embeddings.sqlite").is_file()
    assert str(tmp_path) not in str(read_summary(tmp_path / "m.skt"))


def test_strategies_are_those_of_recommend_strategy():
    assert _make_classifier("auto", "efficientnet_lite0", None, False).unfreeze == "auto"
    assert _make_classifier("frozen", "efficientnet_lite0", None, False).unfreeze == (0,)
    assert _make_classifier("full", "efficientnet_lite0", None, False).unfreeze == (0, "all")
    zero, n_blocks = _make_classifier("staged", "efficientnet_lite0", None, False).unfreeze
    assert zero == 0
    assert 0 < n_blocks < 17


def test_image_size_can_be_a_pair_or_auto(photos, tmp_path):
    arguments = ["--strategy", "frozen", "--image-size", "32x48"]
    run("train", photos, "-o", tmp_path / "m.skt", *arguments)
    assert sktransfer.load(tmp_path / "m.skt").preprocessing_.crop == (32, 48)
    assert _make_classifier("auto", "efficientnet_lite0", None, False).image_size == "auto"
    result = run("train", photos, "-o", tmp_path / "m.skt", "--image-size", "big", code=2)
    assert "Got 'big', but expected auto, a side such as 224, or 192x256" in result.stderr


def test_groups_are_held_out_as_a_whole(photos, tmp_path, monkeypatch):
    images = paths_below(photos)
    groups = write_csv(
        tmp_path / "groups.csv",
        "path,group",
        [(path, f"patient {row % 8}") for row, path in enumerate(images)],
    )
    validation = {}
    fit = FineTunedImageClassifier.fit

    def recorded(self, X, y, X_val, y_val):
        validation.update(train=set(X), val=set(X_val))
        return fit(self, X, y, X_val=X_val, y_val=y_val)

    monkeypatch.setattr(FineTunedImageClassifier, "fit", recorded)
    run("train", photos, "-o", tmp_path / "m.skt", *QUICK, "--groups", groups)
    patients = {
        name: {images.index(path) % 8 for path in paths} for name, paths in validation.items()
    }
    assert patients["val"]
    assert not patients["train"] & patients["val"]
    assert patients["train"] | patients["val"] == set(range(8))


def test_groups_on_both_sides_of_the_folders_are_a_warning(tmp_path):
    root = save_splits(tmp_path / "splits")
    rows = [(path, "one") for path in paths_below(root)]
    groups = write_csv(tmp_path / "groups.csv", "path,group", rows)
    result = run("train", root, "-o", tmp_path / "m.skt", *QUICK, "--groups", groups)
    warning = "1 group with images in several of train, val and test (one), so scores are too"
    assert f"sktransfer: warning: {warning}" in result.stderr


def test_images_without_a_group_are_named(photos, tmp_path):
    images = paths_below(photos)
    groups = write_csv(tmp_path / "g.csv", "path,group", [(path, "a") for path in images[:-1]])
    result = run("train", photos, "-o", tmp_path / "m.skt", "--groups", groups, code=1)
    assert result.stderr == f"sktransfer: {groups} has no group for 1 image: {images[-1]}\n"
    write_csv(groups, "file,group", [])
    result = run("train", photos, "-o", tmp_path / "m.skt", "--groups", groups, code=1)
    assert "needs the columns path and group, but its columns: file, group" in result.stderr


def test_broken_images_are_listed_without_a_traceback(photos, tmp_path):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    for number in range(12):
        save_broken(root / "cat" / f"broken{number:02}.png")
    result = run("train", root, "-o", tmp_path / "m.skt", *QUICK, code=1)
    problems = result.stderr[result.stderr.index("sktransfer: ") :].splitlines()
    assert problems[0] == "sktransfer: 12 images cannot be read (see --skip-broken); the first 10:"
    assert len(problems) == 11
    assert problems[1].startswith(f"  {root / 'cat' / 'broken00.png'}: ")
    assert not (tmp_path / "m.skt").exists()


def test_skip_broken_leaves_images_out(tmp_path):
    root = save_splits(tmp_path / "splits")
    broken = [save_broken(root / split / "cat" / "broken.png") for split in ("train", "test")]
    arguments = ["train", root, "-o", tmp_path / "m.skt", *QUICK]
    run(*arguments, code=1)
    result = run(*arguments, "--skip-broken", "--json")
    assert all(str(path) in result.stderr for path in broken)
    message = f"sktransfer: warning: 1 image cannot be read, left out: {broken[0]}: "
    assert message in result.stderr
    assert "errors_" not in result.stderr
    assert json.loads(result.stdout)["test"]["images"] == 12
    # The model that was saved leaves nothing out unless it is told to.
    images = [root / "val" / "owl", broken[0]]
    assert "1 image cannot be read" in run("predict", tmp_path / "m.skt", *images, code=1).stderr
    result = run("predict", tmp_path / "m.skt", *images, "--skip-broken")
    assert len(result.stdout.splitlines()) == 1 + 3


def test_interruption_writes_nothing(photos, tmp_path, monkeypatch):
    def interrupted(self, *arguments, **options):
        self.interrupted_, self.errors_ = True, []
        return self

    monkeypatch.setattr(FineTunedImageClassifier, "fit", interrupted)
    result = run("train", photos, "-o", tmp_path / "m.skt", "--quiet", code=130)
    assert result.stderr.strip() == "sktransfer: interrupted; no file was written"
    assert list(tmp_path.iterdir()) == []


def test_table_of_images_gives_a_model(photos, tmp_path):
    images = paths_below(photos)
    parts = ["training", "training", "test", "spare"] * 6
    rows = [(path, path.split("/")[-2], part) for path, part in zip(images, parts, strict=True)]
    table = write_csv(tmp_path / "labels.csv", "file,animal,part", rows)
    columns = ["--path-column", "file", "--label-column", "animal", "--split-column", "part"]
    result = run("train", table, "-o", tmp_path / "m.skt", *QUICK, *columns)
    assert "12 training images, 6 test images; 3 classes: cat, dog, owl\n" in result.stderr
    assert "Left out 6 images of other splits: spare\n" in result.stderr
    assert sktransfer.load(tmp_path / "m.skt").classes_.tolist() == ["cat", "dog", "owl"]
    result = run("train", table, "-o", tmp_path / "m.skt", code=1)
    assert "sktransfer: Got the column 'path', but the columns of" in result.stderr


def test_groups_may_be_columns_of_the_table(photos, tmp_path, monkeypatch):
    """Its paths are relative to its folder, wherever the command runs."""
    names = [str(Path(path).relative_to(photos.parent)) for path in paths_below(photos)]
    rows = [(name, name.split("/")[-2], str(row % 4)) for row, name in enumerate(names)]
    table = write_csv(photos.parent / "labels.csv", "path,label,group", rows)
    monkeypatch.chdir(tmp_path)
    result = run("train", table, "-o", "m.skt", *QUICK, "--groups", table)
    assert "18 training images, 6 validation images; 3 classes" in result.stderr
    table.unlink()


def test_folder_without_training_images_is_rejected(tmp_path):
    root = save_classes(tmp_path / "splits" / "test", n=2).parent
    result = run("train", root, "-o", tmp_path / "m.skt", code=1)
    assert "has images for test, but none for train" in result.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere", "there is no folder or table"), ("empty", "Found no class folders with images")],
)
def test_bad_folder_is_a_one_line_error(source, message, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run("train", tmp_path / source, "-o", tmp_path / "m.skt", code=1)
    assert result.stderr.startswith("sktransfer: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_failed_save_leaves_an_existing_model_as_it_was(photos, tmp_path, monkeypatch):
    output = tmp_path / "m.skt"
    output.write_bytes(b"earlier model")

    def fail(model, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(sktransfer, "save", fail)
    result = run("train", photos, "-o", output, *QUICK, code=1)
    assert "No space left on device" in result.stderr
    assert output.read_bytes() == b"earlier model"
    assert [path.name for path in tmp_path.iterdir()] == ["m.skt"]


def test_existing_model_is_replaced_and_said_to_be(photos, tmp_path):
    output = tmp_path / "m.skt"
    output.write_bytes(b"earlier model")
    result = run("train", photos, "-o", output, *QUICK)
    assert f"Replaced {output}" in result.stderr
    assert train_module.STRATEGIES == ("auto", "frozen", "staged", "full")


def test_output_must_not_be_the_table_of_the_images(photos, tmp_path):
    table = write_csv(tmp_path / "labels.csv", "path,label", [])
    result = run("train", table, "-o", table, code=2)
    assert "it is an input of this command; choose another file" in result.stderr
    assert table.read_text() == "path,label\n"
