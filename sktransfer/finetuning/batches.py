"""The batches of one epoch after another, in an order that depends on the seed and the epoch.

An epoch has each image once, as one of its views. If the activations of all views are cached, only
the suffix runs; otherwise images are read, augmented and sent through the frozen blocks again.

Shapes: N images, V views of each, K classes, B images in a batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from sktransfer.finetuning.task import Task
from sktransfer.transforms.device_feed import image_reader
from sktransfer.transforms.loader import ImageErrors
from sktransfer.transforms.views import Views
from sktransfer.utils.processes import ALONE, Processes, Share
from sktransfer.utils.runtime import free_memory, to_device

# Share of the free memory of a device that cached activations may take.
_DEVICE_SHARE = 0.25

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class SoftTargets:
    """Targets of the loss, with sample weights and label smoothing.

    Parameters
    ----------
    y : ndarray of shape (N,)
        Class numbers, 0 to K - 1.
    weights : ndarray of shape (N,)
        Sample weights, which are scaled to a mean of 1.
    task : Task
    label_smoothing : float
        Share of each target that is spread over all classes.
    """

    y: np.ndarray
    weights: np.ndarray
    task: Task
    label_smoothing: float = 0.0

    def of(self, rows: np.ndarray) -> torch.Tensor:
        """Return weighted soft targets, float32 of shape (B, K); a row sums to its weight.

        Examples
        --------
        >>> from sktransfer.finetuning.task import ClassificationTask
        >>> task = ClassificationTask(np.array(["cat", "dog"]))
        >>> targets = SoftTargets(np.array([0, 1]), np.array([1.0, 3.0]), task, label_smoothing=0.5)
        >>> targets.of(np.array([0, 1]))
        tensor([[0.3750, 0.1250],
                [0.3750, 1.1250]])
        """
        weights = self.weights[rows] / self.weights.mean()
        return self.task.batch_targets(self.y[rows], weights, self.label_smoothing)


@dataclass(frozen=True)
class MapChange:
    """Augmentation of feature maps, which costs almost nothing.

    Parameters
    ----------
    shape : (int, int, int)
        C, H and W of a map.
    mirrors : bool
        Whether half of the maps are mirrored, which is almost the map of the mirrored image.
    crops : bool
        Whether a batch loses one row and one column at the border, which is almost the map of
        images that are moved and cropped, and saves some of the training time.
    """

    shape: tuple[int, ...]
    mirrors: bool
    crops: bool


class EpochBatches(Dataset, ABC):
    """Batches of one epoch after another.

    Parameters
    ----------
    targets : SoftTargets
    batch_size : int
        Maximum size; batches are of equal size. With `min_size`, a batch can be larger by one.
    device : torch.device
    mixup : float
        Parameter of the Beta distribution from which the mixing ratio of two images is drawn; 0
        does not mix. Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018,
        applied to the activations at the boundary (Verma et al., "Manifold Mixup", ICML 2019).
    shuffle : bool
        Whether the order changes from epoch to epoch.
    length : int or None
        Images per epoch. If there are fewer images, they repeat; if there are more, each epoch
        takes some of them. None takes each image once.
    min_size : int
        Minimum size, if there are that many images.
    change : MapChange or None
        How feature maps are changed at random, in each epoch anew.
    processes : Processes
        Each of them gets its share of every batch, which may be empty.

    Attributes
    ----------
    share : Share
        This process's share of the last batch.
    """

    def __init__(
        self,
        targets: SoftTargets,
        batch_size: int,
        device: torch.device,
        *,
        mixup: float = 0.0,
        shuffle: bool = True,
        length: int | None = None,
        min_size: int = 1,
        change: MapChange | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.targets, self.device = targets, device
        self.mixup, self.shuffle, self.change = mixup, shuffle, change
        self._length = len(targets.y) if length is None else length
        most_batches = max(1, self._length // min_size)
        self.n_batches = min(math.ceil(self._length / batch_size), most_batches)
        self.batch_size = math.ceil(self._length / self.n_batches)
        self.processes, self.share = processes, processes.share(self.batch_size)
        self.begin_epoch(0, 0)

    def begin_epoch(self, seed: int, epoch: int) -> None:
        """Seed the random numbers of an epoch and select its views."""
        self._rng, self._epoch = np.random.default_rng(seed), epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        """Yield activations (B, ...) and weighted soft targets (B, K), on the device."""
        order = np.arange(len(self.targets.y))
        if self.shuffle:
            self._rng.shuffle(order)
        batches = np.array_split(np.resize(order, len(self)), self.n_batches)
        shares = [self.processes.share(len(rows)) for rows in batches]
        # An image may be mixed with one of another process, so each process then reads all images.
        read = [slice(None) if self.mixup else share.rows for share in shares]
        parts = [rows[part] for rows, part in zip(batches, read, strict=True)]
        for share, part, (rows, x) in zip(shares, read, self._read_parts(parts), strict=True):
            self.share = share
            targets = to_device(self.targets.of(rows), self.device)
            x = x if self.change is None else self._changed(x, self.change, share.total, part)
            if self.mixup:
                x, targets = (mixed[share.rows] for mixed in self._mix(x, targets))
            yield x, targets

    def _read_parts(self, parts: list[np.ndarray]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Read batches, some of which may be empty."""
        reads = self.read([rows for rows in parts if len(rows)])
        for rows in parts:
            yield next(reads) if len(rows) else (rows, torch.empty(0, device=self.device))
        deque(reads, maxlen=0)  # raises the errors of a reader that has reached its end

    @abstractmethod
    def read(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield batches of images, as rows (B,) and float32 activations (B, ...)."""

    def _changed(self, x: torch.Tensor, change: MapChange, total: int, part: slice) -> torch.Tensor:
        """Change the maps of a part of a batch of `total` images."""
        maps = x.reshape(len(x), *change.shape)
        if change.crops:
            height, width = (side - 1 for side in change.shape[1:])
            top, left = self._rng.integers(2, size=2)
            maps = maps[:, :, top : top + height, left : left + width]
        if change.mirrors:
            is_chosen = self._rng.random(total)[part] < 0.5
            chosen = torch.from_numpy(is_chosen).reshape(-1, 1, 1, 1)
            maps = torch.where(to_device(chosen, self.device), maps.flip(-1), maps)
        return maps

    def _mix(self, x: torch.Tensor, targets: torch.Tensor) -> Batch:
        share = float(self._rng.beta(self.mixup, self.mixup))
        other = to_device(torch.from_numpy(self._rng.permutation(len(x))), self.device)
        return torch.lerp(x[other], x, share), torch.lerp(targets[other], targets, share)


class CachedBatches(EpochBatches):
    """Batches of cached activations (N, V, W); each epoch takes the next view of an image.

    The activations are kept on the device if they fit into a part of its free memory.

    Parameters
    ----------
    values : ndarray of shape (N, V, W)
    targets, *args, **options
        As in `EpochBatches`.
    """

    def __init__(
        self, values: np.ndarray, targets: SoftTargets, *args: object, **options: object
    ) -> None:
        super().__init__(targets, *args, **options)  # type: ignore[arg-type]
        self.values = values
        self._on_device: torch.Tensor | None = None
        if self.device.type == "cuda" and values.nbytes <= _DEVICE_SHARE * free_memory(self.device):
            self._on_device = torch.from_numpy(values).to(self.device)

    def read(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """See `EpochBatches.read`."""
        for rows in batches:
            views = (rows + self._epoch) % self.values.shape[1]
            if self._on_device is None:
                yield rows, torch.from_numpy(self.values[rows, views]).to(self.device).float()
            else:
                index = to_device(torch.from_numpy(np.stack([rows, views])), self.device)
                yield rows, self._on_device[index[0], index[1]].float()


class ImageBatches(EpochBatches):
    """Batches of images that are read in each epoch.

    Parameters
    ----------
    views_of : callable
        Returns the views of an epoch, and their number per image.
    run : callable
        Maps pixels (B, 3, H, W), uint8, to float32 activations (B, ...) on the device.
    threads : int
    """

    def __init__(
        self,
        views_of: Callable[[int], tuple[Views, int]],
        run: Callable[[torch.Tensor], torch.Tensor],
        threads: int,
        targets: SoftTargets,
        *args: object,
        **options: object,
    ) -> None:
        super().__init__(targets, *args, **options)  # type: ignore[arg-type]
        self.views_of, self.run, self.threads = views_of, run, threads

    def read(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """See `EpochBatches.read`."""
        views, count = self.views_of(self._epoch)
        items = [(rows * count + (rows + self._epoch) % count).tolist() for rows in batches]
        reader = image_reader(views, self.threads, ImageErrors("raise"), self.device, decodes=False)
        for read, batch in reader.read(items):
            yield np.asarray(read) // count, self.run(batch)


class PairedBatches(Dataset):
    """Batches of a source, each with the same number of images of a target.

    Parameters
    ----------
    source : EpochBatches
    target : EpochBatches
        Of the same length and batch size; its targets are ignored.
    """

    def __init__(self, source: EpochBatches, target: EpochBatches) -> None:
        self.source, self.target = source, target
        self.n_batches, self.batch_size = source.n_batches, source.batch_size
        self.processes = source.processes

    @property
    def share(self) -> Share:
        """See `EpochBatches`."""
        return self.source.share

    def begin_epoch(self, seed: int, epoch: int) -> None:
        """See `EpochBatches.begin_epoch`."""
        self.source.begin_epoch(seed, epoch)
        self.target.begin_epoch(seed, epoch)

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yield activations (B, ...) of both domains, by name, and the source's soft targets."""
        for (x, targets), (target, _) in zip(self.source, self.target, strict=True):
            yield {"x": x, "target": target}, targets
