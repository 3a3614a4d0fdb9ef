"""Photos larger than what the network was trained on, looked at in overlapping tiles, each object counted once.

An object whose sides are no longer than the overlap is whole in at least one tile. So what a tile's inner edge cuts is
left to the tile that sees it whole, and what two tiles see whole is one object where the boxes are nearly one. Larger
objects are looked for in the photo as a whole.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detkit.config import Select
from detkit.errors import UserError
from detkit.geometry import iou
from detkit.manifest import Manifest
from detkit.runtime import decide, merge
from detkit.types import Detections

if TYPE_CHECKING:
    from detkit.runtime.predict import Detector

BATCH = 8  # tiles that the detector is given at a time
EDGE = 0.015  # share of a tile's side: a box that ends so near to its edge is taken for cut
COVERED = 0.5  # share of a cut box that must lie on a whole one to be of the same object
SAME = 0.5  # IoU from which boxes of two tiles are one object, where the model's own NMS doesn't say less


Sure = Callable[[Detections], NDArray[np.bool_]]


class Tiling(NamedTuple):
    """tile: height and width of a tile in pixels of the photo. overlap: longest side in pixels of the objects that are
    to be whole in some tile; longer ones are found in the photo as a whole."""

    tile: tuple[int, int]
    overlap: int

    def margin(self, axis: int) -> int:
        """Pixels along an axis of a tile within which a box counts as cut."""
        return math.ceil(EDGE * self.tile[axis])

    def corners(self, hw: tuple[int, int]) -> NDArray[np.int64]:
        """The tiles of a photo of height and width `hw`, as boxes, int64 [T, 4], row by row, evenly spread."""
        rows, columns = (_starts(hw[axis], self.tile[axis], self.overlap + self.margin(axis)) for axis in (0, 1))
        height, width = (min(side, full) for side, full in zip(self.tile, hw, strict=True))
        return np.array([(x, y, x + width, y + height) for y in rows for x in columns], np.int64)


def chosen(text: str | None, overlap: int | None, manifest: Manifest, model: str) -> Tiling | None:
    """The tiling that the command line asks for: `640` or `640x480` (width and height); auto: as large as the photos
    that the model was trained on, with objects of their size; off: none; None: auto for a model trained on tiles.

    overlap: default a quarter of the shorter side; of auto, what 99 of 100 objects fit into, but at most half a tile.
    Raises UserError, naming `model`, where it says nothing of its photos, and where it is no tiling.
    """
    photos = manifest.photos
    if text is None and photos and photos.tiled:
        text = "auto"
    if text is None or text == "off":
        if overlap is not None:
            raise UserError("--overlap: is that of --tiles, which is not given")
        return None
    if text != "auto":
        return parse(text, overlap)
    if photos is None:
        raise UserError(
            f"--tiles auto: {model} doesn't say what photos it was trained on (detkit {manifest.detkit} made it); "
            "export it again, from a run of this detkit, or give --tiles 640x480"
        )
    whole = Tiling(photos.size, 0)
    most = min(photos.size[axis] // 2 - whole.margin(axis) for axis in (0, 1))
    return checked(photos.size, min(math.ceil(photos.side), most) if overlap is None else overlap)


def parse(text: str, overlap: int | None) -> Tiling:
    """A tiling as `640` or `640x480` (width and height). overlap: default a quarter of the shorter side. Raises
    UserError where it is none."""
    try:
        sides = [int(part) for part in text.lower().split("x")]
        width, height = sides * 2 if len(sides) == 1 else sides
    except ValueError:
        raise UserError(f"--tiles {text}: give a width and a height in pixels, as in 640x480, or auto") from None
    return checked((height, width), min(width, height) // 4 if overlap is None else overlap)


def checked(tile: tuple[int, int], overlap: int) -> Tiling:
    """The tiling. Raises UserError where the tiles are too small for the overlap."""
    tiling = Tiling(tile, overlap)
    if min(tile) < 16 or overlap < 0 or any(tile[axis] < 2 * (overlap + tiling.margin(axis)) for axis in (0, 1)):
        height, width = tile
        raise UserError(
            f"tiles of {width}x{height} that overlap by {overlap}: make them 16 or more, and twice the overlap"
        )
    return tiling


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side of the photo: as few as overlap by so much."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [i * (length - tile) // (count - 1) for i in range(count)]


class _Looks:
    """A detector made of another, which it looks through several times."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector

    @property
    def manifest(self) -> Manifest:
        """The detector's."""
        return self.detector.manifest

    @property
    def classes(self) -> tuple[str, ...]:
        """The detector's."""
        return self.detector.classes


class Tiled(_Looks):
    """A detector that looks at tiles of a photo, and at all of it for what is larger than the overlap. A photo that is
    no larger than a tile is looked at as it is. sure: see `joined`. full: how many looks filled the network's list."""

    def __init__(self, detector: Detector, tiling: Tiling, sure: Sure | None = None) -> None:
        super().__init__(detector)
        self.tiling, self.sure, self.full = tiling, sure, 0
        self._counting = threading.Lock()  # several threads may detect

    def detect(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detections of each image, uint8 [h, w, 3], in its own pixels, best first."""
        return [self._one(image) for image in images]

    def _count(self, looks: Sequence[Detections]) -> None:
        shown = looks if self.sure is None else [_part(one, self.sure(one)) for one in looks]
        with self._counting:
            self.full += sum(decide.fills(one, self.manifest) for one in shown)

    def _one(self, image: NDArray[np.uint8]) -> Detections:
        hw = (image.shape[0], image.shape[1])
        places = self.tiling.corners(hw)
        if len(places) == 1:
            (only,) = self.detector.detect([image])
            self._count([only])
            return only
        views = [image, *(np.ascontiguousarray(image[y1:y2, x1:x2]) for x1, y1, x2, y2 in places)]
        found: list[Detections] = []
        for start in range(0, len(views), BATCH):
            found += self.detector.detect(views[start : start + BATCH])
        self._count(found)
        return joined(found[1:], places, found[0], self.tiling, self.manifest.nms, self.sure)


def joined(
    found: Sequence[Detections],
    places: NDArray[np.int64],
    whole: Detections,
    tiling: Tiling,
    rule: Select,
    sure: Sure | None = None,
) -> Detections:
    """What was found in the tiles of a photo, each object once, best first.

    found: of each tile, in its own pixels. places: the tiles in the photo, int64 [T, 4]. whole: found in the photo as a
    whole; of that, what has a side longer than the overlap counts. Boxes of two tiles (of one class, unless the
    detector's rule is agnostic) are one object from an IoU of `SAME` on, or of the rule's where that is less; the surer
    is kept. Boxes of one tile are left as they are. A box that a tile has cut is of an object that is whole in another
    tile, or in the photo. sure: says which detections are to be counted; where none of these was found there (see
    `_alone`), a cut box that is to be stays as it is; None: all of them go.
    """
    agnostic, same = rule.agnostic, min(rule.iou, SAME)
    large = (whole.boxes[:, 2:] - whole.boxes[:, :2]).max(1, initial=0) > tiling.overlap
    parts, pieces = [_part(whole, large)], []
    for one, place in zip(found, places, strict=True):
        shift = np.tile(place[:2], 2).astype(np.float32)
        cut = _cut(one.boxes, place, whole.hw, tiling)
        moved = Detections(one.boxes + shift, one.scores, one.labels, whole.hw)
        parts.append(_part(moved, ~cut))
        pieces.append(_part(moved, cut))
    views = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    boxes, scores, labels, order = _together(parts)
    views = views[order]
    kept = np.ones(len(order), bool)
    for i in range(len(order)):
        if kept[i]:
            rivals = np.flatnonzero(kept[i + 1 :] & (views[i + 1 :] != views[i])) + i + 1
            if not agnostic:
                rivals = rivals[labels[rivals] == labels[i]]
            kept[rivals[iou(boxes[i, None], boxes[rivals])[0] > same]] = False
    objects = Detections(boxes[kept], scores[kept], labels[kept], whole.hw)
    if sure is None:
        return objects
    cuts = Detections(*_together(pieces)[:3], whole.hw)
    cuts = _part(cuts, sure(cuts))
    thick = (cuts.boxes[:, 2:] - cuts.boxes[:, :2] > (tiling.margin(1), tiling.margin(0))).all(axis=1)
    left = _alone(_part(cuts, np.asarray(thick)), _part(objects, sure(objects)))
    return Detections(*_together([objects, left])[:3], whole.hw) if len(left) else objects


def _together(
    parts: Sequence[Detections],
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """The boxes, scores and labels of all, best first, and the place of each among those of all."""
    boxes, scores, labels = (
        np.concatenate([getattr(part, n) for part in parts]) for n in ("boxes", "scores", "labels")
    )
    order = np.argsort(-scores, kind="stable")
    return boxes[order], scores[order], labels[order], order


def _alone(pieces: Detections, objects: Detections) -> Detections:
    """The pieces of objects of which nothing else tells: no object, nor a larger such piece, lies on more than half of
    them, whatever its class."""
    areas = (pieces.boxes[:, 2:] - pieces.boxes[:, :2]).prod(1)
    kept = np.zeros(len(pieces), bool)
    for place in np.argsort(-areas, kind="stable"):
        box, others = pieces.boxes[place], np.concatenate([objects.boxes, pieces.boxes[kept]])
        sides = np.minimum(others[:, 2:], box[2:]) - np.maximum(others[:, :2], box[:2])
        kept[place] = not (sides.clip(0).prod(1) > COVERED * areas[place]).any()
    return _part(pieces, kept)


def _part(found: Detections, kept: NDArray[np.bool_]) -> Detections:
    return Detections(found.boxes[kept], found.scores[kept], found.labels[kept], found.hw)


def _cut(
    boxes: NDArray[np.float32], place: NDArray[np.int64], hw: tuple[int, int], tiling: Tiling
) -> NDArray[np.bool_]:
    """Which boxes of a tile end at an edge of it that lies inside the photo: bool [N]."""
    x, y = tiling.margin(1), tiling.margin(0)
    width, height = place[2] - place[0], place[3] - place[1]
    left, top = (boxes[:, 0] < x) & (place[0] > 0), (boxes[:, 1] < y) & (place[1] > 0)
    right, bottom = (boxes[:, 2] > width - x) & (place[2] < hw[1]), (boxes[:, 3] > height - y) & (place[3] < hw[0])
    cut: NDArray[np.bool_] = left | top | right | bottom
    return cut


class Flipped(_Looks):
    """A detector that looks at each photo twice, the second time mirrored, and fuses what it finds (weighted boxes)."""

    def detect(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detections of each image, uint8 [h, w, 3], in its own pixels, best first."""
        plain = self.detector.detect(images)
        mirrored = self.detector.detect([np.ascontiguousarray(image[:, ::-1]) for image in images])
        rule = self.manifest.nms
        fused = []
        for one, other in zip(plain, mirrored, strict=True):
            x1, y1, x2, y2 = other.boxes.T
            width = np.float32(other.hw[1])
            back = Detections(np.stack([width - x2, y1, width - x1, y2], 1), other.scores, other.labels, other.hw)
            fused.append(merge.weighted([one, back], iou=max(rule.iou, SAME), agnostic=rule.agnostic))
        return fused
