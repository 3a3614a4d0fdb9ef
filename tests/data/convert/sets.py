"""Data sets for the converters' tests."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from detkit.data import convert
from detkit.data.labels import Annotation, Photo
from detkit.errors import UserError
from tests.data.photos import save_image

Row = tuple[str, tuple[float, float, float, float], int]
CLASSES = ("can", "box", "Käse 'n' <Brot> & \"mehr\", süß")


def annotation(rows: Sequence[Row], hw: tuple[int, int] | None = (48, 64), filename: str = "") -> Annotation:
    names = tuple(name for name, _, _ in rows)
    boxes = np.array([box for _, box, _ in rows], np.float64).reshape(-1, 4)
    flags = np.array([flag for _, _, flag in rows], np.uint8)
    return Annotation(filename, hw, names, boxes, flags, np.zeros(len(rows), np.int32))


def rows(photo: Photo) -> list[Row]:
    assert photo.annotation is not None
    found = photo.annotation
    boxes = [(box[0], box[1], box[2], box[3]) for box in found.boxes.tolist()]
    return list(zip(found.names, boxes, found.flags.tolist(), strict=True))


def make(root: Path, photos: dict[str, Sequence[Row] | None], hw: tuple[int, int] = (48, 64)) -> list[Photo]:
    """Photos on disk, by their name below the root, and what is known of each."""
    for seed, name in enumerate(photos):
        if not (root / name).exists():
            save_image(root / name, hw, seed)
    return [Photo(name, "", None if known is None else annotation(known, hw)) for name, known in photos.items()]


def by_name(photos: Sequence[Photo]) -> dict[str, list[Row]]:
    """The objects of each photo that is annotated, by the photo's own name."""
    return {Path(photo.image).name: rows(photo) for photo in photos if photo.annotation is not None}


def put(path: Path, content: object) -> Path:
    """A file of that text, bytes, or else JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    return path


def refusal(format_name: str, root: Path, split: str | None = None) -> str:
    """The one line that reading gives."""
    with pytest.raises(UserError) as caught:
        convert.read(format_name, root, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def kinds(found: Sequence[object]) -> list[str]:
    return [finding.kind for finding in found]  # type: ignore[attr-defined]
