"""No training batch leaves BatchNorm without a variance."""

import numpy as np
import pytest
import torch
from helpers import DOMAIN, Tiny, images, make_classifier
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sktransfer import estimate_cost


class Pooled(nn.Sequential):
    """One block, and before the logits a BatchNorm of one value per channel and image."""

    preprocessing = Tiny.preprocessing

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)),
            nn.Flatten(),
            nn.Linear(6, 5),
        )


class Reshaped(nn.Module):
    """Runs BatchNorm1d on each position as a row, so one image has many values."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        rows = x.flatten(2).transpose(1, 2).reshape(-1, x.shape[1])
        return self.norm(rows).reshape(len(x), -1, x.shape[1]).transpose(1, 2).reshape(x.shape)


class WithRows(nn.Sequential):
    preprocessing = Tiny.preprocessing

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), Reshaped()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )


@pytest.fixture
def sizes(monkeypatch):
    """Record the number of images of each batch from which BatchNorm learns."""
    recorded = []
    forward = _BatchNorm.forward

    def recording(self, x):
        if self.training:
            recorded.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(_BatchNorm, "forward", recording)
    return recorded


def fit(n=7, backbone=Pooled, **parameters):
    defaults = {"batch_norm": "train", "unfreeze": (0, 1), "max_epochs": 2, "augment": None}
    defaults["early_stopping"] = False
    classifier = make_classifier(backbone, **{**defaults, **parameters})
    return classifier.fit(images(n), np.arange(n) % 2)


@pytest.mark.filterwarnings("ignore:The training loss of the stage:UserWarning")
@pytest.mark.parametrize(
    ("n", "parameters", "expected"),
    [
        (7, {"batch_size": 2}, [3, 2, 2]),
        (7, {"batch_size": 3}, [3, 2, 2]),
        (3, {"batch_size": 2}, [3]),
        (9, {"batch_size": 8}, [5, 4]),
        (7, {"batch_size": 16}, [7]),
        (5, {"batch_size": 2, "mixup": 0.4}, [3, 2]),
        (5, {"batch_size": 2, "n_views": None, "augment": "light"}, [3, 2]),
        (5, {"batch_size": 2, "unfreeze": ("all",)}, [3, 2]),
        (9, {"batch_size": 2, "early_stopping": True}, [3, 2, 2]),  # two images are held out
        (7, {"batch_size": 1, "backbone": Tiny}, [1] * 7),  # maps of 4 x 4: it can learn
        (7, {"batch_size": 1, "backbone": WithRows, "unfreeze": ("all",)}, [49] * 7),
        (7, {"batch_size": 1, "batch_norm": "frozen"}, []),
        (7, {"batch_size": 1, "unfreeze": (0,)}, []),
    ],
)
def test_batches_from_which_batch_norm_learns(sizes, n, parameters, expected):
    fit(n, **parameters)
    layers = 2 if parameters.get("backbone", Pooled) is Pooled else 1
    assert sizes == [size for size in expected * 2 for _ in range(layers)]  # in two epochs


@pytest.mark.parametrize("weight", [0.5, 1.0])
@pytest.mark.parametrize(("n", "batch_size"), [(7, 2), (3, 2), (5, 4), (9, 8)])
def test_pairs_of_domains_have_no_single_image(sizes, n, batch_size, weight):
    X = np.concatenate([images(n), images(40, seed=1)])
    domain = np.concatenate([np.ones(n, int), DOMAIN[-40:]])
    classifier = make_classifier(
        Pooled,
        batch_norm="train",
        unfreeze=(0, 1),
        max_epochs=1,
        augment=None,
        early_stopping=False,
        batch_size=batch_size,
        domain_adversarial=weight,
    )
    classifier.fit(X, np.arange(len(X)) % 2, sample_domain=domain)
    assert min(sizes) > 1


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"unfreeze": ("all",)},
        {"unfreeze": (0, "0")},
        {"unfreeze": ("0", "all")},
        {"mixup": 0.2},
        {"n_views": None, "augment": "light"},
        {"early_stopping": True},
        {"optimizer": "sgd"},
    ],
)
def test_batch_size_of_one_is_refused_before_the_head_is_fitted(monkeypatch, parameters):
    from sktransfer.finetuning.task import ClassificationTask

    monkeypatch.delattr(ClassificationTask, "fit_head")
    message = r"Got batch_size=1, but BatchNorm learns its statistics .*Use batch_size=2 or more"
    with pytest.raises(ValueError, match=message):
        fit(9, batch_size=1, **parameters)


@pytest.mark.filterwarnings("ignore:The training loss of the stage:UserWarning")
def test_random_weights_learn_statistics_too():
    classifier = make_classifier("squeezenet1_1", weights=None, unfreeze=("all",), max_epochs=1)
    assert classifier.set_params(batch_size=1, image_size=64, augment=None).fit(
        images(6), np.arange(6) % 2
    )  # it has no BatchNorm
    with pytest.raises(ValueError, match=r"Got batch_size=1, but BatchNorm .*weights=None"):
        classifier.set_params(backbone="resnet18", image_size=32).fit(images(6), np.arange(6) % 2)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_cost_of_learned_statistics_is_estimated_for_any_batch_size(batch_size):
    classifier = make_classifier(
        Pooled, batch_norm="train", unfreeze=(0, 1), batch_size=batch_size, augment=None
    )
    assert estimate_cost(classifier, images(7), np.arange(7) % 2).fits == 1
