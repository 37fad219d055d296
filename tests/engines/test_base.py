import torch

from sktransfer.engines.base import pad


def test_pad_appends_black_images():
    batch = torch.randint(1, 256, (3, 3, 4, 5), dtype=torch.uint8)
    padded = pad(batch, 5)
    assert (padded.shape, padded.dtype) == ((5, 3, 4, 5), torch.uint8)
    assert torch.equal(padded[:3], batch)
    assert not padded[3:].any()
    assert padded.is_contiguous(memory_format=torch.channels_last)


def test_pad_returns_a_full_batch_unchanged():
    batch = torch.zeros(3, 3, 4, 5, dtype=torch.uint8)
    assert pad(batch, 3) is batch
