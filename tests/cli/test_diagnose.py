import json
import shutil

import pytest
from cli_helpers import paths_below, run, save_broken, save_splits, write_csv

SMALL = ("--image-size", "32")


def test_recommendation_is_printed_with_the_command(photos):
    result = run("recommend", photos, *SMALL)
    assert "images, " in result.stdout
    assert "24 images in 3 classes" in result.stdout
    assert "verbose" not in result.stdout
    command = f"sktransfer train {photos} --image-size 32 -o model.skt"
    assert result.stdout.endswith(f"To train it: {command}\n")


def test_recommendation_as_json(photos):
    printed = json.loads(run("recommend", photos, *SMALL, "--json", "--quiet").stdout)
    assert printed["strategy"] in ("frozen", "staged", "full")
    assert printed["counts"] == {"cat": 8, "dog": 8, "owl": 8}
    assert printed["image_size"] == [32, 32]
    assert 0 <= printed["measured"]["accuracy"] <= 1
    assert printed["estimated_seconds"] > 0


def test_command_has_the_options_that_were_given(photos):
    command = f"sktransfer train {photos} --image-size 32x48 --seed 5 -o model.skt"
    arguments = ["--image-size", "32x48", "--seed", "5", "--json", "--quiet"]
    assert json.loads(run("recommend", photos, *arguments).stdout)["command"] == command


def test_only_training_images_are_measured(tmp_path):
    root = save_splits(tmp_path / "splits")
    result = run("recommend", root, *SMALL, "--json")
    assert json.loads(result.stdout)["counts"] == {"cat": 8, "dog": 8, "owl": 8}
    assert "Using the 24 images for training.\n" in result.stderr


def test_groups_reach_the_folds(photos, tmp_path):
    """A class in a single group cannot be cross-validated."""
    rows = [(path, path.split("/")[-2]) for path in paths_below(photos)]
    groups = write_csv(tmp_path / "groups.csv", "path,group", rows)
    for command in ("recommend", "rank"):
        result = run(command, photos, *SMALL, "--groups", groups, code=1)
        assert "Got a single group of each of the classes" in result.stderr


def test_ranking_is_printed_as_a_table_and_as_json(photos):
    names = "efficientnet_lite0,efficientnet_lite1"
    arguments = ["rank", photos, "--backbones", names, *SMALL]
    result = run(*arguments)
    assert result.stdout.startswith("backbone ")
    printed = json.loads(run(*arguments, "--json").stdout)
    assert {row["name"] for row in printed} == {f"{name}, 32" for name in names.split(",")}
    assert printed[0]["accuracy"] >= printed[1]["accuracy"]
    assert printed[0]["image_size"] == [32, 32]


def test_unknown_backbone_is_a_one_line_error(photos):
    result = run("rank", photos, "--backbones", "efficientnet_lite9", "--quiet", code=1)
    assert "did you mean 'efficientnet_lite" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def copied(tmp_path):
    """Return folders for train, val and test, in which a cat of train is an owl of test."""
    root = save_splits(tmp_path / "splits")
    image = sorted((root / "train" / "cat").iterdir())[0]
    shutil.copy(image, root / "test" / "owl" / "copy.png")
    return root


def test_leaks_between_train_and_test_are_found(copied):
    result = run("leaks", copied, "--json")
    identical = [pair for pair in json.loads(result.stdout)["pairs"] if pair["kind"] == "identical"]
    assert len(identical) == 1
    paths = {identical[0]["first"], identical[0]["second"]}
    assert paths == {
        str(copied / "train" / "cat" / "00.png"),
        str(copied / "test" / "owl" / "copy.png"),
    }
    assert identical[0]["across"] is True
    assert identical[0]["conflict"] is True
    text = run("leaks", copied).stdout
    assert "on both sides of a split, so scores are too optimistic: remove one image of" in text
    assert "report.groups" not in text


def test_leaks_between_two_folders(copied):
    pairs = run("leaks", copied / "train", "--other", copied / "test", "--json").stdout
    for pair in json.loads(pairs)["pairs"]:
        assert pair["first"].startswith(str(copied / "train"))
        assert pair["second"].startswith(str(copied / "test"))
        assert pair["across"]
    assert "identical" in pairs


def test_leaks_of_images_without_classes(tmp_path, photos):
    folder = tmp_path / "flat"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(photos / "cat" / "00.png", folder / name)
    shutil.copy(paths_below(photos)[-1], folder / "c.png")
    result = run("leaks", folder)
    assert "identical" in result.stdout
    assert "labels" not in result.stdout
    assert f"{folder} holds images itself, so they are compared without labels.\n" in result.stderr


def test_long_lists_of_leaks_are_cut(tmp_path, photos):
    folder = tmp_path / "flat"
    folder.mkdir()
    for number in range(8):
        shutil.copy(photos / "cat" / "00.png", folder / f"{number}.png")
    text = run("leaks", folder).stdout
    assert text.startswith("28 pairs among 8 images: 28 identical.\n")
    assert text.endswith("and 8 more; --json lists all of them\n")
    assert len(json.loads(run("leaks", folder, "--json").stdout)["pairs"]) == 28


def test_leaks_names_broken_images(photos, tmp_path):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    save_broken(root / "cat" / "broken.png")
    result = run("leaks", root, "--quiet")
    assert result.stderr.startswith("sktransfer: warning: Got 1 image that cannot be read")
    assert str(root / "cat" / "broken.png") in result.stderr
    assert ".py" not in result.stderr


@pytest.mark.parametrize(
    "arguments", [["recommend"], ["rank", "--backbones", "efficientnet_lite0"]]
)
def test_broken_images_are_named(arguments, photos, tmp_path):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    broken = save_broken(root / "cat" / "broken.png")
    arguments = [arguments[0], root, *arguments[1:], *SMALL]
    message = f"sktransfer: 1 image cannot be read: {broken}: "
    assert message in run(*arguments, code=1).stderr


def test_missing_folders_are_a_one_line_error(photos, tmp_path):
    for arguments in (["leaks", tmp_path / "x"], ["leaks", photos, "--other", tmp_path / "x"]):
        result = run(*arguments, code=1)
        assert result.stderr == f"sktransfer: there is no folder or table '{tmp_path / 'x'}'\n"
