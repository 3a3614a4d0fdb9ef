"""Small data sets for tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detkit.formats import voc_xml

Object = tuple[str, tuple[float, float, float, float]]
CAN: Object = ("can", (2.0, 3.0, 20.0, 30.0))
BOX: Object = ("box", (10.5, 4.25, 60.0, 40.0))


def save_image(path: Path, hw: tuple[int, int] = (48, 64), seed: int = 0, **options: object) -> Path:
    """A photo of smooth noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(hw[::-1], Image.Resampling.BICUBIC).save(path, **options)
    return path


def save_xml(path: Path, objects: Sequence[Object], hw: tuple[int, int] = (48, 64), flags: Sequence[int] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    boxes = np.array([box for _, box in objects]).reshape(-1, 4)
    names = [name for name, _ in objects]
    path.write_text(voc_xml(path.stem + ".jpg", hw, boxes, names, flags or None), encoding="utf-8")
    return path


def make_voc(root: Path, train: int = 4, val: int = 2, hw: tuple[int, int] = (48, 64)) -> Path:
    """A data set in VOC's layout, with two objects a photo; photos p0, p1, ..., those of 'train' first."""
    for index in range(train + val):
        save_image(root / "JPEGImages" / f"p{index}.jpg", hw, index)
        save_xml(root / "Annotations" / f"p{index}.xml", [CAN, BOX], hw)
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    names = [f"p{index}\n" for index in range(train + val)]
    (lists / "train.txt").write_text("".join(names[:train]))
    (lists / "val.txt").write_text("".join(names[train:]))
    return root


# Colours that differ from one another and from the grey of `marked_image` by at least 127 in some channel.
MARKS = np.array(
    [
        [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0],
        [0, 255, 255], [255, 0, 255], [0, 0, 0], [255, 255, 255],
    ],
    np.uint8,
)  # fmt: skip


def marked_image(
    hw: tuple[int, int], boxes: Sequence[Sequence[float]], labels: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.uint8]:
    """A grey image, uint8 [*hw, 3], with a rectangle in the label's colour for each box, x1 y1 x2 y2 in pixels."""
    image = np.full((*hw, 3), 128, np.uint8)
    for label, box in zip(labels, boxes, strict=True):
        x1, y1, x2, y2 = (int(edge) for edge in box)
        image[y1:y2, x1:x2] = MARKS[label]
    return image


def seen(image: NDArray[np.uint8], label: int) -> list[int] | None:
    """Where the mark of that label is in the image: x1 y1 x2 y2 of the pixels mostly of its colour, or None."""
    near = np.abs(image.astype(int) - MARKS[label]).max(2) <= 64
    ys, xs = np.nonzero(near)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1] if len(xs) else None
