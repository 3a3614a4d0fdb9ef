"""Where pixels go when a photo is resized to the network's canvas, and the way back. The only place that maps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Rule = Literal["stretch", "letterbox"]

# Two sizes are of the same photo where their aspect ratios differ by no more than this share.
_SAME_ASPECT = 0.02


@dataclass(frozen=True, slots=True)
class ResizePlan:
    """How one photo lies on a canvas: resized to `inner` (antialiased bilinear), put into the top-left corner.

    source, inner, canvas: heights and widths in pixels. With `stretch`, inner equals canvas; with `letterbox` the
    aspect ratio is kept (to the pixel) and what is left at the right or bottom is filled with the padding colour.
    """

    source: tuple[int, int]
    inner: tuple[int, int]
    canvas: tuple[int, int]

    def _scale(self) -> NDArray[np.float64]:
        (sh, sw), (ih, iw) = self.source, self.inner
        return np.array([iw / sw, ih / sh, iw / sw, ih / sh])

    def to_canvas(self, boxes: NDArray[np.floating]) -> NDArray[np.float64]:
        """Boxes [N, 4] of the original canvas, in pixels of the input canvas."""
        return np.asarray(boxes, np.float64).reshape(-1, 4) * self._scale()

    def to_source(self, boxes: NDArray[np.floating]) -> NDArray[np.float64]:
        """Boxes [N, 4] of the input canvas, in pixels of the original photo, clipped to it."""
        mapped = np.asarray(boxes, np.float64).reshape(-1, 4) / self._scale()
        return np.clip(mapped, 0, np.tile(self.source[::-1], 2))


def turned(boxes: NDArray[np.float64], hw: tuple[int, int], orientation: int) -> NDArray[np.float64]:
    """Boxes [N, 4] of a stored image of height and width `hw`, once its EXIF orientation, 1 to 8, is applied."""
    height, width = hw
    x1, y1, x2, y2 = boxes.T
    if orientation in (2, 3, 7, 8):  # mirrored left-right, in the stored image
        x1, x2 = width - x2, width - x1
    if orientation in (3, 4, 6, 7):  # upside down
        y1, y2 = height - y2, height - y1
    if orientation >= 5:
        x1, y1, x2, y2 = y1, x1, y2, x2
    return np.stack([x1, y1, x2, y2], 1)


def fitted(
    boxes: NDArray[np.float64], stated: tuple[int, int], hw: tuple[int, int], orientation: int
) -> tuple[NDArray[np.float64], str]:
    """Boxes [N, 4] drawn on a canvas of height and width `stated` -> on the upright photo `hw`; and the finding's kind.

    Turned where they were drawn before the photo's EXIF orientation was applied, scaled where they were drawn on a
    larger copy; else they are taken as pixels of the photo, whatever size was stated.
    """
    stored = hw[::-1] if orientation >= 5 else hw
    fits = bool(np.all(boxes[:, 2:] <= (stated[1] + 1, stated[0] + 1)))
    if orientation >= 5 and stated == stored and fits:
        return turned(boxes, stated, orientation), "boxes turned"
    scale = np.array([hw[1] / stated[1], hw[0] / stated[0]])
    beyond = bool(np.any(boxes[:, 2:] > np.array(hw[::-1]) * (1 + _SAME_ASPECT)))
    if fits and abs(scale[0] / scale[1] - 1) <= _SAME_ASPECT and beyond:
        return boxes * np.tile(scale, 2), "boxes scaled"
    return boxes, "size disagrees"


def iou(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Intersection over union of each box of a [N, 4] with each of b [M, 4] -> float64 [N, M]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    overlap = np.maximum(high - low, 0).prod(2).astype(np.float64)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (a, b)]
    result: NDArray[np.float64] = overlap / np.maximum(areas[0][:, None] + areas[1][None] - overlap, 1e-9)
    return result


def plan(source: tuple[int, int], canvas: tuple[int, int], rule: Rule) -> ResizePlan:
    """The plan for a photo of height and width `source` on a canvas of height and width `canvas`."""
    if rule == "stretch":
        return ResizePlan(source, canvas, canvas)
    scale = min(canvas[0] / source[0], canvas[1] / source[1])
    inner = tuple(min(full, max(1, round(side * scale))) for side, full in zip(source, canvas, strict=True))
    return ResizePlan(source, (inner[0], inner[1]), canvas)
