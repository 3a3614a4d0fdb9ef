"""A DataSet on disk: read the XML once, start at once from then on.

The file is a pickle of bytes and plain containers, read by an unpickler that admits no class or function whatever. It
is used only while its key fits: the parser's version, the settings, and size, time and inode of every file.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from detkit.config import Data
from detkit.data import voc
from detkit.data.voc import DataSet, Finding, Progress
from detkit.errors import UserError
from detkit.files import atomic_write

# The columns: their types, and their shapes beside the length.
_COLUMNS: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
    "paths": (np.uint8, ()),
    "path_ends": (np.int64, ()),
    "hw": (np.int32, (2,)),
    "boxes": (np.float64, (4,)),
    "labels": (np.int32, ()),
    "flags": (np.uint8, ()),
    "box_ends": (np.int64, ()),
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


def user_folder() -> Path:
    """Where detkit keeps caches that can't lie beside the data: the platform's folder for them."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "detkit"


def paths(data: Data, split: str) -> list[Path]:
    """Where the split's cache may lie, the first choice first: data.cache or ROOT/.detkit-cache, then `user_folder`."""
    identity = repr((str(data.root.resolve()), _settings(data), split)).encode("utf-8", "surrogateescape")
    name = f"{re.sub(r'[^A-Za-z0-9_-]', '_', split)}-{hashlib.sha256(identity).hexdigest()[:16]}.pickle"
    return [folder / name for folder in (data.cache or data.root / ".detkit-cache", user_folder())]


def _settings(data: Data) -> tuple[Any, ...]:
    classes = str(data.classes) if isinstance(data.classes, Path) else data.classes
    return (data.convention, data.unlabelled, data.val_share, classes)


def key(data: Data, split: str, files: voc.Listing) -> str:
    """The digest of all that the split's DataSet depends on."""
    parts = (voc.PARSER, _settings(data), split, *map(tuple, files.images + files.xmls + files.texts))
    return hashlib.sha256("\n".join(map(repr, parts)).encode("utf-8", "surrogateescape")).hexdigest()


def load(data: Data, split: str, progress: Progress | None = None) -> DataSet:
    """The split, from its cache where that is up to date, else by `voc.scan`, whose result is then cached.

    Raises UserError as `voc.scan` does, and where a cache file holds what no cache holds.
    """
    files = voc.listing(data)
    digest = key(data, split, files)
    places = paths(data, split)
    for path in places:
        found = _read(path, digest, str(data.root))
        if found is not None:
            return found
    found = voc.scan(data, split, files, progress)
    content = _pack(found, digest)
    for path in places:
        if _write(path, content):
            break
    return found


def _pack(found: DataSet, digest: str) -> bytes:
    content = {"key": digest, "classes": found.classes, "findings": [tuple(finding) for finding in found.findings]}
    return pickle.dumps(content | {name: getattr(found, name).tobytes() for name in _COLUMNS}, protocol=5)


def _read(path: Path, digest: str, root: str) -> DataSet | None:
    """The cached DataSet; None where there is none, or it is stale or damaged."""
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes())).load()
        if content["key"] != digest:
            return None
        columns: dict[str, Any] = {
            name: np.frombuffer(content[name], dtype).reshape(-1, *shape) for name, (dtype, shape) in _COLUMNS.items()
        }
        findings = tuple(Finding(*finding) for finding in content["findings"])
        found = DataSet(root=root, classes=tuple(content["classes"]), findings=findings, **columns)
        return found if _whole(found) else None
    except _RefusedError as error:
        raise UserError(f"{path}: not a cache that detkit wrote (it names {error}); delete it") from None
    except _UNREADABLE:
        return None


def _whole(found: DataSet) -> bool:
    """Whether the columns' lengths agree."""
    return (
        len(found.path_ends) == len(found.box_ends) == len(found.hw)
        and len(found.boxes) == len(found.labels) == len(found.flags) == found.box_ends[-1]
        and len(found.paths) == found.path_ends[-1]
    )


def _write(path: Path, content: bytes) -> bool:
    """Put the file in place at once, so that no reader sees half of it. False where the folder can't be written."""
    try:
        atomic_write(path, content)
    except UserError:
        return False
    return True
