"""Pascal-VOC XML and a folder of photos: what each file says, which files belong together, and which are in a split.

The layout is VOC's (JPEGImages, Annotations, ImageSets/Main), or photos beside or near their XML in any folders. An
annotation belongs to the photo of the same relative path without suffix, else to the only one of the same stem.
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from math import isfinite, nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detkit import imaging
from detkit.config import Data
from detkit.data.findings import KINDS, REFUSED, Finding, located
from detkit.data.labels import LABELLING_TOOL, UNSAID, VOC_DEVKIT, Annotation, Columns, Labels, Remark, stated_size
from detkit.errors import UserError, nearest, need
from detkit.files import decoded
from detkit.types import DIFFICULT, OCCLUDED, TRUNCATED

Progress = Callable[[int, int], None]

FLAGS = {"difficult": DIFFICULT, "truncated": TRUNCATED, "occluded": OCCLUDED}
YES, NO = {"1", "true", "True", "yes", "Yes"}, {"0", "", "false", "False", "no", "No", "Unspecified"}
CORNERS = {"xmin": 0, "ymin": 1, "xmax": 2, "ymax": 3}
# What tools write, read here or not: only other tags can be misspelt ones.
_TAGS = {
    "annotation": ("folder", "filename", "path", "source", "size", "segmented", "object", "owner", "verified"),
    "object": ("name", "pose", "bndbox", "part", "parts", "attributes", "comment", "actions", "point", "polygon",
               "robndbox", "score", "id", "type", *FLAGS),
    "bndbox": (*CORNERS, "angle"),
    "size": ("width", "height", "depth"),
}  # fmt: skip


# What the annotations of each format end in.
_SUFFIXES = {
    "voc": (".xml",),
    "cvat": (".xml",),
    "coco": (".json",),
    "labelme": (".json",),
    "yolo": (".txt", ".yaml", ".yml"),
    "openimages": (".csv",),
    "csv": (".csv",),
}


_BINARY = os.O_RDONLY | getattr(os, "O_BINARY", 0)  # of Windows


class BadFileError(Exception):
    """An annotation that can't be read. Its arguments: the line (0: the file as a whole), and the reason."""


class Files(NamedTuple):
    """Files below the root, sorted: their relative POSIX paths, and what changes when a content does.

    stats: int64 [N, 4], size, mtime_ns, ctime_ns and inode. (Columns: a million objects would take half a gigabyte.)
    """

    names: Sequence[str]
    stats: NDArray[np.int64]


class Listing(NamedTuple):
    """The files of a data set: images, annotations, and the text files of splits and classes."""

    images: Files
    annotations: Files
    texts: Files


class Item(NamedTuple):
    """A photo's file and its annotation's, relative to the root; '' where one is missing."""

    image: str
    file: str


# --- one XML file ---------------------------------------------------------------------------------------------------


@cache
def _etree() -> Any:
    return need("lxml.etree")


@cache
def _parser(blank: bool) -> Any:
    return _etree().XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=False,
        remove_comments=True,
        remove_pis=True,
        remove_blank_text=not blank,  # a tenth of the time
    )


def tree(content: bytes, *, blank: bool = False) -> Any:
    """The root element (lxml) of an XML file. blank: keep the white space between elements.

    Raises BadFileError where it is no XML or has a DOCTYPE.
    """
    etree = _etree()
    try:
        root = etree.XML(content, _parser(blank))
    except etree.XMLSyntaxError as error:
        reason = " ".join(re.sub(r", line \d+, column \d+$", "", error.msg or "empty file").split())
        raise BadFileError(error.lineno or 1, f"not XML ({reason})") from None
    except ValueError as error:
        raise BadFileError(0, f"not XML ({error})") from None
    if root.getroottree().docinfo.internalDTD is not None:
        raise BadFileError(0, "a DOCTYPE is not allowed in an annotation: it could declare entities; remove it")
    return root


def _flag(tag: str, text: str, line: int, columns: Columns) -> int:
    if text in YES:
        return FLAGS[tag]
    if text not in NO:
        columns.remark("odd value", line, f"<{tag}> is '{text[:40]}', neither 0 nor 1")
    return 0


def _unknown(parent: str, element: Any, columns: Columns) -> None:
    """Note a tag that is not read though it looks like one that is."""
    known = nearest_tag(parent, element.tag)
    if known:
        columns.remark("misspelt tag", element.sourceline, f"<{element.tag}> in <{parent}> looks like <{known}>")


@cache
def nearest_tag(parent: str, tag: str) -> str:
    """The tag that is read in <parent> and that `tag` must have meant; '' where it is known, or like none."""
    known = _TAGS[parent]
    if tag in known:
        return ""
    close = get_close_matches(tag.lower(), known, 1, 0.75)
    return close[0] if close else ""


def take(element: Any, columns: Columns) -> None:
    """Take an <object>; one whose name or box can't be read is left out and noted."""
    name, flags, box = "", 0, None
    for child in element:
        tag = child.tag
        if tag == "name":
            name = (child.text or "").strip()
        elif tag == "bndbox":
            box = _corners(child, columns)
        elif tag in FLAGS:
            if (text := child.text) != "0":  # nearly always
                flags |= _flag(tag, (text or "").strip(), child.sourceline, columns)
        elif tag != "pose":
            _unknown("object", child, columns)
    if name and box:
        columns.add(name, box, flags, element.sourceline)
    elif box is None or not name:
        missing = "<name>" if box is not None else "<bndbox>"
        columns.remark("object unreadable", element.sourceline, f"the object has no {missing}")


def _corners(bndbox: Any, columns: Columns) -> list[float]:
    """xmin, ymin, xmax, ymax as written; empty, and noted, where one is no number."""
    corners = [nan] * 4
    try:
        for child in bndbox:
            place = CORNERS.get(child.tag)
            if place is not None:
                corners[place] = float(child.text)
            else:
                _unknown("bndbox", child, columns)
        if isfinite(sum(corners)):  # no corner is missing (NaN) or infinite
            return corners
    except (TypeError, ValueError):
        pass
    what = "the <bndbox> lacks a number for xmin, ymin, xmax or ymax"
    columns.remark("object unreadable", bndbox.sourceline, what)
    return []


def size(element: Any) -> tuple[int, int] | None:
    """The height and width that a <size> states, None where they are none."""
    sides = {child.tag: child.text for child in element}
    return stated_size(sides.get("height"), sides.get("width"))


def _origin(source: Any) -> int:
    """Which tool the <source> speaks of: VOC's own annotations are 1-based, LabelImg writes 'Unknown'."""
    for child in source:
        if child.tag == "database":
            said = (child.text or "").strip()
            return VOC_DEVKIT if said.startswith("The VOC") else LABELLING_TOOL if said == "Unknown" else UNSAID
    return UNSAID


def _walk(content: bytes, columns: Columns) -> str:
    """Add the file's photo to `columns`; the filename it states. Raises BadFileError, having added objects perhaps."""
    root = tree(content)
    if root.tag != "annotation":
        raise BadFileError(0, f"not a VOC annotation: its root is <{root.tag}>, not <annotation>")
    filename, stated, origin = "", None, UNSAID
    for child in root:
        tag = child.tag
        if tag == "object":
            take(child, columns)
        elif tag == "size":
            stated = size(child)
        elif tag == "filename":
            filename = (child.text or "").strip()
        elif tag == "source":
            origin = _origin(child)
        elif tag != "folder" and tag != "path" and tag != "segmented":
            _unknown("annotation", child, columns)
    columns.end(stated, origin)
    return filename


def _content(path: str) -> bytes:
    try:
        file = os.open(path, _BINARY)  # half the time that open takes over a small file
        try:
            content = b""
            while more := os.read(file, 1 << 20):
                content += more
            return content
        finally:
            os.close(file)
    except OSError as error:
        raise BadFileError(0, f"can't be read ({error.strerror or error})") from None


def digest(content: bytes) -> bytes:
    """16 bytes that stand for a file's content."""
    return hashlib.blake2b(content, digest_size=16).digest()


def parse(root: Path, names: Sequence[str], progress: Progress | None = None) -> tuple[Labels, list[bytes]]:
    """The annotations in those files (relative to the root), each with `digest` of its content, b"" where unreadable.

    Corners are as written. Nothing is raised: what can't be read is left out, with a remark of a kind of level 'error'.
    """
    columns, digests = Columns(), []
    prefix = str(root) + os.sep
    for done, name in enumerate(names, 1):
        content = b""
        try:
            content = _content(prefix + name)
            filename = _walk(content, columns)
            stem = name[name.rfind("/") + 1 : name.rfind(".")]
            if filename and not same_stem(filename, stem):
                columns.remarks.append(Remark(done - 1, "filename differs", 0, f"<filename> is '{filename[:80]}'"))
        except BadFileError as error:
            columns.drop()
            columns.remark("annotation unreadable", *error.args)
            columns.end()
        digests.append(digest(content) if content else b"")
        if progress:
            progress(done, len(names))
    return columns.labels(), digests


def same_stem(filename: str, stem: str) -> bool:
    """Whether a <filename>, perhaps with a path in front, is that of the photo `stem`."""
    if filename.startswith(stem) and filename.find(".", len(stem)) == len(stem):
        return True  # nearly always
    name = filename.replace("\\", "/").rpartition("/")[2]
    return name == stem or name.rpartition(".")[0] == stem


def read(path: str | Path, convention: str = "edges") -> Annotation:
    """The annotation in one VOC XML file, nothing left out or clipped.

    convention: 'edges' takes the corners as written; 'devkit' reads them as 1-based inclusive pixels. Raises UserError
    naming the file (and line) where it is no XML, has a DOCTYPE, or an object lacks its name or box.
    """
    columns = Columns()
    try:
        filename = _walk(_content(str(path)), columns)
        for remark in columns.remarks:
            if KINDS[remark.kind].level == "error":
                raise BadFileError(remark.line, remark.what)
    except BadFileError as error:
        raise UserError(f"{path}: {located(*error.args)}") from None
    found = columns.labels()
    height, width = found.hw[0].tolist()
    names = tuple(found.vocabulary[index] for index in found.names)
    boxes = edges(found.boxes, convention)
    return Annotation(filename, (height, width) if height else None, names, boxes, found.flags, found.lines)


def edges(boxes: NDArray[np.float64], convention: str) -> NDArray[np.float64]:
    """VOC corners as written -> 0-based edges: 1-based inclusive pixels ('devkit') lose one at the low side."""
    return boxes - [1, 1, 0, 0] if convention == "devkit" else boxes


# --- which files there are ------------------------------------------------------------------------------------------


class _Found:
    """Files in the making."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.stats = array("q")

    def add(self, name: str, stat: os.stat_result) -> None:
        self.names.append(name)
        # Some file systems of Windows number files with 128 bits.
        self.stats.extend((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino & 0x7FFF_FFFF_FFFF_FFFF))

    def files(self) -> Files:
        order = sorted(range(len(self.names)), key=self.names.__getitem__)
        stats = np.array(self.stats, np.int64).reshape(-1, 4)
        return Files([self.names[index] for index in order], stats[order])


def _walk_folder(folder: str, prefix: str, wanted: Sequence[tuple[tuple[str, ...], _Found]], seen: set[Any]) -> None:
    """Add every file below `folder` to those of `wanted` that have its suffix; hidden ones are left out. Links are
    followed, but no folder is entered twice."""
    stat = os.stat(folder)  # noqa: PTH116 (a million files: no Path for each)
    if (stat.st_dev, stat.st_ino) in seen:
        return
    seen.add((stat.st_dev, stat.st_ino))
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if entry.is_dir():
                _walk_folder(entry.path, f"{prefix}{name}/", wanted, seen)
                continue
            ending = name[-5:].lower()
            for suffixes, found in wanted:
                if ending.endswith(suffixes) and entry.is_file():
                    found.add(prefix + name, entry.stat())


def listing(data: Data) -> Listing:
    """The data set's files. Raises UserError where the root is missing or holds no image."""
    root = data.root
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; set data.root to the folder of your data set")
    images, annotations, texts = _Found(), _Found(), _Found()
    kinds = {"JPEGImages": (imaging.IMAGE_SUFFIXES, images), "Annotations": (_SUFFIXES[data.format], annotations)}
    below: dict[str, list[tuple[tuple[str, ...], _Found]]] = {"ImageSets": [((".txt",), texts)]}
    for name, kind in kinds.items():
        below.setdefault(name if data.format == "voc" and (root / name).is_dir() else "", []).append(kind)
    try:
        for name, wanted in below.items():
            if (root / name).is_dir():
                _walk_folder(str(root / name), f"{name}/" if name else "", wanted, set())
        extra = [*root.glob("*.txt"), *([_classes_path(data)] if isinstance(data.classes, Path) else [])]
        for path in sorted(extra):
            texts.add(str(path), path.stat())
    except OSError as error:
        raise UserError(f"{error.filename or root}: can't be read ({error.strerror})") from None
    if not images.names:
        where = root / "JPEGImages" if "JPEGImages" in below else root
        raise UserError(f"{where}: no images here ({' '.join(imaging.IMAGE_SUFFIXES)})")
    return Listing(images.files(), annotations.files(), texts.files())


def key(name: str) -> str:
    """The path without its suffix and, in VOC's layout, without the two folders that keep photos and XML apart."""
    stem = name[: name.rindex(".")]
    return stem.removeprefix("JPEGImages/").removeprefix("Annotations/")


def _keyed(files: Files, findings: list[Finding]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in files.names:
        other = found.setdefault(key(name), name)
        if other != name:
            findings.append(Finding("same name twice", name, f"{other} has the same name", REFUSED))
    return found


def _stems(keys: Iterable[str]) -> dict[str, str]:
    """The keys by their last part; those whose last part is not unique are left out."""
    keys = list(keys)
    count = Counter(key.rpartition("/")[2] for key in keys)
    return {stem: key for key in keys if count[stem := key.rpartition("/")[2]] == 1}


def pair(files: Listing, findings: list[Finding]) -> dict[str, Item]:
    """Photos and annotations that belong together, by key (path without suffix), sorted.

    Of two images, or two annotations, of the same name the first is taken and the other added to `findings`.
    """
    images, notes = _keyed(files.images, findings), _keyed(files.annotations, findings)
    items = {name: Item(image, notes.pop(name, "")) for name, image in images.items()}
    if notes:
        lone = _stems(name for name, item in items.items() if not item.file)
        for stem, name in _stems(notes).items():
            if stem in lone:
                items[lone[stem]] = Item(items[lone[stem]].image, notes.pop(name))
    items |= {name: Item("", note) for name, note in notes.items()}
    return dict(sorted(items.items()))


# --- splits and classes ---------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in decoded(path.read_bytes()).splitlines()]


def split_files(root: Path) -> dict[str, Path]:
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


def _listed(path: Path, items: dict[str, Item], findings: list[Finding], name: str) -> list[str]:
    """The keys that a split file lists, in its order."""
    stems = _stems(items)
    chosen: dict[str, None] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line:
            continue
        found = _find(line, items, stems)
        if found is None:
            hint = nearest(line, items) if len(items) < 20_000 else ""  # it compares with every one
            what = f"no photo or annotation is named '{line[:80]}'{hint}"
            findings.append(Finding("listed but missing", name, what, REFUSED, number))
        elif found in chosen:
            findings.append(Finding("listed twice", name, line, "used once", number))
        else:
            chosen[found] = None
    if not chosen and not any(finding.kind == "listed but missing" and finding.file == name for finding in findings):
        raise UserError(f"{path}: lists no photo")
    return list(chosen)


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


def splits(data: Data) -> tuple[str, ...]:
    """The names of the data set's splits: its split files', else those of the hash split."""
    return tuple(split_files(data.root)) or ("train", "val")


def choose(data: Data, split: str, items: dict[str, Item], findings: list[Finding]) -> list[str]:
    """The keys of the split: as its file lists them, else by hash; 'all', where no file has that name, means every one.

    A line that names no photo goes to `findings`. Raises UserError where there is no such split, or it is empty.
    """
    files = split_files(data.root)
    if split in files:
        path = files[split]
        return _listed(path, items, findings, path.relative_to(data.root).as_posix())
    if split == "all":
        return list(items)
    if files:
        folder = next(iter(files.values())).parent
        raise UserError(f"{folder}: no split '{split}'{nearest(split, files)}; there are: {', '.join(sorted(files))}")
    if split not in ("train", "val"):
        raise UserError(f"{data.root}: no split '{split}': without split files there are 'train', 'val' and 'all'")
    chosen = [name for name in items if _hash_split(name, data.val_share) == split]
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
