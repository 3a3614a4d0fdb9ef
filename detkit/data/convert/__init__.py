"""Annotations in other formats: COCO JSON, YOLO, LabelMe, CVAT XML, Open Images CSV and plain CSV, beside VOC XML.

Each format is a module with `splits`, `read`, `write`, and `photo`, which says where photos go. What is read is what is
written in the files: nothing is clipped or left out unsaid.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np

from detkit.config import Data
from detkit.data import voc as house
from detkit.data.convert import coco, cvat, labelme, openimages, plain, voc, yolo
from detkit.data.convert.common import (
    FARTHEST,
    Item,
    Plan,
    Progress,
    Tally,
    Tree,
    identity,
    merged,
    name_all,
    safe_path,
    shown,
)
from detkit.data.findings import Finding, located
from detkit.data.labels import Photo, Source
from detkit.errors import UserError, nearest
from detkit.files import require_free, whole_folder

Images = Literal["copy", "link", "none"]

_MODULES: dict[str, ModuleType] = {
    "voc": voc,
    "coco": coco,
    "yolo": yolo,
    "labelme": labelme,
    "cvat": cvat,
    "openimages": openimages,
    "csv": plain,
}
FORMATS = tuple(_MODULES)

_A_FILE_A_PHOTO = ("voc", "yolo", "labelme")  # their readers report progress
_ONE_FILE_FOR_ALL_SPLITS = ("voc", "labelme")
_NOT_IN_XML = re.compile("[^ \u0021-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _module(format_name: str) -> Any:
    try:
        return _MODULES[format_name]
    except KeyError:
        known = ", ".join(FORMATS)
        raise UserError(f"no format '{format_name}'{nearest(format_name, FORMATS)}; there are: {known}") from None


def _opened(root: Path, images: Path | None) -> tuple[Tree, str | None]:
    """The tree, and the split where `root` is a file: its name."""
    if root.is_file():
        return Tree(root.parent, images), root.name
    return Tree(root, images), None


def splits(format_name: str, root: Path) -> tuple[str, ...]:
    """The splits that the data set itself has; empty where it has none, or its format holds none. Raises UserError."""
    tree, file = _opened(root, None)
    return () if file else tuple(_module(format_name).splits(tree))


def read(
    format_name: str,
    root: Path,
    split: str | None,
    images: Path | None = None,
    *,
    convention: str = "auto",
    progress: Progress | None = None,
) -> Source:
    """A split of a data set, None: all of it, photos without annotation too.

    root: its folder, or a COCO or CSV file. split: one of `splits`; for COCO and CSV also a file's path below the root;
    where the format has no splits, one of the files in ImageSets/Main, or of the hash split. images: the folder of the
    photos, where it is not the root; those outside have their absolute path in the result. convention: VOC's
    coordinates, see the setting. progress: called with (files read, in all) where a photo has a file of its own.

    Raises UserError, one line that names the file and line, where an annotation can't be read, or it can't be known
    what class an object or which photo an annotation is of.
    """
    tree, file = _opened(root, images)
    return _read(format_name, tree, file or split, convention, progress)


def read_all(format_name: str, root: Path) -> dict[str | None, Source]:
    """Each of the data set's `splits`, or all its photos under None where it has none, as `read` reads them."""
    tree, _ = _opened(root, None)
    names = tuple(_module(format_name).splits(tree))
    return {name: _read(format_name, tree, name, "auto", None) for name in names or (None,)}


def _read(format_name: str, tree: Tree, split: str | None, convention: str, progress: Progress | None) -> Source:
    module = _module(format_name)
    options: dict[str, Any] = {"progress": progress} if format_name in _A_FILE_A_PHOTO else {}
    if format_name == "voc":
        options["convention"] = convention
    listed = split is not None and split not in tree.files and format_name != "voc" and not module.splits(tree)
    source = module.read(tree, None if listed else split, **options)
    findings = list(source.findings)
    photos = merged(source.photos, findings)
    if listed:
        assert split is not None
        items = {house.key(photo.image or photo.file): photo for photo in photos}
        pairs = {key: house.Item(photo.image, photo.file) for key, photo in items.items()}
        photos = [items[key] for key in house.choose(Data(root=tree.root), split, pairs, findings)]
    return Source(source.classes, photos, findings)


def sniff(root: Path) -> str | None:
    """The format of a folder or file, None where that is not plain: it is in none, or in several. Raises UserError."""
    if root.is_file():
        tree = Tree(root.parent)
        tree.files = [root.name]
    else:
        tree = Tree(root)
    found = [name for name, looks in _LOOKS.items() if looks(tree)]
    return found[0] if len(found) == 1 else None


def _xml_root(tree: Tree, root: str) -> bool:
    first = next(iter(tree.ending(".xml")), None)
    return first is not None and cvat._root(tree, first) == root


def _has_shapes(tree: Tree) -> bool:
    first = next(iter(tree.ending(".json")), None)
    try:
        return first is not None and b'"shapes"' in (tree.root / first).read_bytes()
    except OSError:
        return False


def _is_yolo(tree: Tree) -> bool:
    return bool(yolo.config_file(tree)) or (
        any(name in tree.files for name in ("classes.txt", "obj.names", "labels/classes.txt"))
        and any(name.startswith("labels/") for name in tree.files)
    )


_LOOKS: dict[str, Callable[[Tree], bool]] = {
    "voc": lambda tree: _xml_root(tree, "annotation"),
    "coco": lambda tree: bool(coco.files(tree)),
    "yolo": _is_yolo,
    "labelme": _has_shapes,
    "cvat": lambda tree: _xml_root(tree, "annotations"),
    "openimages": lambda tree: bool(openimages.files(tree)),
    "csv": lambda tree: bool(plain.files(tree)) and not openimages.files(tree),
}


# --- writing --------------------------------------------------------------------------------------------------------


def _check(photos: Iterable[Photo], classes: Sequence[str], root: Path, *, xml: bool) -> None:
    """Raise UserError where there is something that no file can hold."""
    known = set(classes)
    for name in classes:
        if not name.strip() or name.splitlines() != [name] or (xml and _NOT_IN_XML.search(name)):
            raise UserError(f"{root}: class {shown(name)} can't be written in this format; rename it")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{root}: class {shown(name)} is not valid Unicode; rename it") from None
    if len(known) < len(classes):
        raise UserError(f"{root}: the list of classes has a name twice")
    for photo in photos:
        if photo.annotation is None:
            continue
        where = root / (photo.file or photo.image)
        unknown = next((name for name in photo.annotation.names if name not in known), None)
        if unknown is not None:
            raise UserError(f"{where}: class {shown(unknown)} is not in the list{nearest(unknown, classes)}")
        if not np.all(np.abs(photo.annotation.boxes) <= FARTHEST):
            raise UserError(f"{where}: a box of {photo.image or photo.annotation.filename} is beyond any photo")


def _put(source: Path, target: Path, how: Images) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if how == "copy":
        shutil.copyfile(source, target)
        return
    try:
        target.symlink_to(source.resolve())
    except OSError:  # Windows: not everyone may
        os.link(source, target)


def write(
    format_name: str,
    source_by_split: dict[str, list[Photo]],
    classes: Sequence[str],
    root_in: Path,
    out: Path,
    images: Images = "copy",
    *,
    progress: Progress | None = None,
) -> list[Finding]:
    """Write a data set to the folder `out`, which must not hold anything: it appears whole or not at all.

    source_by_split: the photos, relative to root_in; the split '' stands for a data set without splits, which becomes
    'train' where the format must have one; an empty split is left out. classes: every class that occurs, in the order
    that ids are given. images: 'link' makes symbolic links (hard ones where the system refuses). progress: called with
    (photos done, in all).

    Photos keep their folders, without those that only mean photos (JPEGImages, images, train, ...). Gives back what the
    format can't hold, counted. Raises UserError.
    """
    module = _module(format_name)
    require_free(out)
    tally = Tally()
    findings: list[Finding] = []
    for photo in (photo for photos in source_by_split.values() for photo in photos):
        if not photo.image and photo.annotation is None:
            tally.add("photo absent", "files without photo, not read", "left out")
    source_by_split = {
        name: [photo for photo in photos if photo.image or photo.annotation is not None]
        for name, photos in source_by_split.items()
    }
    source_by_split = {name: photos for name, photos in source_by_split.items() if photos}
    if not source_by_split:
        raise UserError(f"{root_in}: there is no photo to write")
    shared = [photo for photos in source_by_split.values() for photo in photos]
    _check(shared, classes, root_in, xml=format_name in ("voc", "cvat"))
    by_split = {safe_path(name).replace("/", "_") if name else "": photos for name, photos in source_by_split.items()}
    if len(by_split) < len(source_by_split):
        raise UserError(f"{root_in}: two splits have the same name but for signs that no file name may hold")
    if format_name in _ONE_FILE_FOR_ALL_SPLITS:
        whole = {identity(photo): photo for photo in merged(shared, findings)}
        by_split = {name: [whole[identity(photo)] for photo in photos] for name, photos in by_split.items()}
    by_split = {name: merged(photos, findings) for name, photos in by_split.items()}
    names = name_all(shared, by_split, tally)
    items = {name: [Item(names[identity(photo)], photo) for photo in photos] for name, photos in by_split.items()}
    with whole_folder(out) as temporary:
        module.write(Plan(root_in, temporary, tuple(classes), items, tally))
        if images != "none":
            _place(module, items, root_in, temporary, images, tally, progress)
    return findings + tally.findings()


def _place(
    module: Any,
    items: dict[str, list[Item]],
    root: Path,
    out: Path,
    how: Images,
    tally: Tally,
    progress: Progress | None,
) -> None:
    total = sum(len(photos) for photos in items.values())
    done, placed = 0, set()
    for split, photos in items.items():
        for item in photos:
            target = module.photo(split, item.name)
            if not item.photo.image:
                tally.add("photo absent", "photos aren't there", "their annotations are written without them")
            elif target not in placed:
                placed.add(target)
                _put(root / item.photo.image, out / target, how)
            done += 1
            if progress:
                progress(done, total)


# --- the verb -------------------------------------------------------------------------------------------------------


class Done(NamedTuple):
    """A conversion: photos and objects of each split, the classes, the formats, and all that was not kept or odd."""

    counts: dict[str, tuple[int, int]]
    classes: tuple[str, ...]
    source: str
    target: str
    findings: list[Finding]

    def lines(self) -> list[str]:
        """What to tell a person: a line a split, and one a kind of finding."""
        lines = [
            f"{name + ': ' if name else ''}{photos} photos, {objects} objects, {len(self.classes)} classes"
            for name, (photos, objects) in self.counts.items()
        ]
        groups: dict[tuple[str, str], list[str]] = {}
        for finding in self.findings:
            place = f"{finding.file}: " if finding.file else ""
            told = groups.setdefault((finding.kind, finding.action), [])
            told.append(place + located(finding.line, finding.what))
        for (kind, action), told in groups.items():
            some = "; ".join(told) if len(told) <= 4 else f"{len(told)} times, first {told[0]}"
            lines.append(f"{kind}: {some} ({action})")
        return lines


def _with_photo(root: Path, found: Source, findings: list[Finding]) -> Source:
    """Without label files that can't be read for want of the photo, whose size they need. Raises UserError: all are."""
    kept = [photo for photo in found.photos if photo.image or photo.annotation is not None]
    lone = len(found.photos) - len(kept)
    if lone:
        first = next(photo for photo in found.photos if not photo.image and photo.annotation is None)
        if not kept:
            raise UserError(
                f"{root / first.file}: there is no photo of this name: name their folder with --image-folder"
            )
        what = f"{lone} annotations of photos that aren't there"
        findings.append(Finding("photo absent", first.file, what, "left out: the photo's size is needed"))
    return found._replace(photos=kept)


def convert(
    source: Path,
    out: Path,
    target: str,
    *,
    source_format: str | None = None,
    split: Sequence[str] = (),
    images: Images = "copy",
    image_folder: Path | None = None,
    convention: str = "auto",
    progress: Progress | None = None,
) -> Done:
    """Read a data set and write it in another format (or the same). Raises UserError.

    split: only those; default: all that the data set or its split files have, else everything as one.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    _module(target)
    known = source_format or sniff(source)
    if known is None:
        raise UserError(f"{source}: its format is not plain: name it, such as  --from coco  ({', '.join(FORMATS)})")
    tree, file = _opened(source, image_folder)
    root = tree.root
    names: Sequence[str | None] = list(split)
    if not names and file is None:
        names = _module(known).splits(tree) or tuple(house.split_files(root))
    if not names or file:
        names = [None]
    sources = {name or "": _read(known, tree, file or name, convention, progress) for name in names}
    findings = [finding for found in sources.values() for finding in found.findings]
    sources = {name: _with_photo(root, found, findings) for name, found in sources.items()}
    if not split and names != [None]:
        rest = tree.images.unnamed(photo for found in sources.values() for photo in found.photos)
        if rest:
            what = f"{len(rest)} photos are in no split"
            findings.append(Finding("in no split", "", what, "left out", 0, rest[0].image))
    classes: dict[str, None] = dict.fromkeys(house.known_classes(Data(root=root)) or ())
    for found in sources.values():
        classes |= dict.fromkeys(found.classes)
    by_split = {name: found.photos for name, found in sources.items()}
    findings += write(target, by_split, tuple(classes), root, out, images, progress=progress)
    counts = {
        name: (len(photos), sum(len(photo.annotation.names) for photo in photos if photo.annotation))
        for name, photos in by_split.items()
    }
    return Done(counts, tuple(classes), known, target, list(dict.fromkeys(findings)))
