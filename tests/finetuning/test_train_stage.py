"""Optimizers and seeds. The fits in test_classifier.py and test_resume.py test the training."""

import pytest
import torch

from sktransfer.finetuning.train_stage import derive_seed, resolve_optimizer


def test_resolve_optimizer_accepts_names_and_classes():
    assert resolve_optimizer("adam")[0] is torch.optim.Adam
    assert resolve_optimizer("sgd") == (torch.optim.SGD, {"momentum": 0.9, "nesterov": True})
    assert resolve_optimizer(torch.optim.RMSprop) == (torch.optim.RMSprop, {})


@pytest.mark.parametrize("optimizer", ["adma", None, 3, torch.nn.Linear])
def test_resolve_optimizer_rejects_other_values(optimizer):
    with pytest.raises(
        ValueError, match=r"Got optimizer=.*, but expected .*, or an optimizer class"
    ):
        resolve_optimizer(optimizer)


def test_derive_seed_depends_on_every_number_and_their_order():
    parts = [(0, 1), (1, 0), (0, 1, 1), (0, 2)]
    seeds = [derive_seed(*numbers) for numbers in parts]
    assert len(set(seeds)) == len(parts)
    assert seeds == [derive_seed(*numbers) for numbers in parts]
    assert all(0 <= seed < 2**63 for seed in seeds)
