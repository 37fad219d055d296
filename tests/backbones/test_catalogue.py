import importlib.util

import pandas as pd
import pytest

from sktransfer import list_backbones
from sktransfer.backbones.catalogue import measure_features
from sktransfer.backbones.efficientnet_lite import LITE_VARIANTS
from sktransfer.backbones.loading import load_backbone
from sktransfer.backbones.torchvision_blocks import list_torchvision


@pytest.mark.slow
def test_list_backbones_has_a_correct_row_for_every_backbone():
    table = {row.name: row for row in list_backbones()}
    assert set(table) == {*LITE_VARIANTS, *list_torchvision()}
    for name in list_torchvision():
        assert table[name].features == measure_features(name), name
    assert table["resnet50"].parameters == 25_557_032
    assert table["resnet50"].gflops == pytest.approx(4.089)
    assert table["resnet50"].accuracy == pytest.approx(0.80858)


@pytest.mark.parametrize("name", LITE_VARIANTS)
def test_list_backbones_has_correct_rows_for_efficientnet_lite(name):
    (row,) = list_backbones(name)
    block_list = load_backbone(name).block_list
    modules = [block for _, block in block_list.blocks] + [block_list.logits]
    assert row.parameters == sum(p.numel() for m in modules for p in m.parameters())
    assert row.features == block_list.logits[-1].in_features
    assert row.local


def test_row_of_a_missing_weights_package_is_not_local(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not any(row.local for row in list_backbones("lite"))
    assert len(list_backbones("lite")) == 3


def test_row_is_local_if_the_hub_folder_holds_the_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert not any(row.local for row in list_backbones("resnet18"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth").touch()
    assert all(row.local for row in list_backbones("resnet18"))


def test_backbone_table_has_a_repr_html_and_a_dataframe_form():
    table = list_backbones("mobilenet_v2")
    lines = repr(table).splitlines()
    assert lines[0].split()[:4] == ["name", "parameters", "GFLOPs", "features"]
    assert lines[1].split()[:6] == ["mobilenet_v2", "3.5", "M", "0.30", "1280", "72.2%"]
    html = table._repr_html_()
    assert html.count("<tr>") == 2
    assert ">mobilenet_v2</td>" in html
    frame = pd.DataFrame(list_backbones())
    assert frame.set_index("name").loc["vgg16", "features"] == 4096


@pytest.mark.parametrize("contains", [None, 3, True, ["resnet"], b"resnet", 1.5, (), object])
def test_list_backbones_rejects_non_strings(contains):
    with pytest.raises(TypeError, match=r"^Got contains=.*, but expected a part of a name"):
        list_backbones(contains)
