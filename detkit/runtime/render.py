"""Detections drawn on the photo: legible on 200 px and on 4000 px, with three items or with sixty."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from detkit.types import Detections

# Okabe and Ito's seven, then each the colour farthest (in Lab, seen normally, with protanopia and with deuteranopia)
# from those before it. Fixed: a class keeps its colour from run to run.
PALETTE = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#0000FF",
    "#692D0F", "#D2F0A5", "#6969FF", "#5A2D4B", "#78FFFF", "#5A00A5", "#E1004B", "#D2A55A",
    "#F0B4B4", "#6996FF", "#781E78", "#B4FF78", "#2D693C", "#003CE1", "#A53C0F", "#D200B4",
)  # fmt: skip
MIN_FONT = 11  # pixels; below it the letters of Pillow's own font run together

ENOUGH = 0.25  # a tag that covers less than this share of its area of other things is well placed
TOO_MUCH = 1.5  # a tag that buries more (see `_spot`) is left out: the box says its class by its colour

_Box = tuple[int, int, int, int]
_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
_SPELT = str.maketrans({"ß": "ss", "æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L",
                        "đ": "d", "Đ": "D", "ð": "d", "þ": "th", "Þ": "Th", "ı": "i"})  # fmt: skip


class _Style(NamedTuple):
    """Sizes in pixels: line width, font size, and the space around a tag's text."""

    line: int
    font: int
    pad: int


class _Tag(NamedTuple):
    """A text and the rectangle it fills, x1 y1 x2 y2, half-open."""

    text: str
    box: _Box


def colour(label: int) -> tuple[int, int, int]:
    """The RGB colour of a class, by its index."""
    code = PALETTE[label % len(PALETTE)]
    return int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)


def ink(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever has more contrast (as WCAG measures it) with an RGB background."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in background)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else (255, 255, 255)


def plain(name: str, label: int) -> str:
    """The name in letters that Pillow's own font has, which are ASCII: without accents, or as '#<label>'."""
    letters = unicodedata.normalize("NFKD", name.translate(_SPELT))
    text = "".join(c for c in letters if not unicodedata.combining(c)).strip()
    return text if text.isascii() and text.isprintable() and text else f"#{label}"


def draw(
    image: NDArray[np.uint8],
    detections: Detections,
    classes: Sequence[str],
    score: float = 0.0,
    *,
    scores: bool = True,
    tracks: Sequence[int] | None = None,
) -> NDArray[np.uint8]:
    """The image with a box and a tag (class, and score in percent if `scores`) for each detection of at least `score`.

    image: uint8 [H, W, 3], the photo that the detections are of; it is not changed. Returns uint8 [H, W, 3].
    Lines and letters grow with the photo and shrink, to a floor, with the boxes. Where tags would cover each other
    they go without the score, then with a shortened name; where even that would bury others, there is only the box.
    tracks: in a video, the number of each detection's object, for its tag; with a `score` of 0 only.
    """
    shown = detections.above(score)
    picture = Image.fromarray(image)
    if not len(shown):
        return np.array(picture)
    canvas = ImageDraw.Draw(picture)
    style = _style(shown)
    boxes = [_pixels(box, shown.hw) for box in shown.boxes]
    for box, label in reversed(list(zip(boxes, shown.labels, strict=True))):  # the best on top
        _outline(canvas, box, colour(int(label)), style.line)
    font = ImageFont.load_default(style.font)
    for tag, label in zip(_place(shown, boxes, classes, style, font, scores, tracks), shown.labels, strict=True):
        if tag is not None:
            _stamp(canvas, tag, colour(int(label)), style, font)
    return np.array(picture)


def contact_sheet(images: Sequence[NDArray[np.uint8]], columns: int, width: int) -> NDArray[np.uint8]:
    """Images, uint8 [h, w, 3] of any sizes, in rows of `columns`, as one picture uint8 [H, width, 3] on white.

    The images of a row are as high as each other and fill the width; a last row that is short keeps the height of the
    row before it. Raises ValueError where there are no images.
    """
    if not images:
        raise ValueError("no images for a contact sheet")
    gap = max(2, round(width / 160))
    columns = min(columns, len(images))
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    strips: list[list[Image.Image]] = []
    high = 0
    for row in rows:
        aspect = sum(image.shape[1] / image.shape[0] for image in row)
        fit = max(1, round((width - gap * (len(row) - 1)) / aspect))
        high = fit if len(row) == columns else min(fit, high)
        strips.append([_shrunk(image, high) for image in row])
    sheet = Image.new("RGB", (width, sum(strip[0].height + gap for strip in strips) - gap), "white")
    y = 0
    for strip in strips:
        x = 0
        for picture in strip:
            sheet.paste(picture, (x, y))
            x += picture.width + gap
        y += strip[0].height + gap
    return np.array(sheet)


def _shrunk(image: NDArray[np.uint8], height: int) -> Image.Image:
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    return Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)


def _style(shown: Detections) -> _Style:
    side = math.sqrt(shown.hw[0] * shown.hw[1])
    sizes = np.sqrt(np.prod(shown.boxes[:, 2:] - shown.boxes[:, :2], axis=1))
    typical = float(np.median(sizes))
    font = max(MIN_FONT, round(min(side / 42, max(typical / 5, side / 75))))
    line = max(1 if typical < 32 else 2, round(min(side / 280, typical / 16)))
    return _Style(line, font, max(2, round(font / 5)))


def _pixels(box: NDArray[np.float32], hw: tuple[int, int]) -> _Box:
    """The box as first and last pixels, inside the picture and never inverted."""
    x1, y1, x2, y2 = (round(float(v)) for v in box)
    x1, y1 = min(max(x1, 0), hw[1] - 1), min(max(y1, 0), hw[0] - 1)
    return x1, y1, max(x1, min(x2, hw[1]) - 1), max(y1, min(y2, hw[0]) - 1)


def _outline(canvas: ImageDraw.ImageDraw, box: _Box, rgb: tuple[int, int, int], line: int) -> None:
    """The box in its colour, and inside it a thin line that sets it off from a product of the same colour."""
    edge = max(1, line // 4)
    x1, y1, x2, y2 = box
    inner = (x1 + line, y1 + line, x2 - line, y2 - line)
    if inner[2] - inner[0] > 4 * line and inner[3] - inner[1] > 4 * line:
        canvas.rectangle(inner, outline=ink(rgb), width=edge)
    canvas.rectangle(box, outline=rgb, width=line)


def _stamp(canvas: ImageDraw.ImageDraw, tag: _Tag, rgb: tuple[int, int, int], style: _Style, font: _Font) -> None:
    x1, y1, x2, y2 = tag.box
    canvas.rectangle((x1, y1, x2 - 1, y2 - 1), fill=rgb)
    canvas.text((x1 + style.pad, (y1 + y2) / 2), tag.text, fill=ink(rgb), font=font, anchor="lm")


def _extent(text: str, style: _Style, font: _Font) -> tuple[int, int]:
    """Width and height of a tag; the height is the same for every text."""
    return math.ceil(font.getlength(text)) + 2 * style.pad, style.font + style.pad


def _texts(name: str, score: float | None, room: int, style: _Style, font: _Font) -> Iterator[str]:
    """What a tag may say, the fullest first: name and score, name, a shortened name as wide as the box."""
    if score is not None:
        yield f"{name} {min(99, round(100 * score)):02d}"
    yield name
    for length in range(len(name) - 1, 2, -1):
        short = f"{name[:length].rstrip()}…"
        if _extent(short, style, font)[0] <= room:
            yield short
            return


def _corners(box: _Box, width: int, height: int, line: int) -> Iterator[tuple[int, int]]:
    """Corners a tag may have, the best first: on the box, in its top, under it, then the same from the right."""
    x1, y1, x2, y2 = box
    right = x2 + 1 - width
    for x in (x1, right):
        yield from ((x, y1 - height), (x, y1), (x, y2 + 1))
    yield from ((x1, y2 + 1 - height), (right, y2 + 1 - height))
    middle = (y1 + y2 - height) // 2
    yield from ((x1 + line, middle), ((x1 + right) // 2, y1), ((x1 + right) // 2, middle))


def _place(
    shown: Detections,
    boxes: Sequence[_Box],
    classes: Sequence[str],
    style: _Style,
    font: _Font,
    scores: bool = True,
    tracks: Sequence[int] | None = None,
) -> list[_Tag | None]:
    """A tag for each detection, best first, where it covers least of the earlier tags and of the other products; None
    where it would bury them, or the picture is smaller than the tag."""
    edges = np.array(boxes, np.int64) + np.array((0, 0, 1, 1))
    taken = np.empty((0, 4), np.int64)
    tags: list[_Tag | None] = []
    for i, (box, label, score) in enumerate(zip(boxes, shown.labels, shown.scores, strict=True)):
        others = np.delete(edges, i, axis=0)
        name = plain(classes[label], int(label))
        if tracks is not None:
            name = f"{tracks[i]} {name}"
        best: tuple[float, _Tag] | None = None
        for text in _texts(name, float(score) if scores else None, box[2] - box[0] + 1, style, font):
            choice = _spot(text, box, shown.hw, taken, others, style, font)
            if choice is not None and (best is None or choice[0] < best[0]):
                best = choice
            if best is not None and best[0] <= ENOUGH:
                break
        tags.append(best[1] if best and best[0] <= TOO_MUCH else None)
        if best and best[0] <= TOO_MUCH:
            taken = np.vstack((taken, best[1].box))
    return tags


def _spot(
    text: str,
    box: _Box,
    hw: tuple[int, int],
    taken: NDArray[np.int64],
    others: NDArray[np.int64],
    style: _Style,
    font: _Font,
) -> tuple[float, _Tag] | None:
    """The best place of one text and its cost: the share of the tag that lies on other products, and eight times the
    share that lies on other tags."""
    width, height = _extent(text, style, font)
    if height > hw[0] or width > hw[1]:
        return None
    best: tuple[float, _Tag] | None = None
    for left, top in _corners(box, width, height, style.line):
        x, y = min(max(left, 0), hw[1] - width), min(max(top, 0), hw[0] - height)
        at = (x, y, x + width, y + height)
        cost = (8 * _common(taken, at) + _common(others, at)) / (width * height)
        if best is None or cost < best[0]:
            best = (cost, _Tag(text, at))
        if not cost:
            break
    return best


def _common(rectangles: NDArray[np.int64], one: _Box) -> int:
    """How many pixels of `one` (x1 y1 x2 y2) the rectangles [N, 4] cover, those of each counted."""
    x1, y1, x2, y2 = one
    sides = np.minimum(rectangles[:, 2:], (x2, y2)) - np.maximum(rectangles[:, :2], (x1, y1))
    return int(sides.clip(0).prod(axis=1).sum())
