"""A data set's files -> what they say -> a split to train on, with everything that is not taken as written listed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from detkit import geometry, imaging
from detkit.config import Data
from detkit.data import voc
from detkit.data.findings import REFUSED, Finding, level, refusal
from detkit.data.labels import LABELLING_TOOL, VOC_DEVKIT, DataSet, Labels, from_annotations
from detkit.data.voc import Item, Listing, Progress
from detkit.errors import UserError, nearest
from detkit.formats import number

VERSION = 2  # raise it when the same files would give another DataSet: it makes old caches stale

# Of all boxes: so many that start below 1 are no slip of the hand but 0-based coordinates.
_TELLING, _FEWEST = 0.001, 2


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """What all the annotations of a data set say, whatever the split: row i of `labels` belongs to items[i].

    keys: the photos' names in split files. annotated: bool [N], whether there is an annotation. splits: the places in
    `items` of each split that the format itself holds, None where split files or the hash decide. classes: those that
    the format lists, None where it has no list.
    """

    items: tuple[Item, ...]
    keys: tuple[str, ...]
    labels: Labels
    annotated: NDArray[np.bool_]
    splits: dict[str, NDArray[np.int64]] | None
    classes: tuple[str, ...] | None
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Headers:
    """Of N image files: hw int32 [N, 2], upright, 0 where unreadable; orientation uint8 [N], EXIF's, 1 to 8; and the
    reason why a file is unreadable, by place."""

    hw: NDArray[np.int32]
    orientation: NDArray[np.uint8]
    errors: dict[int, str]


class Survey(NamedTuple):
    """A whole data set, split or not, sound or not: `headers` and `labels` have a row an item (no image: hw 0).

    labels: boxes in 0-based edges, otherwise as written; convention: how they were read, 'edges' or 'devkit'. boxes:
    float64 [M, 4], turned, scaled and clipped as for training; kept: bool [M], those it would not drop. splits: the
    places in `items` of each split. findings: all that training would refuse, change or remark on, were every split
    used.
    """

    items: tuple[Item, ...]
    labels: Labels
    convention: str
    boxes: NDArray[np.float64]
    kept: NDArray[np.bool_]
    headers: Headers
    splits: dict[str, NDArray[np.int64]]
    classes: tuple[str, ...]
    findings: tuple[Finding, ...]


Parse = Callable[[Data, Sequence[str], Progress | None], Labels]
Check = Callable[[Data, Sequence[str], Progress | None], Headers]


def parse(data: Data, names: Sequence[str], progress: Progress | None = None) -> Labels:
    """The VOC annotations in those files."""
    return voc.parse(data.root, names, progress)[0]


def check(data: Data, names: Sequence[str], progress: Progress | None = None) -> Headers:
    """The headers of those images; a name '' is one that is not there."""
    hw, orientation = np.zeros((len(names), 2), np.int32), np.ones(len(names), np.uint8)
    errors: dict[int, str] = {}
    prefix = str(data.root) + os.sep
    for index, name in enumerate(names):
        if not name:
            continue
        try:
            header = imaging.check(prefix + name)
        except UserError as error:
            errors[index] = str(error).removeprefix(f"{prefix}{name}: ")
        else:
            hw[index], orientation[index] = header.hw, header.orientation
        if progress:
            progress(index + 1, len(names))
    return Headers(hw, orientation, errors)


def contents(data: Data, files: Listing, parse: Parse = parse, progress: Progress | None = None) -> Contents:
    """All annotations of the data set. Raises UserError where a format other than VOC can't be read."""
    findings: list[Finding] = []
    if data.format == "voc":
        items = voc.pair(files, findings)
        labels = parse(data, files.annotations.names, progress)
        rows = {name: row for row, name in enumerate(files.annotations.names)}
        chosen = np.array([rows.get(item.file, -1) for item in items.values()], np.int64)
        return Contents(
            tuple(items.values()), tuple(items), labels.take(chosen), chosen >= 0, None, None, tuple(findings)
        )
    from detkit.data import convert

    by_split = convert.read_all(data.format, data.root)
    names, sources = [name for name in by_split if name], list(by_split.values())
    photos = [photo for source in sources for photo in source.photos]
    findings += [finding for source in sources for finding in source.findings]
    ends = np.cumsum([len(source.photos) for source in sources])
    splits = {name: np.arange(end - len(s.photos), end) for name, s, end in zip(names, sources, ends, strict=False)}
    listed = {photo.image for photo in photos}
    findings += [
        Finding("photo not listed", name, "no annotation file names it", "not used", 0, name)
        for name in files.images.names
        if name not in listed
    ]
    known: dict[str, None] = {}
    for source in sources:
        known |= dict.fromkeys(source.classes)
    return Contents(
        items=tuple(Item(photo.image, photo.file) for photo in photos),
        keys=tuple(voc.key(photo.image or photo.file) for photo in photos),
        labels=from_annotations([photo.annotation for photo in photos]),
        annotated=np.array([photo.annotation is not None for photo in photos], np.bool_),
        splits=splits or None,
        classes=tuple(known),
        findings=tuple(dict.fromkeys(findings)),  # what a file with several splits holds is told with each
    )


def require_no_splits(data: Data) -> None:
    """Raise UserError where the format itself says which split a photo is in, so that split files would not be read."""
    from detkit.data import convert

    if data.format != "voc" and (names := convert.splits(data.format, data.root)):
        raise UserError(
            f"{data.root}: its {data.format} files hold splits of their own ({', '.join(names)}); to divide it anew, "
            "make it a VOC data set first, with detkit data convert"
        )


def choose(data: Data, split: str, found: Contents, findings: list[Finding]) -> NDArray[np.int64]:
    """The places of the split's photos in `found`. Raises UserError where there is no such split, or it is empty."""
    if found.splits is None:
        places = {key: index for index, key in enumerate(found.keys)}
        items = dict(zip(found.keys, found.items, strict=True))
        return np.array([places[key] for key in voc.choose(data, split, items, findings)], np.int64)
    if split in found.splits:
        return found.splits[split]
    if split == "all":
        return np.arange(len(found.items))
    names = ", ".join(found.splits)
    raise UserError(f"{data.root}: no split '{split}'{nearest(split, found.splits)}; there are: {names}")


def convention(data: Data, labels: Labels, files: int) -> tuple[str, str]:
    """How the corners in the data set's VOC annotations, of which there are `files`, are read: 'edges' or 'devkit', and
    why."""
    if data.format != "voc":
        return "edges", f"as {data.format} has it"
    if data.convention != "auto":
        return data.convention, "the setting says so"
    below = int(np.any((labels.boxes[:, :2] >= 0) & (labels.boxes[:, :2] < 1), axis=1).sum())
    if below >= max(_FEWEST, _TELLING * len(labels.boxes)):
        return "edges", f"{below} of {len(labels.boxes)} boxes start below 1, which 1-based pixels never do"
    for origin, answer, tool in (
        (VOC_DEVKIT, "devkit", "are from the VOC devkit"),
        (LABELLING_TOOL, "edges", "are of an unknown database, as LabelImg writes"),
    ):
        count = int((labels.origins == origin).sum())
        if 2 * count > files:
            return answer, f"{count} of {files} annotations say they {tool}"
    if np.any(labels.boxes % 1):
        return "edges", "there are decimals, which pixel counts never have"
    return "edges", "nothing speaks for 1-based pixels"


def _classes(data: Data, found: Contents) -> tuple[str, ...]:
    """The class names: as the config or classes.txt lists them, else the format, else all that occur, sorted."""
    return voc.known_classes(data) or found.classes or tuple(sorted(set(found.labels.vocabulary)))


def shown(box: Sequence[float]) -> str:
    """The four numbers as text, without decimals where there are none."""
    return " ".join(number(value) for value in box)


class Split:
    """The photos being made a split; what is found on the way goes to `findings`."""

    def __init__(self, data: Data, items: Sequence[Item], labels: Labels, headers: Headers) -> None:
        self.data, self.items, self.labels, self.headers = data, items, labels, headers
        self.findings: list[Finding] = []
        self.photo = labels.photos
        self.boxes = labels.boxes.copy()

    def _note(self, kind: str, photo: int, what: str, action: str, line: int = 0) -> None:
        item = self.items[photo]
        self.findings.append(Finding(kind, item.file or item.image, what, action, line, item.image))

    def _note_object(self, kind: str, index: int, action: str, what: str = "") -> None:
        item, box = self.items[self.photo[index]], self.boxes[index].tolist()
        height, width = self.headers.hw[self.photo[index]].tolist()
        name = self.labels.vocabulary[self.labels.names[index]]
        what = what or f"{name} {shown(box)} in an image of {width}x{height}"
        line = int(self.labels.lines[index])
        self.findings.append(Finding(kind, item.file, what, action, line, item.image, tuple(box)))

    def usable(self, annotated: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """bool [N]: the photos that have all it takes."""
        keep = np.ones(len(self.items), np.bool_)
        tell = {
            "error": ("image without annotation", "it has no annotation", REFUSED),
            "skip": ("image skipped", "it has no annotation", "left out"),
            "negative": ("image taken as negative", "it has no annotation", "used as a photo without objects"),
        }[self.data.unlabelled]
        for index, item in enumerate(self.items):
            if not item.image:
                self._note("annotation without image", index, "there is no image of this name", REFUSED)
            elif index in self.headers.errors:
                reason = self.headers.errors[index]
                self.findings.append(Finding("image unreadable", item.image, reason, REFUSED, 0, item.image))
            elif annotated[index]:
                continue
            else:
                self._note(tell[0], index, *tell[1:])
                if self.data.unlabelled == "negative":
                    continue
            keep[index] = False
        for photo, kind, line, what in self.labels.remarks:
            action = {
                "misspelt tag": "not read",
                "odd value": "taken as 0",
                "filename differs": "the photo of the annotation's own name is used",
            }.get(kind, REFUSED)
            self._note(kind, photo, what, action, line)
        return keep

    def classify(self, classes: tuple[str, ...]) -> NDArray[np.int32]:
        """int32 [M]: each object's place in `classes`, -1 where it has none."""
        ids = {name: index for index, name in enumerate(classes)}
        mapped = np.array([ids.get(name, -1) for name in self.labels.vocabulary], np.int32)
        labels = mapped[self.labels.names]
        for index in np.flatnonzero(labels < 0).tolist():
            name = self.labels.vocabulary[self.labels.names[index]]
            what = f"class '{name}' is not in the list{nearest(name, classes)}"
            self._note_object("unknown class", index, REFUSED, what)
        return labels

    def fit(self) -> None:
        """Compare the sizes as written with the photos', and move boxes that were drawn on another canvas."""
        stated, hw = self.labels.hw, self.headers.hw
        there = (hw[:, 0] > 0) & ~np.isin(
            np.arange(len(hw)),
            [remark.photo for remark in self.labels.remarks if remark.kind == "annotation unreadable"],
        )
        told = stated[:, 0] > 0
        if self.data.format == "voc":
            objects = np.bincount(self.photo, minlength=len(hw))
            for photo in np.flatnonzero(there & ~told & (objects > 0)).tolist():
                height, width = hw[photo].tolist()
                self._note(
                    "size missing", photo, "the annotation states no size", f"the image's {width}x{height} is used"
                )
        for photo in np.flatnonzero(there & told & np.any(stated != hw, axis=1)).tolist():
            self._refit(photo, tuple(stated[photo].tolist()), tuple(hw[photo].tolist()))

    def _refit(self, photo: int, stated: tuple[int, int], hw: tuple[int, int]) -> None:
        first = int(self.labels.ends[photo - 1]) if photo else 0
        own = slice(first, int(self.labels.ends[photo]))
        self.boxes[own], kind = geometry.fitted(self.boxes[own], stated, hw, int(self.headers.orientation[photo]))
        more, action = {
            "boxes turned": (" turned by its EXIF tag", "the boxes are turned with it"),
            "boxes scaled": (", too small for its boxes", "the boxes are scaled to the image"),
            "size disagrees": ("", "the image's size is used, boxes are taken as written"),
        }[kind]
        what = f"the annotation says {stated[1]}x{stated[0]}, the image is {hw[1]}x{hw[0]}{more}"
        self._note(kind, photo, what, action)

    def clip(self) -> NDArray[np.bool_]:
        """Exchange inverted corners, clip to the photo; bool [M]: the boxes of which something remains."""
        for index in np.flatnonzero(np.any(self.boxes[:, 2:] < self.boxes[:, :2], axis=1)).tolist():
            x1, y1, x2, y2 = self.boxes[index].tolist()
            fixed = [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]
            self._note_object("box inverted", index, f"read as {shown(fixed)}")
            self.boxes[index] = fixed
        limits = np.tile(self.headers.hw[self.photo][:, ::-1], 2)
        clipped = np.clip(self.boxes, 0, limits)
        empty = np.any(self.boxes[:, 2:] <= self.boxes[:, :2], axis=1)
        outside = np.any(clipped[:, 2:] <= clipped[:, :2], axis=1) & ~empty
        changed = np.any(clipped != self.boxes, axis=1) & (limits[:, 0] > 0)
        for index in np.flatnonzero(empty | (outside & (limits[:, 0] > 0)) | changed).tolist():
            if empty[index]:
                self._note_object("box without area", index, "dropped")
            elif outside[index]:
                self._note_object("box outside the image", index, "dropped")
            else:
                self._note_object("box partly outside", index, f"clipped to {shown(clipped[index].tolist())}")
        self.boxes = clipped
        keep: NDArray[np.bool_] = ~(empty | outside)
        return keep


def _assemble(
    data: Data, items: Sequence[Item], labels: Labels, annotated: NDArray[np.bool_], headers: Headers,
    classes: tuple[str, ...],
) -> tuple[DataSet, list[Finding]]:  # fmt: skip
    """The split, from boxes in edges, and what was found; errors among that are for the caller to refuse."""
    split = Split(data, items, labels, headers)
    usable = split.usable(annotated)
    ids = split.classify(classes)
    split.fit()
    keep = split.clip() & usable[split.photo] & (ids >= 0)
    counts = np.bincount(split.photo[keep], minlength=len(items))[usable]
    paths = [os.fsencode(item.image) for item, use in zip(items, usable, strict=True) if use]
    return DataSet(
        root=str(data.root),
        classes=classes,
        paths=np.frombuffer(b"".join(paths), np.uint8),
        path_ends=np.cumsum([len(path) for path in paths], dtype=np.int64),
        hw=headers.hw[usable],
        boxes=np.ascontiguousarray(split.boxes[keep]),
        labels=ids[keep],
        flags=labels.flags[keep],
        box_ends=np.cumsum(counts, dtype=np.int64),
        findings=(),
    ), split.findings


def _read(data: Data, found: Contents) -> tuple[Labels, Finding, str]:
    """The labels in 0-based edges, and how they were read: as a finding, and the convention."""
    how, why = convention(data, found.labels, int(found.annotated.sum()))
    meaning = {"edges": "0-based edges", "devkit": "1-based inclusive pixels"}[how]
    labels = replace(found.labels, boxes=voc.edges(found.labels.boxes, how))
    return labels, Finding("coordinates", "", why, f"corners are read as {meaning}"), how


def scan(
    data: Data,
    split: str,
    files: Listing | None = None,
    progress: Progress | None = None,
    *,
    parse: Parse = parse,
    check: Check = check,
) -> DataSet:
    """Read and check a split: every annotation, and every image's header and end.

    files: the result of `voc.listing`, if at hand. progress: called with (done, in all). parse, check: what reads
    annotations and headers (a cache knows most of them). Raises UserError, naming the file, for a missing or empty
    folder or split and for every finding of level 'error' (see `findings.KINDS`). Everything else that is not taken as
    written is in the result's `findings`.
    """
    files = files or voc.listing(data)
    found = contents(data, files, parse, progress)
    findings = list(found.findings)
    rows = choose(data, split, found, findings)
    labels, how, _ = _read(data, found)
    items = [found.items[row] for row in rows]
    headers = check(data, [item.image for item in items], progress)
    classes = _classes(data, found)
    result, more = _assemble(data, items, labels.take(rows), found.annotated[rows], headers, classes)
    findings += more
    errors = [finding for finding in findings if level(finding) == "error"]
    if errors:
        raise refusal(data, errors)
    if not classes or not len(labels.take(rows).names):
        raise UserError(f"{data.root}: no object in any of the {len(items)} annotations of split '{split}'")
    if data.format == "voc" and data.convention == "auto":
        findings.insert(0, how)
    return replace(result, findings=tuple(findings))


def survey(data: Data, progress: Progress | None = None) -> Survey:
    """Read the whole data set, raising UserError for nothing but a missing root, one without images, a bad class list,
    or annotations of another format than VOC that can't be read at all."""
    files = voc.listing(data)
    found = contents(data, files, progress=progress)
    findings = list(found.findings)
    names = tuple(found.splits) if found.splits is not None else voc.splits(data)
    splits = {}
    for name in names:
        try:
            splits[name] = choose(data, name, found, findings)
        except UserError as error:
            findings.append(Finding("split unusable", "", str(error), REFUSED))
    labels, how, read_as = _read(data, found)
    headers = check(data, [item.image for item in found.items], progress)
    classes = _classes(data, found)
    split = Split(data, found.items, labels, headers)
    usable = split.usable(found.annotated)
    ids = split.classify(classes)
    split.fit()
    kept = split.clip() & usable[split.photo] & (ids >= 0)
    found_all = (how, *findings, *split.findings)
    return Survey(found.items, labels, read_as, split.boxes, kept, headers, splits, classes, found_all)
