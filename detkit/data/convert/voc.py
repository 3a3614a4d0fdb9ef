"""Pascal VOC: an XML file a photo. `detkit.data.voc` reads it; here it is put beside the other formats, and written."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from detkit.config import Data
from detkit.data import scan, voc
from detkit.data.convert.common import FLAGS, Plan, Progress, Tree
from detkit.data.findings import Finding, level, refusal
from detkit.data.labels import Annotation, Labels, Photo, Source
from detkit.errors import UserError
from detkit.formats import voc_xml
from detkit.types import CROWD


def splits(tree: Tree) -> tuple[str, ...]:
    """The split files."""
    return tuple(voc.split_files(tree.root))


def read(tree: Tree, split: str | None, progress: Progress | None = None, convention: str = "auto") -> Source:
    """The photos of the split, None: all, sorted. convention: as the setting data.convention. Raises UserError."""
    data = Data.model_validate({"root": tree.root, "convention": convention})
    findings: list[Finding] = []
    files = voc.Listing(
        images=_files(name for name in tree.images.names if tree.elsewhere or _in(name, "JPEGImages", tree)),
        annotations=_files(name for name in tree.ending(".xml") if _in(name, "Annotations", tree)),
        texts=_files(()),
    )
    names = files.annotations.names
    if not names:
        raise UserError(f"{tree.root}: no VOC annotations here (Annotations/*.xml)")
    labels = voc.parse(tree.root, names, progress)[0]
    for remark in labels.remarks:
        action = {"odd value": "taken as 0"}.get(remark.kind, "not read")
        findings.append(Finding(remark.kind, names[remark.photo], remark.what, action, remark.line))
    items = voc.pair(files, findings)
    errors = [finding for finding in findings if level(finding) == "error"]
    if errors:
        raise refusal(data, errors)
    keys = list(items) if split is None else voc.choose(data, split, items, findings)
    how, why = scan.convention(data, labels, len(labels))
    if how == "devkit":
        findings.append(Finding("coordinates", "", why, "corners are read as 1-based inclusive pixels"))
    annotations = dict(zip(names, _annotations(labels, voc.edges(labels.boxes, how)), strict=True))
    photos = [_photo(tree, items[key], annotations.get(items[key].file)) for key in keys]
    found = voc.known_classes(data) or ()
    more = {name for photo in photos if photo.annotation for name in photo.annotation.names} - set(found)
    return Source((*found, *sorted(more)), photos, findings)


def _in(name: str, folder: str, tree: Tree) -> bool:
    """Whether the file is in VOC's folder, where the data set has that."""
    return name.startswith(folder + "/") or folder not in tree.folders


def _files(names: Iterable[str]) -> voc.Files:
    listed = list(names)
    return voc.Files(listed, np.zeros((len(listed), 4), np.int64))


def _annotations(labels: Labels, boxes: NDArray[np.float64]) -> Iterator[Annotation]:
    first = 0
    for end, (height, width) in zip(labels.ends.tolist(), labels.hw.tolist(), strict=True):
        own = slice(first, end)
        names = tuple(labels.vocabulary[index] for index in labels.names[own].tolist())
        hw = (height, width) if height else None
        yield Annotation("", hw, names, boxes[own], labels.flags[own], labels.lines[own])
        first = end


def _photo(tree: Tree, item: voc.Item, annotation: Annotation | None) -> Photo:
    if item.image or annotation is None:
        return Photo(tree.images.prefix + item.image if item.image else "", item.file, annotation)
    name = voc.read(tree.root / item.file).filename  # only now is it needed: there is no photo
    folder, stem = posixpath.split(voc.key(item.file))
    return Photo("", item.file, replace(annotation, filename=posixpath.join(folder, name or f"{stem}.jpg")))


def photo(split: str, name: str) -> str:  # noqa: ARG001
    """Where the photo goes."""
    return f"JPEGImages/{name}"


def write(plan: Plan) -> None:
    """Annotations/<name>.xml for each photo that is annotated, ImageSets/Main/<split>.txt, classes.txt."""
    for item, annotation in plan.in_lists():
        size, name = plan.size(item) or (0, 0), posixpath.basename(item.name)
        text = voc_xml(name, size, annotation.boxes, annotation.names, annotation.flags.tolist())
        plan.save(f"Annotations/{item.key}.xml", text)
        plan.lose_flags(annotation, sum(FLAGS.values()) - CROWD, "VOC")
