"""Files written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from detkit.errors import UserError


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write into; it becomes `path` at the block's end: whoever looks sees the old file or the whole new one,
    even after a kill.

    Missing parent folders are made. Raises UserError naming the file where it can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Not tempfile: it gives files that nobody else may read.
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error})") from None


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path` as an `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def next_folder(prefix: str | Path) -> Path:
    """Make and return the first new folder of PREFIX1, PREFIX2, ...: after the highest there is, safe against races."""
    parent, stem = os.path.split(prefix)
    base = Path(parent)
    try:
        base.mkdir(parents=True, exist_ok=True)
        used = [path.name.removeprefix(stem) for path in base.iterdir() if path.name.startswith(stem)]
        number = max((int(text) for text in used if text.isdecimal()), default=0)
        while True:
            number += 1
            try:
                (base / f"{stem}{number}").mkdir()
            except FileExistsError:
                continue
            return base / f"{stem}{number}"
    except OSError as error:
        raise UserError(f"{prefix}: can't make a folder here ({error.strerror or error})") from None
