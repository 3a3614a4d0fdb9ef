"""Random changes of training photos. Deterministic: the seed alone decides. The only file that knows albumentations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detkit import geometry, imaging
from detkit.config import Augment
from detkit.errors import need

# SSD's minimum overlaps of a crop with some object; the first means any.
_OVERLAPS = (1e-9, 0.1, 0.3, 0.5, 0.7, 0.9)
_TRIALS = 50
_SMALLEST_CROP = 0.3  # of the photo's side
_MOSAIC_LEFT = 0.25  # share of an object's area that must remain in the mosaic
_MOSAIC_PIXELS = 4.0  # shortest side there
RGB = tuple[int, int, int]


class Labelled(NamedTuple):
    """A photo and its objects: image uint8 [H, W, 3] RGB, boxes float64 [G, 4] in its pixels, labels int64 [G],
    ignore bool [G]."""

    image: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    ignore: NDArray[np.bool_]

    def chosen(self, keep: NDArray[np.bool_]) -> Labelled:
        """The photo with those of its objects that `keep`, bool [G], says."""
        return Labelled(self.image, self.boxes[keep], self.labels[keep], self.ignore[keep])


@cache
def jitter() -> Any:
    """The colour change, made once a process. Raises UserError where albumentations is not installed."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for a newer version
    albumentations: Any = need("albumentations")
    need("cv2").setNumThreads(0)  # the loader's processes are the parallelism
    change = albumentations.ColorJitter(
        brightness=(0.7, 1.3), contrast=(0.7, 1.3), saturation=(0.6, 1.4), hue=(-0.03, 0.03), p=1
    )
    return albumentations.Compose([change])


def colour(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The image with its brightness, contrast, saturation and (little) hue changed."""
    change = jitter()
    change.set_random_seed(int(rng.integers(2**31)))
    changed: NDArray[np.uint8] = change(image=image)["image"]
    return changed


def flip(photo: Labelled) -> Labelled:
    """The photo mirrored left-right."""
    width = photo.image.shape[1]
    boxes = photo.boxes.copy()
    boxes[:, [0, 2]] = width - photo.boxes[:, [2, 0]]
    return photo._replace(image=photo.image[:, ::-1], boxes=boxes)


def expand(photo: Labelled, largest: float, fill: RGB, rng: np.random.Generator) -> Labelled:
    """SSD's zoom-out: the photo somewhere on a canvas of up to `largest` times its sides, of the fill colour."""
    height, width = photo.image.shape[:2]
    ratio = rng.uniform(1, max(1.0, largest))
    canvas = np.empty((int(height * ratio), int(width * ratio), 3), np.uint8)
    canvas[:] = fill
    top = int(rng.integers(canvas.shape[0] - height + 1))
    left = int(rng.integers(canvas.shape[1] - width + 1))
    canvas[top : top + height, left : left + width] = photo.image
    return photo._replace(image=canvas, boxes=photo.boxes + np.tile((left, top), 2))


def _draw_crops(hw: tuple[int, int], rng: np.random.Generator) -> NDArray[np.int64]:
    """Candidate crops, int64 [_TRIALS, 4], of aspect ratio 1/2 to 2 (in shares of the photo's sides)."""
    sides = np.array(hw[::-1])
    shares = rng.uniform(_SMALLEST_CROP, 1, (_TRIALS, 2))
    places = rng.random((_TRIALS, 2))
    size = np.maximum(1, np.rint(shares * sides)).astype(np.int64)
    first = np.rint(places * (sides - size)).astype(np.int64)
    ratio = shares[:, 0] / shares[:, 1]
    return np.concatenate([first, first + size], 1)[(ratio >= 0.5) & (ratio <= 2)]


def crop(photo: Labelled, rng: np.random.Generator) -> Labelled:
    """SSD's random crop: it holds the centre of an object, and its IoU with one reaches a minimum chosen at random
    (chosen anew where no trial reaches it). Objects whose centre is inside stay, clipped; without objects, or where
    every trial fails, the photo stays as it is."""
    crops = _draw_crops((photo.image.shape[0], photo.image.shape[1]), rng)
    centres = (photo.boxes[:, :2] + photo.boxes[:, 2:]) / 2
    inside = np.all((centres > crops[:, None, :2]) & (centres < crops[:, None, 2:]), axis=2)
    best = geometry.iou(crops, photo.boxes).max(1, initial=0) * np.any(inside, axis=1)
    for least in rng.permutation(_OVERLAPS):
        good = np.flatnonzero(best >= least)
        if len(good):
            break
    else:
        return photo
    x1, y1, x2, y2 = crops[good[0]].tolist()
    kept = photo.chosen(inside[good[0]])
    boxes = np.clip(kept.boxes, [x1, y1, x1, y1], [x2, y2, x2, y2]) - [x1, y1, x1, y1]
    return kept._replace(image=photo.image[y1:y2, x1:x2], boxes=boxes)


def resize(photo: Labelled, canvas: tuple[int, int], rule: geometry.Rule, fill: RGB) -> Labelled:
    """The photo on a canvas of that height and width."""
    plan = geometry.plan((photo.image.shape[0], photo.image.shape[1]), canvas, rule)
    return photo._replace(image=imaging.to_canvas(photo.image, plan, fill), boxes=plan.to_canvas(photo.boxes))


def mosaic(
    photos: Sequence[Labelled], canvas: tuple[int, int], rule: geometry.Rule, fill: RGB, rng: np.random.Generator
) -> Labelled:
    """Four photos around a random point of a canvas of that height and width, each at 0.5 to 1 of its fitted size.

    Boxes are clipped to their quadrant; an object goes where less than a quarter of its area, or a side under 4
    pixels, remains.
    """
    height, width = canvas
    middle_y, middle_x = (int(rng.uniform(0.3, 0.7) * side) for side in canvas)
    image = np.empty((height, width, 3), np.uint8)
    image[:] = fill
    parts = []
    for place, photo in enumerate(photos):
        source = (photo.image.shape[0], photo.image.shape[1])
        fitted = geometry.plan(source, canvas, rule).inner
        share = rng.uniform(0.5, 1)
        inner = (max(1, round(fitted[0] * share)), max(1, round(fitted[1] * share)))
        plan = geometry.ResizePlan(source, inner, inner)
        # The photo's inner corner lies on the point; what reaches beyond the canvas is cut off.
        top = middle_y - inner[0] if place < 2 else middle_y
        left = middle_x - inner[1] if place % 2 == 0 else middle_x
        y1, x1 = max(top, 0), max(left, 0)
        y2, x2 = min(top + inner[0], height), min(left + inner[1], width)
        image[y1:y2, x1:x2] = imaging.to_canvas(photo.image, plan, fill)[y1 - top : y2 - top, x1 - left : x2 - left]
        boxes = plan.to_canvas(photo.boxes) + np.tile((left, top), 2)
        parts.append(_clipped(photo._replace(boxes=boxes), (x1, y1, x2, y2)))
    return Labelled(image, *(np.concatenate([part[field] for part in parts]) for field in (1, 2, 3)))


def _clipped(photo: Labelled, window: tuple[int, int, int, int]) -> Labelled:
    """The objects cut to the window, those of which too little remains left out."""
    boxes = np.clip(photo.boxes, np.tile(window[:2], 2), np.tile(window[2:], 2))
    sides, before = boxes[:, 2:] - boxes[:, :2], photo.boxes[:, 2:] - photo.boxes[:, :2]
    keep = (sides.min(1, initial=np.inf) >= _MOSAIC_PIXELS) & (sides.prod(1) >= _MOSAIC_LEFT * before.prod(1))
    return photo._replace(boxes=boxes).chosen(keep)


def geometric(photo: Labelled, settings: Augment, fill: RGB, rng: np.random.Generator, close: bool) -> Labelled:
    """Crop or expand, then flip, each with its probability; `close`: flip only."""
    if not close and rng.random() < settings.crop:
        photo = crop(photo, rng)
    if not close and rng.random() < settings.expand:
        photo = expand(photo, settings.expand_max, fill, rng)
    return flip(photo) if rng.random() < settings.flip else photo
