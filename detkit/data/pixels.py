"""The pixels of training photos: a JPEG decoded at its own reduced scale where that is enough, or photos decoded once.

Evaluation and deployment never decode at a reduced scale: they use `imaging.decode` and `imaging.to_canvas`.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from detkit import geometry, imaging
from detkit.data.labels import DataSet
from detkit.errors import UserError, need
from detkit.files import atomic_file

Window = tuple[float, float, float, float]
_REDUCTIONS = (8, 4, 2)  # what every JPEG decoder offers at full speed
# Pixels of the reduced photo to one that is needed. With 1.0 it comes out sharper than by the resize alone, which cost
# a checkpoint 0.005 mAP; with 1.1, 0.001; from 1.25 on, nothing, on other photos than those it was chosen on neither.
_SPARE = 1.25
_SLACK = 1e-6  # of a pixel
_CHUNK = 64  # photos decoded ahead while a cache is made
_VERSION = 1  # raise it when the same photos would be kept as other pixels
_KEY_BYTES = hashlib.sha256().digest_size
Progress = Callable[[int, int], None]


class Pixels(NamedTuple):
    """A photo, perhaps with fewer pixels than it has: image uint8 [h, w, 3] RGB, and extent, the x1 y1 x2 y2 that it
    spans in the photo's own pixels. At a reduced scale that is a little more than the photo where its sides are no
    multiples of the reduction."""

    image: NDArray[np.uint8]
    extent: Window

    def cut(self, window: Window, hw: tuple[int, int]) -> tuple[NDArray[np.uint8], Window]:
        """A window, x1 y1 x2 y2 in the photo's pixels, by antialiased bilinear as uint8 [*hw, 3]; and the window that
        it really shows: the given one, widened to whole pixels of `image`."""
        height, width = self.image.shape[:2]
        left, top, right, bottom = self.extent
        step_x, step_y = (right - left) / width, (bottom - top) / height
        x1 = min(width - 1, max(0, math.floor((window[0] - left) / step_x + _SLACK)))
        y1 = min(height - 1, max(0, math.floor((window[1] - top) / step_y + _SLACK)))
        x2 = min(width, max(x1 + 1, math.ceil((window[2] - left) / step_x - _SLACK)))
        y2 = min(height, max(y1 + 1, math.ceil((window[3] - top) / step_y - _SLACK)))
        shown = (left + x1 * step_x, top + y1 * step_y, left + x2 * step_x, top + y2 * step_y)
        return resize(self.image[y1:y2, x1:x2], hw), shown


class Source(Protocol):
    """Where pixels come from."""

    def __call__(self, index: int, step: float) -> Pixels:
        """The photo of that place in the data set, with at least a pixel for every `step` of its own pixels, if it is
        not a cache. Raises UserError, naming the file, where it can't be decoded."""


@cache
def cv2() -> Any:
    """OpenCV, with no threads of its own: the loader's processes are the parallelism. Raises UserError without it."""
    module: Any = need("cv2")
    module.setNumThreads(0)
    return module


def resize(image: NDArray[np.uint8], hw: tuple[int, int]) -> NDArray[np.uint8]:
    """The image, uint8 [H, W, 3], by antialiased bilinear to height and width `hw`: what Pillow makes of it, to one
    level (`imaging.to_canvas`), several times as fast."""
    if image.shape[:2] == hw:
        return image
    # With an axis for N that has a proper stride torch sees channels_last, for which its kernel is the fast one.
    planes = torch.from_numpy(image.reshape(1, *image.shape)).permute(0, 3, 1, 2)
    resized = functional.interpolate(planes, hw, mode="bilinear", antialias=True)
    result: NDArray[np.uint8] = resized[0].permute(1, 2, 0).numpy()
    return result


class Files:
    """Photos from their files, each time anew. reduced: JPEGs at 1/2, 1/4 or 1/8 of their sides where that leaves
    enough pixels."""

    def __init__(self, dataset: DataSet, reduced: bool) -> None:
        self.dataset = dataset
        self.reduced = reduced
        cv2()  # what is not installed is told now, and forked workers need not import it each

    def __call__(self, index: int, step: float) -> Pixels:
        """As `Source` says."""
        parts = self.dataset.parts
        height, width = (parts.hw if parts else self.dataset.hw)[index].tolist()
        path = os.path.join(self.dataset.root, self.dataset.name(index))  # noqa: PTH118 - as in DataSet
        whole = decode(path, (height, width), step if self.reduced else 1.0)
        return part(whole, parts.windows[index].tolist()) if parts else whole


def part(whole: Pixels, window: Sequence[int]) -> Pixels:
    """What a window of the photo, x1 y1 x2 y2, shows, the extent in the window's own pixels."""
    height, width = whole.image.shape[:2]
    left, top, right, bottom = whole.extent
    step_x, step_y = (right - left) / width, (bottom - top) / height
    x1, y1 = math.floor((window[0] - left) / step_x + _SLACK), math.floor((window[1] - top) / step_y + _SLACK)
    x2, y2 = math.ceil((window[2] - left) / step_x - _SLACK), math.ceil((window[3] - top) / step_y - _SLACK)
    shown = np.array([left + x1 * step_x, top + y1 * step_y, left + x2 * step_x, top + y2 * step_y])
    own: Window = tuple((shown - np.tile(window[:2], 2)).tolist())
    return Pixels(whole.image[y1:y2, x1:x2], own)


def decode(path: str, hw: tuple[int, int], step: float) -> Pixels:
    """The photo of height and width `hw`, turned as EXIF says; a JPEG at its largest reduction, of 1/2, 1/4 and 1/8,
    that has a pixel, and a quarter to spare, for every `step` of the photo's.

    Raises UserError, naming the file, where it can't be decoded or has another size.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - nor is a Path as quick
            content = file.read()
    except OSError:
        content = b""  # imaging.decode says what is wrong
    stored, exif = _jpeg_header(content)
    orientation = imaging.orientation(content) if exif else 1
    image, reduction = None, 1
    if stored:
        reduction = next((factor for factor in _REDUCTIONS if factor * _SPARE <= step), 1)
        # From 2 on, the flag of a reduction to a grey image is 8 times the reduction, and RGB's turns it into colour.
        flags = cv2().IMREAD_COLOR_RGB | cv2().IMREAD_IGNORE_ORIENTATION | (8 * reduction if reduction > 1 else 0)
        image = cv2().imdecode(np.frombuffer(content, np.uint8), flags)
    if stored is None or image is None:
        image = np.array(imaging.decode(path))
        stored, orientation, reduction = (image.shape[0], image.shape[1]), 1, 1
    if (stored if orientation < 5 else stored[::-1]) != hw:
        raise UserError(f"{path}: no longer {hw[1]}x{hw[0]} pixels, as when its annotation was read; start anew")
    extent = (0.0, 0.0, float(image.shape[1] * reduction), float(image.shape[0] * reduction))
    if orientation == 1:
        return Pixels(image, extent)
    left, top, right, bottom = geometry.turned(np.array([extent]), stored, orientation)[0].tolist()
    return Pixels(_turn(image, orientation), (left, top, right, bottom))


def _jpeg_header(content: bytes) -> tuple[tuple[int, int] | None, bool]:
    """Height and width of a whole JPEG, grey or in three colours with 8 bits, as it is stored; None for anything else.
    And whether it has EXIF data."""
    exif, found, place = False, None, 2
    while content[:2] == b"\xff\xd8" and content[place : place + 1] == b"\xff" and place + 4 <= len(content):
        marker = content[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        body = place + 4
        if marker == 0xDA:  # the first scan: the end comes after it, whatever a thumbnail in front of it has
            return found if content.rfind(b"\xff\xd9", body) >= 0 else None, exif
        exif |= marker == 0xE1 and content.startswith(b"Exif", body)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width, colours = struct.unpack_from(">BHHB", content.ljust(body + 6), body)
            if bits == 8 and colours in (1, 3) and 0 < height * width <= imaging.MAX_PIXELS:
                found = height, width
        place = body - 2 + int.from_bytes(content[place + 2 : body], "big")
    return None, exif


def _turn(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """The stored image, uint8 [H, W, 3], with its EXIF orientation applied."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


# --- photos decoded once ----------------------------------------------------------------------------------------------


class Decoded:
    """Photos decoded once, at the resolution of the canvas: in one block of memory that the loader's processes share,
    or in one file that each of them maps.

    sizes: int32 [N, 2], the kept heights and widths. extents: float64 [N, 4], as of `Pixels`. content: the pixels of
    all photos, bytes in a row; or path: the file that has them after its key.
    """

    def __init__(
        self, sizes: NDArray[np.int32], extents: NDArray[np.float64], content: Any = None, path: Path | None = None
    ) -> None:
        self.extents, self._sizes, self._content, self._path = extents, sizes, content, path
        self._ends = np.cumsum(_lengths(sizes))

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the file itself; mapped memory would be sent as a copy.
        return self.__dict__ | ({"_content": None} if self._path else {})

    def __call__(self, index: int, step: float) -> Pixels:  # noqa: ARG002 - there is only what there is
        """As `Source` says."""
        if self._content is None:
            # Private to the process in name only: nobody writes, but torch takes no memory that can't be written to.
            self._content = np.memmap(str(self._path), np.uint8, "c", offset=_KEY_BYTES)
        height, width = self._sizes[index].tolist()
        length = height * width * 3
        image = np.frombuffer(self._content, np.uint8, length, int(self._ends[index]) - length)
        left, top, right, bottom = self.extents[index].tolist()
        return Pixels(image.reshape(height, width, 3), (left, top, right, bottom))


def in_memory(files: Files, canvas: tuple[int, int], rule: geometry.Rule, threads: int, progress: Progress) -> Decoded:
    """The photos in memory, each as large as `rule` makes it on a canvas of that height and width, or as it is where
    it is smaller.

    threads: how many decode. Raises UserError where a photo can't be decoded, or all need more than half the memory.
    """
    sizes = _sizes(files.dataset, canvas, rule)
    total, memory = int(_lengths(sizes).sum()), _memory()
    if total > memory / 2:
        raise UserError(f"train.cache: ram needs {_gib(total)}, over half of the memory ({_gib(memory)}); use disk")
    block = get_context("spawn").RawArray("B", total)
    view, place, extents = np.frombuffer(block, np.uint8), 0, np.empty((len(sizes), 4))
    for index, (image, extent) in enumerate(_decode_all(files, sizes, threads, progress)):
        extents[index] = extent
        view[place : place + image.size] = image.ravel()
        place += image.size
    return Decoded(sizes, extents, block)


def on_disk(
    files: Files,
    canvas: tuple[int, int],
    rule: geometry.Rule,
    paths: Sequence[Path],
    threads: int,
    progress: Progress,
) -> Decoded:
    """As `in_memory`, but in the first file of `paths` that can be written. It is used again while the photos
    are the same, and else replaced once the new one is complete.

    Raises UserError where a photo can't be decoded, or the disk is too full.
    """
    sizes = _sizes(files.dataset, canvas, rule)
    total, key = int(_lengths(sizes).sum()), _key(files, sizes)
    usable = [path for path in paths if _is_writable(path.parent)]
    for path in usable:
        if not _is_whole(path, key, _KEY_BYTES + total + 32 * len(sizes)):
            continue
        extents = np.fromfile(path, np.float64, offset=_KEY_BYTES + total).reshape(-1, 4)
        return Decoded(sizes, extents, path=path)
    if not usable:
        raise UserError(f"{paths[0].parent}: can't be written, so train.cache: disk has no place; set data.cache")
    free = shutil.disk_usage(usable[0].parent).free
    if total > free:
        raise UserError(f"{usable[0].parent}: train.cache: disk needs {_gib(total)}, {_gib(free)} are free")
    extents = np.empty((len(sizes), 4))
    with atomic_file(usable[0]) as file:
        file.write(key)
        for index, (image, extent) in enumerate(_decode_all(files, sizes, threads, progress)):
            extents[index] = extent
            file.write(image.tobytes())
        file.write(extents.tobytes())
    return Decoded(sizes, extents, path=usable[0])


def _sizes(dataset: DataSet, canvas: tuple[int, int], rule: geometry.Rule) -> NDArray[np.int32]:
    """Height and width in which each photo is kept, int32 [N, 2]."""
    fitted = [geometry.plan((height, width), canvas, rule).inner for height, width in dataset.hw.tolist()]
    return np.minimum(dataset.hw, np.array(fitted, np.int32).reshape(-1, 2))


def _lengths(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Bytes of each photo, int64 [N]."""
    lengths: NDArray[np.int64] = sizes.prod(1, dtype=np.int64) * 3
    return lengths


def _decode_all(
    files: Files, sizes: NDArray[np.int32], threads: int, progress: Progress
) -> Iterator[tuple[NDArray[np.uint8], Window]]:
    """The photos in their order, resized to their sizes, and their extents. Threads do, since decoders hold no lock."""

    def one(index: int) -> tuple[NDArray[np.uint8], Window]:
        height, width = sizes[index].tolist()
        full_height, full_width = files.dataset.hw[index].tolist()
        pixels = files(index, min(full_height / height, full_width / width))
        return pixels.cut(pixels.extent, (height, width))

    total = len(sizes)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for start in range(0, total, _CHUNK):
            chunk = range(start, min(start + _CHUNK, total))
            yield from pool.map(one, chunk)
            progress(chunk.stop, total)


def _key(files: Files, sizes: NDArray[np.int32]) -> bytes:
    """The digest of all that the pixels depend on."""
    dataset = files.dataset
    digest = hashlib.sha256(repr((_VERSION, files.reduced, len(sizes))).encode())
    for column in (sizes, dataset.hw, dataset.path_ends, dataset.paths, *(dataset.parts or ())):
        digest.update(column.tobytes())
    for index in range(len(dataset)):
        with suppress(OSError):  # decoding says what is wrong
            stat = os.stat(dataset[index].path)  # noqa: PTH116 - a Path costs more than the rest
            digest.update(repr((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)).encode())
    return digest.digest()


def _is_whole(path: Path, key: bytes, length: int) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(key)) == key and path.stat().st_size == length
    except OSError:
        return False


def _is_writable(folder: Path) -> bool:
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK)


def _memory() -> float:
    """Bytes of memory that this machine or container has; infinite where the system doesn't say."""
    limits = [math.inf]
    if hasattr(os, "sysconf"):
        with suppress(OSError, ValueError):
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # a container's limit, by cgroup v2
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(limits)


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
