"""A DataSet on disk: read the annotations once, start at once from then on, and read again only what changed.

Beside the data (or where `data.cache` says) lie two kinds of file, each a pickle of bytes and plain containers, read by
an unpickler that admits no class or function whatever:

- a split's DataSet, used while its key fits: the parser's version, the settings, and name, size, mtime, ctime and inode
  of every file. Loading it costs no more than that stat of every file;
- the facts: what each annotation (with the digest of its content) and each image header said. Where the split's key
  doesn't fit, the files whose stat or digest is another are read again, and all others are taken from here.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import sys
import time
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from detkit.config import Data
from detkit.console import counting
from detkit.data import scan, voc
from detkit.data.findings import Finding, summary
from detkit.data.labels import Columns, DataSet, Labels, Remark
from detkit.data.voc import Files, Progress
from detkit.errors import UserError
from detkit.files import atomic_write

FOLDER = ".detkit-cache"
PIXELS = ".pixels"
_TICK = 20_000_000  # ns; Linux stamps files every 1 to 10 ms
_Columns = dict[str, tuple[type[np.generic], tuple[int, ...]]]
# The columns: their types, and their shapes beside the length.
_DATASET: _Columns = {
    "paths": (np.uint8, ()),
    "path_ends": (np.int64, ()),
    "hw": (np.int32, (2,)),
    "boxes": (np.float64, (4,)),
    "labels": (np.int32, ()),
    "flags": (np.uint8, ()),
    "box_ends": (np.int64, ()),
}
_LABELS: _Columns = {
    "hw": (np.int32, (2,)),
    "origins": (np.uint8, ()),
    "ends": (np.int64, ()),
    "names": (np.int32, ()),
    "boxes": (np.float64, (4,)),
    "flags": (np.uint8, ()),
    "lines": (np.int32, ()),
}
# What unpickling damaged bytes may raise.
_UNREADABLE = (
    OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, OverflowError,
    MemoryError,
)  # fmt: skip


class _RefusedError(Exception):
    """The pickle names something that no cache holds."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise _RefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError(f"the persistent object {pid!r:.40}")


class _Facts(NamedTuple):
    """What the files of a data set said. digests: uint8 [N, 16], of the annotations' content."""

    annotations: Files
    digests: NDArray[np.uint8]
    labels: Labels
    images: Files
    headers: scan.Headers


def user_folder() -> Path:
    """Where detkit keeps caches that can't lie beside the data: the platform's folder for them."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "detkit"


def folders(data: Data) -> list[Path]:
    """Where caches may lie, the first choice first: data.cache or ROOT/.detkit-cache, then one in `user_folder`."""
    return [data.cache or data.root / FOLDER, user_folder()]


def paths(data: Data, split: str) -> list[Path]:
    """Where the split's cache may lie, in each of `folders`."""
    return _places(data, re.sub(r"[^A-Za-z0-9_-]", "_", split), (*_settings(data), split))


def facts_paths(data: Data) -> list[Path]:
    """Where the facts may lie, in each of `folders`."""
    return _places(data, "facts", (data.format,))


def pixels(data: Data, split: str, canvas: tuple[int, int], rule: str) -> list[Path]:
    """Where the split's decoded photos may lie, see `detkit.data.pixels`, in each of `folders`."""
    return _places(data, f"{canvas[0]}x{canvas[1]}-{rule}", (*_settings(data), split), PIXELS)


def _places(data: Data, name: str, identity: tuple[Any, ...], suffix: str = ".pickle") -> list[Path]:
    file = f"{_short(str(data.root.resolve()))}-{name}-{_short(repr(identity))}{suffix}"
    return [folder / file for folder in folders(data)]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _settings(data: Data) -> tuple[Any, ...]:
    classes = str(data.classes) if isinstance(data.classes, Path) else data.classes
    return (data.format, data.convention, data.unlabelled, data.val_share, classes)


def key(data: Data, split: str, files: voc.Listing) -> str:
    """The digest of all that the split's DataSet depends on, of files: their names and stats."""
    text = hashlib.sha256(repr((scan.VERSION, _settings(data), split)).encode("utf-8", "surrogateescape"))
    for group in files:
        text.update("\n".join([str(len(group.names)), *group.names]).encode("utf-8", "surrogateescape"))
        text.update(group.stats.tobytes())
    return text.hexdigest()


def load(data: Data, split: str, progress: Progress | None = None) -> DataSet:
    """The split, from its cache where that is up to date, else by `scan.scan`, whose result is then cached.

    Raises UserError as `scan.scan` does, and where a cache file holds what no cache holds.
    """
    files = _settled(data)
    digest = key(data, split, files)
    for path in paths(data, split):
        found = read(path, digest, str(data.root))
        if found is not None:
            return found
    return _build(data, split, files, digest, progress)


def _settled(data: Data) -> voc.Listing:
    """The files, none of them changed in this very tick of the clock that stamps them: its next change gets another."""
    while True:
        files = voc.listing(data)
        newest = max(int(group.stats[:, 1:3].max(initial=0)) for group in files)
        if not 0 <= time.time_ns() - newest < _TICK:
            return files
        time.sleep(_TICK / 1e9)


def verify(data: Data, progress: Progress | None = None) -> list[str]:
    """Read every annotation's content and every image's header, whatever their stats, and make the facts anew; the
    splits' caches are removed where they relied on another content, so that they are made anew too.

    What other formats than VOC held is not kept, so nothing can be compared: their splits' caches are always removed.

    The names of the annotations and photos that are not what the facts say though size, times and inode are the same.
    Raises UserError where the data set's root is missing or empty.
    """
    files = _settled(data)
    reader = _Reader(data, files, verify=True)
    found = scan.contents(data, files, reader.parse, progress)
    reader.check(data, [item.image for item in found.items], progress)
    if reader.unseen or data.format != "voc":
        clear(data)
    _write(facts_paths(data), _pack_facts(reader.facts()))
    return reader.unseen


def _build(data: Data, split: str, files: voc.Listing, digest: str, progress: Progress | None) -> DataSet:
    reader = _Reader(data, files)
    found = scan.scan(data, split, files, progress, parse=reader.parse, check=reader.check)
    _write(facts_paths(data), _pack_facts(reader.facts()))
    findings = [tuple(finding) for finding in found.findings]
    packed = {"split": split, "key": digest, "classes": found.classes, "findings": findings}
    _write(paths(data, split), packed | _packed(found, _DATASET))
    return found


class _Reader:
    """Reads annotations and headers, those that the facts know from there.

    unseen: the annotations and photos that changed though their stat did not; looked for only to `verify`.
    """

    def __init__(self, data: Data, files: voc.Listing, verify: bool = False) -> None:
        self.verify = verify
        self.unseen: list[str] = []
        self.known = next((facts for path in facts_paths(data) if (facts := _read_facts(path))), _NOTHING)
        self.annotations, self.digests, self.labels = _NOTHING[:3]
        self.listing, self.images, self.headers = files, _NOTHING.images, _NOTHING.headers
        self.place = {name: index for index, name in enumerate(files.images.names)}

    def parse(self, data: Data, names: Sequence[str], progress: Progress | None = None) -> Labels:
        """As `scan.parse`."""
        known, self.annotations = self.known, self.listing.annotations
        rows, same = _matched(known.annotations, self.annotations)
        for index in np.flatnonzero((rows >= 0) & (~same | self.verify)).tolist():
            name = names[index]
            if _digest(data.root / name) != known.digests[rows[index]].tobytes():
                if same[index]:
                    self.unseen.append(name)
                rows[index] = -1
        kept, fresh = np.flatnonzero(rows >= 0), np.flatnonzero(rows < 0)
        parsed, digests = voc.parse(data.root, [names[index] for index in fresh.tolist()], progress)
        read = np.frombuffer(b"".join(digest or bytes(16) for digest in digests), np.uint8).reshape(-1, 16)
        place = np.empty(len(names), np.int64)
        place[np.concatenate([kept, fresh])] = np.arange(len(names))
        self.digests = np.concatenate([known.digests[rows[kept]], read])[place]
        self.labels = known.labels.take(rows[kept]).joined(parsed).take(place)
        return self.labels

    def check(self, data: Data, names: Sequence[str], progress: Progress | None = None) -> scan.Headers:
        """As `scan.check`."""
        known = self.known
        stats = np.full((len(names), 4), -1, np.int64)
        listed = [(index, self.place[name]) for index, name in enumerate(names) if name in self.place]
        if listed:
            here, there = np.array(listed).T
            stats[here] = self.listing.images.stats[there]
        rows, same = _matched(known.images, Files(names, stats))
        claimed = np.flatnonzero(same)
        if self.verify:
            same[:] = False
        fresh = np.flatnonzero(~same)
        read = scan.check(data, [names[index] for index in fresh.tolist()], progress)
        hw, orientation = np.zeros((len(names), 2), np.int32), np.ones(len(names), np.uint8)
        hw[fresh], orientation[fresh] = read.hw, read.orientation
        hw[same], orientation[same] = known.headers.hw[rows[same]], known.headers.orientation[rows[same]]
        for index in claimed.tolist() if self.verify else ():
            if np.any(hw[index] != known.headers.hw[rows[index]]) or (
                orientation[index] != known.headers.orientation[rows[index]]
            ):
                self.unseen.append(names[index])
        self.images = Files(names, stats)
        self.headers = scan.Headers(hw, orientation, {int(fresh[i]): why for i, why in read.errors.items()})
        return self.headers

    def facts(self) -> _Facts:
        """What is known now: of the images, those of this split and, as they were, all others."""
        sound = np.flatnonzero(self.headers.hw[:, 0] > 0)
        names = [self.images.names[index] for index in sound.tolist()]
        now = set(names)
        others = [index for index, name in enumerate(self.known.images.names) if name in self.place and name not in now]
        images = Files(
            [*names, *(self.known.images.names[index] for index in others)],
            np.concatenate([self.images.stats[sound], self.known.images.stats[others]]),
        )
        headers = scan.Headers(
            np.concatenate([self.headers.hw[sound], self.known.headers.hw[others]]),
            np.concatenate([self.headers.orientation[sound], self.known.headers.orientation[others]]),
            {},
        )
        return _Facts(self.annotations, self.digests, self.labels, images, headers)


def _matched(known: Files, now: Files) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """int64 [N]: where each of the files is in `known`, -1 where it is not; bool [N]: and is the same by its stat."""
    places = {name: index for index, name in enumerate(known.names)}
    rows = np.array([places.get(name, -1) for name in now.names], np.int64)
    there = rows >= 0
    same = there.copy()
    same[there] = np.all(known.stats[rows[there]] == now.stats[there], axis=1)
    return rows, same


def _digest(path: Path) -> bytes:
    try:
        return voc.digest(path.read_bytes())
    except OSError:
        return b""


# --- the files ------------------------------------------------------------------------------------------------------


def _packed(columns: Any, kinds: _Columns) -> dict[str, bytes]:
    return {name: getattr(columns, name).tobytes() for name in kinds}


def _unpacked(content: dict[str, Any], kinds: _Columns) -> dict[str, Any]:
    """The columns. Raises ValueError where their lengths are wrong."""
    return {name: np.frombuffer(content[name], dtype).reshape(-1, *shape) for name, (dtype, shape) in kinds.items()}


def _open(path: Path) -> Any:
    """What a cache file holds, None where there is none or it is damaged. Raises UserError where it holds code."""
    try:
        with path.open("rb") as file:  # not its bytes: large columns are read straight into place
            return _Unpickler(file).load()
    except _RefusedError as error:
        raise UserError(f"{path}: not a cache that detkit wrote (it names {error}); delete it") from None
    except _UNREADABLE:
        return None


def read(path: Path, digest: str, root: str) -> DataSet | None:
    """The DataSet in a cache file of that key; None where there is none, or it is stale or damaged."""
    content = _open(path)
    try:
        if content is None or content["key"] != digest:
            return None
        findings = tuple(Finding(*finding) for finding in content["findings"])
        columns = _unpacked(content, _DATASET)
        found = DataSet(root=root, classes=tuple(content["classes"]), findings=findings, **columns)
        return found if _whole(found) else None
    except _UNREADABLE:
        return None


def _whole(found: DataSet) -> bool:
    """Whether the columns' lengths agree."""
    return (
        len(found.path_ends) == len(found.box_ends) == len(found.hw)
        and len(found.boxes) == len(found.labels) == len(found.flags) == found.box_ends[-1]
        and len(found.paths) == found.path_ends[-1]
    )


def _pack_files(files: Files) -> tuple[bytes, bytes]:
    return "\0".join(files.names).encode("utf-8", "surrogateescape"), files.stats.tobytes()


def _unpack_files(content: tuple[bytes, bytes]) -> Files:
    stats = np.frombuffer(content[1], np.int64).reshape(-1, 4)
    return Files(content[0].decode("utf-8", "surrogateescape").split("\0") if len(stats) else [], stats)


def _pack_facts(facts: _Facts) -> dict[str, Any]:
    return {
        "version": scan.VERSION,
        "annotations": _pack_files(facts.annotations),
        "digests": facts.digests.tobytes(),
        "vocabulary": facts.labels.vocabulary,
        "remarks": [tuple(remark) for remark in facts.labels.remarks],
        "images": _pack_files(facts.images),
        "image_hw": facts.headers.hw.tobytes(),
        "orientation": facts.headers.orientation.tobytes(),
    } | _packed(facts.labels, _LABELS)


def _read_facts(path: Path) -> _Facts | None:
    content = _open(path)
    try:
        if content is None or content["version"] != scan.VERSION:
            return None
        remarks = tuple(Remark(*remark) for remark in content["remarks"])
        labels = Labels(vocabulary=tuple(content["vocabulary"]), remarks=remarks, **_unpacked(content, _LABELS))
        headers = scan.Headers(
            np.frombuffer(content["image_hw"], np.int32).reshape(-1, 2),
            np.frombuffer(content["orientation"], np.uint8),
            {},
        )
        digests = np.frombuffer(content["digests"], np.uint8).reshape(-1, 16)
        facts = _Facts(
            _unpack_files(content["annotations"]), digests, labels, _unpack_files(content["images"]), headers
        )
    except _UNREADABLE:
        return None
    return facts if _consistent(facts) else None


def _consistent(facts: _Facts) -> bool:
    """Whether the columns' lengths agree."""
    labels, headers = facts.labels, facts.headers
    last = int(labels.ends[-1]) if len(labels) else 0
    objects = (labels.names, labels.boxes, labels.flags, labels.lines)
    annotations = (labels.ends, labels.hw, labels.origins, facts.digests, *facts.annotations)
    images = (headers.hw, headers.orientation, *facts.images)
    groups: tuple[tuple[Sized, ...], ...] = (objects, annotations, images)
    lengths = [{len(column) for column in group} for group in groups]
    return lengths[0] == {last} and len(lengths[1]) == len(lengths[2]) == 1


def _write(places: Sequence[Path], content: dict[str, Any]) -> None:
    """Put the file into the first of those places that can be written, at once: no reader sees half of it."""
    packed = pickle.dumps(content, protocol=5)
    for path in places:
        try:
            atomic_write(path, packed)
        except UserError:
            continue
        return


def _none() -> _Facts:
    nothing = Files([], np.zeros((0, 4), np.int64))
    headers = scan.Headers(np.zeros((0, 2), np.int32), np.zeros(0, np.uint8), {})
    return _Facts(nothing, np.zeros((0, 16), np.uint8), Columns().labels(), nothing, headers)


_NOTHING = _none()


# --- for people -----------------------------------------------------------------------------------------------------


def load_split(data: Data, split: str, console: Console) -> DataSet:
    """`load` with a progress bar, a line about the split, and one for every kind of finding."""
    with counting(console, f"reading {split}") as progress:
        found = load(data, split, progress)
    console.print(f"{split}: {len(found)} photos, {len(found.labels)} objects, {len(found.classes)} classes")
    for line in summary(found.findings):
        console.print(f"  {line}", highlight=False, markup=False, style="yellow")
    return found


class Entry(NamedTuple):
    """A cache file: of which split ('' for the facts), its bytes, photos and objects; -1 where it is damaged."""

    path: Path
    split: str
    size: int
    photos: int
    objects: int


def info(data: Data) -> list[Entry]:
    """The cache files of the data set, whatever the settings. Raises UserError where one holds code."""
    entries = [Entry(path, "(pixels)", path.stat().st_size, -1, -1) for path in _files(data, PIXELS)]
    for path in _files(data, ".pickle"):
        content = _open(path)
        try:
            ends, objects = (
                (content["ends"], content["names"])
                if "version" in content
                else (content["box_ends"], content["labels"])
            )
            counts = len(ends) // 8, len(objects) // 4
            entries.append(Entry(path, content.get("split", ""), path.stat().st_size, *counts))
        except _UNREADABLE:
            entries.append(Entry(path, "", path.stat().st_size, -1, -1))
    return entries


def clear(data: Data) -> list[Path]:
    """Remove every cache file of the data set, whatever the settings; the removed ones."""
    files = _files(data, ".pickle") + _files(data, PIXELS)
    for path in files:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{path}: can't be removed ({error.strerror})") from None
    return files


def _files(data: Data, suffix: str) -> list[Path]:
    prefix = _short(str(data.root.resolve()))
    return sorted(path for folder in folders(data) for path in folder.glob(f"{prefix}-*{suffix}"))
