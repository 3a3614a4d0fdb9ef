"""Open Images CSV: <split>-annotations-bbox.csv, a row an object, corners in shares of the photo's sides."""

from __future__ import annotations

import csv
import io
import posixpath
import re
from decimal import Decimal

from detkit import imaging
from detkit.data.convert.common import Objects, Plan, Size, Tally, Tree, edge, fraction, refuse, share, shown
from detkit.data.convert.plain import rows
from detkit.data.findings import Finding
from detkit.data.labels import Photo, Source
from detkit.errors import UserError, nearest
from detkit.types import CROWD, OCCLUDED, TRUNCATED

_BOXES = re.compile(r"^(?:.*/)?(?:oidv\d+-)?(?:(.*?)-)?annotations-bbox\.csv$")
_LISTS = re.compile(r"^(?:.*/)?(?:oidv\d+-)?(.+?)-(?:images?[-_].*|images)\.csv$")
_MARKS = {"IsOccluded": OCCLUDED, "IsTruncated": TRUNCATED, "IsGroupOf": CROWD}
_UNREAD = {"IsDepiction": "depictions", "IsInside": "seen from the inside"}
_NEEDED = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
_COLUMNS = (
    "ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax",
    "IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside",
)  # fmt: skip
_LIST_COLUMNS = (
    "ImageID", "Subset", "OriginalURL", "OriginalLandingURL", "License", "AuthorProfileURL", "Author", "Title",
    "OriginalSize", "OriginalMD5", "Thumbnail300KURL", "Rotation",
)  # fmt: skip


def files(tree: Tree) -> dict[str, str]:
    """The files of boxes by split; '' where the name says none."""
    return {found[1] or "": name for name in tree.files if (found := _BOXES.match(name))}


def splits(tree: Tree) -> tuple[str, ...]:
    """The splits: one a file of boxes."""
    return tuple(split for split in files(tree) if split)


def _descriptions(tree: Tree) -> dict[str, str]:
    """The class names by label, in the file's order; empty where there is no such file."""
    found: dict[str, str] = {}
    for name in tree.files:
        if "class-descriptions" in posixpath.basename(name) and name.endswith(".csv"):
            for line, row in rows(tree.root / name, ","):
                if row[:2] == ["LabelName", "DisplayName"]:
                    continue
                if len(row) < 2 or not row[0] or not row[1]:
                    refuse(tree.root / name, "not a label and its name", line)
                found.setdefault(row[0], row[1])
            break
    return found


def read(tree: Tree, split: str | None) -> Source:
    """The photos of the split: those with boxes and those that its list of images names. None: of all splits.

    Photos that aren't there are left out, for few people download all; that is said. Raises UserError.
    """
    found = files(tree)
    if not found:
        raise UserError(f"{tree.root}: no Open Images annotations here (<split>-annotations-bbox.csv)")
    if split is not None and split not in found:
        hint = nearest(split, found)
        raise UserError(f"{tree.root}: no split '{split}'{hint}; there are: {', '.join(sorted(filter(None, found)))}")
    names = _descriptions(tree)
    photos: list[Photo] = []
    findings: list[Finding] = []
    used: set[str] = set()
    for own, file in found.items():
        if split in (None, own):
            reader = _File(tree, file, own, names)
            photos += reader.photos()
            findings += reader.findings + reader.tally.findings()
            used |= reader.used
    if split is None:
        photos += tree.images.unnamed(photos)
    classes = tuple(dict.fromkeys(names.values())) if names else tuple(sorted(used))
    unused = [name for name in classes if name not in used]
    if unused:
        what = f"{len(unused)} of {len(classes)} classes have no object: {', '.join(unused[:5])}"
        findings.append(Finding("unused category", "", what, "kept in the list of classes"))
    return Source(classes, photos, findings)


class _File:
    """One file of boxes."""

    def __init__(self, tree: Tree, file: str, split: str, names: dict[str, str]) -> None:
        self.tree, self.file, self.path, self.names = tree, file, tree.root / file, names
        self.near = [f"images/{split}", split, "images", posixpath.dirname(file)]
        self.findings: list[Finding] = []
        self.tally = Tally()
        self.used: set[str] = set()
        self.found: dict[str, tuple[Objects, list[tuple[Decimal, ...]]]] = {}
        self._read_lists(split)
        columns: dict[str, int] = {}
        for line, row in rows(self.path):
            if not columns:
                columns = {word: index for index, word in enumerate(row)}
                missing = [name for name in _NEEDED if name not in columns]
                if missing:
                    refuse(self.path, f"the header has no column {missing[0]}", line)
            else:
                self._row(line, row, columns)
        if not columns:
            refuse(self.path, "an empty file")

    def _read_lists(self, split: str) -> None:
        for name in self.tree.files:
            if not (listed := _LISTS.match(name)) or listed[1] != split:
                continue
            column = -1
            for _, row in rows(self.tree.root / name):
                if column < 0:
                    if "ImageID" not in row:
                        break
                    column = row.index("ImageID")
                elif column < len(row) and row[column]:
                    self.found.setdefault(row[column], (Objects(), []))

    def _row(self, line: int, row: list[str], columns: dict[str, int]) -> None:
        if len(row) < len(columns):
            refuse(self.path, f"{len(row)} columns, the header has {len(columns)}", line)
        known, label = row[columns["ImageID"]], row[columns["LabelName"]]
        name = self.names.get(label) if self.names else label
        if not known or not name:
            what = "the row names no image" if not known else f"label {shown(label)} is in no class description"
            refuse(self.path, what, line)
        try:
            corners = tuple(fraction(row[columns[key]].replace(",", ".")) for key in ("XMin", "YMin", "XMax", "YMax"))
        except ValueError as error:
            refuse(self.path, f"{shown(str(error))} is not a share of the photo's side", line)
        flags = sum(bit for key, bit in _MARKS.items() if key in columns and row[columns[key]] == "1")
        for key, what in _UNREAD.items():
            if key in columns and row[columns[key]] == "1":
                self.tally.add("not read", f"objects are {what}", "read like any other", self.file)
        objects, shares = self.found.setdefault(known, (Objects(), []))
        self.used.add(name)
        shares.append(corners)
        objects.add(name, (), flags, line)

    def photos(self) -> list[Photo]:
        """The photos that are there."""
        photos = []
        for known, (objects, shares) in self.found.items():
            images = self.tree.images
            image = images.find(known, self.near, suffix=False) or images.find(known, self.near)
            if not image:
                self._absent(len(shares))
                continue
            hw = imaging.size(self.tree.root / image)
            objects.boxes = [_box(corners, hw) for corners in shares]
            photos.append(Photo(image, self.file, objects.annotation(known, hw)))
        if self.found and not photos:
            first = next(iter(self.found))
            raise UserError(f"{self.path}: none of its {len(self.found)} photos is there, such as {shown(first)}")
        return photos

    def _absent(self, objects: int) -> None:
        self.tally.add("photo absent", "photos aren't there", "left out with their objects", self.file)
        self.tally.add("photo absent", "objects of photos that aren't there", "left out", self.file, objects)


def _box(corners: tuple[Decimal, ...], hw: Size) -> list[float]:
    return [edge(value, hw[1 - index % 2]) for index, value in enumerate(corners)]


def photo(split: str, name: str) -> str:  # noqa: ARG001
    """Where the photo goes."""
    return f"images/{name}"


def write(plan: Plan) -> None:
    """For each split a file of boxes and a list of its images; class-descriptions-boxable.csv."""
    for split, items in plan.splits.items():
        boxes, images = io.StringIO(newline=""), io.StringIO(newline="")
        writer, lister = csv.writer(boxes, lineterminator="\n"), csv.writer(images, lineterminator="\n")
        writer.writerow(_COLUMNS)
        lister.writerow(_LIST_COLUMNS)
        for item in items:
            annotation = item.photo.annotation
            if annotation is None:
                plan.lose_unlabelled("Open Images")
                continue
            lister.writerow((item.key, split or "train", *[""] * 10))
            upright, (height, width) = plan.upright(item)
            for name, (x1, y1, x2, y2), flags in zip(
                annotation.names, upright.tolist(), annotation.flags.tolist(), strict=True
            ):
                corners = share(x1, width), share(x2, width), share(y1, height), share(y2, height)
                marks = (int(bool(flags & bit)) for bit in _MARKS.values())
                writer.writerow((item.key, "xclick", name, 1, *corners, *marks, 0, 0))
            plan.lose_flags(annotation, sum(_MARKS.values()), "Open Images")
        plan.save(f"{split or 'train'}-annotations-bbox.csv", boxes.getvalue())
        plan.save(f"{split or 'train'}-images-with-rotation.csv", images.getvalue())
    described = io.StringIO(newline="")
    csv.writer(described, lineterminator="\n").writerows((name, name) for name in plan.classes)
    plan.save("class-descriptions-boxable.csv", described.getvalue())
