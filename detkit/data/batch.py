"""Samples -> batches: the same ones whatever the number of worker processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from detkit.data.dataset import EvalSet, Key, Sample
from detkit.data.labels import DataSet
from detkit.errors import UserError
from detkit.types import CROWD, DIFFICULT, Batch, Targets

Canvas = Callable[[int], tuple[int, int]]


def collate(samples: Sequence[Sample]) -> Batch:
    """One batch: images uint8 [B, 3, H, W] (channels_last in memory), targets padded to a power of two G >= 1."""
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)
    most = max(len(sample.labels) for sample in samples)
    padded = 1 << max(0, most - 1).bit_length()
    boxes = np.zeros((len(samples), padded, 4), np.float32)
    labels = np.full((len(samples), padded), -1, np.int64)
    ignore = np.zeros((len(samples), padded), np.bool_)
    for row, sample in enumerate(samples):
        count = len(sample.labels)
        boxes[row, :count], labels[row, :count], ignore[row, :count] = sample.boxes, sample.labels, sample.ignore
    targets = Targets(torch.from_numpy(boxes), torch.from_numpy(labels), torch.from_numpy(ignore))
    index = torch.tensor([sample.index for sample in samples])
    return Batch(images, targets, tuple(sample.plan for sample in samples), index)


class _Guarded(Dataset[Sample | UserError]):
    """The samples; a UserError is handed over, for a worker process would turn it into a page of traceback."""

    def __init__(self, samples: EvalSet) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> Sample | UserError:
        try:
            return self.samples[key]
        except UserError as error:
            return error


def _collate(samples: Sequence[Sample | UserError]) -> Batch | UserError:
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    return collate(cast("Sequence[Sample]", samples))


def repeat_factors(dataset: DataSet, threshold: float) -> NDArray[np.float64]:
    """How often each photo is to be seen in an epoch, float64 [N], at least 1: the largest, over its classes, of
    sqrt(threshold / share of the photos that have the class) (LVIS: Gupta, Dollar and Girshick, 2019).

    Ignored objects don't count: nothing is learned from them.
    """
    count, classes = len(dataset), len(dataset.classes)
    photo = np.repeat(np.arange(count), np.diff(dataset.box_ends, prepend=0))
    counted = (dataset.flags & (DIFFICULT | CROWD)) == 0
    pairs = np.unique(photo[counted] * classes + dataset.labels[counted])
    shares = np.bincount(pairs % classes, minlength=classes) / count
    factors = np.ones(count)
    np.maximum.at(factors, pairs // classes, np.sqrt(threshold / shares[pairs % classes]))
    return factors


class Part(NamedTuple):
    """Which part of each batch is this process': of `ranks` processes it is the one numbered `rank`. It gets its part
    in `pieces` (micro-batches)."""

    rank: int = 0
    ranks: int = 1
    pieces: int = 1

    def of(self, keys: list[Key]) -> Iterator[list[Key]]:
        """Its pieces: as many keys each, or one more or fewer; where there are too few for all, not those without."""
        shares = self.ranks * self.pieces
        for share in range(self.rank * self.pieces, (self.rank + 1) * self.pieces):
            first, last = (len(keys) * at // shares for at in (share, share + 1))
            if first < last:
                yield keys[first:last]


class _Order(Sampler[list[Key]]):
    """The keys of an epoch's batches, or of this process' part of them. Lives in the main process; the last four
    fields are set before each pass."""

    def __init__(
        self, count: int, batch_size: int, seed: int | None, factors: NDArray[np.float64] | None, part: Part
    ) -> None:
        self.photos, self.batch_size, self.seed, self.factors, self.part = count, batch_size, seed, factors, part
        self.count = count if factors is None else int(factors.sum())
        self.epoch, self.close, self.start = 0, False, 0
        self.canvas: Canvas | None = None
        # A last small batch would train BatchNorm badly; but a data set smaller than a batch must still train.
        self.whole = seed is not None and self.count >= batch_size

    def __len__(self) -> int:
        return self.count // self.batch_size if self.whole else -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.arange(self.photos)
        rng = np.random.default_rng((self.seed or 0, self.epoch))
        if self.seed is not None:
            order = rng.permutation(self.photos)
        repeats = np.zeros(self.photos, np.int64)
        if self.factors is not None:
            order, repeats = self._repeated(order, self.factors, rng)
        for batch in range(self.start, len(self)):
            chosen = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            canvas = self.canvas(batch) if self.canvas else None
            keys = [
                Key(self.epoch, index, self.close, canvas, repeat)
                for index, repeat in zip(order[chosen].tolist(), repeats[chosen].tolist(), strict=True)
            ]
            yield from self.part.of(keys)

    def _repeated(
        self, order: NDArray[np.int64], factors: NDArray[np.float64], rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`count` photos in random order, each as often as its factor says: a whole number more or less, drawn so that
        the mean over epochs is the factor (systematic sampling: one offset for all). And which repeat each is."""
        ends = np.floor(np.cumsum(factors[order]) + rng.random()).astype(np.int64)
        times = np.diff(ends, prepend=0)
        photos = np.repeat(order, times)
        repeats = np.arange(len(photos)) - np.repeat(ends - times, times)
        mixed = rng.permutation(len(photos))[: self.count]
        return photos[mixed], repeats[mixed]


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C and other signals to the group are for the main process: it alone decides what they mean, and tells the
    # workers. (Ignoring SIGTERM here would be no way: multiprocessing ends stray workers with it, and waits.)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()


class Loader:
    """Batches of a set of samples, an epoch at a time.

    seed: the order is a permutation drawn from (seed, epoch), and a last batch that is not full is left out (unless
    there is no other); None: in order and complete. factors: float64 [N], how often each photo is seen in an epoch, on
    average (`repeat_factors`); None: once. workers: processes that decode, at most one a core, 0 for none;
    they stay alive between epochs. pin: put batches into pinned memory, for CUDA. part: of each batch, what this
    process has of it.
    """

    def __init__(
        self,
        samples: EvalSet,
        batch_size: int,
        workers: int,
        *,
        seed: int | None = None,
        factors: NDArray[np.float64] | None = None,
        pin: bool = False,
        part: Part | None = None,
    ) -> None:
        self._order = _Order(len(samples), batch_size, seed, factors, part or Part())
        self.samples = samples
        workers = min(workers, os.cpu_count() or 1)
        self._batches = DataLoader(
            _Guarded(samples),
            batch_sampler=self._order,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin,
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
        )

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._order)

    def close(self) -> None:
        """End its processes: those of one that the garbage collector finds in a cycle take 5 s each to end."""
        del self._batches

    def epoch(
        self, number: int = 0, *, start: int = 0, close: bool = False, canvas: Canvas | None = None
    ) -> Iterator[Batch]:
        """The batches of that epoch from the one numbered `start` on; `close` leaves only flip and colour; `canvas`:
        height and width in pixels of the batch of that number in the epoch, where not the input's size. With a `part`
        of several pieces each is given by itself.

        Raises UserError, naming the file, where an image can't be decoded.
        """
        self._order.epoch, self._order.close, self._order.start, self._order.canvas = number, close, start, canvas
        for batch in self._batches:
            if isinstance(batch, UserError):
                # Raised anew: raising `batch` itself makes a cycle with this frame; see `close`.
                raise UserError(*batch.args)
            # Pinning turns the tuple of plans into a list.
            yield batch._replace(plans=tuple(batch.plans))
