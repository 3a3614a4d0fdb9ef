"""Contact sheets: photos with their annotations, as they are or as training sees them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from annotated_types import Le
from numpy.typing import NDArray
from PIL import Image

from detkit import imaging
from detkit.config import Augment, Config
from detkit.data.labels import DataSet
from detkit.errors import UserError, nearest
from detkit.files import atomic_write
from detkit.runtime import render
from detkit.types import Detections

WIDTH = 1920  # pixels: of a sheet whose rows are full
_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


def choose(dataset: DataSet, count: int, class_name: str | None, seed: int) -> list[int]:
    """The places of `count` photos drawn at random, or of all where there are fewer, in the data set's order.

    class_name: only photos that show it. Raises UserError where there is no such class, or no photo of it.
    """
    index = np.arange(len(dataset))
    if class_name is not None:
        if class_name not in dataset.classes:
            raise UserError(f"--class {class_name}: no such class{nearest(class_name, dataset.classes)}")
        photo = np.repeat(index, np.diff(dataset.box_ends, prepend=0))
        index = np.unique(photo[dataset.labels == dataset.classes.index(class_name)])
        if not len(index):
            raise UserError(f"--class {class_name}: no photo of this split shows it")
    chosen = np.random.default_rng(seed).choice(index, min(count, len(index)), replace=False)
    return sorted(chosen.tolist())


def probabilities() -> tuple[str, ...]:
    """The settings of `Augment` that say how likely a change is."""
    fields = Augment.model_fields.items()
    return tuple(name for name, field in fields if any(isinstance(bound, Le) for bound in field.metadata))


def only(settings: Augment, name: str) -> Augment:
    """The settings with one change in every sample and no other. Raises UserError where there is none of that name."""
    known = probabilities()
    if name not in known:
        raise UserError(f"--only {name}: no such change{nearest(name, known)}; there are: {', '.join(known)}")
    return settings.model_copy(update=dict.fromkeys(known, 0.0) | {name: 1.0})


def photos(
    dataset: DataSet, index: list[int], side: int, progress: Callable[[int, int], None] | None = None
) -> list[NDArray[np.uint8]]:
    """Those photos with their boxes and class names, each uint8 [h, w, 3], the longer side `side` pixels.

    Raises UserError, naming the file, where one can't be decoded.
    """
    pictures = []
    for done, place in enumerate(index, 1):
        record = dataset[place]
        pictures.append(tile(imaging.decode(record.path), record.boxes, record.labels, dataset.classes, side))
        if progress:
            progress(done, len(index))
    return pictures


def samples(
    dataset: DataSet,
    index: list[int],
    side: int,
    config: Config,
    seed: int,
    change: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[NDArray[np.uint8]]:
    """`photos` as a training epoch with the config has them; with `change` alone, if given. Needs the extra 'train'."""
    from detkit.data.dataset import Key, TrainSet

    settings = only(config.augment, change) if change else config.augment
    source = TrainSet(dataset, config.input, settings, seed)
    pictures = []
    for done, place in enumerate(index, 1):
        sample = source[Key(0, place)]
        pictures.append(tile(sample.image, sample.boxes, sample.labels, dataset.classes, side))
        if progress:
            progress(done, len(index))
    return pictures


def tile(
    image: NDArray[np.uint8],
    boxes: NDArray[np.floating],
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
    side: int,
) -> NDArray[np.uint8]:
    """The image, uint8 [H, W, 3], with its longer side `side` pixels, and its boxes [G, 4] drawn with their names."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    hw = max(1, round(height * scale)), max(1, round(width * scale))
    small = np.asarray(Image.fromarray(image).resize(hw[::-1], Image.Resampling.LANCZOS))
    scaled = boxes * np.tile([hw[1] / width, hw[0] / height], 2)
    objects = Detections(scaled.astype(np.float32), np.ones(len(labels), np.float32), labels.astype(np.int64), hw)
    return render.draw(small, objects, classes, scores=False)


def file_format(path: Path) -> str:
    """Pillow's name of the format that the file's suffix asks for. Raises UserError for others than JPEG and PNG."""
    if path.suffix.lower() not in _FORMATS:
        raise UserError(f"{path}: name a .jpg or .png file")
    return _FORMATS[path.suffix.lower()]


def write(pictures: list[NDArray[np.uint8]], columns: int, path: Path) -> None:
    """Write the pictures as one, in rows of `columns`, which are WIDTH pixels wide where they are full.

    Raises UserError where it can't be written.
    """
    kind = file_format(path)
    buffer = io.BytesIO()
    sheet = render.contact_sheet(pictures, columns, WIDTH * min(columns, len(pictures)) // columns)
    Image.fromarray(sheet).save(buffer, kind, quality=88)
    atomic_write(path, buffer.getvalue())
