import os
import tarfile
from pathlib import Path

import pytest
from cli_helpers import paths_below, save_classes, write_csv
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from sktransfer import PretrainedFeatureExtractor
from sktransfer.cli.inputs import (
    load_data,
    load_groups,
    load_image_list,
    load_images,
    set_options,
)
from sktransfer.cli.messages import Notes

QUIET = Notes(quiet=True)


@pytest.mark.parametrize("base", ["root", "table", "here"])
def test_groups_are_found_by_paths_relative_to_any_folder(base, tmp_path, monkeypatch):
    root = save_classes(tmp_path / "data" / "photos", n=1)
    (tmp_path / "tables").mkdir()
    folder = {"root": root, "table": tmp_path / "tables", "here": tmp_path}[base]
    images = paths_below(root)
    monkeypatch.chdir(tmp_path)
    rows = [(os.path.relpath(path, folder), f"group {row}") for row, path in enumerate(images)]
    table = write_csv(tmp_path / "tables" / "groups.csv", "path,group", rows)
    assert load_groups(table, images, root) == ["group 0", "group 1", "group 2"]
    assert load_groups(None, images, root) is None


def test_ignored_files_are_reported_in_words_of_the_command_line(tmp_path, capsys):
    root = save_classes(tmp_path / "photos", n=1)
    (root / "README").write_text("")
    data = load_data(root, {}, Notes(quiet=False))
    assert data.labels.tolist() == ["cat", "dog", "owl"]
    message = f"the extension of an image: {root / 'README'}\n"
    assert capsys.readouterr().err.endswith(message)


def test_current_folder_is_searched(tmp_path, monkeypatch):
    save_classes(tmp_path / "photos", n=1)
    monkeypatch.chdir(tmp_path / "photos")
    names = [Path(path).name for path in load_images([Path()], QUIET)]
    assert names == ["00.png", "01.png", "02.png"]


def test_options_reach_the_estimators_of_this_package_only():
    pipeline = make_pipeline(PretrainedFeatureExtractor(), LogisticRegression(verbose=0))
    set_options(pipeline, verbose=1)
    assert pipeline.verbose is False
    assert pipeline["pretrainedfeatureextractor"].verbose == 1
    assert pipeline["logisticregression"].verbose == 0


def test_columns_are_named_only_with_a_table(tmp_path):
    root = save_classes(tmp_path / "photos", n=1)
    names = [os.path.relpath(path, tmp_path) for path in paths_below(root)]
    (tmp_path / "a.txt").write_text("\n".join(names))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(root, "photos")
    for source in (root, tmp_path / "a.txt", tmp_path / "a.tar"):
        assert len(load_image_list([source], "path", {}, QUIET)) == 3
        for option, path_column, columns in (
            ("--path-column file", "file", {}),
            ("--label-column kind", "path", {"label": "kind"}),
            ("--split-column part", "path", {"split": "part"}),
        ):
            with pytest.raises(ValueError, match=f"Got {option} with {source}, .* table"):
                load_image_list([source], path_column, columns, QUIET)
    write_csv(tmp_path / "a.csv", "file,kind", [(name, "x") for name in names])
    images = load_image_list([tmp_path / "a.csv"], "file", {"label": "kind"}, QUIET)
    assert images.read(0, 3).columns == {"label": ["x"] * 3}
