"""COCO JSON (object detection): images, annotations with `bbox` x y width height, categories by id."""

from __future__ import annotations

import json
import posixpath
import re
from typing import Any

import numpy as np

from detkit.data.convert.common import (
    FLAGS,
    Objects,
    Plan,
    Tally,
    Tree,
    class_name,
    extents,
    far_edges,
    finite,
    load_json,
    outline,
    refuse,
    shown,
)
from detkit.data.findings import Finding
from detkit.data.labels import Photo, Source, stated_size
from detkit.errors import UserError, nearest
from detkit.formats import number
from detkit.types import CROWD, DIFFICULT

_SINGLE = ("annotations", "_annotations.coco", "coco", "instances", "result", "labels", "default")  # no split's name
_ALIASES = {"val": ("valid", "validation"), "valid": ("val",), "validation": ("val",)}
_EXTRA = {"keypoints": "keypoints", "score": "scores", "caption": "captions"}


def _is_coco(tree: Tree, name: str) -> bool:
    """Whether the file looks like COCO: cheap, for a data set may hold other JSON as well."""
    try:
        raw = (tree.root / name).read_bytes()
    except OSError:
        return False
    return b'"images"' in raw and b'"categories"' in raw


def files(tree: Tree) -> dict[str, str]:
    """The annotation files by split; '' where there is only one and its name says none."""
    below = tree.ending(".json", folder="annotations")
    found = {re.sub(r"^instances_", "", posixpath.basename(name)[:-5]): name for name in below if "instances_" in name}
    if not found:
        nested = [name for name in tree.ending("_annotations.coco.json") if name.count("/") == 1]
        found = {posixpath.dirname(name): name for name in nested}
    if not found:
        found = {posixpath.basename(name)[:-5]: name for name in below if _is_coco(tree, name)}
    if not found:
        right_here = tree.ending(".json", folder="")
        found = {name[:-5]: name for name in right_here if _is_coco(tree, name)}
        found = {re.sub(r"^instances_", "", split): name for split, name in found.items()}
    if len(found) == 1 and next(iter(found)) in _SINGLE:
        return {"": next(iter(found.values()))}
    return found


def splits(tree: Tree) -> tuple[str, ...]:
    """The splits: one a file."""
    return tuple(split for split in files(tree) if split)


def _chosen(tree: Tree, split: str | None) -> dict[str, str]:
    if split is not None and split.lower().endswith(".json") and split in tree.files:
        return {"": split}
    found = files(tree)
    if not found:
        raise UserError(f"{tree.root}: no COCO annotations here (annotations/instances_<split>.json or another .json)")
    if split is None:
        return found
    names = (split, *_ALIASES.get(split, ()))
    starting = [name for name in found if name.startswith(names)]
    for name in (*names, *(starting if len(starting) == 1 else ())):
        if name in found:
            return {name: found[name]}
    raise UserError(f"{tree.root}: no split '{split}'{nearest(split, found)}; there are: {', '.join(sorted(found))}")


def read(tree: Tree, split: str | None) -> Source:
    """The photos that the split's file lists, in its order; a split may also be a file's path below the root.

    None: those of every file, and the photos beside them that none lists. Raises UserError.
    """
    photos: list[Photo] = []
    findings: list[Finding] = []
    classes: dict[str, None] = {}
    for name, file in _chosen(tree, split).items():
        found = _File(tree, file, name)
        photos += found.photos()
        findings += found.findings
        classes |= dict.fromkeys(found.classes)
    if split is None:
        photos += tree.images.unnamed(photos)
    return Source(tuple(classes), photos, findings)


class _File:
    """One COCO file."""

    def __init__(self, tree: Tree, file: str, split: str) -> None:
        self.tree, self.file, self.path = tree, file, tree.root / file
        self.near = [posixpath.dirname(file), f"images/{split}", split, f"{split}/images", "images", "JPEGImages"]
        self.findings: list[Finding] = []
        self.tally = Tally()
        document = load_json(self.path)
        if not isinstance(document, dict) or "images" not in document:
            refuse(self.path, "not COCO annotations: there is no list 'images' in it")
        self.labelled = "annotations" in document
        self.images = self._objects(document, "images")
        self.annotations = self._objects(document, "annotations") if self.labelled else []
        self.names = self._categories(self._objects(document, "categories") if self.labelled else [])
        self.classes = tuple(dict.fromkeys(self.names.values()))

    def _objects(self, document: dict[str, Any], key: str) -> list[dict[str, Any]]:
        found = document.get(key)
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            refuse(self.path, f"not COCO annotations: there is no list '{key}' of objects in it")
        return found

    def _categories(self, categories: list[dict[str, Any]]) -> dict[Any, str]:
        """The names by id, in the order of the ids."""
        found: dict[Any, str] = {}
        seen: set[str] = set()
        for index, category in enumerate(categories):
            name, known = class_name(category.get("name")), category.get("id")
            if not name or not isinstance(known, int | float | str):
                refuse(self.path, f"categories[{index}] has no name or id")
            if known in found:
                refuse(self.path, f"categories[{index}] has the id {shown(known)}, which another one has")
            if name in seen:
                what = f"category '{name}' stands under several ids"
                self.findings.append(Finding("class listed twice", self.file, what, "read as one class"))
            found[known] = name
            seen.add(name)
        return dict(sorted(found.items(), key=lambda item: (isinstance(item[0], str), item[0])))

    def photos(self) -> list[Photo]:
        """The file's images with their objects."""
        objects: dict[Any, Objects] = {}
        for index, image in enumerate(self.images):
            known = image.get("id")
            if not isinstance(known, int | float | str):
                refuse(self.path, f"images[{index}] has no id")
            if known in objects:
                refuse(self.path, f"images[{index}] has the id {shown(known)}, which another one has")
            if not isinstance(image.get("file_name"), str) or not image["file_name"]:
                refuse(self.path, f"images[{index}] (id {shown(known)}) has no file_name")
            objects[known] = Objects()
        self._read_objects(objects)
        photos = []
        for image in self.images:
            name = image["file_name"]
            found = None
            if self.labelled:
                found = objects[image["id"]].annotation(name, stated_size(image.get("height"), image.get("width")))
            photos.append(Photo(self.tree.images.find(name, self.near), self.file, found))
        self._say_unused()
        return photos

    def _read_objects(self, objects: dict[Any, Objects]) -> None:
        boxes = np.empty((len(self.annotations), 4), np.float64)
        for index, annotation in enumerate(self.annotations):
            try:
                boxes[index] = [finite(value) for value in annotation["bbox"]]
            except (KeyError, TypeError, ValueError):
                boxes[index] = self._masked(index, annotation)
        boxes[:, 2:] = far_edges(boxes[:, :2], boxes[:, 2:])
        for index, (annotation, box) in enumerate(zip(self.annotations, boxes.tolist(), strict=True)):
            self._add(index, annotation, box, objects)

    def _add(self, index: int, annotation: dict[str, Any], box: list[float], objects: dict[Any, Objects]) -> None:
        try:
            found, name = objects[annotation["image_id"]], self.names[annotation["category_id"]]
        except (KeyError, TypeError):
            where = f"annotations[{index}] (id {shown(annotation.get('id'))})"
            wanting = "image_id" if not _known(annotation.get("image_id"), objects) else "category_id"
            kind = {"image_id": "image", "category_id": "category"}[wanting]
            refuse(self.path, f"{where}: no {kind} has the id {shown(annotation.get(wanting))}")
        if annotation.get("segmentation"):
            self.tally.add("mask not read", "objects have a mask as well", "their bbox is taken", self.file)
        for key, what in _EXTRA.items():
            if annotation.get(key):
                self.tally.add("not read", f"objects have {what}", "left out", self.file)
        found.add(name, box, _flags(annotation))

    def _masked(self, index: int, annotation: dict[str, Any]) -> list[float]:
        """x y width height from the segmentation, where there is no usable bbox."""
        where = f"annotations[{index}] (id {shown(annotation.get('id'))})"
        if annotation.get("bbox"):
            refuse(self.path, f"{where}: its bbox is not four numbers")
        mask = annotation.get("segmentation")
        try:
            if isinstance(mask, dict):
                kind, box = "RLE mask", _rle_box(mask)
            elif isinstance(mask, list) and mask:
                points = [finite(value) for polygon in mask for value in polygon]
                if len(points) < 4 or any(len(polygon) % 2 for polygon in mask):
                    raise ValueError
                kind, box = "polygon", outline(np.array(points, np.float64).reshape(-1, 2))
            else:
                refuse(self.path, f"{where} has neither bbox nor segmentation")
        except (TypeError, ValueError, KeyError, OverflowError):
            refuse(self.path, f"{where} has no bbox, and its segmentation can't be read")
        what = f"{where} has only a {kind}"
        place = (box[0], box[1], box[2], box[3])
        self.findings.append(Finding("polygon", self.file, what, "the box round it is taken", box=place))
        near, far = np.array(box[:2]), np.array(box[2:])
        return [*near.tolist(), *extents(near, far).tolist()]

    def _say_unused(self) -> None:
        used = {annotation["category_id"] for annotation in self.annotations}
        unused = [name for known, name in self.names.items() if known not in used]
        if unused:
            more = ", ..." if len(unused) > 5 else ""
            what = f"{len(unused)} of {len(self.names)} categories have no object: {', '.join(unused[:5])}{more}"
            self.findings.append(Finding("unused category", self.file, what, "kept in the list of classes"))
        self.findings += self.tally.findings()


def _known(value: object, ids: dict[Any, Any]) -> bool:
    return isinstance(value, int | float | str) and value in ids


def _flags(annotation: dict[str, Any]) -> int:
    """iscrowd; ignore, which converters from VOC write for difficult; and attributes as CVAT has them."""
    flags = CROWD if annotation.get("iscrowd") else 0
    if annotation.get("ignore"):
        flags |= DIFFICULT
    attributes = annotation.get("attributes")
    if isinstance(attributes, dict):
        flags |= sum(bit for key, bit in FLAGS.items() if attributes.get(key) in (True, 1))
    return flags


def _rle_box(mask: dict[str, Any]) -> list[float]:
    """The box round a run-length encoded mask [h, w], column by column, zeros first; a zero box where it is empty.

    Not pycocotools' toBbox, which gives a box, beyond the image perhaps, for counts that don't fit the size.
    """
    height, width = (int(finite(side)) for side in mask["size"])
    counts = mask["counts"]
    runs = np.array(_unpacked(counts) if isinstance(counts, str) else [finite(n) for n in counts], np.int64)
    if height <= 0 or width <= 0 or np.any(runs < 0) or int(runs.sum()) != height * width:
        raise ValueError
    ends = np.cumsum(runs)
    first, last = ends[0::2][: len(ends[1::2])], ends[1::2] - 1
    first, last = first[first <= last], last[first <= last]
    if not len(first):
        return [0.0, 0.0, 0.0, 0.0]
    columns = np.concatenate([first // height, last // height])
    if np.any(first // height != last // height):  # a run over a column's end touches the first and the last row
        top, bottom = 0, height - 1
    else:
        top, bottom = int((first % height).min()), int((last % height).max())
    return [float(columns.min()), float(top), float(columns.max() + 1), float(bottom + 1)]


def _unpacked(text: str) -> list[int]:
    """COCO's compressed counts: 5 bits a character from the lowest, the 6th says that more follow; from the fourth
    number on each is the difference to the one two before."""
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError
    return counts


def photo(split: str, name: str) -> str:  # noqa: ARG001
    """Where the photo goes."""
    return f"images/{name}"


def write(plan: Plan) -> None:
    """annotations/instances_<split>.json for each split, a line an object."""
    for split, items in plan.splits.items():
        images: list[str] = []
        objects: list[str] = []
        listed = [(item, item.photo.annotation) for item in items if item.photo.annotation is not None]
        boxes = np.concatenate([np.empty((0, 4)), *(annotation.boxes for _, annotation in listed)])
        rows = iter(np.concatenate([boxes[:, :2], extents(boxes[:, :2], boxes[:, 2:])], 1).tolist())
        for known, (item, annotation) in enumerate(listed, 1):
            size = plan.size(item)
            sides = f'"width":{size[1]},"height":{size[0]},' if size else ""
            images.append(f'{{"id":{known},{sides}"file_name":{json.dumps(item.name, ensure_ascii=False)}}}')
            for name, flags in zip(annotation.names, annotation.flags.tolist(), strict=True):
                head = f'"id":{len(objects) + 1},"image_id":{known},"category_id":{plan.ids[name] + 1}'
                objects.append(f"{{{head},{_object(next(rows), flags)}}}")
        for _ in range(len(items) - len(listed)):
            plan.lose_unlabelled("COCO")
        categories = [
            f'{{"id":{known},"name":{json.dumps(name, ensure_ascii=False)},"supercategory":""}}'
            for known, name in enumerate(plan.classes, 1)
        ]
        parts = (("images", images), ("annotations", objects), ("categories", categories))
        body = ",\n".join(f'"{key}": [\n' + ",\n".join(lines) + "\n]" for key, lines in parts)
        plan.save(f"annotations/instances_{split or 'train'}.json", f'{{\n"info": {{}},\n{body}\n}}\n')


def _object(row: list[float], flags: int) -> str:
    """bbox and the rest of an annotation; truncated and occluded as attributes, as CVAT has them."""
    bbox = ",".join(number(value) for value in row)
    attributes = [f'"{key}":true' for key in ("truncated", "occluded") if flags & FLAGS[key]]
    extra = ',"ignore":1' if flags & DIFFICULT else ""
    extra += f',"attributes":{{{",".join(attributes)}}}' if attributes else ""
    crowd = int(bool(flags & CROWD))
    return f'"bbox":[{bbox}],"area":{number(row[2] * row[3])},"iscrowd":{crowd},"segmentation":[]{extra}'
