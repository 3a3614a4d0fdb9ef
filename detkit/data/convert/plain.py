"""Plain CSV: a row an object. With a header, or without one as RetinaNet and TensorFlow tools write it."""

from __future__ import annotations

import csv
import io
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from detkit.data.convert.common import (
    FARTHEST,
    FLAGS,
    Objects,
    Plan,
    Size,
    Tally,
    Tree,
    refuse,
    shown,
    text,
)
from detkit.data.findings import Finding
from detkit.data.labels import Photo, Source, stated_size
from detkit.errors import UserError, nearest
from detkit.formats import number

COLUMNS = ("image", "width", "height", "label", "xmin", "ymin", "xmax", "ymax", *FLAGS, "split")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_ALIASES = {
    "image": ("image", "filename", "file", "file_name", "path", "image_path", "img", "image_name"),
    "width": ("width", "image_width", "img_width"),
    "height": ("height", "image_height", "img_height"),
    "label": ("label", "class", "class_name", "name", "category"),
    "xmin": ("xmin", "x1", "x_min", "left"),
    "ymin": ("ymin", "y1", "y_min", "top"),
    "xmax": ("xmax", "x2", "x_max", "right"),
    "ymax": ("ymax", "y2", "y_max", "bottom"),
    "split": ("split", "subset", "set"),
    "crowd": ("crowd", "iscrowd", "is_crowd"),
} | {name: (name,) for name in ("difficult", "truncated", "occluded")}
_BY_ALIAS = {alias: column for column, aliases in _ALIASES.items() for alias in aliases}
_RETINANET = ("image", *_CORNERS, "label")
_TENSORFLOW = ("image", "width", "height", "label", *_CORNERS)
_YES, _NO = ("1", "true", "yes", "y", "1.0"), ("", "0", "false", "no", "n", "0.0", "-1")


def rows(path: Path, delimiter: str = "") -> Iterator[tuple[int, list[str]]]:
    """The rows that aren't empty, each with its line. Raises UserError.

    delimiter: default: the comma, semicolon or tab that the first line has most of.
    """
    content = text(path)
    first = re.sub(r'"[^"]*"', "", content.lstrip("\r\n").partition("\n")[0])
    if not delimiter:  # commas beside semicolons are decimal ones
        delimiter = ";" if first.count(";") >= 5 else max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, skipinitialspace=True)
    line = 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield line, [cell.strip() for cell in row]
            line = reader.line_num + 1
    except csv.Error as error:
        refuse(path, f"not CSV ({error})", reader.line_num)


def decimal(word: str) -> float:
    """A number with a decimal point or comma. Raises ValueError where it is none, or beyond any photo."""
    if "," in word and "." not in word:
        word = word.replace(",", ".")
    value = float(word)
    if not abs(value) <= FARTHEST:
        raise ValueError(word)
    return value


def files(tree: Tree) -> dict[str, str]:
    """The files with annotations by the split that their name says; '' where there is only one."""
    found = {name[:-4]: name for name in tree.ending(".csv", folder="") if not re.search("class|descriptions", name)}
    if "annotations" in found:
        return {"": found["annotations"]}
    if not found:
        nested = [name for name in tree.ending("_annotations.csv") if name.count("/") == 1]
        found = {posixpath.dirname(name): name for name in nested}
    if len(found) == 1:
        return {"": next(iter(found.values()))}
    return {re.sub(r"[_-](labels|annotations)$", "", split): name for split, name in found.items()}


class _File:
    """One CSV file: the photos in the order of their first row, by split and name."""

    def __init__(self, tree: Tree, file: str, split: str) -> None:
        self.tree, self.file, self.path = tree, file, tree.root / file
        self.near = [posixpath.dirname(file), "images", "JPEGImages", f"images/{split}", split]
        self.found: dict[tuple[str, str], tuple[Objects, list[Size | None]]] = {}
        self.findings: list[Finding] = []
        self.tally = Tally()
        self.columns: dict[str, int] = {}
        for index, (line, row) in enumerate(rows(self.path)):
            if index == 0 and self._header(line, row):
                continue
            self._row(line, row)
        if not self.columns:
            refuse(self.path, "an empty file")
        self.splits = tuple(dict.fromkeys(split for split, _ in self.found))

    def _header(self, line: int, row: list[str]) -> bool:
        """Find out which column holds what; whether the row is a header."""
        words = [cell.lower() for cell in row]
        if sum(word in _BY_ALIAS for word in words) >= 3:
            for index, word in enumerate(words):
                if word in _BY_ALIAS:
                    self.columns.setdefault(_BY_ALIAS[word], index)
                elif word:
                    self.tally.add("not read", f"column '{word[:40]}'", "left out", self.file)
            missing = [name for name in ("image", "label", *_CORNERS) if name not in self.columns]
            if missing:
                refuse(self.path, f"the header has no column {missing[0]}", line)
            return True
        layout = _TENSORFLOW if len(row) >= 8 else _RETINANET
        if len(row) < len(layout):
            refuse(self.path, f"{len(row)} columns without a header: neither path,x1,y1,x2,y2,class nor "
                              "filename,width,height,class,xmin,ymin,xmax,ymax", line)  # fmt: skip
        self.columns = {name: index for index, name in enumerate(layout)}
        return False

    def _cell(self, row: Sequence[str], column: str) -> str:
        index = self.columns.get(column, len(row))
        return row[index] if index < len(row) else ""

    def _row(self, line: int, row: list[str]) -> None:
        name, label = self._cell(row, "image"), self._cell(row, "label")
        corners = [self._cell(row, corner) for corner in _CORNERS]
        if not name:
            refuse(self.path, "the row names no image", line)
        key = (self._cell(row, "split"), name)
        objects, sizes = self.found.setdefault(key, (Objects(), []))
        if not sizes:
            hw = [self._cell(row, side).replace(",", ".") for side in ("height", "width")]
            sizes.append(stated_size(*hw))
        if not label and not any(corners):
            return  # a photo without objects
        if not label:
            refuse(self.path, "the row has no label", line)
        try:
            box = [decimal(corner) for corner in corners]
        except ValueError:
            refuse(self.path, f"{shown(' '.join(corners))} are not four numbers", line)
        objects.add(label, box, self._flags(line, row), line)

    def _flags(self, line: int, row: list[str]) -> int:
        flags = 0
        for name, bit in FLAGS.items():
            word = self._cell(row, name).lower()
            if word in _YES:
                flags |= bit
            elif word not in _NO:
                what = f"{name} is {shown(word)}, neither 0 nor 1"
                self.findings.append(Finding("odd value", self.file, what, "taken as 0", line))
        return flags

    def photos(self, split: str | None) -> list[Photo]:
        """The photos of the file, or of the split that its column names."""
        return [
            Photo(self.tree.images.find(name, self.near), self.file, objects.annotation(name, sizes[0]))
            for (own, name), (objects, sizes) in self.found.items()
            if split is None or own == split
        ]


def _files(tree: Tree) -> dict[str, _File]:
    found = files(tree)
    if not found:
        raise UserError(f"{tree.root}: no CSV of annotations here (annotations.csv, or <split>.csv)")
    return {split: _File(tree, file, split) for split, file in found.items()}


def splits(tree: Tree) -> tuple[str, ...]:
    """What stands in the column `split`, else the files' names; none where there is one file without that column."""
    found = tree.once(_files)
    if "" not in found:
        return tuple(found)
    return () if "" in found[""].splits else found[""].splits


def read(tree: Tree, split: str | None) -> Source:
    """The photos of the split, in the order of their first row; a split may also be a file's path below the root.

    None: those of every file, and those beside them that none names. Raises UserError.
    """
    if split is not None and split in tree.files:
        found, split = {"": _File(tree, split, "")}, None
        chosen = found[""].photos(None)
    else:
        found = tree.once(_files)
        if split is None:
            chosen = [photo for file in found.values() for photo in file.photos(None)]
            chosen += tree.images.unnamed(chosen)
        elif split in found:
            found = {split: found[split]}
            chosen = found[split].photos(None)
        else:
            chosen = found[""].photos(split) if "" in found else []
    if not chosen:
        known = sorted({name for file in found.values() for name in file.splits} | set(found))
        hint = nearest(split or "", known)
        raise UserError(f"{tree.root}: no split '{split}'{hint}; there are: {', '.join(filter(None, known)) or 'none'}")
    names = {name for photo in chosen if photo.annotation for name in photo.annotation.names}
    findings = [finding for file in found.values() for finding in file.findings + file.tally.findings()]
    return Source(tuple(sorted(names)), chosen, findings)


def photo(split: str, name: str) -> str:  # noqa: ARG001
    """Where the photo goes."""
    return f"images/{name}"


def write(plan: Plan) -> None:
    """annotations.csv with a header; a photo without objects is a row without label and box."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for split, items in plan.splits.items():
        for item in items:
            annotation = item.photo.annotation
            if annotation is None:
                plan.lose_unlabelled("CSV")
                continue
            height, width = plan.size(item) or ("", "")
            head = (f"images/{item.name}", width, height)
            for name, box, flags in zip(
                annotation.names, annotation.boxes.tolist(), annotation.flags.tolist(), strict=True
            ):
                marks = (int(bool(flags & bit)) for bit in FLAGS.values())
                writer.writerow((*head, name, *(number(value) for value in box), *marks, split))
            if not annotation.names:
                writer.writerow((*head, *[""] * 9, split))
    plan.save("annotations.csv", out.getvalue())
    plan.save("classes.txt", "".join(f"{name}\n" for name in plan.classes))
