"""Photos as samples on the network's canvas: as they are for evaluation, randomly changed for training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detkit import geometry, imaging
from detkit.config import Augment, Input
from detkit.data import augment as changes
from detkit.data.augment import Labelled
from detkit.data.labels import DataSet
from detkit.geometry import ResizePlan
from detkit.types import CROWD, DIFFICULT


@dataclass(frozen=True, slots=True)
class Key:
    """Which sample: the epoch travels with the index, so that worker processes need not be told of it.

    close: without mosaic, crop and expand (the last epochs). canvas: height and width where not the settings' own.
    """

    epoch: int
    index: int
    close: bool = False
    canvas: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """image: uint8 [h, w, 3] RGB, the canvas. boxes: float32 [G, 4] in its pixels. labels: int64 [G]. ignore: bool [G].
    plan: how the photo lies on the canvas, None where it was changed. index: the photo's place in the data set."""

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    ignore: NDArray[np.bool_]
    plan: ResizePlan | None
    index: int


class EvalSet:
    """The photos of a split as they are, on the canvas of `settings`."""

    def __init__(self, dataset: DataSet, settings: Input) -> None:
        self.dataset = dataset
        self.input = settings
        self.fill = imaging.fill(settings.mean)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key | int) -> Sample:
        """Raises UserError, naming the file, where the image can't be decoded."""
        index = key if isinstance(key, int) else key.index
        photo = self._photo(index)
        plan = geometry.plan((photo.image.shape[0], photo.image.shape[1]), self.input.size, self.input.resize)
        return self._sample(changes.resize(photo, self.input.size, self.input.resize, self.fill), plan, index)

    def _photo(self, index: int) -> Labelled:
        record = self.dataset[index]
        ignore = (record.flags & (DIFFICULT | CROWD)) != 0
        return Labelled(imaging.decode(record.path), record.boxes, record.labels, ignore)

    def _sample(self, photo: Labelled, plan: ResizePlan | None, index: int) -> Sample:
        image = np.ascontiguousarray(photo.image)
        return Sample(image, photo.boxes.astype(np.float32), photo.labels, photo.ignore, plan, index)


class TrainSet(EvalSet):
    """The photos of a split, changed as `augment` says; what comes out depends on seed, epoch and index alone."""

    def __init__(self, dataset: DataSet, settings: Input, augment: Augment, seed: int) -> None:
        super().__init__(dataset, settings)
        self.augment = augment
        self.seed = seed
        if augment.colour:
            changes.jitter()  # what is not installed is told now, and forked workers need not import it each

    def __getitem__(self, key: Key | int) -> Sample:
        """Raises UserError, naming the file, where an image can't be decoded. A bare index is one of epoch 0."""
        key = Key(0, key) if isinstance(key, int) else key
        rng = np.random.default_rng((self.seed, key.epoch, key.index))
        canvas = key.canvas or self.input.size
        composed = rng.random() < self.augment.mosaic and not key.close
        photo = self._mosaic(key.index, canvas, rng) if composed else self._single(key, canvas, rng)
        if rng.random() < self.augment.colour:
            photo = photo._replace(image=changes.colour(photo.image, rng))
        return self._sample(photo, None, key.index)

    def _single(self, key: Key, canvas: tuple[int, int], rng: np.random.Generator) -> Labelled:
        photo = changes.geometric(self._photo(key.index), self.augment, self.fill, rng, key.close)
        return changes.resize(photo, canvas, self.input.resize, self.fill)

    def _mosaic(self, index: int, canvas: tuple[int, int], rng: np.random.Generator) -> Labelled:
        indices = [index, *rng.integers(len(self), size=3).tolist()]
        photos = [self._photo(other) for other in indices]
        photos = [changes.flip(photo) if rng.random() < self.augment.flip else photo for photo in photos]
        return changes.mosaic(photos, canvas, self.input.resize, self.fill, rng)
