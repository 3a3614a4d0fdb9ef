"""Annotations in memory, whatever format they came in: one photo's, and those of a whole data set in flat columns."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from detkit.data.findings import Finding
from detkit.types import Record


@dataclass(frozen=True, slots=True, eq=False)
class Annotation:
    """One photo's annotation as it is written, nothing clipped or left out.

    filename: the photo's name as written, '' where missing. hw: height and width as written, None where missing or
    zero. names: the class name of each object. boxes: float64 [G, 4] x1 y1 x2 y2, 0-based edges, pixels. flags: uint8
    [G], a sum of DIFFICULT, TRUNCATED, OCCLUDED, CROWD. lines: int32 [G], where each object stands in its file, 0 where
    that is not known.
    """

    filename: str
    hw: tuple[int, int] | None
    names: tuple[str, ...]
    boxes: NDArray[np.float64]
    flags: NDArray[np.uint8]
    lines: NDArray[np.int32]


class Photo(NamedTuple):
    """A photo of a data set and what is known of it.

    image: its file relative to the root, forward slashes, '' where there is none. file: the annotation's file relative
    to the root, '' where there is none. annotation: None where there is none.
    """

    image: str
    file: str
    annotation: Annotation | None


class Source(NamedTuple):
    """A data set, or one split of it, as a format holds it.

    classes: in the order that the format gives them (COCO's categories by id, YOLO's names by index), else sorted.
    findings: what the format held and detkit can't (polygons reduced to boxes, and so on), and what was odd.
    """

    classes: tuple[str, ...]
    photos: list[Photo]
    findings: list[Finding]


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """The annotations of N photos as they are written, in flat columns: no Python object a box.

    vocabulary: the class names. hw: int32 [N, 2], height and width as written, 0 where missing. origins: uint8 [N],
    which tool an annotation says it is from: UNSAID, LABELLING_TOOL or VOC_DEVKIT. ends: int64 [N], photo i has the
    objects ends[i - 1]:ends[i]. names: int32 [M], places in the vocabulary. boxes: float64 [M, 4] x1 y1 x2 y2 as
    written. flags: uint8 [M]. lines: int32 [M], of the file. remarks: what was odd in the files themselves.
    """

    vocabulary: tuple[str, ...]
    hw: NDArray[np.int32]
    origins: NDArray[np.uint8]
    ends: NDArray[np.int64]
    names: NDArray[np.int32]
    boxes: NDArray[np.float64]
    flags: NDArray[np.uint8]
    lines: NDArray[np.int32]
    remarks: tuple[Remark, ...]

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def photos(self) -> NDArray[np.int64]:
        """int64 [M]: the photo of each object."""
        return np.repeat(np.arange(len(self)), np.diff(self.ends, prepend=0))

    def take(self, rows: NDArray[np.int64]) -> Labels:
        """The annotations of those photos, in that order; -1 is a photo without one, no other row may come twice."""
        there = rows >= 0
        objects, ends = _members(self.ends, rows)
        place = np.full(len(self), -1)
        place[rows[there]] = np.flatnonzero(there)
        hw, origins = np.zeros((len(rows), 2), np.int32), np.zeros(len(rows), np.uint8)
        hw[there], origins[there] = self.hw[rows[there]], self.origins[rows[there]]
        columns = {name: getattr(self, name)[objects] for name in ("names", "boxes", "flags", "lines")}
        moved = (Remark(int(place[remark.photo]), *remark[1:]) for remark in self.remarks if place[remark.photo] >= 0)
        return Labels(self.vocabulary, hw, origins, ends, **columns, remarks=tuple(sorted(moved)))

    def joined(self, other: Labels) -> Labels:
        """These photos, then the other's."""
        vocabulary = {name: index for index, name in enumerate(self.vocabulary)}
        mapped = np.array([vocabulary.setdefault(name, len(vocabulary)) for name in other.vocabulary], np.int32)
        moved = (Remark(remark.photo + len(self), *remark[1:]) for remark in other.remarks)
        both = {
            name: np.concatenate([getattr(self, name), getattr(other, name)])
            for name in ("hw", "origins", "boxes", "flags", "lines")
        }
        return Labels(
            vocabulary=tuple(vocabulary),
            ends=np.concatenate([self.ends, other.ends + (self.ends[-1] if len(self) else 0)]),
            names=np.concatenate([self.names, mapped[other.names]]),
            remarks=(*self.remarks, *moved),
            **both,
        )


def _members(ends: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of a column in which row i has the places ends[i - 1]:ends[i]: the places of those rows, one row's after the
    other's, and where each row's now end. -1 is a row without any."""
    there = rows >= 0
    counts, last = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    counts[there] = np.diff(ends, prepend=0)[rows[there]]
    last[there] = ends[rows[there]]
    taken = np.cumsum(counts, dtype=np.int64)
    return np.arange(int(counts.sum())) + np.repeat(last - taken, counts), taken


def stated_size(height: object, width: object) -> tuple[int, int] | None:
    """A height and width as a file states them, None where they are none."""
    try:
        sides = int(float(height)), int(float(width))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return sides if 0 < sides[0] < 2**31 and 0 < sides[1] < 2**31 else None


class Remark(NamedTuple):
    """Something odd in an annotation file: whose (a row of Labels), its kind, the line, what it is."""

    photo: int
    kind: str
    line: int
    what: str


UNSAID, LABELLING_TOOL, VOC_DEVKIT = 0, 1, 2


class Columns:
    """Labels in the making: objects are added one by one, then `end` closes their photo."""

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}
        self.hw, self.origins, self.ends = array("i"), array("B"), array("q")
        self.names, self.boxes, self.flags, self.lines = array("i"), array("d"), array("B"), array("i")
        self.remarks: list[Remark] = []

    def add(self, name: str, box: Iterable[float], flags: int, line: int) -> None:
        """Add an object of the current photo."""
        self.names.append(self.vocabulary.setdefault(name, len(self.vocabulary)))
        self.boxes.extend(box)
        self.flags.append(flags)
        self.lines.append(line)

    def remark(self, kind: str, line: int, what: str) -> None:
        """Note something odd in the current photo's annotation."""
        self.remarks.append(Remark(len(self.ends), kind, line, what))

    def end(self, hw: tuple[int, int] | None = None, origin: int = UNSAID) -> None:
        """Close the current photo; hw: its size as written."""
        self.hw.extend(hw or (0, 0))
        self.origins.append(origin)
        self.ends.append(len(self.names))

    def drop(self) -> None:
        """Forget the objects of the current photo: its file can't be read."""
        first = self.ends[-1] if self.ends else 0
        for column, width in ((self.names, 1), (self.boxes, 4), (self.flags, 1), (self.lines, 1)):
            del column[first * width :]

    def labels(self) -> Labels:
        """What was added."""
        return Labels(
            vocabulary=tuple(self.vocabulary),
            hw=np.array(self.hw, np.int32).reshape(-1, 2),
            origins=np.array(self.origins, np.uint8),
            ends=np.array(self.ends, np.int64),
            names=np.array(self.names, np.int32),
            boxes=np.array(self.boxes, np.float64).reshape(-1, 4),
            flags=np.array(self.flags, np.uint8),
            lines=np.array(self.lines, np.int32),
            remarks=tuple(self.remarks),
        )


def from_annotations(annotations: Sequence[Annotation | None]) -> Labels:
    """Annotations as columns; one that is missing has no object."""
    columns = Columns()
    for annotation in annotations:
        if annotation is None:
            columns.end()
            continue
        columns_of_it = (annotation.boxes.tolist(), annotation.flags.tolist(), annotation.lines.tolist())
        for name, box, flags, line in zip(annotation.names, *columns_of_it, strict=True):
            columns.add(name, box, flags, line)
        columns.end(annotation.hw)
    return columns.labels()


class Parts(NamedTuple):
    """What parts of photos the rows of a DataSet are. photos: int64 [N], which photo. windows: int64 [N, 4], the part,
    x1 y1 x2 y2 in its pixels. hw: int32 [N, 2], the whole photo's height and width."""

    photos: NDArray[np.int64]
    windows: NDArray[np.int64]
    hw: NDArray[np.int32]

    def take(self, rows: NDArray[np.int64]) -> Parts:
        """Those of some rows."""
        return Parts(self.photos[rows], self.windows[rows], self.hw[rows])


@dataclass(frozen=True, slots=True, eq=False)
class DataSet:
    """The photos of one split: flat columns that processes share; a Record is made when asked for.

    paths: uint8, the photos' paths relative to `root`, UTF-8, joined; path_ends: int64 [N]. hw: int32 [N, 2].
    boxes: float64 [M, 4]. labels: int32 [M]. flags: uint8 [M]. box_ends: int64 [N]. parts: where the rows are parts of
    photos (data.tiles), which; `hw` and `boxes` are the parts' own then.
    """

    root: str
    classes: tuple[str, ...]
    paths: NDArray[np.uint8]
    path_ends: NDArray[np.int64]
    hw: NDArray[np.int32]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int32]
    flags: NDArray[np.uint8]
    box_ends: NDArray[np.int64]
    findings: tuple[Finding, ...]
    parts: Parts | None = None

    def __len__(self) -> int:
        return len(self.path_ends)

    def __getitem__(self, index: int) -> Record:
        """The photo's Record, with its full path. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = int(self.box_ends[index - 1]) if index else 0
        chosen = slice(first, int(self.box_ends[index]))
        height, width = self.hw[index].tolist()
        path = os.path.join(self.root, self.name(index))  # noqa: PTH118 (a Path costs more than the rest)
        return Record(
            path, (height, width), self.boxes[chosen], self.labels[chosen].astype(np.int64), self.flags[chosen]
        )

    def digest(self) -> str:
        """SHA-256 of the photos' names and of what is known of them, wherever they lie."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for column in (self.paths, self.path_ends, self.hw, self.boxes, self.labels, self.flags, self.box_ends):
            digest.update(np.ascontiguousarray(column).view(np.uint8).data)
        if self.parts:
            digest.update(self.parts.windows.tobytes())
        return digest.hexdigest()

    def take(self, rows: NDArray[np.int64]) -> DataSet:
        """Only those photos, in that order; the findings stay those of all."""
        letters, path_ends = _members(self.path_ends, rows)
        objects, box_ends = _members(self.box_ends, rows)
        columns = {name: getattr(self, name)[objects] for name in ("boxes", "labels", "flags")}
        return DataSet(
            self.root, self.classes, self.paths[letters], path_ends, self.hw[rows], **columns, box_ends=box_ends,
            findings=self.findings, parts=self.parts and self.parts.take(rows),
        )  # fmt: skip

    def name(self, index: int) -> str:
        """The photo's path relative to the root, with forward slashes."""
        first = int(self.path_ends[index - 1]) if index else 0
        return os.fsdecode(self.paths[first : int(self.path_ends[index])].tobytes())
