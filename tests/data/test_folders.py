import os
import re
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sktransfer.data.folders import list_images, load_image_folder


@pytest.fixture
def make(tmp_path):
    """Return a function that creates empty files, as nothing is decoded, and returns their root."""

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path

    return make


def names(bunch, root):
    return [Path(path).relative_to(root).as_posix() for path in bunch.data]


def test_class_folders_become_sorted_targets(make):
    root = make("dogs/b.png", "dogs/a.JPG", "cats/z.jpeg", "cats/deep/er/y.webp", "cats/.x.png")
    bunch = load_image_folder(root)
    assert names(bunch, root) == ["cats/deep/er/y.webp", "cats/z.jpeg", "dogs/a.JPG", "dogs/b.png"]
    assert bunch.target_names == ["cats", "dogs"]
    np.testing.assert_array_equal(bunch.target, [0, 0, 1, 1])
    assert (bunch.target.dtype, bunch.data.dtype) == (np.int64, object)
    assert all(type(path) is str for path in bunch.data)
    assert bunch.filenames is bunch.data
    assert bunch.split is None
    assert bunch.ignored == []
    assert bunch.DESCR.splitlines() == [f"4 images below {root}", "", "cats: 2", "dogs: 2"]


def test_return_x_y_keeps_a_relative_root(make, monkeypatch):
    monkeypatch.chdir(make("photos/cats/a.png", "photos/dogs/b.png"))
    X, y = load_image_folder("photos", return_X_y=True)
    assert list(X) == [
        os.path.join("photos", "cats", "a.png"),
        os.path.join("photos", "dogs", "b.png"),
    ]
    np.testing.assert_array_equal(y, [0, 1])


def test_extensions_select_files(make):
    root = make("a/1.raw", "a/2.RAW", "a/3.png")
    with pytest.warns(UserWarning, match=r"Ignored 1 file\(s\)"):
        bunch = load_image_folder(root, extensions=[".raw"])
    assert names(bunch, root) == ["a/1.raw", "a/2.RAW"]
    for extensions in ("png", ["png"], []):
        with pytest.raises(ValueError, match="Got extensions") as caught:
            load_image_folder(root, extensions=extensions)
        assert str(caught.value) == (
            f"Got extensions={extensions!r}, but expected extensions such as ('.jpg', '.png')."
        )


def test_single_class_is_accepted(make):
    assert load_image_folder(make("cats/a.png")).target_names == ["cats"]


def test_paths_of_the_bunch_are_readable_images(tmp_path):
    from sktransfer.data.images import as_images

    (tmp_path / "red").mkdir()
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red" / "a.png")
    X, _ = load_image_folder(tmp_path, return_X_y=True)
    np.testing.assert_array_equal(as_images(X)[0], np.full((4, 4, 3), [255, 0, 0]))


# Splits


@pytest.fixture
def splits(make):
    return make(
        "train/cats/1.png", "train/cats/2.png", "train/dogs/3.png",
        "validation/dogs/4.png",
        "Test/cats/5.png", "Test/dogs/6.png",
    )  # fmt: skip


def test_all_splits_are_listed_by_default(splits):
    bunch = load_image_folder(splits)
    assert names(bunch, splits) == [
        "Test/cats/5.png", "train/cats/1.png", "train/cats/2.png",
        "Test/dogs/6.png", "train/dogs/3.png", "validation/dogs/4.png",
    ]  # fmt: skip
    assert bunch.split.tolist() == ["test", "train", "train", "test", "train", "val"]
    np.testing.assert_array_equal(bunch.target, [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("split", "expected", "target"),
    [
        ("train", ["train/cats/1.png", "train/cats/2.png", "train/dogs/3.png"], [0, 0, 1]),
        ("val", ["validation/dogs/4.png"], [1]),
        ("test", ["Test/cats/5.png", "Test/dogs/6.png"], [0, 1]),
    ],
)
def test_split_selects_its_files(splits, split, expected, target):
    bunch = load_image_folder(splits, split=split)
    assert names(bunch, splits) == expected
    np.testing.assert_array_equal(bunch.target, target)
    assert bunch.target_names == ["cats", "dogs"]
    assert set(bunch.split) == {split}


@pytest.mark.parametrize("split", [None, "train", "val"])
def test_class_missing_from_train_warns(splits, make, split):
    make("validation/birds/7.png")
    with pytest.warns(UserWarning, match="Some classes") as caught:
        bunch = load_image_folder(splits, split=split)
    assert [str(warning.message) for warning in caught] == [
        "Some classes have images in val or test but none in train: 'birds'."
    ]
    assert bunch.target_names == ["birds", "cats", "dogs"]


def test_splits_without_a_train_folder_raise_no_warning(make):
    root = make("val/cats/1.png", "test/dogs/2.png")
    assert load_image_folder(root).split.tolist() == ["val", "test"]


def test_class_may_be_named_train(make):
    root = make("train/1.png", "car/2.png", "plane/3.png")
    bunch = load_image_folder(root)
    assert bunch.target_names == ["car", "plane", "train"]
    assert bunch.split is None


def test_folders_without_images_next_to_splits_are_ignored(splits, make):
    make("annotations/labels.csv", "README.txt")
    with pytest.warns(UserWarning, match="Ignored 2") as caught:
        bunch = load_image_folder(splits)
    assert len(caught) == 1
    assert len(bunch.data) == 6
    assert [Path(path).name for path in bunch.ignored] == ["labels.csv", "README.txt"]


def test_splits_next_to_classes_are_rejected(splits, make):
    make("birds/1.png")
    with pytest.raises(ValueError, match="next to other folders") as caught:
        load_image_folder(splits)
    assert str(caught.value) == (
        f"Got the splits 'Test', 'train', 'validation' in {str(splits)!r} next to other folders of "
        "images, 'birds', but expected either splits or classes. Move the splits or the other "
        "folders away."
    )


def test_unlabeled_test_images_are_ignored(make):
    root = make("train/cats/1.png", "test/2.png", "test/3.png")
    with pytest.warns(UserWarning, match="Ignored 2"):
        bunch = load_image_folder(root)
    assert names(bunch, root) == ["train/cats/1.png"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image_folder(root, split="train").ignored == []
    with pytest.raises(ValueError, match=r"Found no class folders with images in '.*test'"):
        load_image_folder(root, split="test")


def test_unknown_split_is_rejected(splits, make):
    with pytest.raises(ValueError, match="did you mean 'train'"):
        load_image_folder(splits, split="training")
    (splits / "validation").rename(splits / ".hidden")
    with pytest.raises(ValueError, match="Got split='val'") as caught:
        load_image_folder(splits, split="val")
    assert str(caught.value) == (
        f"Got split='val', but {str(splits)!r} has no folder for it; its folders are 'Test', "
        "'train'. Pass one of 'train', 'test', or None."
    )


def test_split_of_a_folder_without_splits_is_rejected(make):
    root = make("cats/1.png")
    with pytest.raises(ValueError, match="no folder for it") as caught:
        load_image_folder(root, split="train")
    assert str(caught.value) == (
        f"Got split='train', but {str(root)!r} has no folder for it; its folders are 'cats'. "
        "Pass split=None."
    )


USUAL_NAMES = {
    "train": [
        "train", "Train", "TRAIN", "training", "Training", "train_set", "trainset", "Training Set",
        "train-data", "train_images", "images_train", "01_train", "train2017", "training.data",
    ],
    "val": [
        "val", "Val", "valid", "VALID", "validation", "Validation", "val_set", "validation_data",
        "dev", "Dev", "devset", "development", "val2017", "images-val",
    ],
    "test": [
        "test", "Test", "TEST", "testing", "Testing", "test_set", "testset", "test-images", "eval",
        "Evaluation", "eval_set", "holdout", "hold-out", "held_out", "test2017",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("split", "name"), [(split, name) for split, names in USUAL_NAMES.items() for name in names]
)
def test_split_folders_have_any_usual_name(make, split, name):
    root = make(f"{name}/cats/1.png", f"{name}/dogs/2.png")
    for requested in (None, split):
        bunch = load_image_folder(root, split=requested)
        assert bunch.target_names == ["cats", "dogs"]
        assert bunch.split.tolist() == [split, split]


@pytest.mark.parametrize(
    "name", ["trains", "trainer", "tested", "value", "device", "trail", "developer", "contest", "t"]
)
def test_names_that_are_not_splits_are_classes(make, name):
    bunch = load_image_folder(make(f"{name}/1.png", "cats/2.png"))
    assert bunch.target_names == sorted([name, "cats"])
    assert bunch.split is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("Training", "Testing"), ["test", "train"]),
        (("training", "validation", "testing"), ["test", "train", "val"]),
        (("train_set", "test_set"), ["test", "train"]),
        (("dev", "eval"), ["test", "val"]),
        (("train1", "train"), None),
        (("TRAIN", "HOLDOUT"), ["test", "train"]),
        (("trainset", "devset", "evalset"), ["test", "train", "val"]),
        (("Train Images", "Test Images"), ["test", "train"]),
    ],
)
def test_split_folders_may_be_named_together(make, names, expected):
    root = make(*(f"{name}/{label}/1.png" for name in names for label in ("cats", "dogs")))
    if expected is None:  # "train1" is no split, and so "train" is none either
        with pytest.warns(UserWarning, match="have the same subfolders, 'cats', 'dogs'"):
            assert load_image_folder(root).target_names == ["train", "train1"]
        return
    bunch = load_image_folder(root)
    assert bunch.target_names == ["cats", "dogs"]
    assert sorted(set(bunch.split.tolist())) == expected


@pytest.mark.parametrize(
    ("files", "classes", "subfolders", "remedy"),
    [
        (["a/x/1.png", "a/y/1.png", "b/x/1.png", "b/y/1.png"], "'a', 'b'", "'x', 'y'", "classes"),
        (["images/x/1.png", "images/y/1.png"], "'images'", "'x', 'y'", "classes"),
        (["a/x/c/1.png", "a/y/1.png", "b/x/1.png", "b/y/1.png"], "'a', 'b'", "'x', 'y'", "classes"),
        (
            [f"{top}/{low}/1.png" for top in "abcd" for low in "wxyz"],
            "'a', 'b', 'c', ...",
            "'w', 'x', 'y', ...",
            "classes",
        ),
        (
            ["a/x/1.png", "a/y/1.png", "b/x/1.png", "b/y/1.png", "b/z/1.png"],
            "'a', 'b'",
            "'x', 'y'",
            "classes",
        ),
        (
            ["a/train/1.png", "a/test/1.png", "b/train/1.png", "b/test/1.png"],
            "'a', 'b'",
            "'test', 'train'",
            "splits",
        ),
        (
            ["train/a/x/1.png", "train/a/y/1.png", "test/a/x/1.png", "test/a/y/1.png"],
            "'a'",
            "'x', 'y'",
            "classes",
        ),
        (["a/x/1.png", "a/y/1.png", "a/0.png"], "'a'", "'x', 'y'", "classes"),
    ],
)
def test_classes_one_level_too_high_warn(make, files, classes, subfolders, remedy):
    root = make(*files)
    with pytest.warns(UserWarning, match="same subfolders") as caught:
        load_image_folder(root)
    remedies = {
        "classes": "If these are the classes, pass the folder that holds them as root, or name the "
        "folders above them train, val and test.",
        "splits": "If these are splits, move them above the class folders.",
    }
    assert [str(warning.message) for warning in caught] == [
        f"All class folders in {str(root)!r} ({classes}) have the same subfolders, {subfolders}. "
        f"{remedies[remedy]}"
    ]
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "files",
    [
        ["a/1.png", "b/1.png"],
        ["a/images/1.png", "b/images/1.png"],
        ["a/x/1.png", "a/y/1.png", "b/1.png"],
        ["a/x/1.png", "a/y/1.png", "b/x/1.png"],
        ["a/x/1.png", "a/y/1.png", "b/z/1.png", "b/w/1.png"],
        ["a/x/1.png", "a/.y/1.png"],
        ["train/a/1.png", "test/a/1.png"],
        ["a/deep/x/1.png", "a/deep/y/1.png"],
    ],
)
def test_other_subfolders_raise_no_warning(make, files):
    load_image_folder(make(*files))  # warnings are errors


# Names

NAMES = ["café", "größe", "naïve", "Ñandú", "Zürich", "élan", "日が", "한국"]


def make_twins(root, names, forms, folder=""):
    for form in forms:
        for name in names:
            path = root / folder / unicodedata.normalize(form, name)
            path.mkdir(parents=True)
            (path / f"{form}.png").touch()


@pytest.mark.parametrize("name", NAMES)
def test_unicode_twins_are_one_class(tmp_path, name):
    make_twins(tmp_path, [name], ["NFC", "NFD"])
    make_twins(tmp_path, ["cats"], ["NFC"])
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("this file system normalizes names")
    with pytest.warns(UserWarning, match="Unicode") as caught:
        bunch = load_image_folder(tmp_path)
    assert [str(warning.message) for warning in caught] == [
        f"Got 2 class folders named {name!r} that differ only by their Unicode normalization (NFC "
        "and NFD); they are one class."
    ]
    assert bunch.target_names == sorted([name, "cats"])
    assert sorted(bunch.labels.tolist()) == sorted([name, name, "cats"])


def test_unicode_twins_in_different_splits_are_one_class(tmp_path):
    make_twins(tmp_path, NAMES, ["NFC"], "train")
    make_twins(tmp_path, NAMES, ["NFD"], "test")
    with pytest.warns(UserWarning, match="Unicode normalization"):
        bunch = load_image_folder(tmp_path)
    assert bunch.target_names == sorted(NAMES)
    assert np.bincount(bunch.target).tolist() == [2] * len(NAMES)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_normalized_without_a_warning(tmp_path, form):
    make_twins(tmp_path, NAMES, [form])
    assert load_image_folder(tmp_path).target_names == sorted(NAMES)


def test_labels_may_be_names(splits):
    numbers = load_image_folder(splits)
    assert numbers.labels.tolist() == ["cats"] * 3 + ["dogs"] * 3
    names = load_image_folder(splits, labels="names")
    assert names.target.tolist() == numbers.labels.tolist()
    assert names.target_names == ["cats", "dogs"]
    assert names.target.dtype.kind == "U"
    _, y = load_image_folder(splits, split="val", labels="names", return_X_y=True)
    assert y.tolist() == ["dogs"]
    with pytest.raises(ValueError, match="Got labels='name', but expected one of 'numbers', 'nam"):
        load_image_folder(splits, labels="name")


@pytest.mark.parametrize("convert", [str, Path])
def test_tilde_is_the_home_folder(make, monkeypatch, convert):
    root = make("pets/cats/1.png")
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("USERPROFILE", str(root))
    assert names(load_image_folder(convert("~/pets")), root) == ["pets/cats/1.png"]
    monkeypatch.chdir(root)
    make("~/pets/dogs/2.png")  # an odd name, but it exists
    assert load_image_folder(convert("~/pets")).target_names == ["dogs"]


def test_leftovers_of_macos_are_ignored(make):
    root = make(
        "cats/1.png", "cats/._1.png", "__MACOSX/cats/._1.png", ".DS_Store", "cats/.DS_Store"
    )
    bunch = load_image_folder(root)  # warnings are errors
    assert names(bunch, root) == ["cats/1.png"]
    assert bunch.ignored == []


# Warnings and errors


def test_ignored_files_warn(make):
    root = make("cats/1.png", "cats/a.txt", "cats/b.txt", "cats/c.txt", "0.png", "cats/.d.txt")
    with pytest.warns(UserWarning, match="Ignored") as caught:
        bunch = load_image_folder(root)
    expected = [str(root / name) for name in ("0.png", "cats/a.txt", "cats/b.txt", "cats/c.txt")]
    assert [str(warning.message) for warning in caught] == [
        "Ignored 4 file(s) outside any class folder or without an image extension: "
        f"{', '.join(expected[:3])}, .... bunch.ignored lists all of them."
    ]
    assert caught[0].filename == __file__
    assert bunch.ignored == expected
    assert names(bunch, root) == ["cats/1.png"]


def test_empty_class_folder_warns(make):
    root = make("cats/1.png", "dogs/.hidden.png")
    with pytest.warns(UserWarning, match="holds no images") as caught:
        bunch = load_image_folder(root)
    assert [str(warning.message) for warning in caught] == [
        f"The class folder {str(root / 'dogs')!r} holds no images."
    ]
    assert bunch.target_names == ["cats"]


def test_folder_without_classes_is_rejected(make):
    root = make("1.png", "2.png")
    with pytest.raises(ValueError, match="Found no class folders") as caught:
        load_image_folder(root)
    assert str(caught.value) == (
        f"Found no class folders with images in {str(root)!r}. "
        "Expected one folder for each class, with the images of that class in it. The folder has 2 "
        f"images itself. If it is the folder of a class, pass its parent, {str(root.parent)!r}."
    )


@pytest.mark.parametrize(
    ("files", "extensions", "remedy"),
    [
        (
            ["1.jpg", "2.png"],
            None,
            "The folder has 2 images itself. If it is the folder of a class",
        ),
        (["1.JPG", "notes.txt"], None, "The folder has 1 image itself."),
        (["1.raw"], (".raw",), "The folder has 1 image itself."),
        (["cats/1.heic", "dogs/2.HEIC", "cats/notes.txt"], None, "are .heic (2), .txt (1), but"),
        (["cats/1.png"], (".jpg", ".TIF"), "are .png (1), but only .jpg, .tif were searched for."),
        (["1.dcm", "2.dcm"], None, "The extensions of the files are .dcm (2), but only .avif, "),
        (["cats/1", "dogs/2"], None, "The extensions of the files are none (2), but only"),
        (["train/1.png", "test/2.png"], None, "Got 2 images without a class folder; move them"),
        (["train/cats/1.heic"], None, "The extensions of the files are .heic (1), but only"),
    ],
)
def test_error_without_images_says_what_was_found(make, files, extensions, remedy):
    root = make(*files)
    options = {} if extensions is None else {"extensions": extensions}
    with pytest.raises(ValueError, match=r"^Found no class folders with images in") as caught:
        load_image_folder(root, **options)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("name", ["cats", "cats/"])
def test_error_about_a_class_folder_names_its_parent(make, name, monkeypatch):
    monkeypatch.chdir(make("cats/1.png", "cats/2.png"))
    with pytest.raises(ValueError, match=r"pass its parent, '\.'\.$"):
        load_image_folder(name)


def test_splits_without_classes_are_rejected(make):
    root = make("train/1.png", "test/2.png")
    with pytest.raises(ValueError, match="Found no class folders") as caught:
        load_image_folder(root)
    assert f"in {str(root / 'test')!r} and {str(root / 'train')!r}. Expected" in str(caught.value)


def test_missing_folder_and_file_are_rejected(make):
    root = make("cats/1.png")
    with pytest.raises(FileNotFoundError) as caught:
        load_image_folder(root / "nowhere")
    assert str(caught.value) == (
        f"Got root={str(root / 'nowhere')!r}, but there is no such folder. "
        f"Relative paths are resolved from {os.getcwd()}."
    )
    with pytest.raises(NotADirectoryError, match="a file, but expected a folder"):
        load_image_folder(root / "cats" / "1.png")


# Links


def test_links_are_followed_but_not_in_circles(make):
    root = make("data/cats/1.png", "data/dogs/2.png", "elsewhere/3.png", "elsewhere/4.png")
    data = root / "data"
    (data / "cats" / "linked").symlink_to(root / "elsewhere")
    (data / "cats" / "again").symlink_to(root / "elsewhere")
    (data / "cats" / "loop").symlink_to(data / "cats")
    (data / "cats" / "up").symlink_to(data)
    (data / "dogs" / "one.png").symlink_to(root / "elsewhere" / "3.png")
    (data / "dogs" / "gone.png").symlink_to(root / "nowhere.png")
    (data / "birds").symlink_to(root / "elsewhere")
    bunch = load_image_folder(data)
    assert bunch.target_names == ["birds", "cats", "dogs"]
    assert [Path(path).name for path in bunch.data] == [
        "3.png", "4.png", "1.png", "3.png", "4.png", "2.png", "gone.png", "one.png",
    ]  # fmt: skip
    assert not any("loop" in path or "up" in path for path in bunch.data)


def test_class_folder_that_links_back_is_empty(make):
    root = make("cats/1.png")
    (root / "loop").symlink_to(root)
    with pytest.warns(UserWarning, match="loop' holds no images"):
        assert names(load_image_folder(root), root) == ["cats/1.png"]


@pytest.mark.parametrize("root", [None, 0, True, b"pets", "", ["pets"], 1.5, object()])
def test_root_that_is_not_a_path_is_rejected(root):
    with pytest.raises(TypeError, match=r"^Got root=.*, but expected the path of a folder"):
        load_image_folder(root)


@pytest.mark.parametrize("return_X_y", [1, 0, None, "True"])
def test_return_X_y_that_is_not_boolean_is_rejected(tmp_path, return_X_y):  # noqa: N802
    with pytest.raises(ValueError, match=r"Got return_X_y=.*, but expected True or False"):
        load_image_folder(tmp_path, return_X_y=return_X_y)


@pytest.mark.parametrize("extensions", [None, 3, ".png", ["png"], [], [3]])
def test_extensions_that_are_not_a_list_are_rejected(tmp_path, extensions):
    with pytest.raises(ValueError, match=r"Got extensions=.*, but expected extensions such as"):
        load_image_folder(tmp_path, extensions=extensions)


@pytest.mark.parametrize(
    "names",
    [
        ("seg_train", "seg_test"),
        ("imagenet_train", "imagenet_val"),
        ("my-train", "my-test"),
        ("Pets Training", "Pets Testing"),
        ("train_cropped", "test_cropped"),
        ("training.v2", "validation.v2"),
        ("train_224", "val_224"),
        ("cub_train_images", "cub_test_images"),
        ("birds_valid", "birds_test"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_split_folders_may_share_a_word(make, names, wrapped):
    inner = {name: f"{name}/{name}" if wrapped else name for name in names}
    root = make(*(f"{inner[name]}/{label}/1.png" for name in names for label in ("cat", "dog")))
    bunch = load_image_folder(root)
    assert bunch.target_names == ["cat", "dog"]
    assert len(set(bunch.split)) == 2
    assert not bunch.ignored


@pytest.mark.parametrize(
    "names",
    [
        ("bullet_train", "steam_train"),
        ("bullet_train", "car"),
        ("blood_test", "urine_test"),
        ("steam train", "rain"),
        ("train_1", "train_2"),
        ("a_train", "b_test"),
        ("eval_x", "eval_y"),
        ("test",),
    ],
)
def test_classes_that_contain_a_split_are_classes(make, names):
    root = make(*(f"{name}/{number}.png" for name in names for number in (1, 2)), "zebra/1.png")
    assert load_image_folder(root).target_names == sorted([*names, "zebra"])


@pytest.mark.parametrize(
    "names",
    [
        ("Cat", "cat"),
        ("cat", "cat "),
        (" cat", "cat"),
        ("golden retriever", "golden_retriever"),
        ("golden-retriever", "golden retriever"),
        ("T-shirt", "tshirt"),
        ("STRASSE", "straße"),
        ("Éclair", "éclair"),
    ],
)
def test_similar_class_names_warn(make, names):
    root = make(*(f"{name}/1.png" for name in names), "dog/1.png")
    message = f"{re.escape(', '.join(map(repr, sorted(names))))} differ only by capitalization"
    with pytest.warns(UserWarning, match=message) as caught:
        bunch = load_image_folder(root)
    assert caught[0].filename == __file__
    assert bunch.target_names == sorted([*names, "dog"])


@pytest.mark.parametrize(
    "names", [("1", "-1"), ("1.5", "15"), ("1_5", "15"), ("-", "_"), ("cat1", "cat2")]
)
def test_distinct_class_names_do_not_warn(make, names):
    bunch = load_image_folder(make(*(f"{name}/1.png" for name in names)))
    assert bunch.target_names == sorted(names)


@pytest.mark.parametrize(
    "name", ["@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"]
)
def test_folders_of_systems_are_ignored(make, name):
    root = make("cat/1.png", f"cat/{name}/1.png", f"{name}/cat/2.png", "dog/3.png")
    assert len(load_image_folder(root).data) == 2


def test_other_extensions_are_named_if_nothing_is_left(make):
    with pytest.raises(
        ValueError, match=r"The extensions of the files are \.heic \(2\), none \(1\), but only"
    ):
        load_image_folder(make("cat/1.HEIC", "dog/1.heic", "dog/2"))


def test_link_to_itself_is_not_a_folder(make):
    root = make("cat/1.png", "dog/1.png")
    os.symlink("loop", root / "loop")
    with pytest.warns(UserWarning, match=r"Ignored 1 file.*loop"):
        assert load_image_folder(root).target_names == ["cat", "dog"]


def test_images_are_listed_whatever_the_subfolders_are(make, monkeypatch):
    root = make("b.PNG", "train/cat/a.jpg", "train/notes.txt", ".hidden/c.png", "d")
    images, ignored = list_images(root)
    assert images == [str(root / "b.PNG"), str(root / "train" / "cat" / "a.jpg")]
    assert ignored == [str(root / "d"), str(root / "train" / "notes.txt")]
    for here in (root, root / "train"):
        monkeypatch.chdir(here)
        relative = os.path.relpath(root)
        names = [os.path.abspath(path) for path in list_images(relative)[0]]
        assert names == [os.path.realpath(path) for path in images]


def test_only_folders_are_listed(tmp_path):
    with pytest.raises(FileNotFoundError):
        list_images(tmp_path / "missing")
