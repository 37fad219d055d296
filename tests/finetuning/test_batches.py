import numpy as np
import pytest
import torch
from helpers import SIZE, images

from sktransfer.data.images import as_images
from sktransfer.finetuning.batches import (
    CachedBatches,
    ImageBatches,
    MapChange,
    PairedBatches,
    SoftTargets,
)
from sktransfer.finetuning.task import ClassificationTask
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Views

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(resize=SIZE, crop=(SIZE, SIZE))


class Brighter:
    """An augmentation that needs no random numbers."""

    digest = b"brighter"

    def __call__(self, image, seed, size=None):
        return image + 1


def targets(n, classes=3, **options):
    weights = np.random.RandomState(0).rand(n) + 0.5
    return SoftTargets(
        np.arange(n) % classes, weights, ClassificationTask(np.arange(classes)), **options
    )


def cached(n=10, views=3, batch_size=4, **options):
    """Build a loader in which each value is image + view / 10."""
    values = np.arange(n)[:, None, None] + np.arange(views)[:, None] / 10 + np.zeros(2)
    return CachedBatches(values.astype(np.float16), targets(n), batch_size, CPU, **options)


def epoch(loader, seed=0, number=0):
    loader.begin_epoch(seed, number)
    return list(loader)


def rows_and_views(batches):
    values = torch.cat([x for x, _ in batches])[:, 0]
    return values.long().tolist(), ((values - values.floor()) * 10).round().long().tolist()


def test_soft_targets_sum_to_the_weight_of_the_image():
    soft_targets = targets(7, label_smoothing=0.2)
    rows = np.array([6, 0, 0, 3])
    chosen = soft_targets.of(rows)
    assert chosen.dtype == torch.float32
    np.testing.assert_allclose(
        chosen.sum(1), soft_targets.weights[rows] / soft_targets.weights.mean(), rtol=1e-6
    )
    np.testing.assert_allclose(soft_targets.of(np.arange(7)).sum(), 7, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_label_smoothing_spreads_its_share_over_all_classes(smoothing):
    soft_targets = SoftTargets(
        np.array([2, 0]), np.array([4.0, 4.0]), ClassificationTask(np.arange(4)), smoothing
    )
    expected = np.full((2, 4), smoothing / 4)
    expected[0, 2] += 1 - smoothing
    expected[1, 0] += 1 - smoothing
    np.testing.assert_allclose(soft_targets.of(np.array([0, 1])), expected, rtol=1e-6)


def test_loss_of_soft_targets_is_the_weighted_loss_of_labels():
    soft_targets = targets(6, label_smoothing=0.1)
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    losses = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(soft_targets.y), label_smoothing=0.1, reduction="none"
    )
    weights = torch.from_numpy(soft_targets.weights / soft_targets.weights.mean())
    soft_loss = torch.nn.functional.cross_entropy(logits, soft_targets.of(np.arange(6)))
    torch.testing.assert_close(soft_loss.double(), (losses * weights).mean())


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [
        (10, 4, [4, 3, 3]),
        (8, 4, [4, 4]),
        (3, 32, [3]),
        (33, 32, [17, 16]),
        (21, 5, [5, 4, 4, 4, 4]),
        (2, 1, [1, 1]),
    ],
)
def test_batches_are_of_equal_size(n, batch_size, sizes):
    loader = cached(n, batch_size=batch_size)
    assert [len(x) for x, _ in loader] == sizes
    assert loader.n_batches == len(sizes)
    assert loader.batch_size == max(sizes)
    assert len(loader) == n


def test_epoch_shows_each_image_once_and_rotates_its_views():
    loader = cached(n=10, views=3)
    seen = []
    for number in range(6):
        rows, views = rows_and_views(epoch(loader, seed=number, number=number))
        assert sorted(rows) == list(range(10))
        assert len(set(views)) == 3, "an epoch shows the same view of all images"
        seen.append(dict(zip(rows, views, strict=True)))
    for row in range(10):
        shown = [views[row] for views in seen]
        assert sorted(shown[:3]) == [0, 1, 2]
        assert shown[3:] == shown[:3]


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_batches_are_reproducible_for_a_seed(mixup):
    loader = cached(mixup=mixup)
    first, second = epoch(loader, 5, 2), epoch(loader, 5, 2)
    for (x, t), (same_x, same_t) in zip(first, second, strict=True):
        assert torch.equal(x, same_x)
        assert torch.equal(t, same_t)
    different = epoch(loader, 6, 2)
    assert not all(torch.equal(x, y) for (x, _), (y, _) in zip(first, different, strict=True))


def test_batches_leave_the_global_random_states_unchanged():
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    epoch(cached(mixup=0.4))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_batches_pair_images_with_their_targets():
    loader = cached(n=11)
    batches = epoch(loader, seed=3)
    rows, _ = rows_and_views(batches)
    assert rows != sorted(rows)
    expected = loader.targets.of(np.array(rows))
    torch.testing.assert_close(torch.cat([t for _, t in batches]), expected)
    assert all(x.dtype == torch.float32 for x, _ in batches)


def test_unshuffled_batches_keep_the_row_order():
    loader = cached(n=10, views=1, shuffle=False)
    for seed in (0, 1):
        assert rows_and_views(epoch(loader, seed, seed))[0] == list(range(10))


def test_unshuffled_batches_are_the_same_in_every_iteration():
    loader = cached(n=10, views=1, shuffle=False)
    first, second = list(loader), list(loader)
    for (x, t), (same_x, same_t) in zip(first, second, strict=True):
        assert torch.equal(x, same_x)
        assert torch.equal(t, same_t)


def test_mixup_mixes_targets_as_it_mixes_inputs():
    """An image that is its own target shows the share and the partner of the mixture."""
    n = 12
    values = torch.eye(n).numpy()[:, None]
    soft_targets = SoftTargets(np.arange(n), np.ones(n), ClassificationTask(np.arange(n)))
    loader = CachedBatches(values, soft_targets, 6, CPU, mixup=0.5)
    shares = set()
    for number in range(4):
        batches = epoch(loader, number, number)
        for x, t in batches:
            assert torch.equal(x, t)
            torch.testing.assert_close(x.sum(1), torch.ones(6))
            assert (x > 0).sum(1).max() <= 2, "more than two images are mixed"
            mixed = x[(x > 0).sum(1) == 2]
            pairs = {tuple(sorted(row[row > 0].round(decimals=4).tolist())) for row in mixed}
            assert len(pairs) <= 1, "a batch has more than one share"
            shares |= pairs
        total = sum(x.sum(0) for x, _ in batches)
        # Every image is mixed once with either share.
        torch.testing.assert_close(total, torch.ones(n))
    assert len(shares) > 4


def test_mixup_keeps_the_weights_of_images():
    loader = cached(n=10, mixup=0.5)
    total = sum(t.sum() for _, t in epoch(loader))
    torch.testing.assert_close(total, torch.tensor(10.0))


def image_feed(X, n_views, soft_targets, batch_size, **options):
    views = Views(as_images(X), PREPROCESSING, Brighter(), n_views)
    return ImageBatches(
        lambda epoch: (views, 1 + n_views),
        torch.Tensor.float,
        2,
        soft_targets,
        batch_size,
        CPU,
        **options,
    )


def prepared(X, n_views):
    """Prepare all views without `Views`: (N, V, 3, H, W)."""
    plain = torch.stack([PREPROCESSING.prepare(x) for x in X])
    return torch.stack([plain + (number > 0) for number in range(1 + n_views)], dim=1).numpy()


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"mixup": 0.4}])
@pytest.mark.parametrize(("n", "batch_size"), [(8, 4), (9, 5), (21, 5)])
def test_image_batches_equal_cached_batches(n, batch_size, options):
    X, soft_targets = images(n), targets(n)
    image_batches = image_feed(X, 2, soft_targets, batch_size, **options)
    cached_feed = CachedBatches(prepared(X, 2), soft_targets, batch_size, CPU, **options)
    for number in range(3):
        batches = epoch(image_batches, 7, number), epoch(cached_feed, 7, number)
        for (x, t), (same_x, same_t) in zip(*batches, strict=True):
            torch.testing.assert_close(x, same_x, rtol=0, atol=0)
            torch.testing.assert_close(t, same_t, rtol=0, atol=0)


def test_image_batches_may_use_other_views_in_every_epoch():
    X, epochs = images(5), []

    def views_of(epoch):
        epochs.append(epoch)
        return Views(as_images(X), PREPROCESSING, Brighter(), only=epoch), 1

    loader = ImageBatches(views_of, torch.Tensor.float, 1, targets(5), 2, CPU, shuffle=False)
    plain = prepared(X, 1)
    for number in range(2):
        x = torch.cat([x for x, _ in epoch(loader, 0, number)])
        np.testing.assert_array_equal(x, plain[:, number])
    assert epochs == [0, 1]


@pytest.mark.parametrize("length", [4, 10, 23])
def test_epoch_length_may_differ_from_the_number_of_images(length):
    loader = cached(n=10, views=2, batch_size=5, length=length)
    batches = epoch(loader, seed=1)
    rows, _ = rows_and_views(batches)
    assert len(loader) == len(rows) == length
    assert max(len(x) for x, _ in batches) == loader.batch_size <= 5
    counts = np.bincount(rows, minlength=10)
    assert counts.max() - counts.min() <= 1
    assert rows_and_views(epoch(loader, seed=2))[0] != rows


def test_paired_batches_equal_the_batches_of_both_parts():
    source, target = cached(n=11), cached(n=4, views=2, length=11)
    paired = PairedBatches(cached(n=11), cached(n=4, views=2, length=11))
    assert (len(paired), paired.n_batches) == (11, source.n_batches)
    for number in range(2):
        expected = zip(epoch(source, 5, number), epoch(target, 5, number), strict=True)
        for (x, targets), (source_batch, target_batch) in zip(
            epoch(paired, 5, number), expected, strict=True
        ):
            assert torch.equal(x["x"], source_batch[0])
            assert torch.equal(x["target"], target_batch[0])
            assert torch.equal(targets, source_batch[1])


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [
        (7, 1, [3, 2, 2]),
        (7, 2, [3, 2, 2]),
        (7, 3, [3, 2, 2]),
        (5, 2, [3, 2]),
        (3, 2, [3]),
        (2, 1, [2]),
        (1, 1, [1]),  # there is only one
        (1, 16, [1]),
        (9, 8, [5, 4]),
        (8, 2, [2, 2, 2, 2]),
        (33, 32, [17, 16]),
        (17, 16, [9, 8]),
    ],
)
def test_no_batch_is_smaller_than_the_minimum(n, batch_size, sizes):
    loader = cached(n, batch_size=batch_size, min_size=2)
    assert [len(x) for x, _ in loader] == sizes
    assert loader.n_batches == len(sizes)
    assert loader.batch_size == max(sizes)


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (8, 2), (33, 32), (64, 16), (6, 5), (2, 2)])
def test_minimum_changes_no_batch_that_is_large_enough(n, batch_size):
    plain, limited = (cached(n, batch_size=batch_size, min_size=size) for size in (1, 2))
    for (x, y), (same_x, same_y) in zip(epoch(plain), epoch(limited), strict=True):
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)


MAPS = np.random.RandomState(0).rand(12, 1, 2, 5, 7).astype(np.float32)


def changed(mirrors, crops, batch_size=4, seed=0):
    """Return batches of changed maps with the unchanged maps of the same images."""
    loader = CachedBatches(
        MAPS.reshape(12, 1, -1),
        SoftTargets(np.arange(12), np.ones(12), ClassificationTask(np.arange(12))),
        batch_size,
        CPU,
        change=MapChange((2, 5, 7), mirrors, crops),
    )
    batches = epoch(loader, seed)
    return [(x, torch.from_numpy(MAPS[t.argmax(1).numpy(), 0])) for x, t in batches]


def crops_of(maps):
    return {
        (top, left): maps[..., top : top + 4, left : left + 6] for top in (0, 1) for left in (0, 1)
    }


def test_maps_keep_their_values_without_a_change():
    for x, maps in changed(mirrors=False, crops=False):
        assert torch.equal(x, maps)


def test_half_of_the_maps_are_mirrored():
    mirrored = []
    for number in range(20):
        for x, maps in changed(mirrors=True, crops=False, seed=number):
            for one, original in zip(x, maps, strict=True):
                mirrored.append(torch.equal(one, original.flip(-1)))
                assert mirrored[-1] or torch.equal(one, original)
    assert len(mirrored) == 240
    assert 0.4 < np.mean(mirrored) < 0.6


def test_batch_of_maps_loses_a_row_and_a_column_at_the_same_border():
    seen = []
    for number in range(20):
        for x, maps in changed(mirrors=False, crops=True, seed=number):
            assert x.shape == (4, 2, 4, 6)
            seen += [where for where, crop in crops_of(maps).items() if torch.equal(x, crop)]
    assert len(seen) == 60, "each batch has one crop"
    assert set(seen) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_maps_are_mirrored_after_the_crop():
    for x, maps in changed(mirrors=True, crops=True):
        options = [crop for part in crops_of(maps).values() for crop in (part, part.flip(-1))]
        for row, one in enumerate(x):
            assert any(torch.equal(one, option[row]) for option in options)


def test_changes_of_maps_depend_on_the_seed_of_the_epoch():
    def joined(**options):
        return torch.cat([x for x, _ in changed(mirrors=True, crops=True, **options)])

    assert torch.equal(joined(seed=3), joined(seed=3))
    assert not torch.equal(joined(seed=3), joined(seed=4))


def test_changed_maps_have_their_own_targets_if_they_are_mixed():
    loader = CachedBatches(
        MAPS.reshape(12, 1, -1),
        SoftTargets(np.arange(12), np.ones(12), ClassificationTask(np.arange(12))),
        4,
        CPU,
        change=MapChange((2, 5, 7), mirrors=False, crops=False),
        mixup=0.5,
    )
    for x, t in epoch(loader):
        expected = torch.einsum("bn,nchw->bchw", t, torch.from_numpy(MAPS[:, 0]))
        torch.testing.assert_close(x, expected)
