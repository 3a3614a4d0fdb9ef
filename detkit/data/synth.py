"""Draw product-shelf photos with Pascal-VOC annotations, from nothing but a seed.

Every package is drawn once per process at 14 px per cm (supersampled twice), then scaled, leaned and pasted on shelves.
The canvas and a mask of which item is seen where go through one camera homography, so boxes are exact by construction:

- a box is the tight extent of an item's *visible* pixels, as annotators draw it: occluders and the edge cut it;
- an item is annotated where at least 35 % of it is seen. OCCLUDED: others hide more than 30 % of it. TRUNCATED: the
  photo's edge cuts it. DIFFICULT: less than half of it is seen, or its box is under 12 px wide or high;
- products look the same for every seed, so a model trained on one seed can be tested on another;
- image i is a function of (seed, i, size) alone, whatever the number of workers.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from math import cos, exp, log, pi, sin
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from detkit.files import whole_folder
from detkit.formats import voc_xml
from detkit.types import DIFFICULT, OCCLUDED, TRUNCATED

RGB = tuple[int, int, int]
Array = NDArray[Any]
Point = tuple[float, float]
Task = TypeVar("Task")
Result = TypeVar("Result")

CM = 28  # px per cm while a package is drawn; sprites are kept at half that
ART_SPAN = 3.8  # radians of a round package that its label art covers
ZOOM = 1.3  # canvas px per photo px
MARGIN = 1.11  # the canvas is larger than the photo by this, so that roll and perspective stay inside
MIN_VISIBLE, OCCLUDED_BELOW, DIFFICULT_BELOW, SMALL_SIDE = 0.35, 0.7, 0.5, 12
MAX_ITEMS = 40

WHITE, BLACK, SILVER, GOLD = (250, 250, 246), (24, 22, 24), (196, 200, 206), (212, 170, 74)


@dataclass(frozen=True)
class Product:
    """One class: its shape, its size in cm (width, height, depth) and everything printed on it."""

    name: str
    shape: str
    cm: tuple[float, float, float]
    brand: str
    title: str
    top: RGB  # label gradient
    bottom: RGB
    band: RGB  # flavour band behind the title
    plate: RGB  # behind the wordmark
    ink: RGB  # wordmark
    motif: str
    lid: RGB = SILVER
    inside: RGB = (214, 230, 238)  # liquid or filling seen through the wall
    new: bool = False
    stackable: bool = False


_BLUE, _NAVY = (30, 92, 190), (14, 44, 112)
_COLA, _DEEP = (206, 22, 34), (142, 8, 20)
_ICE, _SKY = (228, 242, 252), (120, 184, 232)
# fmt: off
PRODUCTS: tuple[Product, ...] = (
    Product("cereal_honey", "carton", (13.5, 20, 5), "OATIES", "Honey", _BLUE, _NAVY, (246, 178, 30), WHITE,
            (200, 24, 40), "bowl", new=True),
    Product("cereal_cocoa", "carton", (13.5, 20, 5), "OATIES", "Cocoa", _BLUE, _NAVY, (104, 52, 26), WHITE,
            (200, 24, 40), "bowl", new=True),
    Product("cola_classic", "can", (7.6, 12, 0), "Kolino", "Classic", _COLA, _DEEP, (244, 240, 232), _COLA, WHITE,
            "ribbon", stackable=True),
    Product("cola_zero", "can", (7.6, 12, 0), "Kolino", "Zero", _COLA, _DEEP, (26, 22, 24), _COLA, WHITE, "ribbon",
            stackable=True),
    Product("water_still", "pet", (7.2, 23, 0), "Alpina", "Still", _ICE, _SKY, (24, 84, 190), (24, 84, 190), WHITE,
            "mountain", lid=(30, 96, 204), inside=(196, 222, 236)),
    Product("water_sparkling", "pet", (7.2, 23, 0), "Alpina", "Sparkling", _ICE, _SKY, (16, 142, 92), (24, 84, 190),
            WHITE, "mountain", lid=(18, 150, 96), inside=(196, 222, 236)),
    Product("soda_orange", "pet", (7.8, 21, 0), "Fizzo", "Orange", (255, 214, 40), (250, 130, 16), (22, 120, 60),
            (22, 120, 60), WHITE, "slice", lid=(240, 110, 10), inside=(246, 146, 28)),
    Product("jam_strawberry", "jar", (8.4, 11, 0), "Nonna", "Strawberry", (252, 246, 230), (246, 226, 204),
            (190, 22, 48), WHITE, (150, 16, 40), "strawberry", lid=(206, 36, 52), inside=(140, 10, 28)),
    Product("pickles", "jar", (9, 13.5, 0), "GURKO", "Pickles", (236, 244, 196), (196, 218, 120), (34, 96, 44),
            (34, 96, 44), (250, 236, 120), "gherkin", lid=GOLD, inside=(118, 142, 52)),
    Product("crisps_paprika", "bag", (13.5, 18.5, 0), "CRACKO", "Paprika", (238, 64, 30), (190, 14, 26),
            (250, 206, 36), (250, 206, 36), (180, 14, 26), "chips", new=True),
    Product("coffee_beans", "bag", (10.5, 17, 0), "MORO", "Espresso", (52, 38, 32), (20, 14, 12), (196, 150, 66),
            (40, 28, 24), (222, 180, 96), "beans"),
    Product("yoghurt_blueberry", "tub", (10.5, 9, 0), "Lacta", "Blueberry", (250, 250, 252), (196, 206, 242),
            (84, 70, 170), (84, 70, 170), WHITE, "berries", lid=(236, 238, 246), stackable=True),
    Product("milk", "gable", (8.6, 19.5, 7), "Meadow", "Milk", (250, 252, 254), (202, 228, 246), (34, 130, 60),
            (24, 88, 176), WHITE, "meadow", lid=(24, 88, 176)),
    Product("juice_orange", "gable", (8.6, 19.5, 7), "Sunny", "Juice", (255, 236, 150), (252, 168, 36), (236, 96, 10),
            (20, 120, 58), WHITE, "slice", lid=(20, 120, 58), new=True),
    Product("chocolate", "flat", (15, 7.4, 1.4), "Velours", "Dark 70%", (92, 36, 104), (52, 16, 64), GOLD,
            (60, 20, 72), GOLD, "choco", stackable=True),
    Product("tea_green", "flat", (12.5, 8.4, 6), "Zenji", "Green Tea", (206, 232, 160), (112, 176, 84), (24, 92, 54),
            (24, 92, 54), (246, 244, 220), "leaf", stackable=True),
)
# fmt: on
CLASSES: tuple[str, ...] = tuple(p.name for p in PRODUCTS)
# The same package but for a flavour band, its word and (bottles) the cap: told apart with care, confused without it.
LOOKALIKES: tuple[tuple[str, str], ...] = (
    ("cereal_honey", "cereal_cocoa"),
    ("cola_classic", "cola_zero"),
    ("water_still", "water_sparkling"),
)
_PARTNER = {CLASSES.index(a): CLASSES.index(b) for pair in LOOKALIKES for a, b in (pair, pair[::-1])}


# ---------------------------------------------------------------------------------------------------------- small tools


def _mix(a: RGB, b: RGB, t: float) -> RGB:
    return (int(a[0] + (b[0] - a[0]) * t), int(a[1] + (b[1] - a[1]) * t), int(a[2] + (b[2] - a[2]) * t))


def _ink_on(paper: RGB) -> RGB:
    return BLACK if 0.3 * paper[0] + 0.6 * paper[1] + 0.1 * paper[2] > 150 else WHITE


def _tone(colour: RGB) -> NDArray[np.float32]:
    return np.array(colour, np.float32)


def _gradient(w: int, h: int, top: RGB, bottom: RGB) -> Image.Image:
    t = np.linspace(0, 1, h, dtype=np.float32)[:, None, None]
    column = _tone(top) * (1 - t) + _tone(bottom) * t
    return Image.fromarray(column.astype(np.uint8)).resize((w, h), Image.Resampling.NEAREST)


def _clouds(rng: np.random.Generator, w: int, h: int, cells: tuple[int, int]) -> Array:
    """Smooth noise float32 [h, w] of about unit spread, with `cells` (x, y) bumps."""
    coarse = Image.fromarray(rng.standard_normal((cells[1] + 2, cells[0] + 2)).astype(np.float32))
    return np.asarray(coarse.resize((w, h), Image.Resampling.BICUBIC))


def _homography(dst: list[Point], src: list[Point]) -> list[float]:
    """The 8 coefficients PIL wants: they take each point of `dst` to that of `src`."""
    rows, rhs = [], []
    for (x, y), (u, v) in zip(dst, src, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        rhs += [u, v]
    return [float(c) for c in np.linalg.solve(np.array(rows), np.array(rhs))]


@lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # Pillow's own, so pictures don't depend on the machine's fonts


@lru_cache(maxsize=128)
def _advance(letter: str) -> float:
    """A letter's width at font size 1."""
    return _font(100).getlength(letter) / 100


def _word(
    img: Image.Image,
    text: str,
    centre: Point,
    box: tuple[float, float],
    ink: RGB,
    *,
    bold: float = 0.04,
    slant: float = 0.0,
) -> None:
    """Write `text` as large as `box` (width, height) allows, centred.

    Letter by letter: bold strokes need wider tracking than the font's, and text shaping differs between machines.
    """
    track = [_advance(c) + bold * 1.5 for c in text]
    size = max(5, int(min(box[0] / (sum(track) + slant * 0.6), box[1] / (0.74 + 2 * bold))))
    mask = Image.new("L", img.size)
    draw, x = ImageDraw.Draw(mask), centre[0] - sum(track) * size / 2
    for letter, advance in zip(text, track, strict=True):
        middle = (x + advance * size / 2, centre[1] + size * 0.36)
        draw.text(middle, letter, 255, _font(size), anchor="ms", stroke_width=round(size * bold))
        x += advance * size
    if slant:
        shear = (1, slant, -slant * centre[1], 0, 1, 0)
        mask = mask.transform(img.size, Image.Transform.AFFINE, shear, Image.Resampling.BILINEAR)
    img.paste(ink, mask=mask)


@lru_cache(maxsize=512)
def _ball(d: int, colour: RGB, squash: float = 1.0, turn: int = 0, flat: float = 0.0) -> Image.Image:
    """A shaded ellipsoid, RGBA [d * squash, d]: berries, beans, crisps, bubbles."""
    y, x = np.mgrid[0:d, 0:d].astype(np.float32) * (2 / d) - 1 + 1 / d
    z = np.sqrt(np.clip(1 - x * x - y * y, 0, 1))
    light = np.clip(0.35 + 0.75 * (0.66 * z - 0.45 * x - 0.55 * y), 0.2, 1.2) * (1 - flat) + flat
    shine = np.exp(-((x + 0.35) ** 2 + (y + 0.42) ** 2) / 0.045) * 120 * (1 - flat)
    rgb = np.clip(light[..., None] * _tone(colour) + shine[..., None], 0, 255)
    alpha = (x * x + y * y <= 1) * 255
    out = Image.fromarray(np.dstack([rgb, alpha]).astype(np.uint8))
    return out.resize((d, max(2, int(d * squash)))).rotate(turn, Image.Resampling.BICUBIC, expand=True)


def _put(img: Image.Image, piece: Image.Image, centre: Point) -> None:
    img.paste(piece, (int(centre[0] - piece.width / 2), int(centre[1] - piece.height / 2)), piece)


def _leaf(draw: ImageDraw.ImageDraw, tip: Point, length: float, angle: float, colour: RGB) -> None:
    t = np.linspace(0, pi, 14)
    along, across = (1 - np.cos(t)) / 2 * length, np.sin(t) ** 1.4 * length * 0.24
    for side, shade in ((1, 0.0), (-1, 0.22)):
        xs = tip[0] + along * cos(angle) - side * across * sin(angle)
        ys = tip[1] + along * sin(angle) + side * across * cos(angle)
        draw.polygon(list(zip(xs.tolist(), ys.tolist(), strict=True)), _mix(colour, WHITE, shade))


# ------------------------------------------------------------------------------------------------------ what is printed


class Pen(NamedTuple):
    """Where a motif is drawn: within about `r` px of (x, y)."""

    img: Image.Image
    draw: ImageDraw.ImageDraw
    x: float
    y: float
    r: float
    p: Product
    rng: np.random.Generator

    def at(self, dx: float, dy: float) -> Point:
        """A point in units of the radius."""
        return self.x + dx * self.r, self.y + dy * self.r

    def oval(self, dx: float, dy: float, rx: float, ry: float, fill: RGB) -> None:
        """An ellipse, all in units of the radius."""
        self.draw.ellipse((*self.at(dx - rx, dy - ry), *self.at(dx + rx, dy + ry)), fill)


def _bowl(pen: Pen) -> None:
    def flake(dx: float, dy: float, size: float) -> None:
        colour = _mix(pen.p.band, (250, 206, 120), pen.rng.uniform(0, 0.3))
        _put(pen.img, _ball(int(pen.r * size), colour, 0.7, int(pen.rng.integers(0, 180)), 0.25), pen.at(dx, dy))

    for _ in range(34):
        a, q = pen.rng.uniform(pi, 2 * pi), pen.rng.uniform(0, 0.85)
        flake(q * cos(a), 0.05 + q * 0.75 * sin(a), 0.36)
    box = (*pen.at(-1, -0.95), *pen.at(1, 0.95))
    pen.draw.chord(box, 0, 180, (238, 242, 248))
    pen.draw.chord(box, 0, 62, (208, 216, 230))
    pen.draw.arc(box, 95, 165, WHITE, max(2, int(pen.r * 0.06)))
    pen.oval(0, 0, 1, 0.14, (190, 200, 216))
    pen.oval(0, 0, 0.96, 0.11, (252, 250, 244))
    for _ in range(16):
        flake(pen.rng.uniform(-0.75, 0.75), pen.rng.uniform(-0.12, 0.0), 0.3)


def _ribbon(pen: Pen) -> None:
    xs = np.linspace(-3 * pen.r, 3 * pen.r, 60)
    for lift, thick, colour in ((0.1, 0.62, WHITE), (0.24, 0.34, pen.p.band)):
        y = pen.y + pen.r * (0.5 * np.sin(xs / pen.r * 1.25) + lift)
        edge = np.concatenate([np.c_[xs + pen.x, y], np.c_[xs + pen.x, y + pen.r * thick][::-1]])
        pen.draw.polygon([(float(a), float(b)) for a, b in edge], colour)


def _mountain(pen: Pen) -> None:
    for dx, s, colour in ((-0.75, 0.8, (112, 156, 204)), (0.8, 0.7, (128, 172, 214)), (0.05, 1.15, (62, 112, 176))):
        peak, foot = pen.at(dx, 0.65 - 1.3 * s), 0.65
        pen.draw.polygon([pen.at(dx - s, foot), peak, pen.at(dx + s, foot)], colour)
        pen.draw.polygon([peak, pen.at(dx + s, foot), pen.at(dx + 0.1 * s, foot)], _mix(colour, BLACK, 0.18))
        snow = [(0.36, 0.47), (0.12, 0.35), (-0.08, 0.55), (-0.36, 0.47)]
        pen.draw.polygon([peak, *(pen.at(dx + a * s, 0.65 - (1.3 - b) * s) for a, b in snow)], WHITE)


def _slice(pen: Pen) -> None:
    _put(pen.img, _ball(int(pen.r * 1.5), (250, 150, 26), flat=0.15), pen.at(-0.35, -0.1))
    _leaf(pen.draw, pen.at(-0.3, -0.75), pen.r * 0.9, -0.5, (40, 140, 50))
    (x, y), q = pen.at(0.4, 0.25), pen.r * 0.56
    pen.oval(0.4, 0.25, 0.68, 0.68, (244, 126, 10))
    pen.oval(0.4, 0.25, 0.61, 0.61, (255, 240, 200))
    for k in range(8):
        pen.draw.pieslice((x - q, y - q, x + q, y + q), 45 * k + 4, 45 * k + 41, (255, 168, 34))


def _strawberry(pen: Pen) -> None:
    for dx, dy, s in ((-0.5, -0.1, 0.85), (0.5, 0.15, 1.0)):
        (x, y), q = pen.at(dx, dy), s * pen.r * 0.78
        berry = _ball(int(2 * q), (222, 30, 46), 1.15, 0, 0.2).copy()
        w, h = berry.size
        cut = Image.new("L", berry.size)
        taper = [(0, 0.05), (1, 0.05), (0.93, 0.5), (0.55, 1), (0.45, 1), (0.07, 0.5)]
        ImageDraw.Draw(cut).polygon([(w * a, h * b) for a, b in taper], 255)
        berry.putalpha(ImageChops.multiply(cut, berry.getchannel("A")))
        _put(pen.img, berry, (x, y))
        for _ in range(16):
            a, b = x + q * pen.rng.uniform(-0.6, 0.6), y + q * pen.rng.uniform(-0.5, 0.6)
            pen.draw.ellipse((a - 2, b - 3, a + 2, b + 3), (250, 214, 120))
        for k in range(5):
            _leaf(pen.draw, (x, y - q * 0.95), q * 0.75, 0.2 + k * 0.7, (54, 140, 48))


def _meadow(pen: Pen) -> None:
    pen.oval(-0.5, 1.6, 4.0, 1.5, (120, 190, 80))
    pen.oval(0.5, 2.1, 4.0, 1.75, (70, 156, 62))
    for x in (-0.72, -0.48, 0.12, 0.34):  # the cow: legs, trunk, tail, head
        pen.draw.rectangle((*pen.at(x, 0.1), *pen.at(x + 0.14, 0.66)), (232, 232, 236))
        pen.draw.rectangle((*pen.at(x, 0.58), *pen.at(x + 0.14, 0.68)), (70, 60, 56))
    pen.draw.line([pen.at(-0.8, -0.15), pen.at(-1.0, 0.1), pen.at(-0.95, 0.4)], (90, 80, 76), max(2, int(pen.r * 0.05)))
    pen.draw.rounded_rectangle((*pen.at(-0.85, -0.38), *pen.at(0.55, 0.28)), pen.r * 0.3, WHITE)
    for dx, dy, rx, ry in ((-0.5, -0.12, 0.22, 0.24), (0.0, 0.05, 0.24, 0.2), (0.36, -0.25, 0.14, 0.1)):
        pen.oval(dx, dy, rx, ry, (44, 40, 44))
    for side in (-1, 1):
        pen.oval(0.66 + side * 0.3, -0.56, 0.16, 0.08, (44, 40, 44))
        pen.oval(0.66 + side * 0.14, -0.74, 0.05, 0.11, (236, 220, 180))
    pen.oval(0.66, -0.42, 0.25, 0.32, WHITE)
    pen.oval(0.56, -0.52, 0.12, 0.17, (44, 40, 44))
    pen.oval(0.66, -0.2, 0.22, 0.15, (246, 178, 176))
    for side in (-1, 1):
        pen.oval(0.66 + side * 0.1, -0.5, 0.045, 0.055, WHITE if side < 0 else BLACK)
        pen.oval(0.66 + side * 0.08, -0.2, 0.03, 0.04, (150, 84, 84))


def _choco(pen: Pen) -> None:
    for k in range(6):
        x, y = pen.at((k % 3 - 1.5) * 0.72, (k // 3 - 1) * 0.72)
        for inset, colour in ((0.0, (44, 20, 12)), (0.05, (128, 74, 46)), (0.12, (86, 44, 26))):
            a, b = inset * pen.r, (0.7 - inset * 0.7) * pen.r
            pen.draw.rectangle((x + a, y + a, x + b, y + b), colour)


def _tea_leaf(pen: Pen) -> None:
    for angle, length in ((-2.5, 1.1), (-0.6, 1.1), (-1.55, 1.4)):
        _leaf(pen.draw, pen.at(0, 0.5), pen.r * length, angle, (36, 132, 60))


def _heap(pen: Pen) -> None:
    """A pile of one thing: how many, how large, how slender, between which colours, how flat."""
    count, size, squash, a, b, flat = {
        "gherkin": (6, 1.25, 0.42, (84, 124, 36), (136, 168, 60), 0.1),
        "chips": (16, 0.95, 0.66, (255, 220, 110), (250, 190, 70), 0.72),
        "beans": (16, 0.6, 0.66, (128, 76, 42), (84, 46, 26), 0.1),
        "berries": (10, 0.66, 1.0, (70, 78, 168), (98, 104, 196), 0.15),
    }[pen.p.motif]
    for k in range(count):
        turn = int(pen.rng.integers(0, 180))
        dx, dy = float(pen.rng.uniform(-0.8, 0.8)), float(pen.rng.uniform(-0.55, 0.55))
        d = int(pen.r * size)
        if pen.p.motif == "chips":  # a darker rim, so that they part from each other
            _put(pen.img, _ball(d + max(4, d // 10), (176, 104, 24), squash, turn, 0.9), pen.at(dx, dy))
        _put(pen.img, _ball(d, _mix(a, b, pen.rng.uniform(0, 1)), squash, turn, flat), pen.at(dx, dy))
        if pen.p.motif == "beans":
            ex, ey = cos(turn * pi / 180) * 0.2, -sin(turn * pi / 180) * 0.2
            pen.draw.line([pen.at(dx - ex, dy - ey), pen.at(dx + ex, dy + ey)], (36, 18, 10), max(2, int(pen.r * 0.05)))
        elif pen.p.motif == "berries":
            pen.oval(dx, dy, 0.09, 0.09, (38, 40, 100))
            if k % 4 == 0:
                _leaf(pen.draw, pen.at(dx, dy), pen.r * 0.6, pen.rng.uniform(-2.6, -0.5), (60, 150, 70))


_MOTIFS: dict[str, Callable[[Pen], None]] = {
    "bowl": _bowl, "ribbon": _ribbon, "mountain": _mountain, "slice": _slice, "strawberry": _strawberry,
    "meadow": _meadow, "choco": _choco, "leaf": _tea_leaf, "gherkin": _heap, "chips": _heap, "beans": _heap,
    "berries": _heap,
}  # fmt: skip


def _motif(img: Image.Image, p: Product, x: float, y: float, r: float) -> None:
    _MOTIFS[p.motif](Pen(img, ImageDraw.Draw(img), x, y, r, p, np.random.default_rng(_seed_of(p.motif))))


def _badge(img: Image.Image, cx: float, cy: float, r: float) -> None:
    spikes = [(cx + r * q * cos(k * pi / 14), cy + r * q * sin(k * pi / 14)) for k, q in enumerate([1.0, 0.84] * 14)]
    ImageDraw.Draw(img).polygon(spikes, (252, 220, 30), (220, 150, 10))
    _word(img, "NEW", (cx, cy), (r * 1.35, r * 0.6), (210, 20, 30))


def _small_print(img: Image.Image, cx: float, y: float, w: float, h: float, ink: RGB) -> None:
    """The nutrition strip: four boxes with a number each."""
    draw, cell = ImageDraw.Draw(img), w / 4
    for k, text in enumerate(("84 kcal", "1.2 g", "0.3 g", "12 %")):
        x = cx - w / 2 + k * cell
        draw.rounded_rectangle((x + cell * 0.06, y, x + cell * 0.94, y + h), h * 0.25, WHITE, ink, 1)
        draw.line((x + cell * 0.2, y + h * 0.72, x + cell * 0.8, y + h * 0.72), ink, 1)
        _word(img, text, (x + cell / 2, y + h * 0.38), (cell * 0.7, h * 0.42), ink, bold=0)


def _barcode(img: Image.Image, x: float, y: float, w: float, h: float, rng: np.random.Generator) -> None:
    draw = ImageDraw.Draw(img)
    draw.rectangle((x, y, x + w, y + h), WHITE)
    at = x + w * 0.07
    while at < x + w * 0.92:
        bar = w * float(rng.choice([0.015, 0.03, 0.045]))
        draw.rectangle((at, y + h * 0.1, at + bar, y + h * 0.8), BLACK)
        at += bar + w * float(rng.choice([0.02, 0.035]))


def _art(p: Product, w: int, h: int, front: float) -> Image.Image:
    """The label, RGB [h, w]; what must be read stays in the central `front` of its width."""
    rng = np.random.default_rng(_seed_of(p.name))
    img = _gradient(w, h, p.top, p.bottom)
    cx, fw = w / 2, w * front
    rays = Image.new("L", (w, h))
    for k in range(0, 36, 2):  # pale rays behind the motif
        ImageDraw.Draw(rays).pieslice(
            (cx - 2 * w, h * 0.45 - 2 * w, cx + 2 * w, h * 0.45 + 2 * w), k * 10, k * 10 + 9, 30
        )
    img.paste(WHITE, mask=rays)
    draw = ImageDraw.Draw(img)
    if w * front > 1.2 * h:
        _wide_art(img, p, cx, fw, h)
    else:
        xs = np.linspace(0, w, 40)
        wave = h * (0.66 + 0.02 * np.sin((xs - cx) / fw * 5))
        if p.motif == "ribbon":
            _motif(img, p, cx, h * 0.56, fw * 0.5)
        draw.polygon([*zip(xs.tolist(), wave.tolist(), strict=True), (w, h * 0.87), (0, h * 0.87)], p.band)
        draw.line(list(zip(xs.tolist(), wave.tolist(), strict=True)), WHITE, max(2, h // 120))
        if p.plate != p.top:
            box = (cx - fw * 0.48, h * 0.05, cx + fw * 0.48, h * 0.27)
            draw.rounded_rectangle(box, h * 0.09, p.plate, _mix(p.plate, p.ink, 0.5), max(2, h // 150))
        _word(img, p.brand, (cx, h * 0.16), (fw * 0.84, h * 0.19), p.ink, slant=0.12)
        if p.motif != "ribbon":
            _motif(img, p, cx, h * 0.475, min(fw * 0.42, h * 0.215))
        _word(img, p.title, (cx, h * 0.77), (fw * 0.84, h * 0.125), _ink_on(p.band))
        if p.new:
            _badge(img, cx + fw * 0.36, h * 0.34, fw * 0.13)
        _small_print(img, cx, h * 0.905, fw * 0.7, h * 0.06, _mix(p.bottom, BLACK, 0.6))
        if front < 1:  # the sides of a round package come into view when it is turned
            _barcode(img, cx + fw * 0.72, h * 0.45, fw * 0.3, h * 0.18, rng)
            for k in range(9):
                draw.line(
                    (cx - fw, h * (0.32 + 0.03 * k), cx - fw * 0.68, h * (0.32 + 0.03 * k)),
                    _mix(p.bottom, BLACK, 0.5),
                    2,
                )
    return img


def _wide_art(img: Image.Image, p: Product, cx: float, fw: float, h: int) -> None:
    draw = ImageDraw.Draw(img)
    _motif(img, p, cx + fw * 0.29, h * 0.40, h * 0.29)
    draw.rectangle((0, h * 0.74, img.width, h * 0.92), p.band)
    draw.line((0, h * 0.72, img.width, h * 0.72), WHITE, max(2, h // 80))
    draw.rounded_rectangle((cx - fw * 0.46, h * 0.12, cx + fw * 0.12, h * 0.6), h * 0.12, p.plate)
    _word(img, p.brand, (cx - fw * 0.17, h * 0.36), (fw * 0.5, h * 0.34), p.ink, slant=0.12)
    _word(img, p.title, (cx - fw * 0.16, h * 0.83), (fw * 0.5, h * 0.13), _ink_on(p.band))
    _small_print(img, cx + fw * 0.31, h * 0.78, fw * 0.3, h * 0.1, _mix(p.bottom, BLACK, 0.6))


def _seed_of(name: str) -> int:
    """A seed from a name; the built-in hash() differs from run to run."""
    return int.from_bytes(name.encode()[:8], "little")


# ------------------------------------------------------------------------------------------------------- package shapes


def _turned(
    outline: list[Point],
    skin: Image.Image,
    *,
    yaw: float,
    bend: float,
    gloss: float,
    lid: RGB,
    clear: Array | None = None,
) -> Image.Image:
    """A body of revolution seen slightly from above, RGBA.

    outline: (y, radius) in cm from the top; skin: its surface unrolled, ART_SPAN wide; bend: the height of a circle of
    radius 1 as seen; clear: opacity of each skin row.
    """
    h = skin.height
    ys, rs = zip(*outline, strict=True)
    r0, rmax = rs[0] * CM, max(rs) * CM
    lift = int(2 * bend * r0) + 2
    yy = (np.arange(h + lift, dtype=np.float32) - lift)[:, None]
    xx = (np.arange(int(2 * rmax) + 4, dtype=np.float32) - int(rmax) - 1.5)[None]
    r = np.interp(yy, np.multiply(ys, CM), np.multiply(rs, CM)).astype(np.float32)
    r = np.convolve(np.pad(r[:, 0], 4, mode="edge"), np.ones(9) / 9, "valid").astype(np.float32)[:, None]
    u = np.clip(xx / r, -1, 1)
    c, theta = np.sqrt(1 - u * u), np.arcsin(u)
    v = yy + bend * r * (1 - c)
    col = np.clip(skin.width * (0.5 + (theta + yaw) / ART_SPAN), 0, skin.width - 1).astype(np.intp)
    row = np.clip(v, 0, h - 1).astype(np.intp)
    slope = np.gradient(r[:, 0])[:, None]
    light = (
        (0.40 + 0.68 * np.clip(np.cos(theta + 0.5), 0, 1)) * (0.55 + 0.45 * c**0.5) * (1 + 0.22 * np.clip(slope, -1, 1))
    )
    shine = gloss * (np.exp(-(((theta + 0.62) / 0.11) ** 2)) + 0.45 * np.exp(-(((theta - 0.9) / 0.08) ** 2)))
    shine = shine * (0.75 + 0.25 * np.sin(yy / h * 9))
    rgb = np.asarray(skin, np.float32)[row, col] * light[..., None] + 235 * shine[..., None]
    body = (np.abs(xx) <= r) & (v >= 0) & (v < h)
    alpha = np.where(body, 255.0, 0.0)
    if clear is not None:
        wall = clear[row]
        alpha *= np.clip(wall + (1 - wall) * (1 - c) ** 1.2 + shine, 0, 1)
    rho = np.hypot(xx / r0, (yy + bend * r0) / (bend * r0))
    cap = (rho <= 1) & (v < 0)
    plate = 0.86 + 0.16 * np.sin(np.arctan2(yy + bend * r0, xx * bend) * 2 + 0.8)
    plate = np.where(rho > 0.93, 1.12, np.where(rho > 0.82, 0.62, plate))
    rgb = np.where(cap[..., None], plate[..., None] * _tone(lid), rgb)
    alpha = np.where(cap, 255.0, alpha)
    return Image.fromarray(np.dstack([rgb, alpha]).clip(0, 255).astype(np.uint8))


def _skin(width: int, height: float, base: RGB, parts: list[tuple[float, Image.Image]]) -> Image.Image:
    """A surface of `base` colour with pictures pasted at heights (cm)."""
    skin = Image.new("RGB", (width, int(height * CM)), base)
    for y, part in parts:
        skin.paste(part, (0, int(y * CM)))
    return skin


def _ribbed(w: int, h_cm: float, colour: RGB, ribs: int) -> Image.Image:
    stripe = 0.86 + 0.2 * np.cos(np.linspace(0, 2 * pi * ribs, w, dtype=np.float32))
    rows = np.broadcast_to(stripe[None, :, None] * _tone(colour), (max(2, int(h_cm * CM)), w, 3))
    return Image.fromarray(rows.clip(0, 255).astype(np.uint8))


def _can(p: Product, turn: float) -> Image.Image:
    r, h = p.cm[0] / 2, p.cm[1]
    w = int(ART_SPAN * r * CM)
    art = _label(p.name, w, int((h - 1.5) * CM), 0.44)
    skin = _skin(w, h, SILVER, [(0.75, art)])
    outline = [(0, r * 0.84), (0.2, r * 0.86), (1.2, r), (h - 0.9, r), (h - 0.2, r * 0.88), (h, r * 0.84)]
    return _turned(outline, skin, yaw=turn * 0.5, bend=0.13, gloss=0.42, lid=(204, 208, 214))


def _pet(p: Product, turn: float) -> Image.Image:
    r, h = p.cm[0] / 2, p.cm[1]
    w = int(ART_SPAN * r * CM)
    y0, y1 = h * 0.42, h * 0.80
    rng = np.random.default_rng(5)
    rows = np.arange(int(h * CM), dtype=np.float32) / CM
    groove = np.abs((rows / 1.25) % 1 - 0.5) * 2  # moulded rings: a bright ridge, a thin dark groove
    rings = 0.97 + 0.14 * groove**3 - 0.16 * (groove < 0.1)
    ripple = rings[:, None] + 0.035 * _clouds(rng, w, len(rows), (9, 26))
    liquid = np.clip(ripple[..., None] * _tone(p.inside), 0, 255).astype(np.uint8)
    skin = Image.fromarray(liquid)
    air = Image.new("RGB", (w, int(h * 0.12 * CM)), _mix(p.inside, WHITE, 0.6))
    skin.paste(air, (0, int(1.6 * CM)))
    skin.paste(_ribbed(w, 1.6, p.lid, 34), (0, 0))
    skin.paste(_mix(p.lid, BLACK, 0.25), (0, int(1.3 * CM), w, int(1.38 * CM)))
    skin.paste(_label(p.name, w, int((y1 - y0) * CM), 0.46), (0, int(y0 * CM)))
    clear = np.full(skin.height, 0.66, np.float32)
    clear[: int(1.7 * CM)] = clear[int(y0 * CM) : int(y1 * CM)] = 1
    cap = 1.45
    outline = [
        (0, cap * 0.93),
        (0.12, cap),
        (1.6, cap),
        (1.62, cap * 0.84),
        (1.9, cap * 1.08),
        (2.05, cap * 0.84),
        (2.9, cap * 0.86),
        (h * 0.2, r * 0.62),
        (h * 0.27, r * 0.86),
        (h * 0.34, r * 0.98),
        (y0 - 0.3, r),
        (y0, r * 0.97),
        (y1, r * 0.97),
        (y1 + 0.3, r),
        (h - 2.2, r * 0.95),
        (h - 1.6, r),
        (h - 0.5, r * 0.97),
        (h, r * 0.8),
    ]
    return _turned(outline, skin, yaw=turn * 0.5, bend=0.10, gloss=0.55, lid=_mix(p.lid, WHITE, 0.15), clear=clear)


def _jar(p: Product, turn: float) -> Image.Image:
    r, h = p.cm[0] / 2, p.cm[1]
    w = int(ART_SPAN * r * CM)
    lid_h = 1.7
    rng = np.random.default_rng(_seed_of(p.name))
    lumps = 1 + 0.22 * _clouds(rng, w, int(h * CM), (16, 14))
    skin = Image.fromarray(np.clip(lumps[..., None] * _tone(p.inside), 0, 255).astype(np.uint8))
    skin.paste(_mix(p.inside, WHITE, 0.45), (0, int(lid_h * CM), w, int((lid_h + 0.5) * CM)))
    lid = _ribbed(w, lid_h, p.lid, 40)
    if p.lid[0] > 180 and p.lid[1] < 80:  # the jam's gingham
        draw, q = ImageDraw.Draw(lid), int(0.32 * CM)
        for x in range(0, w, q):
            for y in range(0, lid.height, q):
                if (x // q + y // q) % 2:
                    draw.rectangle((x, y, x + q - 1, y + q - 1), WHITE)
    skin.paste(lid, (0, 0))
    skin.paste(_label(p.name, w, int(h * 0.56 * CM), 0.46), (0, int(h * 0.31 * CM)))
    outline = [
        (0, r * 0.86),
        (0.15, r * 0.9),
        (lid_h, r * 0.9),
        (lid_h + 0.05, r * 0.8),
        (lid_h + 0.5, r * 0.84),
        (lid_h + 1.3, r),
        (h - 0.9, r),
        (h - 0.25, r * 0.93),
        (h, r * 0.84),
    ]
    return _turned(outline, skin, yaw=turn * 0.5, bend=0.13, gloss=0.5, lid=_mix(p.lid, WHITE, 0.12))


def _tub(p: Product, turn: float) -> Image.Image:
    r, h = p.cm[0] / 2, p.cm[1]
    w = int(ART_SPAN * r * CM)
    skin = _skin(w, h, _mix(p.lid, WHITE, 0.3), [(1.0, _label(p.name, w, int((h - 1.25) * CM), 0.5))])
    skin.paste(_mix(p.band, WHITE, 0.1), (0, 0, w, int(0.7 * CM)))
    outline = [(0, r), (0.7, r), (0.72, r * 0.92), (1.0, r * 0.92), (h - 0.3, r * 0.76), (h, r * 0.74)]
    return _turned(outline, skin, yaw=turn * 0.4, bend=0.15, gloss=0.16, lid=_mix(p.band, WHITE, 0.55))


def _face(sprite: Image.Image, face: Image.Image, quad: list[Point], light: float) -> None:
    """Paste `face` in perspective on the quad (top left, top right, bottom right, bottom left)."""
    w, h = face.size
    lit = face.point([min(255, int(k * light)) for k in range(256)] * 3)
    coeffs = _homography(quad, [(0, 0), (w, 0), (w, h), (0, h)])
    mask = Image.new("L", sprite.size)
    ImageDraw.Draw(mask).polygon(quad, 255)
    sprite.paste(
        lit.transform(sprite.size, Image.Transform.PERSPECTIVE, coeffs, Image.Resampling.BILINEAR), (0, 0), mask
    )


def _side_art(p: Product, w: int, h: int) -> Image.Image:
    img = _gradient(max(8, w), h, _mix(p.top, BLACK, 0.12), _mix(p.bottom, BLACK, 0.12))
    draw, w = ImageDraw.Draw(img), img.width
    if w > CM:
        draw.rectangle((0, h * 0.66, w, h * 0.87), _mix(p.band, BLACK, 0.12))
        draw.rectangle((w * 0.15, h * 0.1, w * 0.85, h * 0.5), WHITE)
        for k in range(11):
            draw.line(
                (w * 0.2, h * (0.13 + k * 0.033), w * (0.8 if k % 3 else 0.6), h * (0.13 + k * 0.033)), (90, 90, 90), 2
            )
        _barcode(img, w * 0.2, h * 0.53, w * 0.6, h * 0.1, np.random.default_rng(_seed_of(p.name)))
    return img


def _boxed(p: Product, turn: float) -> Image.Image:
    """Cartons, flat boxes and gable-top packs: a front, the side that faces the camera, and the top."""
    w, h, d = (int(v * CM) for v in p.cm)
    gable = int(3.2 * CM) if p.shape == "gable" else 0
    body, side, pitch = h - gable, abs(turn) * d * 0.42 + 1, 0 if gable else int(min(0.07 * d, 0.3 * CM)) + 2
    front_w, pad = w - abs(turn) * w * 0.06, pitch + 4
    sprite = Image.new("RGBA", (int(front_w + side) + 8, h + pad + 4))
    drop, far = abs(turn) * h * 0.012, h * 0.006 + side * 0.10
    x0, x1, y0, y1 = 4.0, 4 + front_w, float(pad + gable), float(pad + gable + body)
    near_l, near_r = (drop, 0.0) if turn > 0 else (0.0, drop)  # a face recedes towards the edge away from the camera
    if turn <= 0:
        x0, x1 = 4 + side, 4 + side + front_w
    quad = [(x0, y0 + near_l), (x1, y0 + near_r), (x1, y1 - near_r), (x0, y1 - near_l)]
    edge, away = (x1, x1 + side) if turn > 0 else (x0, x0 - side)
    flank = [(edge, y0), (away, y0 + far), (away, y1 - far), (edge, y1)]
    if turn <= 0:
        flank = [flank[1], flank[0], flank[3], flank[2]]
    side_art = _side_art(p, d, body)
    draw = ImageDraw.Draw(sprite)
    if gable:
        _gable(sprite, p, quad, flank, turn, pad)
    else:
        back = [
            (quad[0][0] + (x1 - x0) * 0.015, quad[0][1] - pitch),
            (quad[1][0] - (x1 - x0) * 0.015, quad[1][1] - pitch),
        ]
        draw.polygon([quad[0], *back, quad[1]], (*_mix(p.top, WHITE, 0.35), 255))
        draw.polygon([flank[0], flank[1], back[1 if turn > 0 else 0]], (*_mix(p.top, WHITE, 0.3), 255))
    _face(sprite, side_art, flank, 0.66 if turn > 0 else 0.8)
    _face(sprite, _label(p.name, w, body, 1.0), quad, 1.0)
    draw.line([(edge, y0 + 2), (edge, y1 - 2)], (*_mix(p.top, WHITE, 0.55), 255), 3)  # worn board edge
    draw.line([quad[0], quad[1]], (*_mix(p.top, WHITE, 0.6), 255), 3)
    return _sheen(sprite, 0.10 if p.shape != "flat" else 0.14)


def _gable(sprite: Image.Image, p: Product, quad: list[Point], flank: list[Point], turn: float, pad: int) -> None:
    (xl, yl), (xr, yr) = quad[0], quad[1]
    inset, ridge, fin = (xr - xl) * 0.035, pad + 1.25 * CM, float(pad)
    far = flank[1] if turn > 0 else flank[0]
    draw = ImageDraw.Draw(sprite)
    peak = (xr - inset if turn > 0 else xl + inset, ridge)
    draw.polygon([flank[0], flank[1], peak], (*_mix(p.bottom, BLACK, 0.35), 255))
    draw.polygon([far, peak, (far[0] * 0.4 + peak[0] * 0.6, ridge + 0.4 * CM)], (*_mix(p.bottom, BLACK, 0.2), 255))
    slope = _gradient(int(xr - xl), int(2.2 * CM), _mix(p.top, WHITE, 0.5), p.top)
    draw_slope = ImageDraw.Draw(slope)
    draw_slope.rectangle((0, slope.height * 0.86, slope.width, slope.height), p.band)
    _face(sprite, slope, [(xl + inset, ridge), (xr - inset, ridge), (xr, yr), (xl, yl)], 1.04)
    band = _gradient(int(xr - xl), int(1.25 * CM), _mix(p.top, WHITE, 0.2), _mix(p.top, BLACK, 0.16))
    _word(band, p.brand, (band.width / 2, band.height * 0.5), (band.width * 0.5, band.height * 0.5), p.band)
    _face(sprite, band, [(xl + inset, fin), (xr - inset, fin), (xr - inset, ridge), (xl + inset, ridge)], 0.98)
    cx, cy, q = (xl + xr) / 2, ridge + 1.0 * CM, 1.15 * CM
    for k in range(int(0.42 * CM), -1, -1):  # the cap's side, ellipse by ellipse, then its top
        draw.ellipse(
            (cx - q, cy - q * 0.6 + k, cx + q, cy + q * 0.6 + k), (*_mix(p.lid, BLACK, 0.45 if k else 0.0), 255)
        )
    draw.ellipse((cx - q * 0.8, cy - q * 0.46, cx + q * 0.8, cy + q * 0.46), (*_mix(p.lid, WHITE, 0.18), 255))
    draw.arc((cx - q * 0.9, cy - q * 0.54, cx + q * 0.9, cy + q * 0.54), 170, 280, (*_mix(p.lid, WHITE, 0.6), 255), 3)


def _sheen(sprite: Image.Image, strength: float) -> Image.Image:
    """A soft diagonal gloss and darker bottom, as coated board has."""
    w, h = sprite.size
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    gloss = np.exp(-(((x / w + 0.5 * y / h - 0.45) / 0.16) ** 2)) * strength * 255
    light = 1.05 - 0.2 * (y / h) ** 2 - 0.06 * x / w
    rgba = np.array(sprite, np.float32)
    rgba[..., :3] = np.clip(rgba[..., :3] * light[..., None] + gloss[..., None], 0, 255)
    return Image.fromarray(rgba.astype(np.uint8))


def _bag(p: Product, turn: float) -> Image.Image:
    """A crisp bag or pouch: pillow-shaped, sealed at both ends, creased foil lit from the upper left."""
    w, h = int(p.cm[0] * CM), int(p.cm[1] * CM)
    rng = np.random.default_rng((_seed_of(p.name), int(turn * 4) + 8))
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    u, v = x / w * 2 - 1, y / h * 2 - 1
    ends = np.exp(-(1 - np.abs(v)) * 7)
    creases = (
        _clouds(rng, w, h, (26, 3)) * ends * 0.055
        + _clouds(rng, w, h, (7, 9)) * 0.030
        + _clouds(rng, w, h, (3, 4)) * 0.03
    )
    side = _clouds(rng, w, h, (4, 22)) * np.exp(-(1 - np.abs(u)) * 8) * 0.045
    height = np.sqrt(np.clip(1 - (0.96 * u) ** 2, 0, 1)) * np.clip(1 - np.abs(v) ** 3.2, 0, 1) * 0.8 + creases + side
    gy, gx = np.gradient(height * w * 0.22)
    norm = np.sqrt(gx * gx + gy * gy + 1)
    half = np.asarray([(-0.25 - 0.05 * turn), -0.42, 0.87], np.float32)
    spec = np.clip((-gx * half[0] - gy * half[1] + half[2]) / norm, 0, 1) ** 38
    light = 0.50 + 0.55 * np.clip((-gx * -0.45 - gy * -0.6 + 0.75) / norm, 0, 1.3)
    art = np.asarray(_label(p.name, w, h, 0.86), np.float32)
    row = np.clip(y + gy * 16, 0, h - 1).astype(np.intp)
    col = np.clip(x + gx * 16 - turn * w * 0.02, 0, w - 1).astype(np.intp)
    seal = np.abs(v) > 0.93
    rgb = art[row, col] * light[..., None] + 150 * spec[..., None]
    ridged = 0.9 + 0.16 * np.sin(v * h * 0.5)
    rgb = np.where(seal[..., None], rgb * 0.6 + (90 * ridged)[..., None], rgb)
    wobble = 0.014 * _clouds(rng, w, h, (1, 16)).mean(axis=1, keepdims=True) * 2
    width = 0.965 - 0.045 * np.clip(np.cos(v * pi / 2), 0, 1) ** 0.5 + wobble
    zigzag = np.abs((x / (0.3 * CM)) % 1 - 0.5) * 0.012
    mask = (np.abs(u) <= width) & (np.abs(v) <= 0.994 - zigzag)
    return Image.fromarray(np.dstack([rgb, mask * 255.0]).clip(0, 255).astype(np.uint8))


_SHAPES: dict[str, Callable[[Product, float], Image.Image]] = {
    "carton": _boxed, "flat": _boxed, "gable": _boxed, "can": _can, "pet": _pet, "jar": _jar, "tub": _tub, "bag": _bag,
}  # fmt: skip


@lru_cache(maxsize=64)
def _label(name: str, w: int, h: int, front: float) -> Image.Image:
    return _art(PRODUCTS[CLASSES.index(name)], w, h, front)


@lru_cache(maxsize=256)
def cut_out(product: int, turn: int) -> Image.Image:
    """A package, RGBA at CM / 2 px per cm, cropped to its alpha; turn: -2..2, the side that comes into view."""
    p = PRODUCTS[product]
    drawn = _SHAPES[p.shape](p, turn / 2)
    small = drawn.reduce(2)
    return small.crop(small.getchannel("A").point([0] * 128 + [255] * 128).getbbox())


@lru_cache(maxsize=64)  # a run's facings share a few sizes and lights
def _scaled(product: int, turn: int, scale: float, light: float) -> Image.Image:
    sprite, k = cut_out(product, turn), scale / (CM / 2)
    size = (max(4, round(sprite.width * k)), max(4, round(sprite.height * k)))
    sprite = sprite.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    return ImageEnhance.Brightness(sprite).enhance(light)


# ------------------------------------------------------------------------------------------------------------ the shelf


class Item(NamedTuple):
    """A package to paste: bottom centre (x, y) on the canvas, px per cm, lean in degrees, brightness."""

    product: int
    x: float
    y: float
    scale: float
    lean: float
    light: float


class Placed(NamedTuple):
    """What the box needs to know of a pasted item: its class, its own pixel count and its rectangle on the canvas."""

    product: int
    pixels: int
    rect: tuple[int, int, int, int]


class Bay(NamedTuple):
    """The space above one board: y of its ceiling and of the board's front edge, and how much floor is seen."""

    ceiling: float
    floor: float
    depth: float


Plan = list[tuple[bool, Item]]  # (is in the second row, item)


class Scene(NamedTuple):
    """A photo and its truth.

    ids: uint8 [H, W], the number (from 1) of the item seen at each pixel, 0 for none; boxes: int64 [N, 4]; labels:
    index into CLASSES; flags: DIFFICULT, TRUNCATED, OCCLUDED bits; numbers: each box's number in ids.
    """

    image: Image.Image
    ids: Array
    boxes: Array
    labels: list[int]
    flags: list[int]
    numbers: list[int]


@lru_cache(maxsize=64)
def _price_tag(variant: int) -> Image.Image:
    rng = np.random.default_rng((11, variant))
    img = Image.new("RGB", (120, 66), [WHITE, (255, 238, 90), WHITE, (250, 250, 250)][variant % 4])
    draw = ImageDraw.Draw(img)
    if variant % 4 == 3:
        draw.rectangle((0, 0, 120, 16), (210, 24, 36))
    draw.rectangle((0, 0, 119, 65), outline=(150, 150, 150))
    price = f"{rng.integers(0, 9)}.{rng.choice([19, 29, 49, 79, 89, 95, 99])}"
    _word(img, price, (70, 36), (88, 32), BLACK, bold=0.06)
    draw.line((8, 8, 60, 8), (110, 110, 110), 3)
    for k in range(5):
        draw.line((7 + 4 * k, 40, 7 + 4 * k, 58), (130, 130, 130), 2)
    draw.line((40, 59, 110, 59), (140, 140, 140), 2)
    return img


@lru_cache(maxsize=8)
def _promo(variant: int) -> Image.Image:
    """A hanging tag on two strips, RGBA 130 x 170."""
    text, fill, ink = [
        ("-30%", (220, 20, 36), WHITE),
        ("2 for 1", (252, 214, 20), (200, 16, 30)),
        ("SALE", (20, 120, 70), WHITE),
        ("BIO", (120, 180, 40), WHITE),
    ][variant]
    img = Image.new("RGBA", (130, 170))
    draw = ImageDraw.Draw(img)
    draw.rectangle((62, 0, 68, 50), (225, 230, 235, 170))
    if variant % 2:
        draw.rounded_rectangle((6, 46, 124, 160), 12, (*fill, 255), (255, 255, 255, 255), 4)
    else:
        draw.ellipse((6, 44, 124, 162), (*fill, 255), (255, 255, 255, 255), 4)
    _word(img, text, (65, 98), (92, 40), ink, bold=0.07)
    _word(img, "this week", (65, 130), (70, 14), ink, bold=0.02)
    return img


@lru_cache(maxsize=8)
def _blob(strength: float) -> Image.Image:
    """A soft round mask, L 24 x 24."""
    y, x = np.mgrid[-1:1:24j, -1:1:24j]
    return Image.fromarray((255 * strength * np.clip(1 - np.hypot(x, y), 0, 1)).astype(np.uint8))


def _bays(rng: np.random.Generator, height: int, s: float) -> list[Bay]:
    """1 to 4 boards from above the photo downwards; s: canvas px per cm."""
    bays: list[Bay] = []
    floor = 0.0
    for k in range(4):
        clear = s * float(
            rng.choice([rng.uniform(15, 17.5), rng.uniform(22, 24.5), rng.uniform(25, 28)], p=[0.3, 0.25, 0.45])
        )
        ceiling, floor = (floor, floor + clear) if k else (-clear, clear * rng.uniform(0.3, 1.0))
        if not k:
            ceiling = floor - clear
        bays.append(Bay(ceiling, floor, s * (0.7 + 2.2 * min(1.0, floor / height))))
        floor += s * 4.0  # the rail
        if floor > height:
            break
    return bays


def _row(rng: np.random.Generator, bay: Bay, width: int, s: float, stock: float) -> Iterator[tuple[bool, Item]]:
    """Plan one board: runs of facings; yields (is in the second row, item)."""
    clear = (bay.floor - bay.ceiling) / s - 1.5
    fits = [k for k, p in enumerate(PRODUCTS) if p.cm[1] < clear and (p.stackable or p.cm[1] > 0.5 * clear)]
    odds = np.array([0.45 if PRODUCTS[k].stackable else 1.0 for k in fits])  # a stack is several items at once
    palette = list(rng.choice(fits, min(len(fits), int(rng.integers(3, 7))), replace=False, p=odds / odds.sum()))
    x, product = float(rng.uniform(-0.5, 0.1) * 10 * s), int(rng.choice(palette))
    while x < width:
        p = PRODUCTS[product]
        w, run = p.cm[0] * s, int(rng.integers(1, 7 if p.cm[0] < 10 else 5))
        pitch = w * rng.uniform(0.93, 1.09)
        high = min(3, int(clear / p.cm[1])) if p.stackable and rng.random() < 0.75 else 1
        back = rng.random() < 0.75
        sold = rng.random() < 0.08  # out of stock: nothing, or what is left of the second row
        for k in range(run):
            at = x + pitch * k + w / 2 + rng.normal(0, 0.03) * w
            here = not sold and rng.random() < stock
            if back and rng.random() < (0.9 if here else 0.3):
                yield (
                    True,
                    Item(
                        product,
                        at + rng.normal(0, 0.06) * w,
                        bay.floor - bay.depth * 0.85,
                        s * 0.93,
                        0.0,
                        float(rng.choice([0.5, 0.58, 0.66])),
                    ),
                )
            if here:
                yield from ((False, i) for i in _stand(rng, product, at, bay, s, high))
        if run > 1 and rng.random() < 0.16:  # a shopper put something back in front of the wrong product
            other = int(rng.choice(fits))
            at = x + pitch * rng.uniform(0.5, run - 0.5) + w / 2
            yield False, Item(other, at, bay.floor - 0.15 * s, s * 1.04, float(rng.normal(0, 2)), 1.04)
        x += pitch * run + s * (rng.uniform(0.1, 1.2) if rng.random() < 0.92 else rng.uniform(4, 12))
        near = _PARTNER.get(product)
        product = near if near is not None and rng.random() < 0.3 else int(rng.choice(palette))


def _stand(rng: np.random.Generator, product: int, x: float, bay: Bay, s: float, high: int) -> Iterator[Item]:
    p = PRODUCTS[product]
    y, light = bay.floor - bay.depth * rng.uniform(0.08, 0.3), float(rng.choice([0.92, 0.98, 1.04]))
    if p.shape != "bag" and p.cm[1] < 24 and rng.random() < 0.012:
        yield Item(product, x, y, s, float(rng.choice([-90, 90])) + rng.normal(0, 3), light)
        return
    for level in range(high if rng.random() < 0.85 else int(rng.integers(1, high + 1))):
        lean = float(rng.choice([0.0, rng.normal(0, 1.2), rng.normal(0, 5)], p=[0.7, 0.25, 0.05]))
        rise = level * p.cm[1] * s * 0.985
        yield Item(
            product,
            x + rng.normal(0, 0.015) * s * level * 8,
            y - rise,
            s,
            lean,
            light,
        )


class _Canvas:
    """The picture before the camera: colours, and which item is seen where."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.image = Image.new("RGB", size)
        self.ids = np.zeros((size[1], size[0]), np.uint8)
        self.placed: list[Placed] = []

    def shade(self, box: tuple[float, float, float, float], mask: Image.Image) -> None:
        """Darken a box through a mask stretched over it."""
        x0, y0, x1, y1 = (round(v) for v in box)
        if x1 > x0 and y1 > y0:
            self.image.paste((12, 10, 14), (x0, y0), mask.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR))

    def cover(self, piece: Image.Image, x: int, y: int, number: int) -> None:
        """Paste an RGBA piece and claim its pixels for item `number` (0: nobody's)."""
        self.image.paste(piece, (x, y), piece)
        x0, y0 = max(0, x), max(0, y)
        x1, y1 = min(self.image.width, x + piece.width), min(self.image.height, y + piece.height)
        if x1 > x0 and y1 > y0:
            solid = np.asarray(piece.getchannel("A"))[y0 - y : y1 - y, x0 - x : x1 - x] >= 128
            self.ids[y0:y1, x0:x1][solid] = number

    def add(self, item: Item, width: int) -> None:
        """Paste an item with its contact shadow."""
        turn = int(np.clip(round((0.5 - item.x / width) * 5), -2, 2))
        sprite = _scaled(item.product, turn, item.scale, item.light)
        if item.lean:
            sprite = sprite.rotate(item.lean, Image.Resampling.BILINEAR, expand=True)
            sprite = sprite.crop(sprite.getchannel("A").point([0] * 128 + [255] * 128).getbbox())
        (w, h), s = sprite.size, item.scale
        x, y = round(item.x - w / 2), round(item.y - h)
        self.shade((x - 0.5 * s, item.y - 0.7 * s, x + w + 0.9 * s, item.y + 0.55 * s), _blob(0.8))
        self.shade((x + 0.15 * w, y, x + w + 1.4 * s, item.y), _blob(0.35))  # cast on what stands behind
        pixels = int((np.asarray(sprite.getchannel("A")) >= 128).sum())
        self.placed.append(Placed(item.product, pixels, (x, y, x + w, y + h)))
        self.cover(sprite, x, y, len(self.placed))


_STYLES: tuple[tuple[RGB, RGB, RGB], ...] = (  # back panel, board, rail
    ((206, 206, 202), (226, 226, 222), (196, 200, 204)),
    ((176, 180, 184), (214, 214, 212), (196, 30, 40)),
    ((196, 186, 168), (190, 150, 108), (110, 76, 48)),
    ((120, 124, 130), (150, 152, 156), (40, 44, 50)),
    ((214, 214, 216), (236, 236, 236), (30, 92, 170)),
    ((188, 196, 190), (222, 224, 220), (44, 128, 76)),
    ((74, 76, 82), (98, 100, 104), (232, 232, 230)),
)


def _back_panel(canvas: _Canvas, bay: Bay, colour: RGB, s: float, rng: np.random.Generator, holes: bool) -> None:
    w = canvas.image.width
    top, h = round(bay.ceiling), max(2, round(bay.floor - bay.ceiling))
    img = _gradient(w, h, _mix(colour, BLACK, 0.3), _mix(colour, BLACK, 0.1))
    draw = ImageDraw.Draw(img)
    if holes:
        step, q = 2.5 * s, max(1.0, 0.28 * s)
        for y in np.arange(step / 2, h, step):
            for x in np.arange(step / 2, w, step):
                draw.ellipse((x - q, y - q, x + q, y + q), _mix(colour, BLACK, 0.5))
    post = float(rng.uniform(0, 90)) * s
    while post < w:  # slotted uprights
        draw.rectangle((post, 0, post + 2.6 * s, h), _mix(colour, BLACK, 0.18), _mix(colour, BLACK, 0.4))
        for y in np.arange(0, h, 2.2 * s):
            draw.rectangle((post + 1.05 * s, y, post + 1.55 * s, y + 1.2 * s), _mix(colour, BLACK, 0.75))
        post += 95 * s
    canvas.image.paste(img, (0, top))


def _board(canvas: _Canvas, bay: Bay, board: RGB, rail: RGB, s: float) -> None:
    w = canvas.image.width
    f, d = round(bay.floor), max(2, round(bay.depth))
    canvas.image.paste(_gradient(w, d, _mix(board, BLACK, 0.5), _mix(board, BLACK, 0.06)), (0, f - d))
    rail_h = max(4, round(4.0 * s))
    face = _gradient(w, rail_h, _mix(rail, WHITE, 0.18), _mix(rail, BLACK, 0.25))
    draw = ImageDraw.Draw(face)
    draw.rectangle((0, 0, w, max(1, 0.35 * s)), _mix(board, WHITE, 0.35))
    draw.rectangle((0, 0.45 * s, w, 0.6 * s), _mix(rail, BLACK, 0.45))
    draw.rectangle((0, rail_h - 0.4 * s, w, rail_h), _mix(rail, BLACK, 0.5))
    canvas.image.paste(face, (0, f))


def _tags(canvas: _Canvas, bay: Bay, items: list[Item], s: float, rng: np.random.Generator) -> None:
    """A price under each run of a product, at its first facing or in its middle."""
    size = (max(6, round(5.4 * s)), max(4, round(3.0 * s)))
    last = -np.inf
    for _, run in groupby(items, key=lambda i: i.product):
        xs = [i.x for i in run]
        x = xs[0] if rng.random() < 0.5 else sum(xs) / len(xs)
        if x - last < size[0]:
            continue
        last = x
        tag = _price_tag(int(rng.integers(0, 40))).resize(size, Image.Resampling.BOX, reducing_gap=2.0)
        canvas.image.paste(tag, (round(x - size[0] / 2), round(bay.floor + 0.7 * s)))


@lru_cache(maxsize=8)
def _fall(strength: float) -> Image.Image:
    """A mask that fades from `strength` at the top to nothing."""
    return Image.fromarray((255 * strength * np.linspace(1, 0, 64)[:, None] ** 1.6).astype(np.uint8).repeat(4, axis=1))


def _plan(rng: np.random.Generator, size: tuple[int, int], s: float, stock: float) -> tuple[list[Bay], list[Plan]]:
    bays = _bays(rng, size[1], s)
    return bays, [list(_row(rng, bay, size[0], s, stock)) for bay in bays]


def _in_photo(item: Item, size: tuple[int, int]) -> bool:
    """Whether an item's middle falls in the photo, before roll and perspective."""
    edge, y = (1 - 1 / MARGIN) / 2, item.y - PRODUCTS[item.product].cm[1] * item.scale / 2
    return edge < item.x / size[0] < 1 - edge and edge < y / size[1] < 1 - edge


def _draw_shelf(rng: np.random.Generator, size: tuple[int, int]) -> _Canvas:
    """Everything in front of the camera, on a canvas larger than the photo."""
    width, height = round(size[0] * ZOOM * MARGIN), round(size[1] * ZOOM * MARGIN)
    unit = ZOOM * min(size[0] / 640, size[1] / 480)
    s = unit * exp(rng.uniform(log(4.7), log(9.5)))
    panel, board, rail = _STYLES[int(rng.integers(0, len(_STYLES)))]
    holes, lit = rng.random() < 0.35, rng.random() < 0.35
    stock = float(rng.choice([1.0, 0.97, 0.9, 0.7, 0.35], p=[0.3, 0.3, 0.2, 0.12, 0.08]))
    bays, plans = _plan(rng, (width, height), s, stock)
    while sum(_in_photo(i, (width, height)) for plan in plans for back, i in plan if not back) > MAX_ITEMS - 4:
        s *= 1.06  # too many: step closer
        bays, plans = _plan(rng, (width, height), s, stock)
    canvas = _Canvas((width, height))
    canvas.image.paste(_gradient(width, height, _mix(panel, BLACK, 0.55), _mix(panel, BLACK, 0.75)))
    for bay, plan in zip(bays, plans, strict=True):
        _back_panel(canvas, bay, panel, s, rng, holes)
        _board(canvas, bay, board, rail, s)
        canvas.shade((0, bay.ceiling, width, bay.ceiling + 15 * s), _fall(0.2 if lit else 0.6))
        _tags(canvas, bay, [i for back, i in plan if not back], s, rng)
        for item in (i for back in (True, False) for b, i in plan if b == back):
            if item.y - 30 * s < height and item.x - 8 * s < width and len(canvas.placed) < 255:  # ids are bytes
                canvas.add(item, width)
        canvas.shade((0, bay.ceiling, width, bay.ceiling + 11 * s), _fall(0.1 if lit else 0.36))
    for bay in bays[:-1]:
        if rng.random() < 0.45:
            tag = _promo(int(rng.integers(0, 4))).resize((round(8 * s), round(10.5 * s)), Image.Resampling.BOX)
            tag = tag.rotate(rng.normal(0, 4), Image.Resampling.BICUBIC)
            canvas.cover(tag, round(rng.uniform(0.1, 0.9) * width), round(bay.floor + 3.4 * s), 0)
    return canvas


# ----------------------------------------------------------------------------------------------------------- the camera


def _camera(rng: np.random.Generator, size: tuple[int, int]) -> list[Point]:
    """Where the photo's corners fall on the canvas: a roll of a degree or two and mild keystone."""
    w, h = size
    roll, kx, ky = rng.normal(0, 0.014), rng.normal(0, 0.014), rng.normal(0, 0.014)
    roll, kx, ky = (float(np.clip(v, -0.035, 0.035)) for v in (roll, kx, ky))
    corners = []
    for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
        x, y = sx * w / 2 * (1 + kx * sy), sy * h / 2 * (1 + ky * sx)
        x, y = x * cos(roll) - y * sin(roll), x * sin(roll) + y * cos(roll)
        corners.append((ZOOM * (x + w * MARGIN / 2), ZOOM * (y + h * MARGIN / 2)))
    return corners


@lru_cache(maxsize=2)
def _grain(size: tuple[int, int]) -> Array:
    """Sensor noise float32 [H + 64, W + 64, 3], drawn once; each photo takes a window of it."""
    rng = np.random.default_rng(1)
    luma = rng.standard_normal((size[1] + 65, size[0] + 65, 1), np.float32)
    noise = luma * 0.85 + rng.standard_normal((*luma.shape[:2], 3), np.float32) * 0.45
    noise = noise[1:] + 0.7 * noise[:-1]  # a camera's demosaicing blurs the grain
    noise = noise[:, 1:] + 0.7 * noise[:, :-1]
    return np.asarray(noise / noise.std())


def _develop(rng: np.random.Generator, photo: Image.Image) -> Image.Image:
    """Light, lens and sensor: blur, white balance, exposure, vignette, glare, noise."""
    w, h = photo.size
    blur = rng.choice(["none", "soft", "soft", "motion"], p=[0.35, 0.3, 0.2, 0.15])
    if blur == "soft":
        photo = photo.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    elif blur == "motion":
        dx = int(rng.integers(1, 3))
        shifted = ImageChops.offset(photo, dx, int(rng.integers(0, 2)))
        photo = Image.blend(photo, shifted, 0.5)
    warm = rng.normal(0, 0.07)
    gains = np.array([1 + warm, 1 + rng.normal(0, 0.015), 1 - 1.2 * warm]) * exp(rng.normal(0.10, 0.16))
    gamma, t = exp(rng.normal(0, 0.08)), np.linspace(0, 1, 256)
    lut: list[int] = []
    for gain in gains:
        v = (t * gain) ** gamma
        v = np.where(v > 0.8, 0.8 + 0.2 * np.tanh((v - 0.8) / 0.2), v)  # highlights roll off, they do not clip
        lut += [int(k) for k in np.clip(255 * v, 0, 255)]
    x = np.linspace(-1, 1, w, dtype=np.float32)[None]
    y = np.linspace(-1, 1, h, dtype=np.float32)[:, None]
    side = rng.normal(0, 0.10, 2)
    gain_map = 1 - rng.uniform(0.05, 0.32) * (x * x + y * y) / 1.6 + np.float32(side[0]) * x + np.float32(side[1]) * y
    pixels = np.asarray(photo.point(lut), np.float32) * gain_map[..., None]
    if rng.random() < 0.3:
        gx, gy, r = rng.uniform(-1, 1), rng.uniform(-1, 0.4), rng.uniform(0.15, 0.5)
        glare = np.exp(-((x - gx) ** 2 + ((y - gy) * rng.uniform(0.6, 2.0)) ** 2) / r**2) * rng.uniform(30, 110)
        pixels += glare[..., None].astype(np.float32) * np.array([1, 0.98, 0.92], np.float32)
    oy, ox = rng.integers(0, 64, 2)
    pixels += _grain(photo.size)[oy : oy + h, ox : ox + w] * np.float32(rng.uniform(0.8, 3.6))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _annotate(
    canvas: _Canvas, corners: list[Point], size: tuple[int, int]
) -> tuple[Array, list[tuple[int, Array, int]]]:
    """The photo's id mask uint8 [H, W], and (number, box, flags) of each item that is visible enough."""
    w, h = size
    rect = [(0.0, 0.0), (float(w), 0.0), (float(w), float(h)), (0.0, float(h))]
    a, b, c, d, e, f, g, k = _homography(rect, corners)
    forth = np.array([[a, b, c], [d, e, f], [g, k, 1]])
    back = np.linalg.inv(forth)
    flat = Image.fromarray(canvas.ids)
    ids = np.asarray(
        flat.transform(size, Image.Transform.PERSPECTIVE, [a, b, c, d, e, f, g, k], Image.Resampling.NEAREST)
    )
    found = []
    for number, item in enumerate(canvas.placed, 1):
        x0, y0, x1, y1 = item.rect
        quad = back @ np.array([[x0, x1, x1, x0], [y0, y0, y1, y1], [1, 1, 1, 1]])
        px, py = quad[:2] / quad[2]
        lo_x, lo_y = max(0, int(px.min()) - 2), max(0, int(py.min()) - 2)
        ys, xs = np.nonzero(ids[lo_y : max(0, int(py.max()) + 3), lo_x : max(0, int(px.max()) + 3)] == number)
        if not len(ys):
            continue
        # Canvas px per photo px at the item: the homography's Jacobian.
        area = abs(np.linalg.det(forth)) / (g * px.mean() + k * py.mean() + 1) ** 3
        seen = len(ys) * area / item.pixels
        if seen < MIN_VISIBLE:
            continue
        box = np.array([xs.min() + lo_x, ys.min() + lo_y, xs.max() + lo_x + 1, ys.max() + lo_y + 1])
        beyond = px.min() < -1 or py.min() < -1 or px.max() > w + 1 or py.max() > h + 1
        cut = beyond and (box[0] == 0 or box[1] == 0 or box[2] == w or box[3] == h)
        flat_seen = (canvas.ids[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)] == number).sum()
        inside = max(1, (min(x1, flat.width) - max(0, x0)) * (min(y1, flat.height) - max(0, y0))) / (
            (x1 - x0) * (y1 - y0)
        )
        hidden = flat_seen / (item.pixels * inside)
        hard = seen < DIFFICULT_BELOW or min(box[2] - box[0], box[3] - box[1]) < SMALL_SIDE
        flags = TRUNCATED * bool(cut) | OCCLUDED * bool(hidden < OCCLUDED_BELOW) | DIFFICULT * bool(hard)
        found.append((number, box, flags))
    return ids, found


def render(seed: int, index: int, size: tuple[int, int] = (640, 480)) -> Scene:
    """Photo `index` of `seed` with its truth; size is (width, height). The same arguments give the same pixels."""
    for attempt in range(100):
        rng = np.random.default_rng((seed, index, attempt))
        canvas = _draw_shelf(rng, size)
        corners = _camera(rng, size)
        ids, found = _annotate(canvas, corners, size)
        if 3 <= len(found) <= MAX_ITEMS:
            break
    w, h = size
    coeffs = _homography([(0, 0), (w, 0), (w, h), (0, h)], corners)
    photo = canvas.image.transform(size, Image.Transform.PERSPECTIVE, coeffs, Image.Resampling.BILINEAR)
    boxes = np.array([b for _, b, _ in found]).reshape(-1, 4)
    labels = [canvas.placed[n - 1].product for n, _, _ in found]
    return Scene(_develop(rng, photo), ids, boxes, labels, [f for _, _, f in found], [n for n, _, _ in found])


# ------------------------------------------------------------------------------------------------------------ the files


class Drawn(NamedTuple):
    """A photo to write: the JPEG file's content, (height, width), and what `formats.voc_xml` takes of its objects."""

    jpeg: bytes
    hw: tuple[int, int]
    boxes: Array
    names: list[str]
    flags: list[int]


def _draw(seed: int, size: tuple[int, int], index: int) -> Drawn:
    scene, jpeg = render(seed, index, size), io.BytesIO()
    scene.image.save(jpeg, "JPEG", quality=86, optimize=True)
    return Drawn(jpeg.getvalue(), size[::-1], scene.boxes, [CLASSES[k] for k in scene.labels], scene.flags)


def _write(root: Path, prefix: str, draw: Callable[[int], Drawn], index: int) -> None:
    name, drawn = f"{prefix}_{index:05d}", draw(index)
    (root / "JPEGImages" / f"{name}.jpg").write_bytes(drawn.jpeg)
    xml = voc_xml(f"{name}.jpg", drawn.hw, drawn.boxes.astype(np.float64), drawn.names, drawn.flags)
    (root / "Annotations" / f"{name}.xml").write_text(xml, encoding="utf-8", newline="\n")


def pooled(
    job: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Result]:
    """The job's result for each task, in order, by `workers` processes (0: one per CPU; 1: this one).

    job, tasks: can be pickled. progress: called with (done, total) after each.
    """
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    with ExitStack() as stack:
        results: Iterator[Result] = map(job, tasks)
        if workers > 1:
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
            stack.callback(pool.shutdown, cancel_futures=True)  # when stopped, what is left is not drawn first
            results = pool.map(job, tasks, chunksize=4)
        for done, result in enumerate(results, 1):
            if progress:
                progress(done, len(tasks))
            yield result


def write_set(
    out: Path,
    draw: Callable[[int], Drawn],
    classes: Sequence[str],
    *,
    prefix: str,
    train: int,
    val: int,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a Pascal-VOC data set of the photos draw(0), draw(1), ... to `out`, which must not hold anything yet.

    draw: can be pickled, and depends on the number alone, so the bytes don't depend on `workers`. prefix: of the
    photos' names. progress: called with (done, total). `out` appears whole or not at all. Raises UserError.
    """
    names = [f"{prefix}_{k:05d}" for k in range(train + val)]
    with whole_folder(out) as temp:
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (temp / folder).mkdir(parents=True)
        for _ in pooled(partial(_write, temp, prefix, draw), range(len(names)), workers, progress):
            pass
        for path, lines in (
            ("ImageSets/Main/train.txt", names[:train]),
            ("ImageSets/Main/val.txt", names[train:]),
            ("classes.txt", classes),
        ):
            (temp / path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def synthesise(
    out: Path,
    *,
    train: int = 400,
    val: int = 100,
    size: tuple[int, int] = (640, 480),
    seed: int = 0,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a Pascal-VOC data set of shelf photos to `out`, which must not hold anything yet.

    size: (width, height) in px; workers: processes, 0 for one per CPU (the bytes don't depend on it); progress: called
    with (done, total). `out` appears whole or not at all.
    """
    draw = partial(_draw, seed, size)
    write_set(Path(out), draw, CLASSES, prefix="shelf", train=train, val=val, workers=workers, progress=progress)
