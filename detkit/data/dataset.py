"""Photos as samples on the network's canvas: as they are for evaluation, randomly changed for training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detkit import geometry, imaging
from detkit.config import Augment, Input, Select
from detkit.data import augment as changes
from detkit.data import tiles
from detkit.data.augment import Labelled, Objects
from detkit.data.labels import DataSet
from detkit.data.pixels import Files, Source
from detkit.geometry import ResizePlan
from detkit.types import CROWD, DIFFICULT, Detections, Record


@dataclass(frozen=True, slots=True)
class Key:
    """Which sample: the epoch travels with the index, so that worker processes need not be told of it.

    close: flip and colour only (the last epochs). canvas: height and width where not the settings' own. repeat: which
    of the photo's samples, where an epoch has several.
    """

    epoch: int
    index: int
    close: bool = False
    canvas: tuple[int, int] | None = None
    repeat: int = 0


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
    """The photos of a split as they are, on the canvas of `settings`; or, where these say so, their tiles."""

    def __init__(self, dataset: DataSet, settings: Input) -> None:
        self.dataset = tiles.cut(dataset, settings.tiles, every=True)
        self.input = settings
        self.fill = imaging.fill(settings.mean)
        self._last = -1, np.zeros((0, 0, 3), np.uint8)  # the photo whose parts come now

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key | int) -> Sample:
        """Raises UserError, naming the file, where the image can't be decoded."""
        index = key if isinstance(key, int) else key.index
        record = self.dataset[index]
        plan = geometry.plan(record.hw, self.input.size, self.input.resize)
        image = imaging.to_canvas(self._image(index, record.path), plan, self.fill)
        return _sample(Labelled(image, _objects(record)._replace(boxes=plan.to_canvas(record.boxes))), plan, index)

    def _image(self, index: int, path: str) -> NDArray[np.uint8]:
        parts = self.dataset.parts
        if parts is None:
            return imaging.decode(path)
        if self._last[0] != parts.photos[index]:
            self._last = int(parts.photos[index]), imaging.decode(path)
        return tiles.window(self._last[1], parts, index)

    def joined(self, found: list[Detections], rule: Select) -> list[Detections]:
        """What was found in each sample, as what was found in each photo, by a detector of that rule."""
        parts = self.dataset.parts
        return tiles.joined(found, parts, self.input.tiles, rule) if parts and self.input.tiles else found


def _objects(record: Record) -> Objects:
    return Objects(record.boxes, record.labels, (record.flags & (DIFFICULT | CROWD)) != 0)


def _sample(photo: Labelled, plan: ResizePlan | None, index: int) -> Sample:
    boxes, labels, ignore = photo.objects
    return Sample(photo.image, boxes.astype(np.float32), labels, ignore, plan, index)


class TrainSet(EvalSet):
    """The photos of a split, changed as `augment` says; what comes out depends on seed, epoch, index and repeat alone.

    source: where the samples' pixels come from; default: the files, JPEGs at a reduced scale where that is enough.
    """

    def __init__(
        self, dataset: DataSet, settings: Input, augment: Augment, seed: int, source: Source | None = None
    ) -> None:
        super().__init__(tiles.cut(dataset, settings.tiles), settings)
        self.augment = augment
        self.seed = seed
        self.source = source or Files(self.dataset, reduced=True)
        if augment.colour:
            changes.jitter()  # what is not installed is told now, and forked workers need not import it each

    def __getitem__(self, key: Key | int) -> Sample:
        """Raises UserError, naming the file, where an image can't be decoded. A bare index is one of epoch 0."""
        key = Key(0, key) if isinstance(key, int) else key
        rng = np.random.default_rng((self.seed, key.epoch, key.index, key.repeat))
        canvas = key.canvas or self.input.size
        photo = self._photo(key.index, canvas, rng, key.close)
        if not key.close and rng.random() < self.augment.mixup:
            photo = changes.mixup(photo, self._photo(self._other(rng), canvas, rng, key.close), rng)
        if rng.random() < self.augment.colour:
            photo = photo._replace(image=changes.colour(photo.image, rng))
        return _sample(photo, None, key.index)

    def _other(self, rng: np.random.Generator) -> int:
        return int(rng.integers(len(self)))

    def _photo(self, index: int, canvas: tuple[int, int], rng: np.random.Generator, close: bool) -> Labelled:
        """The canvas with a photo or a mosaic of four, and objects of another on it."""
        composed = rng.random() < self.augment.mosaic and not close
        photo = self._mosaic(index, canvas, rng) if composed else self._single(index, canvas, rng, close)
        if not close and rng.random() < self.augment.copy_paste:
            photo = self._pasted(photo, self._other(rng), rng)
        return photo

    def _single(self, index: int, canvas: tuple[int, int], rng: np.random.Generator, close: bool) -> Labelled:
        record = self.dataset[index]
        view, keep = changes.single(record.hw, record.boxes, self.augment, canvas, self.input.resize, rng, close)
        pixels = self.source(index, view.step)
        ground = changes.blank(canvas, None if view.hw == canvas else self.fill)
        return changes.lay(ground, pixels, _objects(record).chosen(keep), view)

    def _mosaic(self, index: int, canvas: tuple[int, int], rng: np.random.Generator) -> Labelled:
        indices = [index, *rng.integers(len(self), size=3).tolist()]
        records = [self.dataset[other] for other in indices]
        views = changes.tiles([record.hw for record in records], self.augment, canvas, self.input.resize, rng)
        whole = changes.blank(canvas, self.fill)
        for other, record, view in zip(indices, records, views, strict=True):
            whole = changes.lay(whole, self.source(other, view.step), _objects(record), view, strict=True)
        return whole

    def _pasted(self, photo: Labelled, index: int, rng: np.random.Generator) -> Labelled:
        record = self.dataset[index]
        objects, canvas = _objects(record), (photo.image.shape[0], photo.image.shape[1])
        views = changes.pieces(record.hw, objects, self.augment, canvas, self.input.resize, rng)
        if not views:
            return photo
        pixels = self.source(index, min(view.step for view in views))
        photo = photo._replace(objects=changes.occlude(photo.objects, [view.place for view in views]))
        for view in views:
            photo = changes.lay(photo, pixels, objects, view, strict=True)
        return photo
