"""YOLO: a text file a photo, a line `class cx cy w h` an object, in shares of the photo's sides; names in data.yaml."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import yaml

from detkit import imaging
from detkit.data.convert.common import (
    Objects,
    Plan,
    Progress,
    Size,
    Tally,
    Tree,
    centred,
    edge,
    edges,
    fraction,
    is_image,
    outline,
    refuse,
    shown,
    stem,
    text,
)
from detkit.data.findings import Finding
from detkit.data.labels import Photo, Source
from detkit.errors import UserError, nearest

# Keys of data.yaml that hold something else than photos.
_NO_SPLIT = frozenset(("path", "names", "nc", "download", "kpt_shape", "flip_idx", "roboflow", "channels", "colors"))
_KNOWN = ("train", "val", "valid", "validation", "test")
_NAMES = ("classes.txt", "obj.names", "labels/classes.txt")


def config_file(tree: Tree) -> str:
    """The YAML file with the names, '' where there is none: data.yaml, or the only one right below the root."""
    found = [name for name in tree.ending(".yaml", ".yml", folder="") if "names" in text(tree.root / name)]
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if name in found:
            return name
    return found[0] if len(found) == 1 else ""


def _load(tree: Tree, file: str) -> dict[str, Any]:
    path = tree.root / file
    try:
        # The base loader takes every word as it stands: a class 'no' or '007' is neither False nor 7.
        document = yaml.load(text(path), yaml.BaseLoader)  # noqa: S506 - the base loader makes strings only
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        refuse(path, f"not YAML ({error.problem})", line)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        refuse(path, f"not YAML ({' '.join(str(error).split())[:120]})")
    except RecursionError:
        refuse(path, "nested too deep")
    if not isinstance(document, dict):
        refuse(path, "no YAML with 'names'")
    return {key: value for key, value in document.items() if isinstance(key, str)}


def _names(tree: Tree, file: str, document: dict[str, Any]) -> tuple[str, ...]:
    """The class names by number."""
    listed = document.get("names")
    if file and isinstance(listed, dict):
        try:
            ids = {int(key): value for key, value in listed.items()}
        except (TypeError, ValueError):
            refuse(tree.root / file, "the keys of 'names' must be numbers")
        if len(ids) < len(listed) or sorted(ids) != list(range(len(ids))):
            refuse(tree.root / file, f"the keys of 'names' must be 0 to {len(listed) - 1}, each once")
        names = [ids[index] for index in range(len(ids))]
    elif file and isinstance(listed, list):
        names = listed
    elif file and isinstance(listed, str) and listed in tree.files:
        file, names = listed, text(tree.root / listed).split("\n")
    else:
        file = next((name for name in _NAMES if name in tree.files), "")
        if not file:
            raise UserError(f"{tree.root}: no data.yaml with the class names here, nor a classes.txt")
        names = [line for line in text(tree.root / file).splitlines() if line.strip()]
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        refuse(tree.root / file, "lists no class names, or an empty one")
    return tuple(name.strip() for name in names)


def _entries(value: object) -> list[str]:
    found = value if isinstance(value, list) else [value]
    return [entry for entry in found if isinstance(entry, str) and entry.strip()]


class _Places:
    """Where the photos of a split are, as data.yaml says."""

    def __init__(self, tree: Tree, document: dict[str, Any]) -> None:
        self.tree = tree
        base = document.get("path")
        self.base = base.replace("\\", "/").strip("/") if isinstance(base, str) else ""
        self.folders = tree.folders if not tree.elsewhere else frozenset(_folders(tree.images.names))

    def find(self, entry: str) -> str | None:
        """The entry as a folder or list file below the root, None where there is none: as it stands, below `path`,
        or by its last parts (the rest is another machine's)."""
        entry = entry.replace("\\", "/").rstrip("/")
        for candidate in (f"{self.base}/{entry}", entry):
            path = posixpath.normpath(candidate.lstrip("/"))
            if path == "." or path in self.folders or path in self.tree.files:
                return "" if path == "." else path
        parts = [part for part in entry.split("/") if part not in ("", ".", "..")][-32:]
        for first in range(len(parts)):
            path = "/".join(parts[first:])
            if path in self.folders or path in self.tree.files:
                return path
        return None

    def photos(self, entry: str) -> list[str] | None:
        """The photos of an entry, with '?' before one that is named and isn't there; None: no such entry."""
        images = self.tree.images
        place = self.find(entry)
        if place is None:
            return self._labelled(entry)
        if place in self.tree.files:
            if is_image(place):
                return [place]
            lines = [line.strip() for line in text(self.tree.root / place).splitlines()]
            near = (posixpath.dirname(place), self.base)
            return [images.find(line, near) or f"?{line}" for line in lines if line]
        return [images.prefix + name for name in images.names if not place or name.startswith(place + "/")]

    def _labelled(self, entry: str) -> list[str] | None:
        """The photos of the label files in the folder that belongs to a folder of photos that isn't there."""
        parts = entry.replace("\\", "/").strip("/").split("/")
        if "images" not in parts:
            return None
        at = len(parts) - 1 - parts[::-1].index("images")
        own = "/".join(["labels", *parts[at + 1 :]]) + "/"
        found = []
        for label in self.tree.ending(".txt"):
            before, _, name = f"/{label}".partition(f"/{own}")
            if name:
                key = name[: -len(".txt")]
                image = self.tree.images.find(key, ["/".join(parts[at + 1 :])], suffix=False)
                found.append(image or f"?{before}/images/{own.removeprefix('labels/')}{key}.jpg".replace("?/", "?"))
        return found or None


def _folders(names: Sequence[str]) -> set[str]:
    found = {""}
    for name in names:
        folder = posixpath.dirname(name)
        while folder not in found:
            found.add(folder)
            folder = posixpath.dirname(folder)
    return found


def splits(tree: Tree) -> tuple[str, ...]:
    """The keys of data.yaml that name folders or lists of photos."""
    file = config_file(tree)
    document = _load(tree, file) if file else {}
    places = _Places(tree, document)
    return tuple(
        key
        for key, value in document.items()
        if key not in _NO_SPLIT
        and _entries(value)
        and (key in _KNOWN or all(places.find(entry) is not None for entry in _entries(value)))
    )


def read(tree: Tree, split: str | None, progress: Progress | None = None) -> Source:
    """The photos of the split in data.yaml; None: every photo there is. Raises UserError."""
    file = config_file(tree)
    document = _load(tree, file) if file else {}
    reader = _Reader(tree, _names(tree, file, document), document)
    places = _Places(tree, document)
    if split is None:
        images = [tree.images.prefix + name for name in tree.images.names]
    else:
        known = splits(tree)
        if split not in known:
            hint = nearest(split, known)
            raise UserError(f"{tree.root / file}: no split '{split}'{hint}; there are: {', '.join(known) or 'none'}")
        images = []
        for entry in _entries(document[split]):
            found = places.photos(entry)
            if found is None:
                raise UserError(f"{tree.root / file}: {split}: no folder or list {shown(entry)} below {tree.root}")
            images += found
    photos = []
    for done, image in enumerate(dict.fromkeys(images), 1):
        photos.append(reader.photo(image))
        if progress:
            progress(done, len(images))
    if split is None:
        photos += reader.orphans()
    return Source(reader.names, photos, reader.findings + reader.tally.findings())


class _Reader:
    """The label files of one data set."""

    def __init__(self, tree: Tree, names: tuple[str, ...], document: dict[str, Any]) -> None:
        self.tree, self.names = tree, names
        self.texts = dict.fromkeys(tree.ending(".txt"), False)  # whether a photo has it
        self.by_name: dict[str, list[str]] = {}
        for name in self.texts:
            self.by_name.setdefault(posixpath.basename(name), []).append(name)
        self.pose = "kpt_shape" in document
        self.findings: list[Finding] = []
        self.tally = Tally()

    def _label(self, image: str) -> str:
        """The photo's label file: `images` in its path exchanged for `labels`, else beside it; '' where not there."""
        image = image.removeprefix(self.tree.elsewhere)
        parts = image.split("/")
        name = posixpath.basename(stem(image)) + ".txt"
        candidates = [stem(image) + ".txt", f"labels/{stem(image)}.txt"]
        for index in range(len(parts) - 2, -1, -1):
            if parts[index] == "images":
                candidates.insert(0, "/".join([*parts[:index], "labels", *parts[index + 1 : -1], name]))
                break
        for candidate in candidates:
            if candidate in self.texts:
                return candidate
        if self.tree.elsewhere:  # the photos are in another folder: the only label of that name
            found = self.by_name.get(name, [])
            own = [label for label in found if label.startswith("labels/") or "/" not in label]
            return own[0] if len(own) == 1 else ""
        return ""

    def photo(self, image: str) -> Photo:
        """The photo with what its label file says."""
        if image.startswith("?"):
            label = self._label(image[1:].replace("\\", "/").removeprefix("./"))
            if not label:
                return Photo("", image[1:], None)
            self.texts[label] = True
            return Photo("", label, None)
        label = self._label(image)
        if not label:
            return Photo(image, "", None)
        self.texts[label] = True
        path = self.tree.root / label
        hw = imaging.size(self.tree.root / image)
        objects = Objects()
        for number, line in enumerate(text(path).splitlines(), 1):
            words = line.split()
            if words:
                box = self._box(words, hw, label, number)
                objects.add(self._name(words[0], label, number), box, 0, number)
        return Photo(image, label, objects.annotation("", hw))

    def _name(self, word: str, label: str, line: int) -> str:
        try:
            number = float(word)
            if number != int(number) or not 0 <= number < len(self.names):
                raise ValueError
        except (ValueError, OverflowError):
            what = f"class {shown(word)}, but there are 0 to {len(self.names) - 1}"
            refuse(self.tree.root / label, what, line)
        return self.names[int(number)]

    def _box(self, words: list[str], hw: Size, label: str, line: int) -> Sequence[float]:
        try:
            numbers = [fraction(word) for word in words[1:]]
        except ValueError as error:
            refuse(self.tree.root / label, f"{shown(str(error))} is not a share of the photo's side", line)
        height, width = hw
        if len(numbers) >= 6 and len(numbers) % 2 == 0 and not self.pose:
            box = outline(_points(numbers, hw))
            what = f"a polygon of {len(numbers) // 2} points"
            place = (box[0], box[1], box[2], box[3])
            self.findings.append(Finding("polygon", label, what, "the box round it is taken", line, box=place))
            return box
        if len(numbers) < 4 or (len(numbers) > 5 and not self.pose):
            refuse(self.tree.root / label, f"{len(words)} words, not `class cx cy w h` nor a polygon", line)
        if len(numbers) > 4:
            what = "objects have keypoints" if self.pose else "objects have a sixth number (a score?)"
            self.tally.add("not read", what, "left out")
        (x1, x2), (y1, y2) = edges(numbers[0], numbers[2], width), edges(numbers[1], numbers[3], height)
        return x1, y1, x2, y2

    def orphans(self) -> list[Photo]:
        """The label files in a folder `labels` that no photo has."""
        return [
            Photo("", name, None)
            for name, used in self.texts.items()
            if not used and "labels" in name.split("/")[:-1] and posixpath.basename(name) != "classes.txt"
        ]


def _points(numbers: list[Decimal], hw: Size) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([edge(value, hw[1 - index % 2]) for index, value in enumerate(numbers)], np.float64).reshape(-1, 2)


def photo(split: str, name: str) -> str:
    """Where the photo goes."""
    return f"images/{split or 'train'}/{name}"


def write(plan: Plan) -> None:
    """labels/<split>/<name>.txt for each photo that is annotated, and data.yaml."""
    # Without `path`, folders are relative to the file itself; with a relative one, to wherever Ultralytics is run.
    document: dict[str, Any] = {}
    for split, items in plan.splits.items():
        document[split or "train"] = f"images/{split or 'train'}"
        (plan.out / f"images/{split or 'train'}").mkdir(parents=True, exist_ok=True)
        for item in items:
            annotation = item.photo.annotation
            if annotation is None:
                continue  # a photo without a label file is just that in YOLO
            boxes, (height, width) = plan.upright(item)
            lines = []
            for name, (x1, y1, x2, y2) in zip(annotation.names, boxes.tolist(), strict=True):
                (cx, w), (cy, h) = centred(x1, x2, width), centred(y1, y2, height)
                lines.append(f"{plan.ids[name]} {cx} {cy} {w} {h}\n")
            plan.save(f"labels/{split or 'train'}/{item.key}.txt", "".join(lines))
            plan.lose_flags(annotation, 0, "YOLO")
    document["names"] = dict(enumerate(plan.classes))
    plan.save("data.yaml", yaml.safe_dump(document, allow_unicode=True, sort_keys=False))
