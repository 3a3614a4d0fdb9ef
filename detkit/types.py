"""What crosses the borders between packages: Record and Detections (numpy), Targets and Batch (torch tensors).

Boxes everywhere are x1 y1 x2 y2 in pixels, 0-based half-open edges: a box over the whole image is 0 0 W H.
Records and Detections use the original canvas: the photo as a person sees it, after EXIF rotation. Torch is imported
here for type checkers only: the runtime works without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from detkit.geometry import ResizePlan

DIFFICULT, TRUNCATED, OCCLUDED, CROWD = 1, 2, 4, 8


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One annotated photo.

    path: the image file. hw: its height and width in pixels. boxes: float64 [G, 4]. labels: int64 [G], an index into
    the classes. flags: uint8 [G], a sum of DIFFICULT, TRUNCATED, OCCLUDED, CROWD.
    Raises ValueError where the shapes disagree or a box is empty, inverted or outside the image.
    """

    path: str
    hw: tuple[int, int]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    flags: NDArray[np.uint8]

    def __post_init__(self) -> None:
        count = len(self.labels)
        if self.boxes.shape != (count, 4) or self.flags.shape != (count,):
            raise ValueError(f"{self.path}: {self.boxes.shape} boxes, {count} labels, {self.flags.shape} flags")
        height, width = self.hw
        x1, y1, x2, y2 = self.boxes.T
        if not ((x1 >= 0) & (y1 >= 0) & (x1 < x2) & (y1 < y2) & (x2 <= width) & (y2 <= height)).all():
            raise ValueError(f"{self.path}: a box is empty or outside the image of {width}x{height}")


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """What was found in one photo, best first.

    boxes: float32 [K, 4]. scores: float32 [K], in (0, 1]. labels: int64 [K], an index into the classes.
    hw: the photo's height and width in pixels. Raises ValueError where the shapes disagree.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    hw: tuple[int, int]

    def __post_init__(self) -> None:
        count = len(self.scores)
        if self.boxes.shape != (count, 4) or self.labels.shape != (count,):
            raise ValueError(f"{self.boxes.shape} boxes, {count} scores, {self.labels.shape} labels")

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> Detections:
        """Those with a score of at least `score`."""
        keep = self.scores >= score
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep], self.hw)


class Targets(NamedTuple):
    """The ground truth of a batch, padded to G, a power of two; input canvas.

    boxes: float32 [B, G, 4]. labels: int64 [B, G], -1 is padding. ignore: bool [B, G]: difficult and crowd objects,
    neither positive nor negative.
    """

    boxes: Tensor
    labels: Tensor
    ignore: Tensor


class Batch(NamedTuple):
    """What the loader hands over: images uint8 [B, 3, H, W] RGB, targets, a resize plan an image (None where the
    image was composed of several photos or cropped), and index int64 [B], the samples' places in the data set."""

    images: Tensor
    targets: Targets
    plans: tuple[ResizePlan | None, ...]
    index: Tensor  # type: ignore[assignment]  # tuple.index is not missed

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        images, *targets, index = (
            tensor.to(device, non_blocking=True) for tensor in (self.images, *self.targets, self.index)
        )
        return Batch(images, Targets(*targets), self.plans, index)
