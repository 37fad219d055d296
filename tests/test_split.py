import pytest
import torch
from tiny import Tiny
from torch import nn

from sktransfer.architectures import dissect
from sktransfer.split import FrozenPrefix, freeze, pool


@pytest.fixture
def network():
    return freeze(Tiny())


def picture(n=3):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_frozen_means_no_gradient_no_moving_statistics_and_no_dropout_in_any_mode():
    network = Tiny()
    prefix = FrozenPrefix(dissect(freeze(network)), (None, "logits"))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    first = prefix(picture())
    for mode in (True, False):
        prefix.train(mode)
        assert not any(module.training for module in prefix.modules())
        torch.testing.assert_close(prefix(picture()), first, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())


def test_taps_are_emitted_side_by_side_in_the_order_asked_for(network):
    anatomy = dissect(network)
    first, second = (name for name, _ in anatomy.blocks[:2])
    x = picture()
    together = FrozenPrefix(anatomy, ("logits", second, None, first))(x)
    apart = [FrozenPrefix(anatomy, (tap,))(x) for tap in ("logits", second, None, first)]
    torch.testing.assert_close(together, torch.cat(apart, dim=1))
    assert [part.shape[1] for part in apart] == [5, 12, 12, 8]


def test_taps_equal_the_network_itself(network):
    x = picture()
    anatomy = dissect(network)
    torch.testing.assert_close(FrozenPrefix(anatomy, ("logits",))(x), network(x))
    torch.testing.assert_close(FrozenPrefix(anatomy)(x), network.embed(x))
    first = anatomy.blocks[0][0]
    torch.testing.assert_close(FrozenPrefix(anatomy, (first,))(x), network[0](x).mean((2, 3)))
    torch.testing.assert_close(
        FrozenPrefix(anatomy, (first,), "max")(x), network[0](x).amax((2, 3))
    )


def test_blocks_after_the_boundary_are_left_out(network):
    anatomy = dissect(network)
    prefix = FrozenPrefix(anatomy, (anatomy.blocks[0][0],))
    assert len(prefix.blocks) == 1
    assert sum(p.numel() for p in prefix.parameters()) == sum(
        p.numel() for p in network[0].parameters()
    )


def test_a_layer_that_is_none_of_the_blocks_names_them(network):
    anatomy = dissect(network)
    names = ", ".join(name for name, _ in anatomy.blocks)
    with pytest.raises(ValueError, match=r"^Got layer='logit', but the backbone has blocks ") as e:
        FrozenPrefix(anatomy, ("logit",))
    assert str(e.value) == (
        f"Got layer='logit', but the backbone has blocks {names}, besides 'logits' and None for "
        "the penultimate vector; did you mean 'logits'?"
    )


@pytest.mark.parametrize(
    ("layout", "axes"), [("NCHW", (0, 3, 1, 2)), ("NHWC", (0, 1, 2, 3)), ("NLC", None)]
)
@pytest.mark.parametrize("pooling", ["avg", "max", "avgmax"])
def test_pooling_in_every_layout(layout, axes, pooling):
    x = torch.randn(2, 4, 5, 3)  # N, H, W, C
    mean, largest = x.mean((1, 2)), x.amax((1, 2))
    arranged = x.flatten(1, 2) if axes is None else x.permute(axes)
    expected = {"avg": mean, "max": largest, "avgmax": torch.cat([mean, largest], 1)}[pooling]
    torch.testing.assert_close(pool(arranged, pooling, layout), expected)


def test_class_tokens_are_no_positions():
    tokens = torch.randn(2, 1 + 6, 4)
    torch.testing.assert_close(pool(tokens, "avg", "NLC", 1), tokens[:, 1:].mean(1))


def test_no_pooling_keeps_every_value_and_vectors_stay_vectors():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(pool(x, None), x.flatten(1))
    vectors = nn.Flatten()(x)
    assert pool(vectors, "max") is vectors
