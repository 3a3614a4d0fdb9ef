"""What the formats share: the files of a data set, numbers that survive a round trip, and what is put where."""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Context, Decimal, InvalidOperation
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from detkit import geometry, imaging
from detkit.data.findings import Finding, located
from detkit.data.labels import Annotation, Photo
from detkit.errors import UserError
from detkit.files import decoded
from detkit.imaging import IMAGE_SUFFIXES
from detkit.types import CROWD, DIFFICULT, OCCLUDED, TRUNCATED

Progress = Callable[[int, int], None]
Size = tuple[int, int]  # height, width
Made = TypeVar("Made")
FLAGS = {"difficult": DIFFICULT, "truncated": TRUNCATED, "occluded": OCCLUDED, "crowd": CROWD}

FARTHEST = 1e15  # a coordinate beyond it is no pixel's
_MAX_PARTS = 32  # of a path, counted from its end


def refuse(path: str | Path, what: str, line: int = 0) -> NoReturn:
    """Raise the UserError of a file that can't be read."""
    raise UserError(f"{path}: {located(line, what)}")


def shown(value: object) -> str:
    """A value from a file, short and in one line, for messages."""
    if isinstance(value, str | int | float | None):
        return repr(value[:60] if isinstance(value, str) else value)
    return f"a {type(value).__name__}"


# --- files ----------------------------------------------------------------------------------------------------------


def content(path: Path) -> bytes:
    """The file's bytes. Raises UserError."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from None


def text(path: Path) -> str:
    """A text file as Windows, PowerShell or a spreadsheet may have written it. Raises UserError."""
    return decoded(content(path))


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise ValueError(f"an object has the key {shown(twin)} twice")
    return found


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number in JSON")


def load_json(path: Path) -> Any:
    """A JSON file in UTF-8, -16 or -32. Raises UserError; also for a key twice, NaN, and nesting without end."""
    try:
        return json.loads(content(path), object_pairs_hook=_no_twins, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        refuse(path, f"not JSON ({error.msg})", error.lineno)
    except UnicodeDecodeError:
        refuse(path, "not JSON (not in UTF-8)")
    except ValueError as error:
        refuse(path, f"not JSON ({' '.join(str(error).split())[:120]})")
    except RecursionError:
        refuse(path, "nested too deep for an annotation")


def _below(folder: Path) -> list[str]:
    """Every file below the folder, relative, sorted; hidden ones left out, links followed, no folder entered twice."""
    found: list[str] = []
    seen: set[tuple[int, int]] = set()

    def stop(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename or folder}: can't be read ({error.strerror})") from None

    for parent, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        stat = os.stat(parent)  # noqa: PTH116
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = Path(parent).relative_to(folder).as_posix()
        prefix = "" if prefix == "." else prefix + "/"
        found += [prefix + name for name in files if not name.startswith(".")]
    return sorted(found)


def is_image(name: str) -> bool:
    """Whether the name is a photo's."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def stem(name: str) -> str:
    """The path without the suffix of a photo, where it has one."""
    return name[: name.rindex(".")] if is_image(name) else name


def _tails(names: Iterable[str]) -> dict[str, str]:
    """The names by each of their ends ('b.jpg', 'a/b.jpg'); '' where an end is not of one name only."""
    found: dict[str, str] = {}
    for name in names:
        at = len(name)
        while at >= 0:
            at = name.rfind("/", 0, at)
            tail = name[at + 1 :]
            found[tail] = "" if tail in found else name
            if at < 0:
                break
    return found


class Images:
    """The photos of a data set, looked up by whatever an annotation calls them."""

    def __init__(self, names: Sequence[str], prefix: str = "") -> None:
        """names: relative to their folder. prefix: what makes them relative to the data set's root (or absolute)."""
        self.names, self.prefix = names, prefix
        self._known = frozenset(names)

    @cached_property
    def _by_tail(self) -> dict[str, str]:
        return _tails(self.names)

    @cached_property
    def _by_stem(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in self.names:
            key = stem(name)
            found[key] = "" if key in found else name
        return found

    @cached_property
    def _by_stem_tail(self) -> dict[str, str]:
        tails = _tails(key for key, name in self._by_stem.items() if name)
        return {tail: self._by_stem[key] for tail, key in tails.items() if key}

    def find(self, name: str, near: Sequence[str] = (), *, suffix: bool = True) -> str:
        """The photo that an annotation calls `name`, '' where there is none or several may be meant.

        Tried in turn: the path as it stands, below each folder in `near`, then its last parts wherever they are.
        suffix: whether the name has one.
        """
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")][-_MAX_PARTS:]
        if not parts:
            return ""
        path = "/".join(parts)
        known: Any = self._known if suffix else self._by_stem
        tails = self._by_tail if suffix else self._by_stem_tail
        for folder in (*near, ""):
            candidate = posixpath.normpath(f"{folder}/{path}") if folder else path
            if candidate in known and (suffix or self._by_stem[candidate]):
                return self.prefix + (candidate if suffix else self._by_stem[candidate])
        for first in range(len(parts)):
            tail = "/".join(parts[first:])
            if tail in tails:
                return self.prefix + tails[tail] if tails[tail] else ""
        return ""

    def unnamed(self, photos: Iterable[Photo]) -> list[Photo]:
        """The photos that no annotation names, of those that lie beside one that is named."""
        named = {photo.image for photo in photos if photo.image}
        folders = {posixpath.dirname(name) for name in named}
        rest = (self.prefix + name for name in self.names)
        return [Photo(name, "", None) for name in rest if posixpath.dirname(name) in folders and name not in named]


class Tree:
    """The files of a data set: all below the root, and its photos there or in another folder."""

    def __init__(self, root: Path, images: Path | None = None) -> None:
        """Raises UserError where a folder is missing or can't be read."""
        for folder in (root, images or root):
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder")
        self.root = root
        self.files = _below(root)
        self._made: dict[Any, Any] = {}
        prefix = ""
        if images is not None and images.resolve() != root.resolve():
            inside = images.resolve().is_relative_to(root.resolve())
            where = images.resolve().relative_to(root.resolve()) if inside else images.resolve()
            prefix = where.as_posix() + "/"
        self.elsewhere = prefix
        names = self.files if images is None else _below(images)
        self.images = Images([name for name in names if is_image(name)], prefix)

    def once(self, make: Callable[[Tree], Made]) -> Made:
        """What `make` makes of the tree, made once: a file that holds several splits is parsed for the first."""
        if make not in self._made:
            self._made[make] = make(self)
        made: Made = self._made[make]
        return made

    @cached_property
    def folders(self) -> frozenset[str]:
        """The folders that hold a file, at any depth; '' is the root."""
        found = {""}
        for name in self.files:
            folder = posixpath.dirname(name)
            while folder not in found:
                found.add(folder)
                folder = posixpath.dirname(folder)
        return frozenset(found)

    def ending(self, *suffixes: str, folder: str | None = None) -> list[str]:
        """The files that end in one of the suffixes, whatever their case; folder: only those right in there."""
        return [
            name
            for name in self.files
            if name.lower().endswith(suffixes) and (folder is None or posixpath.dirname(name) == folder)
        ]


# --- what is read ---------------------------------------------------------------------------------------------------


def finite(value: object) -> float:
    """A number from JSON as a float. Raises ValueError where it is none, not finite, or beyond any photo."""
    if type(value) is float or type(value) is int:
        try:
            number = float(value)
        except OverflowError:
            raise ValueError from None
        if abs(number) <= FARTHEST:
            return number
    raise ValueError


def class_name(value: object) -> str:
    """A class name from JSON, without space around it; '' where it is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    return str(value).strip()


@dataclass(slots=True)
class Objects:
    """The objects of one photo while they are read."""

    names: list[str] = field(default_factory=list)
    boxes: list[Sequence[float]] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)

    def add(self, name: str, box: Sequence[float], flags: int = 0, line: int = 0) -> None:
        """Take an object."""
        self.names.append(name)
        self.boxes.append(box)
        self.flags.append(flags)
        self.lines.append(line)

    def annotation(self, filename: str, hw: Size | None) -> Annotation:
        """What was added, as the annotation of a photo."""
        return Annotation(
            filename,
            hw,
            tuple(self.names),
            np.array(self.boxes, np.float64).reshape(-1, 4),
            np.array(self.flags, np.uint8),
            np.array(self.lines, np.int32),
        )


class Tally:
    """Findings that are counted, not listed: one a file and kind, whatever the number of objects."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, str, str], int] = {}

    def add(self, kind: str, what: str, action: str, file: str = "", count: int = 1) -> None:
        """Count what was found; what: in the singular or plural, it follows the number."""
        key = (kind, file, what, action)
        self._counts[key] = self._counts.get(key, 0) + count

    def findings(self) -> list[Finding]:
        """One finding for each different one that was added."""
        return [
            Finding(kind, file, f"{n} {what}", action) for (kind, file, what, action), n in self._counts.items() if n
        ]


def outline(points: NDArray[np.float64]) -> list[float]:
    """The box round points [N, 2]: x1 y1 x2 y2."""
    return [*points.min(0).tolist(), *points.max(0).tolist()]


def identity(photo: Photo) -> str:
    """What tells photos apart: the image; else the annotation's file and the name in it."""
    filename = photo.annotation.filename if photo.annotation else ""
    return photo.image or f"{photo.file}\0{filename}"


def merged(photos: Iterable[Photo], findings: list[Finding]) -> list[Photo]:
    """Each photo once: the objects of one that is annotated several times are put together, equal ones counted once."""
    found: dict[object, Photo] = {}
    for index, photo in enumerate(photos):
        key: object = identity(photo) if photo.image or photo.annotation is not None else index
        known = found.get(key)
        if known is None or known.annotation is None:
            found[key] = photo
        elif photo.annotation is not None and not _same(known.annotation, photo.annotation):
            name = photo.image or photo.annotation.filename
            what = f"{name} is annotated more than once, in different ways"
            action = "its objects are put together, equal ones once"
            findings.append(Finding("photo annotated twice", photo.file, what, action, 0, photo.image))
            found[key] = known._replace(annotation=_union(known.annotation, photo.annotation))
    return list(found.values())


def _rows(annotation: Annotation) -> list[tuple[str, tuple[float, ...], int]]:
    boxes = [tuple(box) for box in annotation.boxes.tolist()]
    return list(zip(annotation.names, boxes, annotation.flags.tolist(), strict=True))


def _same(one: Annotation, other: Annotation) -> bool:
    return _rows(one) == _rows(other)


def _union(one: Annotation, other: Annotation) -> Annotation:
    known = set(_rows(one))
    new = [index for index, row in enumerate(_rows(other)) if row not in known]
    return Annotation(
        one.filename,
        one.hw or other.hw,
        one.names + tuple(other.names[index] for index in new),
        np.concatenate([one.boxes, other.boxes[new]]),
        np.concatenate([one.flags, other.flags[new]]),
        np.concatenate([one.lines, other.lines[new]]),
    )


# --- numbers --------------------------------------------------------------------------------------------------------

_EXACT = Context(prec=60, Emax=10**6, Emin=-(10**6))
_SHORT, _DIGITS = 9, (17, 20, 24, 36)  # tried in turn, the short one where it is as good as exact
_NEAR = Decimal("1e-15")


def fraction(number: str) -> Decimal:
    """A share of the photo's side as it is written. Raises ValueError where it is no number, or beyond any photo."""
    try:
        value = Decimal(number)
    except InvalidOperation:
        raise ValueError(number) from None
    if not value.is_finite() or (value and value.adjusted() > 6):
        raise ValueError(number)
    return value


def edges(centre: Decimal, extent: Decimal, side: int) -> tuple[float, float]:
    """Low and high edge in pixels, each the float64 nearest to the exact result."""
    half = _EXACT.divide(extent, Decimal(2))
    return (
        float(_EXACT.multiply(_EXACT.subtract(centre, half), side)),
        float(_EXACT.multiply(_EXACT.add(centre, half), side)),
    )


def edge(share: Decimal, side: int) -> float:
    """A share of the side in pixels, the float64 nearest to the exact result."""
    return float(_EXACT.multiply(share, side))


def _rounded(value: Decimal, digits: int) -> Decimal:
    if value.adjusted() + digits > 50:
        return value
    return value.quantize(Decimal(1).scaleb(-digits), context=_EXACT)


def _plain(value: Decimal) -> str:
    number = f"{value:f}"
    return number.rstrip("0").rstrip(".") if "." in number else number


def centred(low: float, high: float, side: int) -> tuple[str, str]:
    """Centre and extent as shares of the side, with as few digits as `edges` needs to give the same float64 again."""
    a, b = Decimal(repr(low)), Decimal(repr(high))
    start, extent = _EXACT.divide(a, side), _EXACT.divide(_EXACT.subtract(b, a), side)
    for digits in (_SHORT, *_DIGITS):
        first, span = _rounded(start, digits), _rounded(extent, digits)
        if digits == _SHORT and (abs(first - start) > _NEAR or abs(span - extent) > _NEAR):
            continue
        # From the rounded edge, not rounded itself: an edge at 0 stays there.
        centre = _EXACT.add(first, _EXACT.divide(span, Decimal(2)))
        if edges(centre, span, side) == (low, high):
            break
    return _plain(centre), _plain(span)


def share(value: float, side: int) -> str:
    """A coordinate as a share of the side, with as few digits as `edge` needs to give the same float64 again."""
    exact = _EXACT.divide(Decimal(repr(value)), side)
    for digits in (_SHORT, *_DIGITS):
        rounded = _rounded(exact, digits)
        if edge(rounded, side) == value:
            break
    return _plain(rounded)


def _tidy(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rounded to 9 decimals; beyond 4e6 as they are, for there float64 has no more."""
    return np.where(np.abs(values) < 4e6, np.rint(values * 1e9) / 1e9, values)


def far_edges(low: NDArray[np.float64], extent: NDArray[np.float64]) -> NDArray[np.float64]:
    """low + extent; where both have at most 9 decimals, so has the sum: 0.1 + 0.2 is 0.3."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = low + extent
        short = (_tidy(low) == low) & (_tidy(extent) == extent)
        return np.where(short, _tidy(total), total)


def extents(low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    """The short numbers that `far_edges` turns into `high` again; the nearest there is where none does."""
    with np.errstate(over="ignore", invalid="ignore"):
        plain = high - low
        found = plain
        for candidate in (np.nextafter(plain, -np.inf), np.nextafter(plain, np.inf), plain, _tidy(plain)):
            found = np.where(far_edges(low, candidate) == high, candidate, found)
        return found


# --- what is written ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """A photo that is being written, under the name that it gets: a relative path without the format's own folders."""

    name: str
    photo: Photo

    @property
    def key(self) -> str:
        """The name without the photo's suffix."""
        return stem(self.name)


@dataclass(slots=True)
class Plan:
    """A data set that is being written: from `root` to the folder `out`; a split '' is a data set without splits."""

    root: Path
    out: Path
    classes: tuple[str, ...]
    splits: dict[str, list[Item]]
    tally: Tally
    ids: dict[str, int] = field(init=False)
    _sizes: dict[str, Size] = field(default_factory=dict)
    _folders: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.ids = {name: index for index, name in enumerate(self.classes)}

    def save(self, name: str, text: str) -> None:
        """Write a text file below `out`."""
        folder = posixpath.dirname(name)
        if folder not in self._folders:
            self._folders.add(folder)
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        (self.out / name).write_text(text, encoding="utf-8", newline="\n")

    def in_lists(self) -> Iterator[tuple[Item, Annotation]]:
        """Each annotated photo once, whatever splits it is in; the splits become ImageSets/Main, the classes a file."""
        written = set()
        for split, items in self.splits.items():
            if split:
                self.save(f"ImageSets/Main/{split}.txt", "".join(f"{item.key}\n" for item in items))
            for item in items:
                if item.photo.annotation is not None and item.key not in written:
                    written.add(item.key)
                    yield item, item.photo.annotation
        self.save("classes.txt", "".join(f"{name}\n" for name in self.classes))

    def _real(self, item: Item) -> Size:
        image = item.photo.image
        if image not in self._sizes:
            self._sizes[image] = imaging.size(self.root / image)
        return self._sizes[image]

    def size(self, item: Item) -> Size | None:
        """The size of the canvas that the photo's boxes are on: as stated, else the photo's; None where not known."""
        if item.photo.annotation is not None and item.photo.annotation.hw:
            return item.photo.annotation.hw
        return self._real(item) if item.photo.image else None

    def upright(self, item: Item) -> tuple[NDArray[np.float64], Size]:
        """The photo's boxes and size as a format needs them that states no size: on the photo as a person sees it.

        Raises UserError where the size is not known.
        """
        annotation = item.photo.annotation
        assert annotation is not None
        if not item.photo.image:
            if annotation.hw is None:
                name = annotation.filename or item.photo.file
                raise UserError(
                    f"{self.root / item.photo.file}: {shown(name)}: no such photo, and its size isn't stated"
                )
            return annotation.boxes, annotation.hw
        hw = self._real(item)
        if annotation.hw in (None, hw):
            return annotation.boxes, hw
        assert annotation.hw is not None
        orientation = imaging.check(self.root / item.photo.image).orientation
        boxes, kind = geometry.fitted(annotation.boxes, annotation.hw, hw, orientation)
        action = {
            "boxes turned": "the boxes are turned with it",
            "boxes scaled": "the boxes are scaled to the image",
            "size disagrees": "the image's size is used, boxes are taken as written",
        }[kind]
        self.tally.add(kind, "photos of another size than their annotations say", action)
        return boxes, hw

    def lose_flags(self, annotation: Annotation, held: int, format_name: str) -> None:
        """Count the flags that the format can't hold."""
        for name, bit in FLAGS.items():
            if not held & bit:
                count = int(np.count_nonzero(annotation.flags & bit))
                self.tally.add(
                    "flag not held", f"objects marked {name}", f"{format_name} has no such mark", count=count
                )

    def lose_unlabelled(self, format_name: str) -> None:
        """Count a photo without annotation, which the format lists nowhere."""
        what, action = "photos without annotation", f"{format_name} can't list them; the files are there"
        self.tally.add("unlabelled not listed", what, action)


_FOLDERS = frozenset(("jpegimages", "images", "train", "val", "valid", "test"))
_UNSAFE = re.compile(r'[<>:"|?*\\]')


def _safe(part: str) -> str:
    """One part of a path as any system and format takes it."""
    part = "".join(letter if letter.isprintable() else "_" for letter in _UNSAFE.sub("_", part))
    head, dot, tail = part.rpartition(".")
    part = f"{head.strip()}{dot}{tail.strip()}"
    return re.sub(r"^\.+|\.+$", "_", part) or "_"


def safe_path(name: str) -> str:
    """A relative path that stays below its folder, whatever the name was; drives, servers and '..' go."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    if len(parts) > 1 and parts[0].endswith(":"):
        parts = parts[-1:]  # a drive's or a server's: only the file's own name means anything here
    return "/".join(_safe(part) for part in parts) or "unnamed"


def _short(name: str, splits: frozenset[str]) -> str:
    """The path without the folders that only say that here are images, or of which split."""
    parts = name.split("/")
    while len(parts) > 1 and (parts[0].lower() in _FOLDERS or parts[0] in splits):
        parts.pop(0)
    return "/".join(parts)


def name_all(photos: Sequence[Photo], splits: Iterable[str], tally: Tally) -> dict[str, str]:
    """The name that each photo gets, by `identity`: no two have the same stem, whatever the case of their letters."""
    known = frozenset(splits)
    given: dict[str, str] = {}
    for photo in photos:
        given.setdefault(identity(photo), photo.image or (photo.annotation.filename if photo.annotation else "") or
                         photo.file)  # fmt: skip
    rooted = [photo.image for photo in photos if re.match(r"/|[A-Za-z]:/", photo.image)]
    outside = posixpath.commonpath([posixpath.dirname(name) for name in rooted]) if rooted else ""
    full = {key: safe_path(name.removeprefix(outside)) for key, name in given.items()}
    short = {key: _short(name, known) for key, name in full.items()}
    if len({stem(name).lower() for name in short.values()}) == len(short):
        return short
    taken: dict[str, int] = {}  # how often each stem was asked for
    for key, name in full.items():
        unique, wanted = name, stem(name).lower()
        while stem(unique).lower() in taken:
            taken[wanted] = taken.get(wanted, 0) + 1
            unique = f"{stem(name)}_{taken[wanted]}{name[len(stem(name)) :]}"
        if unique != name:
            tally.add("photo renamed", "photos of the same name but for suffix or case", "a number is put behind it")
        taken[stem(unique).lower()] = 1
        full[key] = unique
    return full
