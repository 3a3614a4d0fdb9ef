"""Random changes of training photos. Deterministic: the seed alone decides. The only file that knows albumentations.

What is seen of a photo, and where, is drawn from its size and boxes alone, as one `View`; only then is the photo
decoded, no larger than the view needs, and resized once, straight to its place on the canvas.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detkit import geometry
from detkit.config import Augment
from detkit.data.pixels import Pixels, Window, cv2
from detkit.errors import need

# SSD's minimum overlaps of a crop with some object; the first means any.
_OVERLAPS = (1e-9, 0.1, 0.3, 0.5, 0.7, 0.9)
_TRIALS = 50
_SMALLEST_CROP = 0.3  # of the photo's side
_LEFT = 0.25  # share of an object's area that must remain in a mosaic, in a tile, in a pasted piece or under one
_PIXELS = 4.0  # shortest side there, on the canvas
_PASTED = 3  # most objects pasted from another photo
RGB = tuple[int, int, int]
Boxes = NDArray[np.float64]
Place = tuple[int, int, int, int]


class Objects(NamedTuple):
    """Objects of a photo: boxes float64 [G, 4] in its pixels, labels int64 [G], ignore bool [G]."""

    boxes: Boxes
    labels: NDArray[np.int64]
    ignore: NDArray[np.bool_]

    def chosen(self, keep: NDArray[np.bool_]) -> Objects:
        """Those that `keep`, bool [G], says."""
        return Objects(self.boxes[keep], self.labels[keep], self.ignore[keep])


class Labelled(NamedTuple):
    """A canvas and its objects: image uint8 [H, W, 3] RGB, objects in its pixels."""

    image: NDArray[np.uint8]
    objects: Objects


class View(NamedTuple):
    """What of a photo is seen, and where: window, x1 y1 x2 y2 in the photo's pixels, resized to place, x1 y1 x2 y2 in
    whole pixels of the canvas; mirrored: left-right, within place."""

    window: Window
    place: Place
    mirrored: bool = False

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width of the place."""
        return self.place[3] - self.place[1], self.place[2] - self.place[0]

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the canvas to a pixel of the photo, across and down."""
        x1, y1, x2, y2 = self.window
        return self.hw[1] / (x2 - x1), self.hw[0] / (y2 - y1)

    @property
    def step(self) -> float:
        """Pixels of the photo to a pixel of the canvas, along the side that has fewer."""
        return 1 / max(self.scale)

    def to_canvas(self, boxes: Boxes) -> Boxes:
        """Boxes [G, 4] of the photo in pixels of the canvas, clipped to the place."""
        (height, width), (left, top) = self.hw, self.window[:2]
        mapped: Boxes = (boxes - (left, top, left, top)) * (self.scale * 2)
        np.clip(mapped, 0, (width, height, width, height), out=mapped)
        if self.mirrored:
            mapped[:, [0, 2]] = width - mapped[:, [2, 0]]
        mapped += self.place[:2] * 2
        return mapped


# --- draws: from sizes and boxes, without a pixel ---------------------------------------------------------------------


def _draw_crops(hw: tuple[int, int], rng: np.random.Generator) -> NDArray[np.int64]:
    """Candidate crops, int64 [_TRIALS, 4], of aspect ratio 1/2 to 2 (in shares of the photo's sides)."""
    sides = np.array(hw[::-1])
    shares = rng.uniform(_SMALLEST_CROP, 1, (_TRIALS, 2))
    places = rng.random((_TRIALS, 2))
    size = np.maximum(1, np.rint(shares * sides)).astype(np.int64)
    first = np.rint(places * (sides - size)).astype(np.int64)
    ratio = shares[:, 0] / shares[:, 1]
    return np.concatenate([first, first + size], 1)[(ratio >= 0.5) & (ratio <= 2)]


def crop(hw: tuple[int, int], boxes: Boxes, rng: np.random.Generator) -> tuple[Place, NDArray[np.bool_]]:
    """SSD's random crop of a photo of height and width `hw`: x1 y1 x2 y2, and bool [G], the objects that stay.

    It holds the centre of an object, and its IoU with one reaches a minimum chosen at random (chosen anew where no
    trial reaches it). Objects whose centre is inside stay, to be clipped; without objects, or where every trial fails,
    the photo stays whole.
    """
    crops = _draw_crops(hw, rng)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = np.all((centres > crops[:, None, :2]) & (centres < crops[:, None, 2:]), axis=2)
    best = geometry.iou(crops, boxes).max(1, initial=0) * np.any(inside, axis=1)
    for least in rng.permutation(_OVERLAPS):
        good = np.flatnonzero(best >= least)
        if len(good):
            x1, y1, x2, y2 = crops[good[0]].tolist()
            return (x1, y1, x2, y2), inside[good[0]]
    return (0, 0, hw[1], hw[0]), np.ones(len(boxes), np.bool_)


def expand(hw: tuple[int, int], largest: float, rng: np.random.Generator) -> tuple[tuple[int, int], tuple[int, int]]:
    """SSD's zoom-out of a photo of height and width `hw`: height and width of a larger one, up to `largest` times its
    sides, and the left and top edge of the photo there."""
    height, width = hw
    ratio = rng.uniform(1, max(1.0, largest))
    larger = (int(height * ratio), int(width * ratio))
    top = int(rng.integers(larger[0] - height + 1))
    left = int(rng.integers(larger[1] - width + 1))
    return larger, (left, top)


def single(
    hw: tuple[int, int],
    boxes: Boxes,
    settings: Augment,
    canvas: tuple[int, int],
    rule: geometry.Rule,
    rng: np.random.Generator,
    close: bool,
) -> tuple[View, NDArray[np.bool_]]:
    """A photo of height and width `hw` on a canvas: crop, expand and flip, each with its probability (`close`: flip
    only), fitted by `rule`. And bool [G], the objects that stay."""
    window, keep = (0, 0, hw[1], hw[0]), np.ones(len(boxes), np.bool_)
    if not close and rng.random() < settings.crop:
        window, keep = crop(hw, boxes, rng)
    size = window[3] - window[1], window[2] - window[0]
    larger, (left, top) = size, (0, 0)
    if not close and rng.random() < settings.expand:
        larger, (left, top) = expand(size, settings.expand_max, rng)
    plan = geometry.plan(larger, canvas, rule)
    (inner_h, inner_w), (height, width) = plan.inner, larger
    x1 = min(round(left * inner_w / width), inner_w - 1)
    y1 = min(round(top * inner_h / height), inner_h - 1)
    x2 = max(round((left + size[1]) * inner_w / width), x1 + 1)
    y2 = max(round((top + size[0]) * inner_h / height), y1 + 1)
    mirrored = rng.random() < settings.flip
    if mirrored:
        x1, x2 = inner_w - x2, inner_w - x1
    return View(window, (x1, y1, x2, y2), mirrored), keep


def tiles(
    hws: Sequence[tuple[int, int]],
    settings: Augment,
    canvas: tuple[int, int],
    rule: geometry.Rule,
    rng: np.random.Generator,
) -> list[View]:
    """A mosaic: four photos of those heights and widths around a random point of the canvas, each at 0.5 to 1 of its
    fitted size, its inner corner on the point; what would reach beyond the canvas is not seen."""
    height, width = canvas
    middle_y, middle_x = (int(rng.uniform(0.3, 0.7) * side) for side in canvas)
    views = []
    for number, hw in enumerate(hws):
        fitted = geometry.plan(hw, canvas, rule).inner
        share = rng.uniform(0.5, 1)
        tile_h, tile_w = (max(1, round(side * share)) for side in fitted)
        top = middle_y - tile_h if number < 2 else middle_y
        left = middle_x - tile_w if number % 2 == 0 else middle_x
        x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + tile_w, width), min(top + tile_h, height)
        mirrored = rng.random() < settings.flip
        from_x, to_x = (left + tile_w - x2, left + tile_w - x1) if mirrored else (x1 - left, x2 - left)
        step_x, step_y = hw[1] / tile_w, hw[0] / tile_h
        window = (from_x * step_x, (y1 - top) * step_y, to_x * step_x, (y2 - top) * step_y)
        views.append(View(window, (x1, y1, x2, y2), mirrored))
    return views


def pieces(
    hw: tuple[int, int],
    objects: Objects,
    settings: Augment,
    canvas: tuple[int, int],
    rule: geometry.Rule,
    rng: np.random.Generator,
) -> list[View]:
    """One to three objects of a photo of height and width `hw`, as rectangles somewhere on a canvas, each at 0.7 to 1.4
    of its fitted size. None lies on another, and those that are ignored are not taken."""
    inner = geometry.plan(hw, canvas, rule).inner
    chosen = rng.permutation(np.flatnonzero(~objects.ignore))[: rng.integers(1, _PASTED + 1)]
    views: list[View] = []
    for window in objects.boxes[chosen].tolist():
        x1, y1, x2, y2 = window
        share = rng.uniform(0.7, 1.4)
        height = min(canvas[0], max(int(_PIXELS), round((y2 - y1) * inner[0] / hw[0] * share)))
        width = min(canvas[1], max(int(_PIXELS), round((x2 - x1) * inner[1] / hw[1] * share)))
        left, top = int(rng.integers(canvas[1] - width + 1)), int(rng.integers(canvas[0] - height + 1))
        place = (left, top, left + width, top + height)
        mirrored = rng.random() < settings.flip
        if not any(_meet(place, other.place) for other in views):
            views.append(View((x1, y1, x2, y2), place, mirrored))
    return views


def _meet(a: Place, b: Place) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# --- pixels -----------------------------------------------------------------------------------------------------------


_NOTHING = Objects(np.empty((0, 4)), np.empty(0, np.int64), np.empty(0, np.bool_))


def blank(canvas: tuple[int, int], fill: RGB | None) -> Labelled:
    """A canvas of that height and width, without objects, of the fill colour; None: for a view that covers it all."""
    image = np.empty((*canvas, 3), np.uint8)
    if fill is not None:
        cv2().rectangle(image, (0, 0), canvas[::-1], fill, -1)  # NumPy takes 20 times as long
    return Labelled(image, _NOTHING)


def visible(boxes: Boxes, areas: NDArray[np.float64]) -> NDArray[np.bool_]:
    """bool [G]: which objects count still, of which these boxes [G, 4] are left, `areas` [G] being those of all of
    them: at least a quarter of it, and no side under 4 pixels."""
    sides = boxes[:, 2:] - boxes[:, :2]
    kept: NDArray[np.bool_] = (sides.min(1, initial=np.inf) >= _PIXELS) & (sides.prod(1) >= _LEFT * areas)
    return kept


def lay(ground: Labelled, pixels: Pixels, objects: Objects, view: View, strict: bool = False) -> Labelled:
    """The view of a photo painted onto the ground's own image, its objects added to the ground's.

    strict: an object goes of which less than a quarter is in view, or that has a side under 4 pixels there.
    """
    image, window = pixels.cut(view.window, view.hw)
    view = view._replace(window=window)
    if view.mirrored:
        image = cv2().flip(image, 1)
    x1, y1, x2, y2 = view.place
    ground.image[y1:y2, x1:x2] = image
    boxes = view.to_canvas(objects.boxes)
    if strict:
        # Mapped, but not cut off.
        areas = (objects.boxes[:, 2:] - objects.boxes[:, :2]).prod(1) * (view.scale[0] * view.scale[1])
        keep = visible(boxes, areas)
    else:
        keep = (boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf) > 0
    return Labelled(ground.image, joined(ground.objects, objects._replace(boxes=boxes).chosen(keep)))


def joined(one: Objects, other: Objects) -> Objects:
    """The objects of both."""
    if one is _NOTHING:
        return other
    return Objects(*(np.concatenate(pair) for pair in zip(one, other, strict=True)))


def occlude(objects: Objects, places: Sequence[Place]) -> Objects:
    """The objects behind rectangles that don't overlap.

    An object's box becomes the bounding rectangle of that part of it which no rectangle covers: more can't be known of
    what is still seen of it. It goes where less than a quarter of its area, or a side under 4 pixels, remains.
    """
    boxes, keep = objects.boxes.copy(), np.ones(len(objects.boxes), np.bool_)
    covers = np.array(places, np.float64).reshape(-1, 4)
    for index, box in enumerate(objects.boxes):
        met = covers[np.all((covers[:, :2] < box[2:]) & (covers[:, 2:] > box[:2]), axis=1)]
        if len(met):
            boxes[index], seen = _uncovered(box, met)
            keep[index] = seen >= _LEFT and (boxes[index, 2:] - boxes[index, :2]).min() >= _PIXELS
    return objects._replace(boxes=boxes).chosen(keep)


def _uncovered(box: NDArray[np.float64], covers: Boxes) -> tuple[NDArray[np.float64], float]:
    """The bounding rectangle of what the covers leave of the box, and its share of the box's area. Where less than half
    a pixel is left between a cover's edge and the box's, nothing is."""
    first, last = np.tile(box[:2], 2), np.tile(box[2:], 2)
    inside = np.where(covers < first + 0.5, first, np.where(covers > last - 0.5, last, covers))
    # The edges of all cut the box into a grid, each cell of which is covered or free as a whole.
    xs, ys = (np.unique(np.concatenate([box[axis::2], inside[:, axis::2].ravel()])) for axis in (0, 1))
    across = (inside[:, :1] <= xs[:-1]) & (inside[:, 2:3] >= xs[1:])
    down = (inside[:, 1:2] <= ys[:-1]) & (inside[:, 3:] >= ys[1:])
    free = ~np.any(down[:, :, None] & across[:, None, :], axis=0)
    columns, rows = np.flatnonzero(free.any(0)), np.flatnonzero(free.any(1))
    if not len(columns):
        return box, 0.0
    seen = (free * np.diff(ys)[:, None] * np.diff(xs)).sum() / (box[2:] - box[:2]).prod()
    return np.array([xs[columns[0]], ys[rows[0]], xs[columns[-1] + 1], ys[rows[-1] + 1]]), float(seen)


def mixup(photo: Labelled, other: Labelled, rng: np.random.Generator) -> Labelled:
    """Two canvases of one size blended about half and half (0.4 to 0.6), the objects of both: since labels carry no
    weight, none may be hardly seen."""
    share = rng.uniform(0.4, 0.6)
    image = cv2().addWeighted(photo.image, share, other.image, 1 - share, 0)
    return Labelled(image, joined(photo.objects, other.objects))


@cache
def jitter() -> Any:
    """The colour change, made once a process. Raises UserError where albumentations is not installed."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks the network for a newer version
    albumentations: Any = need("albumentations")
    cv2()  # without threads
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
