"""Data sets of parts of photos, as runtime.tiles looks at them: training on tiles, and evaluation with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from detkit import imaging
from detkit.config import Select, Tiles
from detkit.data.augment import visible
from detkit.data.labels import DataSet, Parts
from detkit.runtime import tiles
from detkit.types import DIFFICULT, Detections


def cut(dataset: DataSet, settings: Tiles | None, every: bool = False) -> DataSet:
    """The parts of the photos that `detkit predict --tiles` looks at: the tiles of each and, where there are several,
    first the whole, in which only what is longer than the overlap counts (the rest is ignored there). Without settings,
    or where they are parts already, the data set itself.

    An object in a tile is clipped to it; one that is cut goes where less than a quarter of it is left, or a side under
    4 pixels. every: whole photos too that show nothing long enough. Raises UserError where the tiles are too small for
    the overlap.
    """
    if settings is None or dataset.parts:
        return dataset
    tiling = tiles.checked(settings.size, settings.overlap)
    photos, windows, chosen, boxes, ends, small = [], [], [], [], [], []
    first = count = 0
    for photo, last in enumerate(dataset.box_ends.tolist()):
        height, width = dataset.hw[photo].tolist()
        own = dataset.boxes[first:last]
        sides = own[:, 2:] - own[:, :2]
        short = sides.max(1, initial=0) <= tiling.overlap
        places = tiling.corners((height, width))
        views = [(window, False) for window in places.tolist()]
        if len(views) > 1 and (every or not short.all()):
            views.insert(0, ([0, 0, width, height], True))
        for window, whole in views:
            x1, y1, x2, y2 = window
            seen = np.clip(own, (x1, y1, x1, y1), (x2, y2, x2, y2)) - (x1, y1, x1, y1)
            left = (seen == own - (x1, y1, x1, y1)).all(1) | visible(seen, sides.prod(1))
            kept = np.flatnonzero(left)
            photos.append(photo)
            windows.append(window)
            chosen.append(first + kept)
            boxes.append(seen[kept])
            small.append(short[kept] & whole)
            count += len(kept)
            ends.append(count)
        first = last
    rows = np.array(photos, np.int64)
    found = dataset.take(rows)
    objects = np.concatenate([np.zeros(0, np.int64), *chosen])
    flags = dataset.flags[objects]
    flags[np.concatenate([np.zeros(0, bool), *small])] |= DIFFICULT
    corners = np.array(windows, np.int64).reshape(-1, 4)
    return replace(
        found,
        hw=(corners[:, [3, 2]] - corners[:, [1, 0]]).astype(np.int32),
        boxes=np.concatenate([np.zeros((0, 4)), *boxes]),
        labels=dataset.labels[objects],
        flags=flags,
        box_ends=np.array(ends, np.int64),
        parts=Parts(rows, corners, dataset.hw[rows]),
    )


def image(dataset: DataSet, index: int) -> NDArray[np.uint8]:
    """The pixels of a row, uint8 [h, w, 3] RGB: the photo, or its part. Raises UserError where it can't be decoded."""
    whole = imaging.decode(dataset[index].path)
    return whole if dataset.parts is None else window(whole, dataset.parts, index)


def window(whole: NDArray[np.uint8], parts: Parts, index: int) -> NDArray[np.uint8]:
    """The part of a photo, uint8 [h, w, 3], that the row has."""
    x1, y1, x2, y2 = parts.windows[index].tolist()
    return np.ascontiguousarray(whole[y1:y2, x1:x2])


def joined(found: Sequence[Detections], parts: Parts, settings: Tiles, rule: Select) -> list[Detections]:
    """What was found in each part (cut with `every`), as what was found in each photo."""
    tiling = tiles.checked(settings.size, settings.overlap)
    starts = np.flatnonzero(np.diff(parts.photos, prepend=-1)).tolist()
    result = []
    for start, stop in zip(starts, [*starts[1:], len(found)], strict=True):
        if stop - start == 1:
            result.append(found[start])
            continue
        whole, *tiled = found[start:stop]
        places: NDArray[np.int64] = parts.windows[start + 1 : stop]
        result.append(tiles.joined(tiled, places, whole, tiling, rule))
    return result
