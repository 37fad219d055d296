"""Blocks after the boundary are trained, and blocks before it keep every bit."""

import numpy as np
import pytest
import torch
from block_helpers import Wide, changed, copy_of, float_images, run_before
from helpers import Tiny
from torch import nn

from sktransfer.adaptation.adversary import Adversary
from sktransfer.backbones.frozen import FrozenPrefix, freeze
from sktransfer.backbones.torchvision_blocks import split_into_blocks
from sktransfer.finetuning.schedule import ADVERSARY
from sktransfer.finetuning.suffix import TrainedSuffix

SHAPES = {0: (3, 16, 16), 1: (4, 16, 16), 2: (6, 16, 16)}
PARTS = ("a", "b", "c", "pre_logits", "head")


def suffix_of(network, boundary=0, **options):
    """Build the suffix of a network, with the head of the network."""
    suffix = TrainedSuffix(network.block_list(), boundary, 5, 7, SHAPES, **options)
    suffix.set_head(network[4].weight.numpy(), network[4].bias.numpy())
    return suffix


def train_a_little(suffix, x):
    """Take two optimizer steps with all trained parameters, in training mode."""
    suffix.train()
    optimizer = torch.optim.SGD(suffix.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        targets = torch.arange(len(x)) % 5
        nn.functional.cross_entropy(suffix(x), targets).backward()
        optimizer.step()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("boundary", [0, 1, 2, 3])
def test_suffix_after_the_blocks_before_it_equals_the_network(boundary, flat):
    network = Wide()
    suffix = suffix_of(network, boundary, dropout=0.5)
    x = run_before(network, 4 if boundary == 3 else boundary, float_images())
    x = x.flatten(1) if flat else x
    torch.testing.assert_close(suffix(x), network(float_images()))
    torch.testing.assert_close(suffix.embed(x), run_before(network, 4, float_images()))


@pytest.mark.parametrize("start", [1, 2, 3])
def test_suffix_accepts_activations_at_a_later_boundary(start):
    network = Wide()
    suffix = suffix_of(network, 1)
    suffix.move_boundary(start, ())
    x = run_before(network, 4 if start == 3 else start, float_images())
    torch.testing.assert_close(suffix(x.flatten(1)), network(float_images()))


def test_prefix_and_suffix_compose_to_the_backbone():
    network = freeze(Tiny())
    block_list = split_into_blocks(network)
    prefix = FrozenPrefix(block_list, (block_list.blocks[0][0],), None)
    suffix = TrainedSuffix(block_list, 1, 5, 12, {1: (8, 8, 8)})
    suffix.set_head(network[5].weight.numpy(), network[5].bias.numpy())
    torch.testing.assert_close(suffix(prefix(float_images())), network(float_images()))
    torch.testing.assert_close(suffix.embed(prefix(float_images())), network.embed(float_images()))


def test_new_head_has_zero_logits():
    suffix = TrainedSuffix(Wide().block_list(), 3, 4, 7, {})
    assert torch.equal(suffix(torch.randn(2, 7)), torch.zeros(2, 4))


@pytest.mark.parametrize("learn_statistics", [False, True])
@pytest.mark.parametrize(
    ("start", "trained"),
    [
        (0, PARTS),
        (0, ("a", "c", "pre_logits", "head")),
        (1, ("b", "head")),
        (2, ("c", "pre_logits", "head")),
        (3, ("head",)),
    ],
)
def test_frozen_parts_keep_every_bit_and_trained_parts_change(start, trained, learn_statistics):
    network = Wide()
    suffix = suffix_of(network, learn_statistics=learn_statistics, dropout=0.2)
    suffix.move_boundary(start, trained)
    state = copy_of(suffix)
    parts = {name: set(part.state_dict()) for name, part in suffix.parts().items()}
    train_a_little(suffix, run_before(network, 4 if start == 3 else start, float_images(10)))
    changed_names = changed(suffix, state)
    attributes = {
        "a": "blocks.0",
        "b": "blocks.1",
        "c": "blocks.2",
        "pre_logits": "pre_logits",
        "head": "head",
    }
    expected = {
        f"{attributes[name]}.{key}"
        for name in trained
        for key in parts[name]
        if learn_statistics or not key.endswith(("running_mean", "running_var", "tracked"))
        if key != "penalty"  # a constant
    }
    assert changed_names == expected


def test_penalty_weighs_squares_of_columns_and_is_part_of_the_head():
    suffix = suffix_of(Wide())
    assert suffix.penalty() == 0
    penalty = np.arange(7, dtype=np.float32)
    suffix.set_head(np.full((5, 7), 2.0, np.float32), np.ones(5, np.float32), penalty)
    assert suffix.penalty() == 5 * 4 * penalty.sum()
    restored = suffix_of(Wide())
    restored.restore(suffix.state_of(["head"]))
    assert restored.penalty() == suffix.penalty()


@pytest.mark.parametrize("learn_statistics", [False, True])
def test_modes_follow_the_trained_parts(learn_statistics):
    suffix = suffix_of(Wide(), learn_statistics=learn_statistics)
    for trained in (("c", "head"), ("a", "pre_logits"), (), PARTS, ("b",)):
        for mode in (True, False, True):
            suffix.move_boundary(0, trained)
            suffix.train(mode)
            suffix.move_boundary(1, trained)
            for name, part in suffix.parts().items():
                for module in part.modules():
                    is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
                    learns = mode and name in trained and (learn_statistics or not is_norm)
                    assert module.training == learns, (name, module)
                for parameter in part.parameters():
                    assert parameter.requires_grad == (name in trained)
            assert suffix.dropout.training == mode


def test_new_suffix_trains_nothing_and_is_in_inference_mode():
    suffix = suffix_of(Wide(), dropout=0.5)
    assert not any(module.training for module in suffix.modules())
    assert suffix.count_trained() == 0


def test_frozen_blocks_compute_the_same_in_training_mode():
    """Dropout and batch statistics do not affect frozen blocks."""
    network = Wide()
    suffix = suffix_of(network, learn_statistics=True)
    suffix.move_boundary(0, ("head",))
    expected = suffix(float_images())
    suffix.train()
    torch.testing.assert_close(suffix(float_images()), expected, rtol=0, atol=0)


def test_dropout_affects_only_the_input_of_the_head():
    suffix = suffix_of(Wide(), 3, dropout=0.5)
    suffix.set_head(np.ones((5, 7), np.float32), np.zeros(5, np.float32))
    suffix.move_boundary(3, ("head",))
    x = torch.ones(200, 7)
    assert torch.equal(suffix(x), torch.full((200, 5), 7.0))
    suffix.train()
    counts = suffix(x)[:, 0] / 2  # dropout doubles the kept values
    assert 2.5 < counts.mean() < 4.5
    assert counts.std() > 0.5
    assert torch.equal(suffix.embed(x), x)


def test_count_trained_sums_the_trained_parts():
    network = Wide()
    suffix = suffix_of(network)
    parts = zip(PARTS, network, strict=True)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts}
    for trained in ((), ("head",), ("a", "pre_logits"), PARTS):
        suffix.move_boundary(0, trained)
        assert suffix.count_trained() == sum(sizes[name] for name in trained)


def test_parts_are_listed_from_input_to_head():
    assert list(suffix_of(Wide(), 1).parts()) == ["b", "c", "pre_logits", "head"]
    assert list(suffix_of(Wide(), 3).parts()) == ["pre_logits", "head"]


def test_state_of_parts_is_a_copy_that_restores_them():
    network = Wide()
    suffix = suffix_of(network, learn_statistics=True)
    suffix.move_boundary(0, PARTS)
    state, expected = suffix.state_of(("a", "pre_logits", "head")), copy_of(suffix)
    assert {name.split(".")[0] for name in state} == {"a", "pre_logits", "head"}
    assert "a.1.num_batches_tracked" in state
    assert not any(tensor.requires_grad for tensor in state.values())
    train_a_little(suffix, float_images(10))
    state_before = {name: tensor.clone() for name, tensor in state.items()}
    parameters = list(map(id, suffix.parameters()))
    suffix.restore(state)
    # The other parts stay trained, and an optimizer still holds the same parameters.
    of_rest = {name for name in expected if name.startswith(("blocks.1", "blocks.2"))}
    assert changed(suffix, expected) == of_rest
    assert parameters == list(map(id, suffix.parameters()))
    train_a_little(suffix, float_images(10))
    assert all(tensor.equal(state_before[name]) for name, tensor in state.items())


def test_restored_state_makes_another_suffix_equal():
    network = Wide()
    suffix, restored = (suffix_of(network, 1, learn_statistics=True) for _ in range(2))
    suffix.move_boundary(1, PARTS)
    x = run_before(network, 1, float_images(10))
    train_a_little(suffix, x)
    restored.restore(suffix.state_of(PARTS))
    torch.testing.assert_close(restored(x), suffix.train(False)(x), rtol=0, atol=0)


def test_training_leaves_the_backbone_unchanged():
    network = Wide()
    block_list = network.block_list()
    state, expected = copy_of(network), network(float_images())
    suffix = TrainedSuffix(block_list, 0, 5, 7, SHAPES, 0.5, learn_statistics=True)
    suffix.move_boundary(0, PARTS)
    train_a_little(suffix, float_images(10))
    suffix.restore({name: tensor + 1 for name, tensor in suffix.state_of(PARTS).items()})
    assert not changed(network, state)
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    torch.testing.assert_close(network(float_images()), expected, rtol=0, atol=0)
    suffix_tensors = {id(tensor) for tensor in (*suffix.parameters(), *suffix.buffers())}
    assert suffix_tensors.isdisjoint(
        id(tensor) for tensor in (*network.parameters(), *network.buffers())
    )


def test_mixed_precision_returns_close_float32():
    network = Wide()
    full, mixed = suffix_of(network), suffix_of(network, precision=torch.bfloat16)
    assert torch.equal(mixed(float_images()), full(float_images()))
    full.train()
    mixed.train()
    assert mixed(float_images()).dtype == torch.float32
    torch.testing.assert_close(mixed(float_images()), full(float_images()), rtol=0.05, atol=0.05)
    assert not torch.equal(mixed(float_images()), full(float_images()))


def test_new_suffix_draws_no_random_numbers():
    network = Wide()
    state = torch.get_rng_state()
    suffix_of(network)
    assert torch.equal(torch.get_rng_state(), state)


def test_target_gradient_reaches_the_blocks_reversed():
    suffix = suffix_of(Wide())
    suffix.attach_adversary(Adversary(7, 1.0))
    suffix.move_boundary(0, [*PARTS, ADVERSARY])
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.rand(4, 3, 16, 16, generator=generator) for _ in range(2))
    gradients = {}
    for strength in (-1.0, 0.0, 0.5):
        suffix.zero_grad()
        suffix.adversary.strength = strength
        suffix(x, target)[1].backward()
        gradients[strength] = suffix.blocks[0][0].weight.grad.clone()
    assert gradients[-1.0].abs().max() > 0
    assert gradients[0.0].abs().max() == 0
    torch.testing.assert_close(gradients[0.5], -0.5 * gradients[-1.0])


def test_parts_leave_out_a_detached_adversary():
    suffix = suffix_of(Wide())
    suffix.attach_adversary(Adversary(7, 1.0))
    assert [*suffix.parts()] == [*PARTS, ADVERSARY]
    suffix.detach_adversary()
    assert [*suffix.parts()] == [*PARTS]
    assert torch.is_tensor(suffix(torch.rand(2, 3, 16, 16)))
