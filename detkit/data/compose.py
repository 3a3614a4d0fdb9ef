"""Compose scenes of cut-out products, with Pascal-VOC annotations.

Cut-outs are pictures with transparency, a sub-folder a class, or the boxes of a VOC data set, whose masks are found by
GrabCut. They are decoded once, into one file of premultiplied RGBA at halving sizes that all processes map; a scene
warps each item straight from there onto its own few pixels. So boxes are exact by construction:

- a box is the tight extent of an item's *visible* pixels: its alpha is at least one half there, and
  that of no item put down after it;
- which items are annotated, and OCCLUDED, TRUNCATED and DIFFICULT, is as in `detkit.data.synth`;
- each scene begins with another class and takes the classes in turns, so they come out balanced;
- scene i is a function of (seed, i), the cut-outs and the settings, whatever the number of workers.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from math import ceil, cos, exp, log, pi, sin, sqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from detkit import imaging
from detkit.config import Data
from detkit.data import cache as voc_cache
from detkit.data.synth import (
    DIFFICULT_BELOW,
    MIN_VISIBLE,
    OCCLUDED_BELOW,
    SMALL_SIDE,
    Drawn,
    pooled,
    write_set,
)
from detkit.errors import UserError, need
from detkit.files import require_free
from detkit.types import DIFFICULT, OCCLUDED, TRUNCATED

Array = NDArray[Any]
Window = tuple[slice, slice]
Progress = Callable[[int, int], None]
Layout = Literal["auto", "scatter", "shelf"]
Masks = Literal["grabcut", "box"]

JPEG_QUALITY = 88
CUT_SIDE = 96  # px of the longer side while GrabCut works: its time grows with the square
CONTEXT = 0.12  # of the box's sides: what GrabCut sees around it
SMALLEST = 12  # px of a cut-out's shorter side
OVERLAP = 0.1  # of a box's area: covered more than this by another box, it is not cut out
# How items fill a scene: the squares over their longer sides sum to at most the first share of it, and at least to
# that with sides of the second share of the length.
SCATTERED, SHELVED = (2.8, 0.4), (1.6, 0.7)
MOST_ITEMS = 2000


@dataclass(frozen=True)
class Look:
    """What scenes look like.

    size: (width, height) in pixels. items: fewest and most in a scene. scale: smallest and largest longer side of an
    item before perspective, as a share of the scene's shorter side; where many items are drawn they are smaller.
    effects: shadows, light, blur and grain; without them the pixels are those of the cut-outs.
    Raises UserError for a setting out of range.
    """

    size: tuple[int, int] = (640, 480)
    items: tuple[int, int] = (1, 24)
    scale: tuple[float, float] = (0.08, 0.95)
    layout: Layout = "auto"
    effects: bool = True

    def __post_init__(self) -> None:
        if not 32 <= min(self.size) <= max(self.size) <= 16384:
            raise UserError(f"--size {self.size[0]} {self.size[1]}: each from 32 to 16384 pixels")
        if not 1 <= self.items[0] <= self.items[1] <= MOST_ITEMS:
            raise UserError(f"--items {self.items[0]} {self.items[1]}: fewest and most, from 1 to {MOST_ITEMS}")
        if not 0.01 <= self.scale[0] <= self.scale[1] <= 2:
            raise UserError(f"--scale {self.scale[0]:g} {self.scale[1]:g}: smallest and largest, from 0.01 to 2")


class Source(NamedTuple):
    """Where a cut-out comes from: an image file, its class, and its box there (None: the whole picture)."""

    path: str
    label: int
    box: tuple[float, float, float, float] | None = None


class Scene(NamedTuple):
    """A scene and its truth.

    image: uint8 [H, W, 3] RGB. ids: uint16 [H, W], the number (from 1) of the item seen at each pixel, 0 for none.
    boxes: int64 [G, 4]. labels: an index into the classes. flags: DIFFICULT, TRUNCATED, OCCLUDED bits. numbers: each
    box's number in ids.
    """

    image: NDArray[np.uint8]
    ids: NDArray[np.uint16]
    boxes: NDArray[np.int64]
    labels: list[int]
    flags: list[int]
    numbers: list[int]


@cache
def _cv2() -> Any:
    return need("cv2")


@contextmanager
def _one_thread() -> Iterator[None]:
    """OpenCV's own threads off: processes are the parallelism."""
    cv2 = _cv2()
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


# --- what there is --------------------------------------------------------------------------------------------------


def _images(folder: Path) -> list[Path]:
    """The image files below a folder, sorted; hidden ones and those in hidden folders left out."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in imaging.IMAGE_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a' if folder.exists() else 'no such'} folder")


def read_folder(root: Path) -> tuple[tuple[str, ...], list[Source]]:
    """The classes, named exactly as the sub-folders of `root` and sorted, and the pictures in them.

    Raises UserError where a folder or an image is missing, an image lies beside the class folders, or a folder's name
    can't stand in an annotation.
    """
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UserError(f"{root}: no class folders here: it needs one sub-folder a class, or photos with VOC XML")
    loose = [path for path in _images(root) if path.parent == root]
    if loose:
        raise UserError(f"{loose[0]}: lies beside the class folders: move it into the one of its class")
    sources = []
    for label, folder in enumerate(folders):
        if not folder.name.isprintable() or folder.name != folder.name.strip():
            raise UserError(f"{folder}: a class name can't begin or end with a blank or hold control characters")
        found = _images(folder)
        if not found:
            raise UserError(f"{folder}: no images here ({' '.join(imaging.IMAGE_SUFFIXES)})")
        sources += [Source(str(path), label) for path in found]
    return tuple(folder.name for folder in folders), sources


def read_voc(root: Path, split: str) -> tuple[tuple[str, ...], list[Source], Counter[str]]:
    """The classes of a VOC data set, those boxes of the split that show a whole product, and how many others there are.

    Left out are boxes that are flagged, small, or more than `OVERLAP` covered by another one. Raises UserError as
    `cache.load` does, and where nothing is left.
    """
    records = voc_cache.load(Data(root=root, unlabelled="skip"), split)
    sources: list[Source] = []
    left_out: Counter[str] = Counter()
    for index in range(len(records)):
        record = records[index]
        for number, box in enumerate(record.boxes):
            reason = _unfit(record.boxes, int(record.flags[number]), number)
            if reason:
                left_out[reason] += 1
            else:
                x1, y1, x2, y2 = box.tolist()
                sources.append(Source(record.path, int(record.labels[number]), (x1, y1, x2, y2)))
    if not sources:
        raise UserError(f"{root}: no box of split '{split}' can be cut out ({_counts(left_out)})")
    return records.classes, sources, left_out


def _unfit(boxes: Array, flags: int, number: int) -> str:
    """Why a box is not cut out; '' where it is."""
    for flag, reason in ((DIFFICULT, "difficult"), (TRUNCATED, "truncated"), (OCCLUDED, "occluded")):
        if flags & flag:
            return reason
    sides = boxes[number, 2:] - boxes[number, :2]
    if sides.min() < SMALLEST:
        return "small"
    common = np.minimum(boxes[:, 2:], boxes[number, 2:]) - np.maximum(boxes[:, :2], boxes[number, :2])
    covered = common.clip(0).prod(axis=1) / sides.prod()
    covered[number] = 0
    return "overlapped" if covered.max() > OVERLAP else ""


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counter.most_common())


# --- cutting out ----------------------------------------------------------------------------------------------------


def _alpha(path: str) -> NDArray[np.uint8] | None:
    """The transparency of an image that `imaging.decode` has read, turned alike; None where it has none."""
    with Image.open(path) as image:
        if not image.has_transparency_data:
            return None
        return np.asarray(ImageOps.exif_transpose(image).convert("RGBA").getchannel("A"))


def _grabcut(crop: NDArray[np.uint8], inside: NDArray[np.int64]) -> NDArray[np.uint8] | None:
    """The mask uint8 [H, W] of the thing that fills the box `inside` of a crop; None where none is plausible.

    The box is taken as tight: a mask that does not reach nearly from edge to edge both ways is of something else. And
    packages have few dents.
    """
    cv2 = _cv2()
    shrink = min(1.0, CUT_SIDE / max(crop.shape[:2]))
    if min(inside[2:] - inside[:2]) * shrink < 8:  # too little is left to tell apart
        return None
    small = cv2.resize(crop, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    x1, y1, x2, y2 = np.rint(inside * shrink).astype(int)
    state = np.full(small.shape[:2], cv2.GC_BGD, np.uint8)
    state[y1:y2, x1:x2] = cv2.GC_PR_FGD
    if np.count_nonzero(state == cv2.GC_BGD) < 0.04 * state.size:  # the box fills the photo
        return None
    middle, axes = ((x1 + x2) // 2, (y1 + y2) // 2), ((x2 - x1) * 3 // 10, (y2 - y1) * 3 // 10)
    cv2.ellipse(state, middle, axes, 0, 0, 360, cv2.GC_FGD, cv2.FILLED)
    cv2.setRNGSeed(1)  # GrabCut draws from a generator that the process shares
    cv2.grabCut(small, state, None, np.zeros((1, 65)), np.zeros((1, 65)), 3, cv2.GC_INIT_WITH_MASK)
    found = state & 1
    for change, width in ((cv2.MORPH_CLOSE, 7), (cv2.MORPH_OPEN, 5)):  # no bites, no crumbs
        found = cv2.morphologyEx(found, change, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width)))
    outlines, _ = cv2.findContours(found, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return None
    outline = max(outlines, key=cv2.contourArea)
    _, _, w, h = cv2.boundingRect(outline)
    mask = cv2.drawContours(np.zeros_like(state), [outline], 0, 255, cv2.FILLED)  # without holes
    share = np.count_nonzero(mask) / ((x2 - x1) * (y2 - y1))
    dented = cv2.contourArea(outline) < 0.85 * cv2.contourArea(cv2.convexHull(outline))
    if min(w / (x2 - x1), h / (y2 - y1)) < 0.85 or share < 0.4 or dented:
        return None
    mask = cv2.resize(cv2.GaussianBlur(mask, (3, 3), 0), crop.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    # A narrower edge, a little further in: what is just outside the outline is background.
    return np.asarray(cv2.convertScaleAbs(cv2.subtract(mask, 96), alpha=255 / 128))


def _masked(photo: NDArray[np.uint8], box: Sequence[float] | None, masks: Masks) -> tuple[Array, Array, str]:
    """The part of a photo around the box, its mask, and how that was made.

    Without a box the whole picture is the part, and what lies at its very edge is taken as background.
    """
    height, width = photo.shape[:2]
    if box is None:
        rim = max(2, round(0.02 * min(height, width)))
        x1, y1, x2, y2 = crop = np.array([0, 0, width, height])
        inside = np.array([rim, rim, width - rim, height - rim])
    else:
        x1, y1, x2, y2 = crop = np.rint(box).astype(np.int64).clip(0, [width, height, width, height])
        pad = np.ceil(CONTEXT * (crop[2:] - crop[:2])).astype(np.int64)
        around = np.concatenate([crop[:2] - pad, crop[2:] + pad]).clip(0, [width, height, width, height])
        inside, crop = crop - np.tile(around[:2], 2), around
    if masks == "grabcut":
        part = np.ascontiguousarray(photo[crop[1] : crop[3], crop[0] : crop[2]])
        mask = _grabcut(part, inside)
        if mask is not None:
            return part, mask, "masked by GrabCut"
    part = photo[y1:y2, x1:x2]
    mask = np.full(part.shape[:2], 160, np.uint8)  # a soft rim that still counts as the product's
    mask[1:-1, 1:-1] = 255
    return part, mask, "whole rectangles"


def _require_pixels(source: Source, width: int, height: int) -> None:
    """Raise UserError where a picture of its own shows too little; boxes are chosen beforehand."""
    if source.box is None and min(width, height) < SMALLEST:
        what = f"only {width}x{height} pixels of it are opaque" if width else "fully transparent"
        raise UserError(f"{source.path}: {what}; a cut-out needs {SMALLEST} pixels each way")


def cut(source: Source, masks: Masks, limit: int) -> tuple[list[NDArray[np.uint8]], str]:
    """A cut-out and in words how its mask was made.

    The levels are uint8 [h, w, 4] RGBA, premultiplied, cropped to alpha >= 128, each half as large as the one before;
    the first one's longer side is at most `limit` px. Raises UserError naming the file where it is damaged, fully
    transparent or, being a picture of its own, smaller than `SMALLEST`.
    """
    cv2 = _cv2()
    with _one_thread():
        photo = imaging.decode(source.path)
        _require_pixels(source, photo.shape[1], photo.shape[0])
        mask = _alpha(source.path) if source.box is None else None
        how = "transparent"
        if mask is None:
            photo, mask, how = _masked(photo, source.box, masks)
            colour = cv2.multiply(photo, cv2.cvtColor(mask, cv2.COLOR_GRAY2RGB), scale=1 / 255)
        else:
            colour = cv2.subtract(photo, cv2.cvtColor(255 - mask, cv2.COLOR_GRAY2RGB))  # decode put it on white
        x, y, width, height = cv2.boundingRect(cv2.compare(mask, 127, cv2.CMP_GT))
        _require_pixels(source, width, height)
        level = np.dstack([colour, mask])[y : y + height, x : x + width]
        if max(width, height) > limit:
            level = _shrunk(level, limit / max(width, height))
        levels = [np.ascontiguousarray(level)]
        while min(levels[-1].shape[:2]) >= 16:
            levels.append(_shrunk(levels[-1], 0.5))
        return levels, how


def _shrunk(image: Array, factor: float) -> NDArray[np.uint8]:
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    return np.asarray(_cv2().resize(image, size, interpolation=_cv2().INTER_AREA))


def _background(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A background photo, uint8 [h, w, 3] RGB, no larger than scenes of (width, height) need."""
    with _one_thread():
        photo = imaging.decode(path)
        factor = 1.3 * max(size[0] / photo.shape[1], size[1] / photo.shape[0])
        return _shrunk(photo, factor) if factor < 1 else np.ascontiguousarray(photo)


# --- the store ------------------------------------------------------------------------------------------------------


class Store(NamedTuple):
    """Cut-outs and background photos as every process maps them.

    labels: the class of each cut-out. levels: of each cut-out. members: the cut-outs of each class that has any.
    backgrounds: uint8 [h, w, 3] each.
    """

    labels: list[int]
    members: dict[int, list[int]]
    levels: list[list[NDArray[np.uint8]]]
    backgrounds: list[NDArray[np.uint8]]


def _fill(folder: Path, pictures: Iterable[tuple[int, list[NDArray[np.uint8]]]]) -> None:
    """Write (class, levels) of each picture to the folder; class -1 is a background photo.

    pixels.bin holds the levels one after the other; table.npz a row (picture, offset, height, width, channels) a level.
    """
    rows: list[tuple[int, ...]] = []
    labels: list[int] = []
    offset = 0
    with (folder / "pixels.bin").open("wb") as file:
        for label, levels in pictures:
            for level in levels:
                rows.append((len(labels), offset, *level.shape))
                offset += file.write(level.data)
            labels.append(label)
    np.savez(folder / "table.npz", rows=np.array(rows), labels=np.array(labels))


@lru_cache(maxsize=1)
def _store(folder: Path) -> Store:
    """The store in a folder, mapped: its pixels are read when they are used, and shared between processes."""
    with np.load(folder / "table.npz") as table:
        rows, labels = table["rows"], table["labels"]
    pixels = np.asarray(np.memmap(folder / "pixels.bin", np.uint8, "r"))
    levels: list[list[NDArray[np.uint8]]] = [[] for _ in labels]
    for picture, offset, *shape in rows.tolist():
        levels[picture].append(pixels[offset : offset + int(np.prod(shape))].reshape(shape))
    count = int((labels >= 0).sum())  # backgrounds are behind the cut-outs
    members = {int(label): np.flatnonzero(labels == label).tolist() for label in np.unique(labels[:count])}
    return Store(labels[:count].tolist(), members, levels[:count], [photo for (photo,) in levels[count:]])


# --- where things stand ---------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """A cut-out to put down: centre, width and height in scene px; yaw, pitch and roll in radians."""

    cutout: int
    x: float
    y: float
    width: float
    height: float
    yaw: float
    pitch: float
    roll: float


class Plan(NamedTuple):
    """The items in the order in which they are put down, the y of each shelf board (none: a scatter), and the typical
    longer side of an item in px."""

    items: list[Item]
    floors: list[float]
    side: float


def _picks(rng: np.random.Generator, store: Store, index: int, count: int) -> list[int]:
    """The classes of `count` items: the scene's own first, then all in turns."""
    classes = np.array(list(store.members))
    own = classes[index % len(classes)]
    turns = [np.array([own]), rng.permutation(classes[classes != own])]
    while sum(map(len, turns)) < count:
        turns.append(rng.permutation(classes))
    return [int(label) for label in np.concatenate(turns)[:count]]


def _of_class(rng: np.random.Generator, store: Store, label: int) -> int:
    members = store.members[label]
    return members[int(rng.integers(len(members)))]


def _extent(store: Store, cutout: int, side: float) -> tuple[float, float]:
    """Width and height in px of a cut-out whose longer side is `side`."""
    height, width = store.levels[cutout][0].shape[:2]
    return side * width / max(width, height), side * height / max(width, height)


def _side(rng: np.random.Generator, look: Look, count: int, fill: tuple[float, float]) -> float:
    """The typical longer side in px of the scene's items: within `look.scale`, and as SCATTERED or SHELVED says."""
    short = min(look.size)
    low, high = look.scale
    roomy = sqrt(fill[0] * look.size[0] * look.size[1] / count) / short
    high = min(high, max(low, roomy))
    return short * exp(rng.uniform(log(max(low, fill[1] * high)), log(high)))


def _scattered(rng: np.random.Generator, store: Store, look: Look, labels: Sequence[int]) -> Plan:
    """Items lying anywhere: apart where there is room, in a heap now and then, upright or turned any way."""
    side, short = _side(rng, look, len(labels), SCATTERED), min(look.size)
    tries = 1 if rng.random() < 0.25 else 8
    turned = rng.random() < 0.35
    placed = np.zeros((0, 4))
    items = []
    for label in labels:
        cutout = _of_class(rng, store, label)
        width, height = _extent(store, cutout, max(look.scale[0] * short, side * exp(rng.uniform(-0.35, 0))))
        roll = rng.uniform(-pi, pi) if turned else rng.normal(0, 0.12)
        yaw, pitch = rng.normal(0, 0.28, 2).clip(-0.8, 0.8)
        half = np.abs([[cos(roll), sin(roll)], [sin(roll), cos(roll)]]) @ [width / 2, height / 2]
        edge = half * 0.6  # at most a fifth of a side is outside
        centres = edge + rng.random((tries, 2)) * (look.size - 2 * edge)
        rects = np.concatenate([centres - half, centres + half], axis=1)
        sides = np.minimum(rects[:, None, 2:], placed[:, 2:]) - np.maximum(rects[:, None, :2], placed[:, :2])
        best = int(sides.clip(0).prod(axis=2).sum(axis=1).argmin())
        placed = np.concatenate([placed, rects[best : best + 1]])
        x, y = centres[best].tolist()
        items.append(Item(cutout, x, y, width, height, float(yaw), float(pitch), float(roll)))
    return Plan([*items[1:], items[0]], [], side)


def _shelved(rng: np.random.Generator, store: Store, look: Look, labels: Sequence[int]) -> Plan:
    """Items standing in rows on boards, in runs of a class; those that find no room stand in front of others."""
    (width, height), side, short = look.size, _side(rng, look, len(labels), SHELVED), min(look.size)
    floors = [rng.uniform(0.65, 1) * min(1.1 * side, 0.97 * height)]
    while floors[-1] + 0.7 * side < height:
        floors.append(floors[-1] + 1.25 * side)
    yaw = rng.normal(0, 0.12)

    def stand(cutout: int, size: tuple[float, float], left: float, floor: float) -> Item:
        lean, turn = rng.normal(0, 0.02), yaw + rng.normal(0, 0.06)
        return Item(cutout, left + size[0] / 2, floor - size[1] / 2, *size, turn, rng.normal(0, 0.04), lean)

    # Rows with room: their board and the x from which they are free (None: begin anywhere); those in the scene first.
    free: list[tuple[float, float | None]] = [(floor, None) for floor in rng.permutation(floors).tolist()]
    free.sort(key=lambda row: row[0] > height)
    rows: list[Item] = []
    front: list[Item] = []
    for label in labels:
        if len(rows) + len(front) == len(labels):
            break
        cutout = _of_class(rng, store, label)
        size = _extent(store, cutout, max(look.scale[0] * short, side * exp(rng.uniform(-0.3, 0))))
        for _ in range(min(len(labels) - len(rows) - len(front), int(rng.integers(1, 5)))):
            while free and (free[0][1] or 0) + 0.75 * size[0] > width:
                free.pop(0)
            if free:
                floor, begin = free[0]
                left = rng.uniform(-0.3, 0.4) * size[0] if begin is None else begin
                rows.append(stand(cutout, size, left, floor))
                free[0] = (floor, left + size[0] * rng.uniform(0.98, 1.08))
            else:
                left = rng.random() * (width - 0.6 * size[0]) - 0.2 * size[0]
                front.append(stand(cutout, size, left, float(rng.choice(floors)) + 0.05 * side))
        if free and rng.random() < 0.2:
            free[0] = (free[0][0], (free[0][1] or 0) + 0.3 * side)  # a gap
    return Plan([*rows[1:], *front, *rows[:1]], floors, side)


def _quads(plan: Plan, camera: Array) -> NDArray[np.float64]:
    """Where the corners of each item fall, float64 [N, 4, 2], clockwise from its upper left; camera: 3x3, px to px."""
    _, x, y, width, height, yaw, pitch, roll = np.array(plan.items).T
    flat = np.stack([width, height], axis=1)[:, None] * [[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]
    depth = flat[..., 0] * np.sin(yaw)[:, None] + flat[..., 1] * np.sin(pitch)[:, None]
    nearness = 1 / (1 + depth / (3 * np.maximum(width, height)[:, None]))  # seen from three times the item's length
    u = flat[..., 0] * np.cos(yaw)[:, None] * nearness
    v = flat[..., 1] * np.cos(pitch)[:, None] * nearness
    c, s = np.cos(roll)[:, None], np.sin(roll)[:, None]
    points = np.stack([c * u - s * v + x[:, None], s * u + c * v + y[:, None], np.ones_like(u)], axis=2) @ camera.T
    return np.asarray(points[..., :2] / points[..., 2:])


def _camera(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float64]:
    """A roll of a degree or two and mild keystone, 3x3."""
    w, h = size
    corners = np.array([[0, 0], [w, 0], [w, h], [0, h]], np.float32)
    moved = corners + rng.normal(0, 0.012, (4, 2)).clip(-0.03, 0.03) * (w, h)
    return np.asarray(_cv2().getPerspectiveTransform(corners, moved.astype(np.float32)))


# --- painting -------------------------------------------------------------------------------------------------------


def _patch(rng: np.random.Generator, size: tuple[int, int], cells: int, spread: float) -> Array:
    """Smooth noise around 1, float32 [h, w], of about `cells` bumps each way."""
    noise = rng.normal(1, spread, (cells, cells)).astype(np.float32)
    return np.asarray(_cv2().resize(noise, size, interpolation=_cv2().INTER_CUBIC))


def _backdrop(rng: np.random.Generator, store: Store, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The background uint8 [H, W, 3]: a part of a photo, or where there are none a made-up surface with clutter."""
    cv2 = _cv2()
    if store.backgrounds:
        photo = store.backgrounds[int(rng.integers(len(store.backgrounds)))]
        height, width = photo.shape[:2]
        part = rng.uniform(0.65, 1) * min(width / size[0], height / size[1])
        w, h = max(1, int(part * size[0])), max(1, int(part * size[1]))
        x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        shown = cv2.resize(photo[y : y + h, x : x + w], size, interpolation=cv2.INTER_LINEAR)
        return np.asarray(cv2.flip(shown, 1) if rng.random() < 0.5 else shown)
    coarse = int(rng.choice([1, 2, 4]))  # painted smaller, it is out of focus
    w, h = ceil(size[0] / coarse), ceil(size[1] / coarse)
    base = rng.uniform(30, 225) + rng.normal(0, 22, 3)
    tones = base * rng.normal(1, 0.12, (int(rng.integers(2, 7)), int(rng.integers(2, 7)), 1)) + rng.normal(0, 6, 3)
    canvas = cv2.resize(tones.clip(0, 255).astype(np.uint8), (w, h), interpolation=cv2.INTER_CUBIC)
    if rng.random() < 0.5:  # planks, tiles, stripes
        step, upright = rng.uniform(0.04, 0.4) * max(w, h), rng.random() < 0.5
        for at in np.arange(-rng.random() * step, max(w, h), step):
            tone = (base * rng.normal(1, 0.08)).clip(0, 255).tolist()
            first, last = ((at, 0), (at + 0.96 * step, h)) if upright else ((0, at), (w, at + 0.96 * step))
            cv2.rectangle(canvas, _point(first), _point(last), tone, cv2.FILLED)
    for _ in range(int(rng.integers(0, 16))):
        _clutter(rng, canvas)
    if coarse > 1:
        canvas = cv2.resize(cv2.GaussianBlur(canvas, (3, 3), 0), size, interpolation=cv2.INTER_LINEAR)
    return np.asarray(canvas)


def _point(xy: Sequence[float] | Array) -> tuple[int, int]:
    return round(float(xy[0])), round(float(xy[1]))


def _clutter(rng: np.random.Generator, canvas: Array) -> None:
    """A coloured thing of no class: an ellipse, a turned rectangle with a stripe, or a line."""
    cv2 = _cv2()
    h, w = canvas.shape[:2]
    centre, axes = rng.random(2) * (w, h), rng.uniform(0.02, 0.22, 2) * max(w, h)
    turn = float(rng.uniform(0, 180))
    dull = rng.uniform(0.1, 1)
    colour, stripe = (255 * (dull * rng.random((2, 3)) + (1 - dull) * rng.random((2, 1)))).tolist()
    kind = rng.random()
    if kind < 0.3:
        cv2.ellipse(canvas, _point(centre), _point(axes), turn, 0, 360, colour, cv2.FILLED, cv2.LINE_AA)
    elif kind < 0.8:
        for part, tone in ((1.0, colour), (0.35, stripe)):
            corners = cv2.boxPoints((centre.tolist(), (2 * axes[0], 2 * part * axes[1]), turn))
            cv2.fillConvexPoly(canvas, np.rint(corners).astype(np.int32), tone, cv2.LINE_AA)
    else:
        cv2.line(canvas, _point(centre - 2 * axes), _point(centre + 2 * axes), colour, 1 + int(w / 150), cv2.LINE_AA)


def _wall(rng: np.random.Generator, plan: Plan, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The wall behind the shelves, uint8 [H, W, 3]: dark below each board."""
    colour = (rng.uniform(50, 215) + rng.normal(0, 10, 3)).clip(0, 255)
    y = np.arange(64) * (size[1] / 64)
    ceilings = [plan.floors[0] - 1.25 * plan.side, *plan.floors]
    below = np.min([np.where(y > ceiling, y - ceiling, plan.side) for ceiling in ceilings], axis=0) / plan.side
    column = colour * (0.45 + 0.5 * below.clip(0, 1) ** 0.7)[:, None]
    return np.asarray(_cv2().resize(column[:, None].astype(np.uint8), size, interpolation=_cv2().INTER_LINEAR))


def _boards(rng: np.random.Generator, canvas: Array, plan: Plan, camera: Array) -> None:
    """Paint the shelves' boards, rails and price tags."""
    w, s = canvas.shape[1], plan.side
    board = rng.uniform(90, 235) + rng.normal(0, 12, 3)
    rail = rng.uniform(30, 235, 3) if rng.random() < 0.5 else board * 0.85

    rects: list[tuple[float, float, float, float]] = []
    colours: list[Array] = []
    tag, priced = rng.uniform(0.14, 0.3) * s, rng.random() < 0.7
    for floor in plan.floors:
        for y1, y2, colour in (
            (-0.07, 0.03, board * 0.7),
            (0.03, 0.15, rail),
            (0.03, 0.045, rail * 1.25 + 15),
            (0.15, 0.165, rail * 0.4),
        ):
            rects.append((-w, floor + y1 * s, 2 * w, floor + y2 * s))
            colours.append(colour)
        x = float(rng.uniform(-0.5, 0.5) * s)
        while priced and x < w:
            paper = np.array([[250, 250, 245], [255, 235, 90]][int(rng.random() < 0.2)])
            rects.append((x, floor + 0.045 * s, x + tag, floor + 0.14 * s))
            rects.append((x + 0.3 * tag, floor + 0.07 * s, x + 0.9 * tag, floor + 0.115 * s))
            colours += [paper, paper * 0.3]
            x += rng.uniform(1.5, 5) * tag + 0.3 * s
    corners = np.array(rects)[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    mapped = np.concatenate([corners, np.ones((len(rects), 4, 1))], axis=2) @ camera.T
    points = np.rint(mapped[..., :2] / mapped[..., 2:] * 16).astype(np.int32)  # in 1/16 px
    for quad, colour in zip(points, np.array(colours).clip(0, 255).tolist(), strict=True):
        _cv2().fillConvexPoly(canvas, quad, colour, _cv2().LINE_AA, 4)


def _clip(canvas: Array, shape: Sequence[int], x: int, y: int) -> tuple[Window, Window] | None:
    """The part of the canvas that a picture of (h, w) at x, y covers, and the part of the picture that is on it."""
    x1, y1 = max(0, x), max(0, y)
    x2, y2 = min(canvas.shape[1], x + shape[1]), min(canvas.shape[0], y + shape[0])
    if x1 >= x2 or y1 >= y2:
        return None
    return (slice(y1, y2), slice(x1, x2)), (slice(y1 - y, y2 - y), slice(x1 - x, x2 - x))


class _Frame(NamedTuple):
    """Where an item is drawn: the px rectangle x, y, width, height around its quad; the quad's corners in it, float32
    [4, 2], pixel centres being whole numbers; and its longest edge in px."""

    x: int
    y: int
    width: int
    height: int
    quad: NDArray[np.float32]
    longest: float


def _frames(quads: NDArray[np.float64]) -> list[_Frame]:
    """The frame of each quad, float64 [N, 4, 2]."""
    low = np.floor(quads.min(axis=1)).astype(int) - 1
    extent = np.ceil(quads.max(axis=1)).astype(int) + 1 - low
    longest = np.hypot(*np.moveaxis(quads - quads[:, [1, 2, 3, 0]], 2, 0)).max(axis=1).tolist()
    inner = (quads - low[:, None] - 0.5).astype(np.float32)
    rows = np.concatenate([low, extent], axis=1).tolist()
    return [
        _Frame(x, y, width, height, quad, edge)
        for (x, y, width, height), quad, edge in zip(rows, inner, longest, strict=True)
    ]


def _warped(levels: Sequence[NDArray[np.uint8]], frame: _Frame) -> NDArray[np.uint8]:
    """A cut-out drawn into its frame, uint8 [h, w, 4] premultiplied."""
    cv2 = _cv2()
    # At most 1.6 px of the level become one: bilinear sampling takes that without aliasing to speak of.
    wanted = int(max(0, log(max(levels[0].shape) / frame.longest / 1.6, 2) + 1))
    level = levels[min(wanted, len(levels) - 1)]
    h, w = level.shape[:2]
    corners = np.array([[-0.5, -0.5], [w - 0.5, -0.5], [w - 0.5, h - 0.5], [-0.5, h - 0.5]], np.float32)
    matrix = cv2.getPerspectiveTransform(corners, frame.quad)
    return np.asarray(cv2.warpPerspective(level, matrix, (frame.width, frame.height)))


def _darken(canvas: Array, mask: Array, x: int, y: int, strength: float) -> None:
    """Take light away where the mask, uint8 [h, w], is; strength: the share at 255."""
    cv2 = _cv2()
    clipped = _clip(canvas, mask.shape, x, y)
    if clipped:
        on, part = clipped
        left = cv2.convertScaleAbs(mask[part], alpha=-strength, beta=255)
        cv2.multiply(canvas[on], cv2.cvtColor(left, cv2.COLOR_GRAY2RGB), canvas[on], 1 / 255)


@cache
def _blob() -> NDArray[np.uint8]:
    """A soft disc, uint8 [32, 32]."""
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    return np.asarray(255 * (1 - np.hypot(x, y)).clip(0, 1) ** 0.8).astype(np.uint8)


class _Sun(NamedTuple):
    """Where shadows fall, in sides of an item: their offset and softness; and how dark they are."""

    dx: float
    dy: float
    soft: float
    strength: float


def _shadow(canvas: Array, alpha: Array, x: int, y: int, sun: _Sun, size: tuple[float, float], stands: bool) -> None:
    """The item's shadow on what lies behind it and, where it `stands`, on its board. size: its width and height."""
    cv2 = _cv2()
    side = max(size)
    sigma = max(1.0, sun.soft * side)
    k = max(1, round(sigma))  # a blur this wide needs no more pixels
    pad = 3
    small = cv2.resize(alpha, (ceil(alpha.shape[1] / k), ceil(alpha.shape[0] / k)), interpolation=cv2.INTER_AREA)
    small = cv2.copyMakeBorder(small, pad, pad, pad, pad, cv2.BORDER_CONSTANT)
    small = cv2.blur(cv2.blur(small, (3, 3)), (3, 3))
    mask = cv2.resize(small, (small.shape[1] * k, small.shape[0] * k), interpolation=cv2.INTER_LINEAR)
    _darken(canvas, mask, x + round(sun.dx * side) - pad * k, y + round(sun.dy * side) - pad * k, sun.strength)
    if stands:
        w, h = max(2, round(1.25 * size[0])), max(2, round(0.14 * side))
        foot = cv2.resize(_blob(), (w, h), interpolation=cv2.INTER_LINEAR)
        _darken(canvas, foot, x + alpha.shape[1] // 2 - w // 2, y + alpha.shape[0] - 1 - h // 2, 0.75)


def _paste(canvas: Array, sprite: Array, light: float) -> None:
    """Put premultiplied RGBA, made brighter by a factor, over the canvas of the same size, in place."""
    cv2 = _cv2()
    behind = cv2.cvtColor(cv2.bitwise_not(cv2.extractChannel(sprite, 3)), cv2.COLOR_GRAY2RGB)
    cv2.multiply(canvas, behind, canvas, 1 / 255)
    cv2.addWeighted(cv2.cvtColor(sprite, cv2.COLOR_RGBA2RGB), light, canvas, 1, 0, canvas)


@lru_cache(maxsize=1)
def _grain(size: tuple[int, int]) -> NDArray[np.uint8]:
    """Sensor noise around 128, uint8 [H + 64, W + 64, 3]; each photo takes a window of it."""
    rng = np.random.default_rng(1)
    shape = (size[1] + 64, size[0] + 64)
    noise = rng.standard_normal((*shape, 1), np.float32) * 0.85 + rng.standard_normal((*shape, 3), np.float32) * 0.45
    return np.asarray(128 + 24 * _cv2().blur(noise, (2, 2))).clip(0, 255).astype(np.uint8)


def _develop(rng: np.random.Generator, photo: Array) -> NDArray[np.uint8]:
    """Light, lens and sensor: falloff, a lamp, blur, white balance, exposure, grain."""
    cv2 = _cv2()
    h, w = photo.shape[:2]
    blur = rng.random()
    if blur < 0.25:
        photo = cv2.GaussianBlur(photo, (3, 3), rng.uniform(0.4, 0.9))
    elif blur < 0.4:
        photo = cv2.blur(photo, [(1, 3), (3, 1), (1, 5), (5, 1)][int(rng.integers(4))])
    x, y = np.linspace(-1, 1, 24)[None], np.linspace(-1, 1, 24)[:, None]
    slope, lamp = rng.normal(0, 0.1, 2), rng.uniform(-1.2, 1.2, 2)
    light = 1 + slope[0] * x + slope[1] * y - rng.uniform(0, 0.25) * (x * x + y * y) / 2
    light = light + rng.uniform(0, 0.35) * np.exp(-((x - lamp[0]) ** 2 + (y - lamp[1]) ** 2) / rng.uniform(0.1, 0.6))
    light = light * _patch(rng, (24, 24), 4, 0.06)
    warm = rng.normal(0, 0.06)
    tint = np.array([1 + warm, 1 + rng.normal(0, 0.015), 1 - warm])
    gain = cv2.resize((128 * light[..., None] * tint).clip(0, 255).astype(np.uint8), (w, h))
    photo = cv2.multiply(photo, gain, scale=1 / 128)
    tone = (np.linspace(0, 1, 256) * exp(rng.normal(0.05, 0.16))) ** exp(rng.normal(0, 0.12))
    tone = np.where(tone > 0.8, 0.8 + 0.2 * np.tanh((tone - 0.8) / 0.2), tone)  # highlights roll off, they do not clip
    photo = cv2.LUT(photo, np.rint(255 * tone).astype(np.uint8))
    top, left = rng.integers(0, 64, 2).tolist()
    noise = rng.uniform(0.02, 0.28)
    grain = _grain((w, h))[top : top + h, left : left + w]
    return np.asarray(cv2.addWeighted(photo, 1, grain, noise, -128 * noise))


# --- a scene --------------------------------------------------------------------------------------------------------


class _Put(NamedTuple):
    """What the box needs to know of an item that was put down: its class, its own pixels, those inside the scene, and
    the part of the scene that it can be in."""

    label: int
    pixels: int
    inside: int
    where: Window


def _annotate(ids: Array, number: int, put: _Put) -> tuple[list[int], int] | None:
    """Box and flags of an item that is visible enough."""
    cv2 = _cv2()
    seen = cv2.compare(np.ascontiguousarray(ids[put.where]), number, cv2.CMP_EQ)
    visible = cv2.countNonZero(seen)
    if visible < MIN_VISIBLE * put.pixels or not visible:
        return None
    x, y, w, h = cv2.boundingRect(seen)
    x, y = x + put.where[1].start, y + put.where[0].start
    touches = x == 0 or y == 0 or x + w == ids.shape[1] or y + h == ids.shape[0]
    flags = TRUNCATED * (put.inside < put.pixels and touches) | OCCLUDED * (visible < OCCLUDED_BELOW * put.inside)
    hard = visible < DIFFICULT_BELOW * put.pixels or min(w, h) < SMALL_SIDE
    return [x, y, x + w, y + h], flags | DIFFICULT * hard


def render(store: Store, look: Look, seed: int, index: int) -> Scene:
    """Scene `index` of `seed`. The same arguments give the same pixels."""
    cv2 = _cv2()
    rng = np.random.default_rng((seed, index))
    low, high = look.items
    count = min(high, int(exp(rng.uniform(log(low), log(high + 1)))))
    shelf = look.layout == "shelf" or (look.layout == "auto" and count > 1 and rng.random() < 0.5)
    plan = (_shelved if shelf else _scattered)(rng, store, look, _picks(rng, store, index, count))
    camera = _camera(rng, look.size) if shelf else np.eye(3)
    canvas = _wall(rng, plan, look.size) if shelf and not store.backgrounds else _backdrop(rng, store, look.size)
    if shelf:
        _boards(rng, canvas, plan, camera)
    ids = np.zeros(canvas.shape[:2], np.uint16)
    fall = rng.uniform(-pi, pi)
    reach = rng.uniform(0.01, 0.07)
    sun = _Sun(reach * cos(fall), reach * sin(fall), rng.uniform(0.01, 0.06), rng.uniform(0.15, 0.6))
    found = []
    for number, (item, frame) in enumerate(zip(plan.items, _frames(_quads(plan, camera)), strict=True), 1):
        sprite, x, y = _warped(store.levels[item.cutout], frame), frame.x, frame.y
        light = float(rng.normal(1, 0.08)) if look.effects else 1.0
        if look.effects and rng.random() < 0.15:
            sprite = cv2.GaussianBlur(sprite, (3, 3), 0)
        alpha = cv2.extractChannel(sprite, 3)
        if look.effects:
            _shadow(canvas, alpha, x, y, sun, (item.width, item.height), shelf)
        solid = alpha >= 128
        clipped = _clip(canvas, alpha.shape, x, y)
        if not clipped:
            continue
        on, part = clipped
        _paste(canvas[on], sprite[part], light)
        np.copyto(ids[on], number, where=solid[part])
        pixels, inside = int(np.count_nonzero(solid)), int(np.count_nonzero(solid[part]))
        found.append((number, _Put(store.labels[item.cutout], pixels, inside, on)))
    truths = [(number, put.label, truth) for number, put in found if (truth := _annotate(ids, number, put))]
    if look.effects:
        canvas = _develop(rng, canvas)
    return Scene(
        canvas,
        ids,
        np.array([box for _, _, (box, _) in truths], np.int64).reshape(-1, 4),
        [label for _, label, _ in truths],
        [flags for _, _, (_, flags) in truths],
        [number for number, _, _ in truths],
    )


# --- the data set ---------------------------------------------------------------------------------------------------


def _draw(folder: Path, classes: Sequence[str], look: Look, seed: int, index: int) -> Drawn:
    cv2 = _cv2()
    with _one_thread():
        scene = render(_store(folder), look, seed, index)
        options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR), options)
    return Drawn(jpeg.tobytes(), look.size[::-1], scene.boxes, [classes[k] for k in scene.labels], scene.flags)


def _read(source: Path, split: str) -> tuple[tuple[str, ...], list[Source], Counter[str]]:
    """The classes, what to cut out, and how many boxes are left out for which reason."""
    if any(source.rglob("*.xml")):
        return read_voc(source, split)
    return (*read_folder(source), Counter())


def _read_backgrounds(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    _require_folder(folder)
    found = _images(folder)
    if not found:
        raise UserError(f"{folder}: no images here ({' '.join(imaging.IMAGE_SUFFIXES)})")
    return found


def compose(
    out: Path,
    source: Path,
    *,
    backgrounds: Path | None = None,
    look: Look | None = None,
    split: str = "train",
    masks: Masks = "grabcut",
    train: int = 400,
    val: int = 100,
    seed: int = 0,
    workers: int = 0,
    progress: Progress | None = None,
) -> list[str]:
    """Write a Pascal-VOC data set of scenes to `out`, which must not hold anything yet; lines that say what was used.

    source: a folder of class folders with cut-outs, or a VOC data set whose `split` is cut out. masks: how a picture
    without transparency is cut out: 'grabcut', or 'box': all of it. backgrounds: a folder of photos; None for made-up
    ones. workers: processes, 0 for one per CPU (the bytes don't depend on it). progress: called with (done, total) of
    pictures read and scenes drawn. `out` appears whole or not at all. Raises UserError, naming the file, for input
    that can't be used.
    """
    look, out, source = look or Look(), Path(out), Path(source)
    _cv2()
    require_free(out)
    _require_folder(source)
    classes, sources, left_out = _read(source, split)
    photos = _read_backgrounds(backgrounds and Path(backgrounds))
    read = len(sources) + len(photos)

    def after(before: int) -> Progress | None:
        return progress and (lambda done, _: progress(before + done, read + train + val))

    job = partial(cut, masks=masks, limit=ceil(look.scale[1] * min(look.size)))
    made: Counter[str] = Counter()
    found: Counter[int] = Counter()

    def pictures() -> Iterator[tuple[int, list[NDArray[np.uint8]]]]:
        for taken, (levels, how) in zip(sources, pooled(job, sources, workers, after(0)), strict=True):
            made[how] += 1
            found[taken.label] += 1
            yield taken.label, levels
        for photo in pooled(partial(_background, size=look.size), photos, workers, after(len(sources))):
            yield -1, [photo]

    with tempfile.TemporaryDirectory(prefix="detkit-", ignore_cleanup_errors=True) as name:
        try:
            _fill(Path(name), pictures())
            draw = partial(_draw, Path(name), classes, look, seed)
            write_set(out, draw, classes, prefix="scene", train=train, val=val, workers=workers, progress=after(read))
        finally:
            _store.cache_clear()  # Windows removes no file that is mapped
    lines = [f"{found.total()} cut-outs of {len(found)} classes ({_counts(made)})"]
    if photos:
        lines.append(f"{len(photos)} background photos")
    if left_out:
        lines.append(f"boxes not cut out: {_counts(left_out)}")
    without = [name for label, name in enumerate(classes) if label not in found]
    if without:
        lines.append(f"in no scene, for want of a cut-out: {', '.join(without)}")
    return lines
