"""Networks and checks that the tests of blocks, boundaries and suffixes share."""

import torch
from helpers import seeded
from torch import nn
from torch.nn import functional

from sktransfer.backbones.blocks import BlockList
from sktransfer.backbones.frozen import freeze
from sktransfer.backbones.torchvision_blocks import split_into_blocks

# Buffers that follow from the structure of a network.
TABLES = ("relative_position_index", "relative_coords_table", "num_batches_tracked")


def random_state(network):
    """Fill every parameter and statistic with values that carry a signal to the last layer."""
    values = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    state = {}
    for name, tensor in network.state_dict().items():
        if name.endswith(TABLES):
            state[name] = tensor
            continue
        value = values.repeat(-(-tensor.numel() // len(values)))[: tensor.numel()]
        value = value.reshape(tensor.shape)
        if tensor.ndim > 1:
            state[name] = value.mul_((2 / tensor[0].numel()) ** 0.5)
        elif name.endswith(("weight", "var")):
            state[name] = value.abs_().mul_(0.1).add_(1)
        else:
            state[name] = value.mul_(0.1)
    return state


@torch.no_grad()
def fill(network):
    state = network.state_dict()
    for name, value in random_state(network).items():
        state[name].copy_(value)
    return network


def two_images(size):
    coarse = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return functional.interpolate(coarse, (size, size), mode="bicubic")


def float_images(n=3):
    """Draw images from a normal distribution, float32 (N, 3, 16, 16)."""
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def run(blocks, x):
    for _, block in blocks:
        version = x._version
        y = block(x)
        assert x._version == version, "a block writes into its input"
        x = y
    return x


def assert_equal(x, y):
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


@torch.no_grad()
def check_block_list(network, x):
    """Check the block list of a network, and return it with the last feature map."""
    block_list = split_into_blocks(network)
    network.eval()
    expected = network(x)
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()
    last = run(block_list.blocks, x)
    assert_equal(block_list.logits(last), expected)
    vector = block_list.pre_logits(last)
    assert vector.ndim == 2
    assert len(vector) == len(x)
    assert last.ndim == {"NCHW": 4, "NHWC": 4, "NLC": 3, "vector": 2}[block_list.layout]
    assert len(dict(block_list.blocks)) == len(block_list.blocks)
    owned = [
        set(part.parameters()) for part in (*dict(block_list.blocks).values(), block_list.logits)
    ]
    assert sum(map(len, owned)) == len(set().union(*owned))
    assert set().union(*owned) == set(network.parameters())
    return block_list, last


class Wide(nn.Sequential):
    """Three blocks with BatchNorm and dropout, pre-logits that learn, 5 logits."""

    def __init__(self):
        super().__init__(
            *(
                nn.Sequential(nn.Conv2d(c, d, 3, padding=1), nn.BatchNorm2d(d), nn.Dropout(0.5))
                for c, d in ((3, 4), (4, 6), (6, 8))
            ),
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7), nn.BatchNorm1d(7)
            ),
            nn.Linear(7, 5),
        )
        seeded(self)

    def block_list(self):
        first, second, third, pre_logits, head = freeze(self)
        blocks = (("a", first), ("b", second), ("c", third))
        return BlockList(blocks, pre_logits, nn.Sequential(pre_logits, head), "NCHW")


def copy_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module, before):
    """Return the names of the tensors that have changed."""
    return {name for name, tensor in module.state_dict().items() if not tensor.equal(before[name])}


def run_before(network, boundary, x):
    """Run the children of a network before a boundary."""
    for block in list(network)[:boundary]:
        x = block(x)
    return x
