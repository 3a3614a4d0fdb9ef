"""``detkit verify``: whether an exported file finds, here, what it found where it was exported. No torch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from detkit import geometry
from detkit.errors import UserError
from detkit.manifest import Golden, Manifest, Precision
from detkit.runtime.session import Session
from detkit.types import Detections


class Tolerance(NamedTuple):
    """Two detections are one from the IoU `iou` on, where their scores differ by `score` at most."""

    iou: float
    score: float


# Rounding differs from processor to processor: the more, the coarser the numbers. GPUs multiply fp32 as TF32, which has
# the 10 bits of fp16.
TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(0.99, 1e-3),
    "fp16": Tolerance(0.95, 0.02),
    "int8": Tolerance(0.9, 0.05),
}


MOST = 20  # detections of a golden photo that are kept


def scene(seed: int, hw: tuple[int, int]) -> NDArray[np.uint8]:
    """A made-up photo, uint8 [h, w, 3]: packages with labels before a soft wall. The same bytes everywhere.

    Python's `random.random` gives the same numbers in every version, and the rest is integers.
    """
    draw = random.Random(seed)

    def number(low: int, high: int) -> int:
        return low + int(draw.random() * (high - low))

    def colour(low: int = 0, high: int = 256) -> NDArray[np.int64]:
        return np.array([number(low, high) for _ in range(3)])

    height, width = hw
    top, bottom = colour(90, 230), colour(60, 200)
    down = np.arange(height)[:, None, None]
    image = np.repeat(top + (bottom - top) * down // height, width, axis=1)
    rows, columns = np.ogrid[:height, :width]
    for _ in range(number(4, 12)):
        h, w = number(height // 6, height // 2) + 1, number(width // 8, width // 2) + 1
        y, x = number(-h // 4, height - h // 2), number(-w // 4, width - w // 2)
        body, label, ink = colour(), colour(120), colour(0, 120)
        oval, stripes = draw.random() < 0.4, number(2, 6)
        inside = (rows >= y) & (rows < y + h) & (columns >= x) & (columns < x + w)
        if oval:
            inside = (((2 * (rows - y) - h) * w) ** 2 + ((2 * (columns - x) - w) * h) ** 2) <= (h * w) ** 2
        shade = 160 + 96 * (columns - x).clip(0, w) // w
        image = np.where(inside[..., None], body * shade[..., None] // 256, image)
        band = inside & (rows >= y + h // 3) & (rows < y + 2 * h // 3)
        image = np.where(band[..., None], label, image)
        written = band & (((rows - y) * stripes * 2 // h) % 2 == 1) & (((columns - x) * 3 * stripes // w) % 3 != 0)
        image = np.where(written[..., None], ink, image)
    return image.clip(0, 255).astype(np.uint8)


class Difference(NamedTuple):
    """How what was found differs from what should be. lost: detections that are not there. more: those that should not
    be. box, score: the largest differences of the others, in pixels of the photo and as such."""

    lost: int
    more: int
    box: float
    score: float


def compare(found: Detections, golden: Golden, tolerance: Tolerance) -> Difference:
    """What was found in a golden photo beside what should be. It holds the best only, so what is no better than its
    last is not looked at."""
    boxes = np.array(golden.boxes, np.float64).reshape(-1, 4)
    scores, labels = np.array(golden.scores), np.array(golden.labels, np.int64)
    same = geometry.iou(boxes, found.boxes.astype(np.float64)) * (labels[:, None] == found.labels)
    gaps = np.abs(scores[:, None] - found.scores)
    same[gaps > tolerance.score] = 0
    pairs = same >= tolerance.iou
    lost = int((~pairs.any(1)).sum())
    sure = found.scores > scores.min(initial=1) + tolerance.score
    more = int((sure & ~pairs.any(0)).sum())
    mine = np.flatnonzero(pairs.any(1))
    partners = same[mine].argmax(1) if len(mine) else mine
    box = np.abs(boxes[mine] - found.boxes[partners]).max(initial=0)
    return Difference(lost, more, float(box), float(gaps[mine, partners].max(initial=0)))


def run(path: Path, device: str, threads: int, console: Console) -> bool:
    """Repeat the golden photos of the file and print how far each is off. Returns whether all is as it should be.

    Raises UserError as Session does, and where the file has no golden photos.
    """
    session = Session(path, device=device, threads=threads)
    manifest = session.manifest
    if not manifest.golden:
        raise UserError(
            f"{path}: holds no golden photos to repeat (exported by detkit {manifest.detkit}); export it again"
        )
    tolerance = _tolerance(manifest, session.device)
    table = Table("made-up photo", title=escape(_title(path, manifest)), title_justify="left")
    for name in ("detections", "lost", "more", "boxes, px", "scores", ""):
        table.add_column(name, justify="right")
    right = True
    for golden in manifest.golden:
        (found,) = session.detect([scene(golden.seed, golden.size)])
        off = compare(found, golden, tolerance)
        good = not off.lost and not off.more
        right &= good
        height, width = golden.size
        table.add_row(
            f"{golden.seed}: {width} x {height}",
            str(len(golden.scores)),
            str(off.lost),
            str(off.more),
            f"{off.box:.2g}",
            f"{off.score:.2g}",
            "same" if good else "[red]differs[/red]",
        )
    console.print(table)
    said = "finds here" if right else "does NOT find here"
    console.print(
        f"{path} {said}, on {session.device}, what it found where it was exported "
        f"(IoU {tolerance.iou}, scores to {tolerance.score:g})",
        highlight=False,
        markup=False,
    )
    return right


def _title(path: Path, manifest: Manifest) -> str:
    what = f"{manifest.name}, {manifest.input} input, {manifest.precision}, {len(manifest.classes)} classes"
    return f"{path.name}: {what}, detkit {manifest.detkit}"


def _tolerance(manifest: Manifest, device: str) -> Tolerance:
    own, coarse = TOLERANCES[manifest.precision], TOLERANCES["fp16"]
    if device == "cpu" or own.iou < coarse.iou:
        return own
    return coarse


def golden(seed: int, found: Detections, floor: float) -> Golden:
    """What to expect in the scene of that seed, of a photo's size: the best of what was found there, above `floor`."""
    best = found.above(floor)
    height, width = found.hw
    return Golden(
        seed=seed,
        size=(height, width),
        boxes=tuple(tuple(round(float(side), 3) for side in box) for box in best.boxes[:MOST]),
        scores=tuple(round(float(score), 6) for score in best.scores[:MOST]),
        labels=tuple(int(label) for label in best.labels[:MOST]),
    )
