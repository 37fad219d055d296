import contextlib

import pytest

from sktransfer.utils.processes import ALONE, Processes, current_processes, use_processes


class Several(Processes):
    def __init__(self, rank, count):
        self.rank, self.count = rank, count


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("n_images", [1, 2, 7, 8, 9])
def test_shares_are_the_whole_batch_in_order(n_images, count):
    shares = [Several(rank, count).share(n_images) for rank in range(count)]
    rows = [row for share in shares for row in range(n_images)[share.rows]]
    assert rows == list(range(n_images))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sum(share.weight for share in shares) == pytest.approx(1)


def test_processes_are_used_inside_the_block_only():
    processes = Several(0, 2)
    with contextlib.suppress(KeyError), use_processes(processes):
        assert current_processes() is processes
        raise KeyError
    assert current_processes() is ALONE
