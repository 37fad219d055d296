"""Random numbers and gradients of a batch that several processes share."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

from sktransfer.finetuning.shared_step import WholeBatchDraws, add_gradients
from sktransfer.utils.processes import ALONE, Processes


class Second(Processes):
    """The second of two processes."""

    rank, count = 1, 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_random_numbers_are_those_of_the_whole_batch(layout):
    layers = nn.Sequential(
        nn.Dropout(0.3), StochasticDepth(0.5, "row"), nn.Dropout2d(0.5), nn.Dropout(0.0)
    )
    x = torch.rand(7, 4, 3, 5).contiguous(memory_format=layout)
    share = Second().share(7)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = functional.dropout(layers(x).repeat_interleave(2, 0), 0.5)[6:]
        after = torch.rand(1)
        torch.manual_seed(1)
        with WholeBatchDraws(share):
            actual = functional.dropout(layers(x[share.rows]).repeat_interleave(2, 0), 0.5)
        torch.testing.assert_close(actual, expected)
        assert torch.equal(torch.rand(1), after)
    assert (expected == 0).any()
    assert (expected != 0).any()


def test_unused_parameters_keep_no_gradient():
    used, unused = (nn.Parameter(torch.ones(2)) for _ in range(2))
    loss = (used * torch.tensor([1.0, 2.0])).sum()
    loss.backward()
    assert add_gradients([used, unused], loss.detach(), ALONE) == 3
    assert used.grad.tolist() == [1, 2]
    assert unused.grad is None


def test_gradients_of_all_processes_are_added():
    class Doubled(Processes):
        """Two processes with the same values."""

        count = 2

        def add(self, values):
            return 2 * values

    first, second = (
        nn.Parameter(torch.ones(2, 3)),
        nn.Parameter(torch.ones(1, dtype=torch.bfloat16)),
    )
    loss = (first * torch.arange(6.0).reshape(2, 3)).sum() + 3 * second.float().sum()
    loss.backward()
    assert add_gradients([first, second], loss.detach(), Doubled()) == 2 * (15 + 3)
    torch.testing.assert_close(first.grad, 2 * torch.arange(6.0).reshape(2, 3))
    assert second.grad.dtype == torch.bfloat16
    assert second.grad.tolist() == [6]
