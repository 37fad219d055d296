import pytest
import torch
from block_helpers import Wide, changed, copy_of, float_images, run_before
from helpers import Tiny
from torch import nn

from sktransfer.backbones.frozen import FrozenPrefix, FrozenSpan, freeze, pool
from sktransfer.backbones.torchvision_blocks import split_into_blocks


@pytest.fixture
def network():
    return freeze(Tiny())


def test_prefix_stays_frozen_in_any_mode():
    network = Tiny()
    prefix = FrozenPrefix(split_into_blocks(freeze(network)), (None, "logits"))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    first = prefix(float_images())
    for mode in (True, False):
        prefix.train(mode)
        assert not any(module.training for module in prefix.modules())
        torch.testing.assert_close(prefix(float_images()), first, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())


def test_prefix_concatenates_layers_in_the_given_order(network):
    block_list = split_into_blocks(network)
    first, second = (name for name, _ in block_list.blocks[:2])
    x = float_images()
    together = FrozenPrefix(block_list, ("logits", second, None, first))(x)
    apart = [FrozenPrefix(block_list, (tap,))(x) for tap in ("logits", second, None, first)]
    torch.testing.assert_close(together, torch.cat(apart, dim=1))
    assert [part.shape[1] for part in apart] == [5, 12, 12, 8]


def test_prefix_layers_equal_the_network(network):
    x = float_images()
    block_list = split_into_blocks(network)
    torch.testing.assert_close(FrozenPrefix(block_list, ("logits",))(x), network(x))
    torch.testing.assert_close(FrozenPrefix(block_list)(x), network.embed(x))
    first = block_list.blocks[0][0]
    torch.testing.assert_close(FrozenPrefix(block_list, (first,))(x), network[0](x).mean((2, 3)))
    torch.testing.assert_close(
        FrozenPrefix(block_list, (first,), "max")(x), network[0](x).amax((2, 3))
    )


def test_prefix_leaves_out_blocks_after_the_boundary(network):
    block_list = split_into_blocks(network)
    prefix = FrozenPrefix(block_list, (block_list.blocks[0][0],))
    assert len(prefix.blocks) == 1
    assert sum(p.numel() for p in prefix.parameters()) == sum(
        p.numel() for p in network[0].parameters()
    )


def test_unknown_layer_raises_an_error_that_lists_the_blocks(network):
    block_list = split_into_blocks(network)
    names = ", ".join(name for name, _ in block_list.blocks)
    with pytest.raises(ValueError, match=r"^Got layer='logit', but the backbone has blocks ") as e:
        FrozenPrefix(block_list, ("logit",))
    assert str(e.value) == (
        f"Got layer='logit', but the backbone has blocks {names}; expected one of them, "
        "'logits', or None for the penultimate vector; did you mean 'logits'?"
    )


@pytest.mark.parametrize(
    ("layout", "axes"), [("NCHW", (0, 3, 1, 2)), ("NHWC", (0, 1, 2, 3)), ("NLC", None)]
)
@pytest.mark.parametrize("pooling", ["avg", "max", "avgmax"])
def test_pool_handles_every_layout(layout, axes, pooling):
    x = torch.randn(2, 4, 5, 3)  # N, H, W, C
    mean, largest = x.mean((1, 2)), x.amax((1, 2))
    arranged = x.flatten(1, 2) if axes is None else x.permute(axes)
    expected = {"avg": mean, "max": largest, "avgmax": torch.cat([mean, largest], 1)}[pooling]
    torch.testing.assert_close(pool(arranged, pooling, layout), expected)


def test_pool_leaves_out_class_tokens():
    tokens = torch.randn(2, 1 + 6, 4)
    torch.testing.assert_close(pool(tokens, "avg", "NLC", 1), tokens[:, 1:].mean(1))


def test_pool_keeps_every_value_for_none_and_returns_vectors_unchanged():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(pool(x, None), x.flatten(1))
    vectors = nn.Flatten()(x)
    assert pool(vectors, "max") is vectors


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 3), (0, 3), (3, 3)])
def test_span_runs_the_blocks_between_two_boundaries(start, stop):
    network = Wide()
    span = FrozenSpan(network.block_list(), start, stop)
    x = run_before(network, start, float_images())
    expected = run_before(network, 4 if stop == 3 else stop, float_images())
    torch.testing.assert_close(span(x), expected, rtol=0, atol=0)


def test_span_stays_frozen_in_any_mode():
    network = Wide()
    span = FrozenSpan(network.block_list(), 0, 3)
    state, first = copy_of(network), span(float_images())
    for mode in (True, False):
        span.train(mode)
        torch.testing.assert_close(span(float_images()), first, rtol=0, atol=0)
        assert not any(module.training for module in span.modules())
    assert not any(parameter.requires_grad for parameter in span.parameters())
    assert not changed(network, state)
