"""Pascal-VOC XML and a folder of photos -> a DataSet, with everything that was not taken as written listed.

The layout is VOC's (JPEGImages, Annotations, ImageSets/Main), or photos beside or near their XML in any folders. An
annotation belongs to the photo of the same relative path without suffix, else to the only one of the same stem.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite, nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detkit import imaging
from detkit.config import Data
from detkit.errors import UserError, nearest, need
from detkit.files import atomic_write
from detkit.formats import number
from detkit.types import DIFFICULT, OCCLUDED, TRUNCATED, Record

PARSER = 1  # raise it when the same files would give another DataSet: it makes old caches stale
Progress = Callable[[int, int], None]

_FLAGS = {"difficult": DIFFICULT, "truncated": TRUNCATED, "occluded": OCCLUDED}
_YES = ("1", "true", "True", "yes")
_CORNERS = {"xmin": 0, "ymin": 1, "xmax": 2, "ymax": 3}


class Finding(NamedTuple):
    """Something not taken as written: its kind, the file (relative to the root), what is wrong, what was done."""

    kind: str
    file: str
    what: str
    action: str


@dataclass(frozen=True, slots=True, eq=False)
class Annotation:
    """One XML file as it is written.

    filename: as in the XML, '' where missing. hw: height and width as in the XML, None where missing or zero.
    names: the class name of each object. boxes: float64 [G, 4] x1 y1 x2 y2, 0-based edges. flags: uint8 [G], a sum of
    DIFFICULT, TRUNCATED, OCCLUDED.
    """

    filename: str
    hw: tuple[int, int] | None
    names: tuple[str, ...]
    boxes: NDArray[np.float64]
    flags: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class DataSet:
    """The photos of one split: flat columns that processes share; a Record is made when asked for.

    paths: uint8, the photos' paths relative to `root`, UTF-8, joined; path_ends: int64 [N]. hw: int32 [N, 2].
    boxes: float64 [M, 4]. labels: int32 [M]. flags: uint8 [M]. box_ends: int64 [N].
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

    def name(self, index: int) -> str:
        """The photo's path relative to the root, with forward slashes."""
        first = int(self.path_ends[index - 1]) if index else 0
        return os.fsdecode(self.paths[first : int(self.path_ends[index])].tobytes())


class File(NamedTuple):
    """A file below the root: its relative POSIX path, and what changes when its content does."""

    name: str
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a data set, sorted by name: images, annotations, and the text files of splits and classes."""

    images: tuple[File, ...]
    xmls: tuple[File, ...]
    texts: tuple[File, ...]


class Item(NamedTuple):
    """A photo and its annotation, relative to the root; '' where one is missing."""

    image: str
    xml: str


# --- one XML file ---------------------------------------------------------------------------------------------------


@cache
def _etree() -> Any:
    return need("lxml.etree")


@cache
def _parser() -> Any:
    return _etree().XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=False,
        remove_comments=True,
        remove_pis=True,
    )


def _tree(path: str) -> Any:
    """The root element. Raises UserError where the file is no XML, no VOC annotation, or declares entities."""
    etree = _etree()
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (Path.open doubles the time of a small file)
            root = etree.XML(file.read(), _parser())
    except etree.XMLSyntaxError as error:
        reason = " ".join(re.sub(r", line \d+, column \d+$", "", error.msg or "empty file").split())
        raise UserError(f"{path}: not XML (line {error.lineno or 1}: {reason})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
    if root.getroottree().docinfo.internalDTD is not None:
        raise UserError(f"{path}: a DOCTYPE is not allowed in an annotation: it could declare entities; remove it")
    if root.tag != "annotation":
        raise UserError(f"{path}: not a VOC annotation: its root is <{root.tag}>, not <annotation>")
    return root


class _Columns:
    """Objects of many annotations, in flat lists."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.boxes = array("d")
        self.flags = array("B")

    def add(self, element: Any, path: str) -> None:
        """Take an <object>. Raises UserError where its name or box is missing or no number."""
        name, flag, box = "", 0, None
        for child in element:
            tag = child.tag
            if tag == "name":
                name = (child.text or "").strip()
            elif tag == "bndbox":
                box = _corners(child, path)
            elif tag in _FLAGS and (child.text or "").strip() in _YES:
                flag |= _FLAGS[tag]
        if not name or box is None:
            missing = "<name>" if box is not None else "<bndbox>"
            raise UserError(f"{path}: the object in line {element.sourceline} has no {missing}")
        self.names.append(name)
        self.boxes.extend(box)
        self.flags.append(flag)


def _corners(bndbox: Any, path: str) -> list[float]:
    corners = [nan] * 4
    try:
        for child in bndbox:
            place = _CORNERS.get(child.tag)
            if place is not None:
                corners[place] = float(child.text)
        if isfinite(sum(corners)):  # no corner is missing (NaN) or infinite
            return corners
    except (TypeError, ValueError):
        pass
    raise UserError(f"{path}: the <bndbox> in line {bndbox.sourceline} lacks a number for xmin, ymin, xmax or ymax")


def _size(element: Any) -> tuple[int, int] | None:
    sides = {child.tag: (child.text or "").strip() for child in element}
    try:
        height, width = int(float(sides["height"])), int(float(sides["width"]))
    except (KeyError, ValueError, OverflowError):
        return None
    return (height, width) if height > 0 and width > 0 else None


def _walk(path: str, columns: _Columns) -> tuple[str, tuple[int, int] | None]:
    """Add the file's objects to `columns`; the filename and the size it states."""
    filename, stated = "", None
    for child in _tree(path):
        if child.tag == "object":
            columns.add(child, path)
        elif child.tag == "size":
            stated = _size(child)
        elif child.tag == "filename":
            filename = (child.text or "").strip()
    return filename, stated


def _edges(columns: _Columns, convention: str) -> NDArray[np.float64]:
    boxes = np.array(columns.boxes, np.float64).reshape(-1, 4)
    if convention == "devkit":
        boxes[:, :2] -= 1
    return boxes


def read(path: str | Path, convention: str = "edges") -> Annotation:
    """The annotation in one VOC XML file, nothing left out or clipped.

    convention: 'edges' takes the corners as written; 'devkit' reads them as 1-based inclusive pixels. Raises UserError
    naming the file (and line) where it is no XML, has a DOCTYPE, or an object lacks its name or box.
    """
    columns = _Columns()
    filename, stated = _walk(str(path), columns)
    boxes, flags = _edges(columns, convention), np.array(columns.flags, np.uint8)
    return Annotation(filename, stated, tuple(columns.names), boxes, flags)


# --- which files there are ------------------------------------------------------------------------------------------


def _files(folder: Path, root: Path, seen: set[tuple[int, int]]) -> Iterator[File]:
    """Every file below `folder`, hidden ones left out; links are followed, but no folder is entered twice."""
    stat = folder.stat()
    if (stat.st_dev, stat.st_ino) in seen:
        return
    seen.add((stat.st_dev, stat.st_ino))
    prefix = folder.relative_to(root).as_posix()
    prefix = "" if prefix == "." else prefix + "/"
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _files(Path(entry.path), root, seen)
            elif entry.is_file():
                stat = entry.stat()
                yield File(prefix + entry.name, stat.st_size, stat.st_mtime_ns, stat.st_ino)


def listing(data: Data) -> Listing:
    """The data set's files. Raises UserError where the root is missing or holds no image."""
    root = data.root
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; set data.root to the folder of your data set")
    photos, notes = ((root / name) if (root / name).is_dir() else root for name in ("JPEGImages", "Annotations"))
    below: dict[Path, list[File]] = {}
    try:
        for folder in {photos, notes, root / "ImageSets"}:
            below[folder] = sorted(_files(folder, root, set())) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{error.filename or root}: can't be read ({error.strerror})") from None
    images = tuple(file for file in below[photos] if file.name.lower().endswith(imaging.IMAGE_SUFFIXES))
    xmls = tuple(file for file in below[notes] if file.name.lower().endswith(".xml"))
    if not images:
        raise UserError(f"{photos}: no images here ({' '.join(imaging.IMAGE_SUFFIXES)})")
    texts = [file for file in below[root / "ImageSets"] if file.name.endswith(".txt")]
    extra = [*root.glob("*.txt"), *([_classes_path(data)] if isinstance(data.classes, Path) else [])]
    for path in sorted(extra):
        stat = path.stat()
        texts.append(File(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return Listing(images, xmls, tuple(texts))


def _key(name: str) -> str:
    """The path without its suffix and, in VOC's layout, without the two folders that keep photos and XML apart."""
    stem = name[: name.rindex(".")]
    return stem.removeprefix("JPEGImages/").removeprefix("Annotations/")


def _keyed(root: Path, files: Sequence[File]) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in files:
        other = found.setdefault(_key(file.name), file.name)
        if other != file.name:
            raise UserError(f"{root / file.name}: {other} has the same name; one annotation can't belong to both")
    return found


def _stems(keys: Iterable[str]) -> dict[str, str]:
    """The keys by their last part; those whose last part is not unique are left out."""
    keys = list(keys)
    count = Counter(key.rpartition("/")[2] for key in keys)
    return {stem: key for key in keys if count[stem := key.rpartition("/")[2]] == 1}


def pair(root: Path, files: Listing) -> dict[str, Item]:
    """Photos and annotations that belong together, by key (path without suffix), sorted.

    Raises UserError where two images, or two annotations, have the same name.
    """
    images, xmls = _keyed(root, files.images), _keyed(root, files.xmls)
    items = {key: Item(name, xmls.pop(key, "")) for key, name in images.items()}
    if xmls:
        lone = _stems(key for key, item in items.items() if not item.xml)
        for stem, key in _stems(xmls).items():
            if stem in lone:
                items[lone[stem]] = Item(items[lone[stem]].image, xmls.pop(key))
    items |= {key: Item("", name) for key, name in xmls.items()}
    return dict(sorted(items.items()))


# --- splits and classes ---------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    """The lines of a text file as Windows, LabelImg or PowerShell may have written it."""
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = raw.decode("utf-16", "replace")
    else:
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("cp1252", "replace")
    return [line.strip() for line in text.splitlines()]


def _split_files(root: Path) -> dict[str, Path]:
    """The split files by name: ImageSets/Main/<name>.txt, else ImageSets/<name>.txt, else train.txt and so on."""
    for folder in (root / "ImageSets" / "Main", root / "ImageSets"):
        if found := {path.stem: path for path in sorted(folder.glob("*.txt"))}:
            return found
    names = ("train", "val", "trainval", "test")
    return {name: root / f"{name}.txt" for name in names if (root / f"{name}.txt").is_file()}


def _hash_split(key: str, val_share: float) -> str:
    """'train' or 'val', by the key alone: adding photos moves none of the others."""
    draw = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
    return "val" if draw < val_share else "train"


def _listed(path: Path, items: dict[str, Item], findings: list[Finding], name: str) -> dict[str, Item]:
    """The items that a split file lists, in its order."""
    stems = _stems(items)
    chosen: dict[str, Item] = {}
    for number_, line in enumerate(_lines(path), 1):
        if not line:
            continue
        key = _find(line, items, stems)
        if key is None:
            hint = nearest(line, items) if len(items) < 20_000 else ""  # it compares with every one
            raise UserError(f"{path}: line {number_}: no photo or annotation is named '{line[:80]}'{hint}")
        if key in chosen:
            findings.append(Finding("listed twice", name, f"line {number_}: {line}", "used once"))
        chosen[key] = items[key]
    if not chosen:
        raise UserError(f"{path}: lists no photo")
    return chosen


def _find(line: str, items: dict[str, Item], stems: dict[str, str]) -> str | None:
    """The key that a line of a split file means: a path or stem, with or without suffix, perhaps VOC's 1 or -1."""
    name = line.replace("\\", "/").removeprefix("./")
    for text in (name, re.sub(r"\s+-?[01]$", "", name)):
        for key in (text, re.sub(r"\.[A-Za-z]+$", "", text)):
            key = key.removeprefix("JPEGImages/").removeprefix("Annotations/")
            if key in items:
                return key
            if key in stems:
                return stems[key]
    return None


def _choose(data: Data, split: str, items: dict[str, Item], findings: list[Finding]) -> dict[str, Item]:
    """The items of the split: as its file lists them, else by hash."""
    files = _split_files(data.root)
    if split in files:
        path = files[split]
        return _listed(path, items, findings, path.relative_to(data.root).as_posix())
    if files:
        folder = next(iter(files.values())).parent
        raise UserError(f"{folder}: no split '{split}'{nearest(split, files)}; there are: {', '.join(sorted(files))}")
    if split not in ("train", "val"):
        raise UserError(f"{data.root}: no split '{split}': without split files there are 'train' and 'val'")
    chosen = {key: item for key, item in items.items() if _hash_split(key, data.val_share) == split}
    if not chosen:
        raise UserError(f"{data.root}: none of its {len(items)} photos falls into '{split}'; change data.val_share")
    return chosen


def _classes_path(data: Data) -> Path:
    """The file that data.classes names: as given, else below the root."""
    assert isinstance(data.classes, Path)
    for path in (data.classes, data.root / data.classes):
        if path.is_file():
            return path
    raise UserError(f"{data.classes}: no such file of class names (data.classes)")


def known_classes(data: Data) -> tuple[str, ...] | None:
    """The class names that the config or ROOT/classes.txt lists, None where neither does. Raises UserError."""
    if isinstance(data.classes, tuple):
        names, source = list(data.classes), "data.classes"
    else:
        path = _classes_path(data) if data.classes is not None else data.root / "classes.txt"
        if not path.is_file():
            return None
        names, source = [line for line in _lines(path) if line], str(path)
    if not names:
        raise UserError(f"{source}: lists no class")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{source}: lists the class '{twice[0]}' twice")
    return tuple(names)


def _found_classes(data: Data, items: Iterable[Item]) -> tuple[str, ...]:
    """Every class name in the XML of the whole data set, sorted."""
    columns = _Columns()
    for item in items:
        if item.xml:
            _walk(str(data.root / item.xml), columns)
    if not columns.names:
        raise UserError(f"{data.root}: no object in any of its annotations")
    return tuple(sorted(set(columns.names)))


# --- the scan -------------------------------------------------------------------------------------------------------


def _complete(data: Data, items: dict[str, Item], findings: list[Finding]) -> list[Item]:
    """The items to use: each has its image; those without XML as data.unlabelled says."""
    for item in items.values():
        if not item.image:
            raise UserError(f"{data.root / item.xml}: there is no image of this name")
    bare = [item for item in items.values() if not item.xml]
    if bare and data.unlabelled == "error":
        more = f" and {len(bare) - 1} more" if len(bare) > 1 else ""
        raise UserError(
            f"{data.root / bare[0].image}: no XML for this image{more}; "
            "set data.unlabelled to 'skip' (leave them out) or 'negative' (they show no object)"
        )
    action = {"skip": "left out", "negative": "used as a photo without objects"}.get(data.unlabelled, "")
    findings += [Finding("image without XML", item.image, "it has no annotation", action) for item in bare]
    return [item for item in items.values() if item.xml or data.unlabelled == "negative"]


def _size_finding(item: Item, stated: tuple[int, int] | None, hw: tuple[int, int]) -> Finding | None:
    if stated == hw:
        return None
    if stated is None:
        return Finding("size missing", item.xml, "the XML states no size", f"the image's {hw[1]}x{hw[0]} is used")
    what = f"the XML says {stated[1]}x{stated[0]}, the image is {hw[1]}x{hw[0]}"
    if stated == hw[::-1]:
        what += " (turned by its EXIF tag?)"
    return Finding("size disagrees", item.xml, what, "the image's size is used, boxes are taken as written")


def _text(box: NDArray[np.float64]) -> str:
    return " ".join(number(value) for value in box.tolist())


class _Scan:
    """The columns of the split being read."""

    def __init__(self, data: Data, classes: tuple[str, ...], findings: list[Finding]) -> None:
        self.data, self.classes, self.findings = data, classes, findings
        self.ids = {name: index for index, name in enumerate(classes)}
        self.columns = _Columns()
        self.labels = array("i")
        self.counts = array("q")
        self.hw = array("i")

    def add(self, item: Item) -> None:
        """Read one photo's header and its XML."""
        before = len(self.columns.names)
        hw = imaging.check(self.data.root / item.image)
        if item.xml:
            path = str(self.data.root / item.xml)
            finding = _size_finding(item, _walk(path, self.columns)[1], hw)
            if finding:
                self.findings.append(finding)
            for name in self.columns.names[before:]:
                if name not in self.ids:
                    raise UserError(f"{path}: class '{name}' is not in the list{nearest(name, self.classes)}")
                self.labels.append(self.ids[name])
        self.counts.append(len(self.columns.names) - before)
        self.hw.extend(hw)

    def finish(self, items: Sequence[Item]) -> DataSet:
        """Clip and drop what must be, all boxes at once."""
        boxes = _edges(self.columns, self.data.convention)
        hw = np.array(self.hw, np.int32).reshape(-1, 2)
        photo = np.repeat(np.arange(len(items)), np.array(self.counts, np.int64))
        limits = np.tile(hw[photo][:, ::-1], 2)
        clipped = np.clip(boxes, 0, limits)
        empty = np.any(boxes[:, 2:] <= boxes[:, :2], axis=1)
        outside = np.any(clipped[:, 2:] <= clipped[:, :2], axis=1) & ~empty
        changed = np.any(clipped != boxes, axis=1)
        for index in np.flatnonzero(empty | outside | changed):
            item, name, box = items[photo[index]], self.columns.names[index], _text(boxes[index])
            width, height = limits[index, :2]
            if empty[index]:
                kind, action = "box without area", "dropped"
            elif outside[index]:
                kind, action = "box outside the image", "dropped"
            else:
                kind, action = "box partly outside", f"clipped to {_text(clipped[index])}"
            what = f"{name} {box} in an image of {width}x{height}"
            self.findings.append(Finding(kind, item.xml, what, action))
        keep = ~(empty | outside)
        paths = [os.fsencode(item.image) for item in items]
        return DataSet(
            root=str(self.data.root),
            classes=self.classes,
            paths=np.frombuffer(b"".join(paths), np.uint8),
            path_ends=np.cumsum([len(path) for path in paths], dtype=np.int64),
            hw=hw,
            boxes=np.ascontiguousarray(clipped[keep]),
            labels=np.array(self.labels, np.int32)[keep],
            flags=np.array(self.columns.flags, np.uint8)[keep],
            box_ends=np.cumsum(np.bincount(photo[keep], minlength=len(items)), dtype=np.int64),
            findings=tuple(self.findings),
        )


def scan(data: Data, split: str, files: Listing | None = None, progress: Progress | None = None) -> DataSet:
    """Read and check a split: every XML, and every image's header and end.

    files: the result of `listing`, if at hand. progress: called with (photos done, photos in all).
    Raises UserError, naming the file, for a missing or empty folder or split, an XML without image or that is no VOC
    XML, an image that is cut off or (see data.unlabelled) has no XML, and a class that is not in the list. Boxes
    outside the image are clipped, those without area dropped; each such change is in the result's `findings`.
    """
    items = pair(data.root, files or listing(data))
    findings: list[Finding] = []
    chosen = _complete(data, _choose(data, split, items, findings), findings)
    classes = known_classes(data) or _found_classes(data, items.values())
    reader = _Scan(data, classes, findings)
    for done, item in enumerate(chosen, 1):
        reader.add(item)
        if progress:
            progress(done, len(chosen))
    if not reader.columns.names:
        raise UserError(f"{data.root}: no object in any of the {len(chosen)} annotations of split '{split}'")
    return reader.finish(chosen)


def summary(findings: Sequence[Finding]) -> list[str]:
    """One line a kind of finding: how many, what is done, and the first of them."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.kind, []).append(finding)
    lines = []
    for kind, group in groups.items():
        first = group[0]
        more = "" if len(group) == 1 else f" and {len(group) - 1} more"
        lines.append(f"{kind}: {first.file}{more} ({first.what}; {first.action})")
    return lines


def write_findings(path: Path, findings: Sequence[Finding]) -> None:
    """Write every finding as a JSON line: kind, file, what, action."""
    text = "".join(json.dumps(finding._asdict(), ensure_ascii=False) + "\n" for finding in findings)
    atomic_write(path, text.encode("utf-8", "surrogateescape"))
