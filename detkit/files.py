"""Files and folders written whole or not at all; text as others write it."""

from __future__ import annotations

import errno
import os
import shutil
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


def require_writable(path: Path) -> None:
    """Raise UserError where no file can be written there: asked before work that takes long. Missing parent folders are
    made."""
    probe = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error})") from None


def require_free(out: Path) -> None:
    """Raise UserError where `out` holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: name another folder, or move its files away first")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder to write into; it becomes `out`, which must not hold anything, at the block's end.

    After an error, or a kill, there is no `out`. Missing parents are made. Raises UserError where it holds something,
    and for an OSError within the block, naming the file.
    """
    require_free(out)
    temporary = out.absolute().with_name(f".{out.absolute().name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if out.exists():
            out.rmdir()  # Windows does not replace even an empty folder
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: can't be written or read ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def decoded(content: bytes) -> str:
    """The text of a file as Windows, PowerShell or a spreadsheet may have written it."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


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
