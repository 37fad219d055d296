"""Values at the edge of the parameters that extractor and classifier share."""

import pytest
import torch
from torchvision import models

BAD_SHARED = {
    "n_jobs": [0, "all", 1.5, True, 10**9, float("nan")],
    "image_size": ["big", "224", 0, 1, (0, 5), 10**6, True, (224, 224, 3), 32.0],
    "image_shape": [3, "ab", (0, 5), (20,), (-1, -1, 3), (1.5, 2)],
    "pixel_range": ["full", (1, 0), (0, float("inf")), (float("nan"), 1), ("0", "1"), 3, None],
    "cache": ["none", "None", "", True, 0, __file__, "AUTO"],
    "device": ["cuda:99", "gpu", 0, None, "meta", True],
    "engine": ["", None, 1, "OpenVINO"],
    "precision": ["fp16", None, 16, torch.float16],
    "verbose": [-1, "yes", None, 1.5],
    "weights": ["none", "", 3, True, "x.pth", models.ResNet50_Weights.DEFAULT],
    "batch_norm": [None, True, "Frozen"],
    "backbone": [None, 3, "", True, "resnet5o"],
}


def cases(table):
    return [
        pytest.param(name, value, id=f"{name}-{str(value)[:12]}")
        for name, values in table.items()
        for value in values
    ]


class Unread(torch.utils.data.Dataset):
    """A dataset that fails if an image is read."""

    def __len__(self):
        return 12

    def __getitem__(self, row):
        raise AssertionError("an image was read")
