"""LabelMe: a JSON file a photo, beside it; `shapes` are rectangles, polygons, circles and so on, in pixels."""

from __future__ import annotations

import json
import posixpath
from math import hypot
from typing import Any

import numpy as np

from detkit.data.convert.common import (
    FLAGS,
    Objects,
    Plan,
    Progress,
    Tally,
    Tree,
    class_name,
    finite,
    load_json,
    outline,
    refuse,
    shown,
)
from detkit.data.findings import Finding
from detkit.data.labels import Annotation, Photo, Source, stated_size
from detkit.errors import UserError
from detkit.formats import number

_BOXED = {"polygon": "polygon", "linestrip": "line", "circle": "circle", "mask": "mask", "rotation": "turned rectangle"}
_BOXLESS = ("point", "points", "line")


def splits(tree: Tree) -> tuple[str, ...]:  # noqa: ARG001
    """None: LabelMe has no splits."""
    return ()


def read(tree: Tree, split: str | None, progress: Progress | None = None) -> Source:  # noqa: ARG001
    """Every photo of the folder, sorted by its annotation's name. Raises UserError."""
    findings: list[Finding] = []
    tally = Tally()
    photos = []
    files = tree.ending(".json")
    for done, file in enumerate(files, 1):
        document = load_json(tree.root / file)
        if isinstance(document, dict) and "shapes" in document:
            photos.append(_read(tree, file, document, findings, tally))
        if progress:
            progress(done, len(files))
    if not photos:
        raise UserError(f"{tree.root}: no LabelMe annotations here (.json with 'shapes')")
    photos += tree.images.unnamed(photos)
    names = {name for photo in photos if photo.annotation for name in photo.annotation.names}
    return Source(tuple(sorted(names)), photos, findings + tally.findings())


def _read(tree: Tree, file: str, document: dict[str, Any], findings: list[Finding], tally: Tally) -> Photo:
    path = tree.root / file
    folder, stem = posixpath.dirname(file), file[: -len(".json")]
    filename = document["imagePath"] if isinstance(document.get("imagePath"), str) else ""
    image = tree.images.find(posixpath.basename(stem), [folder], suffix=False)
    if posixpath.dirname(image) != folder or not image:
        image = tree.images.find(filename, [folder, "JPEGImages", "images"]) or image
    shapes = document["shapes"]
    if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
        refuse(path, "'shapes' is not a list of objects")
    objects = Objects()
    for index, shape in enumerate(shapes):
        where = f"shapes[{index}]"
        name = class_name(shape.get("label"))
        if not name:
            refuse(path, f"{where} has no label")
        kind = shape.get("shape_type") or ("polygon" if len(_points(path, where, shape)) > 2 else "rectangle")
        box = _box(path, where, shape, kind)
        if kind in _BOXLESS:
            what, action = f"{where}, {name}, is a {kind}", "left out: it has no area"
            findings.append(Finding("no box", file, what, action, 0, image, (box[0], box[1], box[2], box[3])))
            continue
        if kind in _BOXED:
            what, place = f"{where}, {name}, is a {_BOXED[kind]}", (box[0], box[1], box[2], box[3])
            findings.append(Finding("polygon", file, what, "the box round it is taken", 0, image, place))
        elif kind != "rectangle":
            refuse(path, f"{where} has the unknown shape_type {shown(kind)}")
        if shape.get("group_id") is not None:
            tally.add("not read", "objects have a group_id", "left out")
        objects.add(name, box, _flags(shape, tally))
    return Photo(
        image, file, objects.annotation(filename, stated_size(document.get("imageHeight"), document.get("imageWidth")))
    )


def _points(path: Any, where: str, shape: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    try:
        points = np.array([[finite(value) for value in point] for point in shape["points"]], np.float64)
        if not len(points) or points.shape[1:] != (2,):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        refuse(path, f"{where} has no list of points x, y")
    return points


def _box(path: Any, where: str, shape: dict[str, Any], kind: str) -> list[float]:
    points = _points(path, where, shape)
    if kind == "circle":  # centre, and a point on it
        if len(points) != 2:
            refuse(path, f"{where} is a circle of {len(points)} points, not 2")
        (x, y), (on_x, on_y) = points.tolist()
        radius = hypot(on_x - x, on_y - y)
        return [x - radius, y - radius, x + radius, y + radius]
    if kind == "rectangle" and len(points) not in (2, 4):
        refuse(path, f"{where} is a rectangle of {len(points)} points, not 2 or 4")
    return outline(points)


def _flags(shape: dict[str, Any], tally: Tally) -> int:
    """LabelMe's own flags of the names that detkit knows; X-AnyLabeling's `difficult`."""
    marks = shape.get("flags")
    marks = dict(marks) if isinstance(marks, dict) else {}
    if isinstance(shape.get("difficult"), bool):
        marks["difficult"] = marks.get("difficult") or shape["difficult"]
    unknown = sum(bool(value) for key, value in marks.items() if key not in FLAGS)
    if unknown:
        tally.add("not read", "flags other than difficult, truncated, occluded, crowd", "left out", count=unknown)
    return sum(bit for key, bit in FLAGS.items() if marks.get(key))


def photo(split: str, name: str) -> str:  # noqa: ARG001
    """Where the photo goes."""
    return name


def write(plan: Plan) -> None:
    """<name>.json beside each photo; the splits as lists in ImageSets/Main, which detkit reads; classes.txt."""
    for item, annotation in plan.in_lists():
        plan.save(f"{item.key}.json", _text(item.name, plan.size(item), annotation))
        inverted = int(np.any(annotation.boxes[:, 2:] < annotation.boxes[:, :2], axis=1).sum())
        action = "LabelMe takes corners in any order: they will be read the right way round"
        plan.tally.add("box inverted", "boxes", action, count=inverted)


def _text(name: str, size: tuple[int, int] | None, annotation: Annotation) -> str:
    shapes = []
    for label, box, flags in zip(annotation.names, annotation.boxes.tolist(), annotation.flags.tolist(), strict=True):
        x1, y1, x2, y2 = (number(value) for value in box)
        marks = ", ".join(f'"{key}": true' for key, bit in FLAGS.items() if flags & bit)
        shapes.append(
            f'{{"label": {json.dumps(label, ensure_ascii=False)}, "points": [[{x1}, {y1}], [{x2}, {y2}]], '
            f'"group_id": null, "description": "", "shape_type": "rectangle", "flags": {{{marks}}}}}'
        )
    image = json.dumps(posixpath.basename(name), ensure_ascii=False)
    height, width = size or ("null", "null")
    body = ",\n".join(shapes)
    return (
        f'{{\n"version": "5.5.0",\n"flags": {{}},\n"shapes": [\n{body}\n],\n"imagePath": {image},\n"imageData": null,\n'
        f'"imageHeight": {height},\n"imageWidth": {width}\n}}\n'
    )
